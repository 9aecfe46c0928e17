"""The folder of all versions, their labels, and the history of both.

MODELS/signing.pem           the key that signs; signing.pub its public part
MODELS/history.jsonl         chained: what was added and promoted
MODELS/NAME/N/               one version: sigma.safetensors, study.yaml, card.md, manifest.json, manifest.sig
MODELS/NAME/labels.json      label -> version
"""

from __future__ import annotations

import fcntl
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
    """A version: its folder, its verified manifest, and its labels."""

    path: Path
    manifest: Manifest
    labels: tuple[str, ...] = ()


def registry_folder(runs: Path) -> Path:
    """Where versions are kept: $FEDSIGMA_MODELS, else `models` of the server, else beside the runs.

    Args:
        runs: where this machine's runs are.
    """
    if found := os.environ.get("FEDSIGMA_MODELS"):
        return Path(found).expanduser()
    if server := os.environ.get("FEDSIGMA_SERVER"):
        return Path(server).expanduser() / "models"
    return runs / "models"


class ModelRegistry:
    """The versions of one place.

    Args:
        path: of the folder; made with the first version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._history = HashChainedLog(path / "history.jsonl")

    @property
    def public_key(self) -> str:
        """The key that must have signed what is here; empty while there is nothing."""
        file = self.path / "signing.pub"
        return file.read_text(encoding="ascii").strip() if file.is_file() else ""

    def add(self, draft: Manifest, files: Mapping[str, bytes]) -> Version:
        """Add a version: the next of its name.

        Args:
            draft: the manifest; version, created, files and signer are filled in.
            files: what it consists of, by name.

        Raises:
            ModelError: the name does not do.
            OSError: it cannot be written; nothing is left of it.
        """
        check_name(draft.name)
        with self._locked():
            signer = Signer(self.path / "signing.pem")
            if not self.public_key:
                write_whole(self.path / "signing.pub", signer.public.encode() + b"\n")
            elif self.public_key != signer.public:
                raise ModelError(f"{self.path}: signing.pem and signing.pub do not belong together")
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
        """All versions, or those of one model, verified, by name and number.

        Raises:
            ModelError: one was changed.
        """
        names = [name] if name else sorted(p.name for p in self.path.glob("*") if p.is_dir())
        return [self._version(one, number) for one in names for number in self._numbers(one)]

    def find(self, reference: str) -> Version:
        """A version by NAME (its latest), NAME@N or NAME@LABEL.

        Raises:
            ModelError: there is none, or it was changed.
        """
        name, _, which = reference.partition("@")
        check_name(name)
        numbers = self._numbers(name)
        if not numbers:
            known = ", ".join(sorted(p.name for p in self.path.glob("*") if p.is_dir())) or "none"
            raise ModelError(f"there is no model '{name}' in {self.path}: there are {known}")
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
        """Give a version a label, such as `production`; another version of the model loses it.

        Raises:
            ModelError: there is no such version, or the label does not do.
        """
        if not _LABEL.fullmatch(label):
            raise ModelError(
                f"the label is {label!r}, expected a small letter, then small letters, digits or '-'"
            )
        found = self.find(reference)
        manifest = found.manifest
        with self._locked():
            labels = {**self._labels(manifest.name), label: manifest.version}
            text = json.dumps(labels, indent=2, sort_keys=True) + "\n"
            write_whole(self.path / manifest.name / "labels.json", text.encode())
            self._note("promoted", manifest.reference, label=label)
        return self._version(manifest.name, manifest.version)

    def check(self) -> list[str]:
        """Verify everything: each version, and the history; returns what is wrong, one line each."""
        found = []
        try:
            added = {line["model"]: line for line in self._history.lines() if line["kind"] == "added"}
        except ValueError as error:
            return [str(error)]
        for name in sorted(p.name for p in self.path.glob("*") if p.is_dir()):
            for number in self._numbers(name):
                noted = added.pop(f"{name}@{number}", None)
                try:
                    manifest = self._version(name, number).manifest
                except ModelError as error:
                    found.append(str(error))
                    continue
                if noted is None or noted["sha256"] != digest_of(manifest.to_bytes()):
                    found.append(f"{manifest.reference} is not the one that the history has")
        return found + [f"{reference} is missing" for reference in sorted(added)]

    def _version(self, name: str, number: int) -> Version:
        folder = self.path / name / str(number)
        manifest = Manifest.read(folder, signer=self.public_key)
        if manifest.reference != f"{name}@{number}":
            raise ModelError(f"{folder} holds {manifest.reference}: it was moved or exchanged")
        labels = tuple(sorted(label for label, n in self._labels(name).items() if n == number))
        return Version(folder, manifest, labels)

    def _numbers(self, name: str) -> list[int]:
        return sorted(int(p.name) for p in (self.path / name).glob("*") if p.name.isdecimal()) if name else []

    def _labels(self, name: str) -> dict[str, int]:
        file = self.path / name / "labels.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def _note(self, kind: str, reference: str, **fields: Any) -> None:
        self._history.append({"time": round(time.time(), 3), "kind": kind, "model": reference, **fields})

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
