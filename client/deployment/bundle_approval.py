"""App bundles of a site: which may run, and how a new one differs from the last.

A study reaches a site as a bundle, a zip file with its code. The site runs a bundle only if its SHA-256 is
in site.yaml; it stores a rejected one in worker/pending for review.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import re
import time
import zipfile
from dataclasses import replace
from pathlib import Path

from fedsigma.client.site.policy import SitePolicy
from fedsigma.common.config.schema import ConfigError, build, read_yaml
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.files import write_atomic, write_whole

__all__ = ["BundleApprovals", "BundleError", "bundle_digest", "diff_bundles"]

MAX_PENDING, MAX_FILE_BYTES = 20, 2 << 20


class BundleError(FedSigmaError, ValueError):
    """There is no such bundle, or it is not a zip file of text files."""


def bundle_digest(bundle: bytes) -> str:
    """Return the SHA-256 of a bundle, 64 hex digits."""
    return hashlib.sha256(bundle).hexdigest()


class BundleApprovals:
    """The pending and approved bundles of a site.

    Args:
        folder: The site's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._site_yaml = folder / "site.yaml"
        self._approved, self._pending = folder / "worker" / "approved", folder / "worker" / "pending"

    def add_pending(self, bundle: bytes) -> None:
        """Store a rejected bundle for `fedsigma site approve`; of too many, the oldest is removed."""
        self._pending.mkdir(parents=True, exist_ok=True)
        write_whole(self._pending / f"{bundle_digest(bundle)}.fab", bundle)
        for path in self.pending()[MAX_PENDING:]:
            path.unlink()

    def pending(self) -> list[Path]:
        """Return the rejected bundles, newest first."""
        return _newest_first(self._pending)

    def find(self, digest: str) -> bytes:
        """Return a pending or approved bundle by its SHA-256, or the start of it.

        Raises:
            BundleError: No bundle or several bundles match, or the file was changed.
        """
        # A bundle that was approved once can be in both folders.
        paths = {
            path.stem: path for folder in (self._approved, self._pending) for path in folder.glob("*.fab")
        }
        matches = [path for stem, path in paths.items() if stem.startswith(digest)]
        if len(digest) < 6 or len(matches) != 1:
            pending = ", ".join(path.stem[:12] for path in self.pending()) or "none"
            raise BundleError(f"'{digest}' names no single bundle here: pending are {pending}")
        bundle = matches[0].read_bytes()
        if bundle_digest(bundle) != matches[0].stem:
            raise BundleError(f"{matches[0]} was changed: remove it, and have the study submitted again")
        return bundle

    def last_approved(self) -> bytes | None:
        """Return the bundle that was approved last."""
        return next((path.read_bytes() for path in _newest_first(self._approved)), None)

    def approve(self, bundle: bytes) -> None:
        """Add a bundle to site.yaml, whose comments remain, and store it to compare later ones with.

        Raises:
            ConfigError: The `bundles:` list of site.yaml cannot be extended; the file is unchanged.
        """
        digest, policy = bundle_digest(bundle), SitePolicy.read(self._site_yaml)
        if digest not in policy.bundles:
            text = _add_bundle(self._site_yaml.read_text(encoding="utf-8"), digest)
            problem = f"{self._site_yaml}: add {digest} to the list `bundles` by hand"
            try:
                changed = build(SitePolicy, read_yaml(text, where="site.yaml"), where="site.yaml")
            except ConfigError as error:
                raise ConfigError(problem) from error
            if changed != replace(policy, bundles=(digest, *policy.bundles)):
                raise ConfigError(problem)
            write_atomic(self._site_yaml, text.encode())
        self._approved.mkdir(parents=True, exist_ok=True)
        write_whole(self._approved / f"{digest}.fab", bundle)
        (self._pending / f"{digest}.fab").unlink(missing_ok=True)


def diff_bundles(before: bytes | None, after: bytes) -> str:
    """Return a unified diff of all files of two bundles.

    Raises:
        BundleError: One is not a zip file of text files.
    """
    old, new = _read_texts(before) if before else {}, _read_texts(after)
    lines: list[str] = []
    for name in sorted({*old, *new}):
        old_lines, new_lines = old.get(name, "").splitlines(), new.get(name, "").splitlines()
        lines += difflib.unified_diff(old_lines, new_lines, name, name, lineterm="")
    return "\n".join(lines)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.fab"), key=lambda path: path.stat().st_mtime, reverse=True)


def _read_texts(bundle: bytes) -> dict[str, str]:
    texts = {}
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            for entry in archive.infolist():
                if entry.file_size > MAX_FILE_BYTES:
                    raise BundleError(f"the bundle's file {entry.filename!r} is larger than 2 MiB")
                text = archive.read(entry).decode()
                # Escape what a terminal would act on.
                texts[entry.filename] = "".join(
                    c if c.isprintable() or c in "\n\t" else repr(c) for c in text
                )
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError, RuntimeError) as error:
        raise BundleError(f"the bundle is not a zip file of text files: {error}") from None
    texts.pop(".info/CONTENT", None)
    return texts


def _add_bundle(text: str, digest: str) -> str:
    """Add a digest as the first one of the `bundles:` list."""
    line = f"  - {digest}  # approved {time.strftime('%Y-%m-%d')}\n"
    text = text.rstrip("\n") + "\n"
    pattern = r"(?m)^bundles:(?:[ \t]*\[\s*\])?([ \t]*(?:#[^\n]*)?)\n"
    text, count = re.subn(pattern, rf"bundles:\1\n{line}", text, count=1)
    return text if count else f"{text}bundles:\n{line}"
