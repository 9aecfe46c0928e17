"""App bundles: which may run at this site, and what a new one would change.

A study reaches a site as a bundle, a zip file with the code that runs there. The site runs a bundle only if
its SHA-256 is in site.yaml. One that is refused is kept in worker/pending for people to look at.
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
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.files import write_whole

__all__ = ["BundleApprovals", "BundleError", "bundle_digest", "diff_bundles"]

MAX_PENDING, MAX_FILE_BYTES = 20, 2 << 20


class BundleError(FedSigmaError, ValueError):
    """There is no such bundle, or it is no zip file of texts."""


def bundle_digest(bundle: bytes) -> str:
    """The SHA-256 by which a bundle is known, 64 hex digits."""
    return hashlib.sha256(bundle).hexdigest()


class BundleApprovals:
    """The bundles of a site.

    Args:
        folder: the site's.
    """

    def __init__(self, folder: Path) -> None:
        self._site_yaml = folder / "site.yaml"
        self._approved, self._pending = folder / "worker" / "approved", folder / "worker" / "pending"

    def add_pending(self, bundle: bytes) -> None:
        """Keep a refused bundle for `fedsigma site approve`; the oldest of many goes."""
        self._pending.mkdir(parents=True, exist_ok=True)
        write_whole(self._pending / f"{bundle_digest(bundle)}.fab", bundle)
        for old in self.pending()[MAX_PENDING:]:
            old.unlink()

    def pending(self) -> list[Path]:
        """The refused bundles, the latest first."""
        return sorted(self._pending.glob("*.fab"), key=lambda p: p.stat().st_mtime, reverse=True)

    def find(self, digest: str) -> bytes:
        """A refused or approved bundle by its SHA-256, or the beginning of it.

        Raises:
            BundleError: there is none, there are several, or its file was changed.
        """
        # One that was approved once and is no longer may wait again, so both folders can have it.
        known = {path.stem: path for place in (self._approved, self._pending) for path in place.glob("*.fab")}
        found = [path for stem, path in known.items() if stem.startswith(digest)]
        if len(digest) < 6 or len(found) != 1:
            waiting = ", ".join(path.stem[:12] for path in self.pending()) or "none"
            raise BundleError(f"'{digest}' names no single bundle here: waiting for approval are {waiting}")
        bundle = found[0].read_bytes()
        if bundle_digest(bundle) != found[0].stem:
            raise BundleError(f"{found[0]} was changed: remove it, and have the study submitted again")
        return bundle

    def last_approved(self) -> bytes | None:
        """The bundle that was approved last."""
        found = sorted(self._approved.glob("*.fab"), key=lambda p: p.stat().st_mtime)
        return found[-1].read_bytes() if found else None

    def approve(self, bundle: bytes) -> None:
        """Add a bundle to site.yaml, and keep it to compare later ones with. Comments stay.

        Raises:
            ConfigError: site.yaml has no `bundles:` list that can be added to; it stays as it is.
        """
        digest, before = bundle_digest(bundle), SitePolicy.read(self._site_yaml)
        if digest not in before.bundles:
            text = self._site_yaml.read_text(encoding="utf-8")
            added = _with_bundle(text, digest, f"# approved {time.strftime('%Y-%m-%d')}")
            part = self._site_yaml.with_name("site.yaml.new")
            part.write_text(added, encoding="utf-8")
            if not _only_bundle_added(before, part, digest):
                part.unlink()
                raise ConfigError(f"{self._site_yaml}: add {digest} to the list `bundles` by hand")
            part.replace(self._site_yaml)
        self._approved.mkdir(parents=True, exist_ok=True)
        write_whole(self._approved / f"{digest}.fab", bundle)
        (self._pending / f"{digest}.fab").unlink(missing_ok=True)


def diff_bundles(before: bytes | None, after: bytes) -> str:
    """What one bundle has that the other has not, as a unified diff of all files.

    Raises:
        BundleError: one is no zip file of texts.
    """
    old, new = _read_texts(before) if before else {}, _read_texts(after)
    lines: list[str] = []
    for name in sorted({*old, *new}):
        lines += difflib.unified_diff(
            old.get(name, "").splitlines(), new.get(name, "").splitlines(), name, name, lineterm=""
        )
    return "\n".join(lines)


def _read_texts(bundle: bytes) -> dict[str, str]:
    found = {}
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            for entry in archive.infolist():
                if entry.file_size > MAX_FILE_BYTES:
                    raise BundleError(f"the bundle's file {entry.filename!r} is larger than 2 MiB")
                text = archive.read(entry).decode()
                # What a terminal would act on is shown, not sent to it.
                found[entry.filename] = "".join(
                    c if c.isprintable() or c in "\n\t" else repr(c) for c in text
                )
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError, RuntimeError) as error:
        raise BundleError(f"the bundle is no zip file of texts: {error}") from None
    found.pop(".info/CONTENT", None)
    return found


def _only_bundle_added(before: SitePolicy, file: Path, digest: str) -> bool:
    """Whether a site.yaml says what it said before, and this bundle besides."""
    try:
        after = SitePolicy.read(file)
    except ConfigError:
        return False
    return replace(after, bundles=before.bundles) == before and set(after.bundles) == {
        *before.bundles,
        digest,
    }


def _with_bundle(text: str, digest: str, comment: str) -> str:
    line = f"  - {digest}  {comment}\n"
    if re.search(r"(?m)^bundles:\s*\[\s*\]", text):
        return re.sub(r"(?m)^bundles:\s*\[\s*\][^\n]*\n?", f"bundles:\n{line}", text, count=1)
    if re.search(r"(?m)^bundles:[ \t]*(#[^\n]*)?$", text):
        return re.sub(r"(?m)^(bundles:[ \t]*(?:#[^\n]*)?\n)", rf"\g<1>{line}", text, count=1)
    return text.rstrip("\n") + f"\nbundles:\n{line}"
