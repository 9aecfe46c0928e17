"""The folder of all model versions, with their labels and history.

MODELS/signing.pem           the private signing key; signing.pub has the public key
MODELS/history.jsonl         hash-chained log of additions and promotions
MODELS/NAME/N/               one version: sigma.safetensors, study.yaml, card.md, manifest.json, manifest.sig
MODELS/NAME/labels.json      label -> version
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedsigma.common.registry.manifest import (
    MANIFEST,
    SIGNATURE,
    Manifest,
    ModelError,
    Signer,
    check_name,
    digest_of,
)
from fedsigma.common.utils.files import write_whole
from fedsigma.common.utils.hash_chain import HashChainedLog

__all__ = ["ModelRegistry", "Version", "registry_folder"]

_LABEL = re.compile(r"[a-z][a-z0-9-]{0,31}")


@dataclass(frozen=True)
class Version:
    """One version of a model.

    Attributes:
        path: Folder of the version.
        manifest: Verified manifest.
        labels: Labels that point to this version, such as `production`.
    """

    path: Path
    manifest: Manifest
    labels: tuple[str, ...] = ()


def registry_folder(runs: Path) -> Path:
    """Return the folder of the registry: $FEDSIGMA_MODELS, else $FEDSIGMA_SERVER/models, else RUNS/models."""
    if folder := os.environ.get("FEDSIGMA_MODELS"):
        return Path(folder).expanduser()
    if server := os.environ.get("FEDSIGMA_SERVER"):
        return Path(server).expanduser() / "models"
    return runs / "models"


class ModelRegistry:
    """The model versions of one folder.

    Args:
        path: Folder of the registry; created with the first version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._history = HashChainedLog(path / "history.jsonl")

    @property
    def public_key(self) -> str:
        """Public key of the registry's signatures, 64 hex digits; empty for an empty registry."""
        file = self.path / "signing.pub"
        return file.read_text(encoding="ascii").strip() if file.is_file() else ""

    def add(self, draft: Manifest, files: Mapping[str, bytes]) -> Version:
        """Add the next version of a model.

        Args:
            draft: Manifest; version, created, files and signer are filled in.
            files: Content of the version's files, by name.

        Raises:
            ModelError: The name is invalid, or the two key files do not match.
            OSError: The version cannot be written; no part of it remains.
        """
        check_name(draft.name)
        with self._locked():
            signer = Signer(self.path / "signing.pem")
            if not self.public_key:
                write_whole(self.path / "signing.pub", signer.public.encode() + b"\n")
            elif self.public_key != signer.public:
                raise ModelError(f"{self.path}: signing.pem and signing.pub do not match: restore both")
            number = max(self._numbers(draft.name), default=0) + 1
            manifest = replace(
                draft,
                version=number,
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                files={name: digest_of(content) for name, content in files.items()},
                signer=signer.public,
            )
            folder = self.path / draft.name / str(number)
            part = folder.with_name(f".{number}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            content = manifest.to_bytes()
            signature = signer.sign(content).encode()
            for name, data in {**files, MANIFEST: content, SIGNATURE: signature}.items():
                write_whole(part / name, data)
            part.rename(folder)
            self._note("added", manifest.reference, sha256=digest_of(content))
        return Version(folder, manifest)

    def versions(self, name: str = "") -> list[Version]:
        """Return the verified versions of a model, or of all, sorted by name and number.

        Raises:
            ModelError: A version was changed.
        """
        names = [name] if name else self._names()
        return [self._version(model, number) for model in names for number in self._numbers(model)]

    def find(self, reference: str) -> Version:
        """Return the verified version of NAME (the latest), NAME@N or NAME@LABEL.

        Raises:
            ModelError: There is no such version, or it was changed.
        """
        name, _, which = reference.partition("@")
        check_name(name)
        numbers = self._numbers(name)
        if not numbers:
            available = ", ".join(self._names()) or "none"
            raise ModelError(f"no model '{name}' in {self.path}: available are {available}")
        labels = self._labels(name)
        if which.isdecimal() and int(which) in numbers:
            return self._version(name, int(which))
        if not which:
            return self._version(name, numbers[-1])
        if which in labels:
            return self._version(name, labels[which])
        raise ModelError(
            f"model '{name}' has no version '{which}': it has 1 to {numbers[-1]}"
            + (f" and the labels {', '.join(sorted(labels))}" if labels else "")
        )

    def promote(self, reference: str, label: str) -> Version:
        """Move a label, such as `production`, to a version; `reference` as for `find`.

        Raises:
            ModelError: There is no such version, or the label is invalid.
        """
        if not _LABEL.fullmatch(label):
            raise ModelError(
                f"the label is {label!r}, expected a lower-case letter, then such letters, digits or '-'"
            )
        version = self.find(reference)
        manifest = version.manifest
        with self._locked():
            labels = {**self._labels(manifest.name), label: manifest.version}
            text = json.dumps(labels, indent=2, sort_keys=True) + "\n"
            write_whole(self.path / manifest.name / "labels.json", text.encode())
            self._note("promoted", manifest.reference, label=label)
        return self._version(manifest.name, manifest.version)

    def verify(self) -> list[str]:
        """Verify all versions and the history; return one line for each problem."""
        problems = []
        try:
            added = {line["model"]: line for line in self._history.lines() if line["kind"] == "added"}
        except ValueError as error:
            return [str(error)]
        for name in self._names():
            for number in self._numbers(name):
                entry = added.pop(f"{name}@{number}", None)
                try:
                    manifest = self._version(name, number).manifest
                except ModelError as error:
                    problems.append(str(error))
                    continue
                if entry is None or entry["sha256"] != digest_of(manifest.to_bytes()):
                    problems.append(f"{manifest.reference} differs from the version in the history")
        return problems + [f"{reference} is missing" for reference in sorted(added)]

    def _version(self, name: str, number: int) -> Version:
        folder = self.path / name / str(number)
        manifest = Manifest.read(folder, signer=self.public_key)
        if manifest.reference != f"{name}@{number}":
            raise ModelError(f"{folder} holds {manifest.reference}: the folder was moved or replaced")
        labels = tuple(sorted(label for label, n in self._labels(name).items() if n == number))
        return Version(folder, manifest, labels)

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.path.glob("*") if path.is_dir())

    def _numbers(self, name: str) -> list[int]:
        return sorted(int(path.name) for path in (self.path / name).glob("*") if path.name.isdecimal())

    def _labels(self, name: str) -> dict[str, int]:
        file = self.path / name / "labels.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def _note(self, kind: str, reference: str, **fields: Any) -> None:
        self._history.append({"time": round(time.time(), 3), "kind": kind, "model": reference, **fields})

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / ".lock"):
            yield
