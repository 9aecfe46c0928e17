"""Names of backbones: what a study file may say, and what is meant by it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedsigma.common.utils.errors import FedSigmaError

Kind = Literal["starter", "tag", "hub", "folder", "checkpoint"]

FORMS = "starter, ARCH/TAG, hf-hub:org/name, local-dir:PATH or checkpoint:ARCH:PATH.safetensors"


class BackboneError(FedSigmaError, ValueError):
    """A backbone that cannot be loaded or written; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class BackboneName:
    """A parsed name: `architecture` and `tag` as open_clip knows them, `hub` an org/name."""

    text: str
    kind: Kind
    architecture: str = ""
    tag: str = ""
    hub: str = ""
    path: Path = Path()


def parse_name(text: str) -> BackboneName:
    """Read a backbone's name; nothing is opened.

    Raises:
        BackboneError: an unknown form, architecture or tag; the message names near matches.
    """
    text = text.strip()
    prefix, colon, rest = text.partition(":")
    if text == "starter":
        return BackboneName(text=text, kind="starter")
    if not colon:
        architecture, tag = architecture_and_tag(text)
        return BackboneName(text=text, kind="tag", architecture=architecture, tag=tag)
    if prefix == "hf-hub":
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", rest):
            raise BackboneError(
                f"backbone {text!r}: after 'hf-hub:' comes an organisation and a name, org/name"
            )
        return BackboneName(text=text, kind="hub", hub=rest)
    if prefix == "local-dir":
        if not rest:
            raise BackboneError("backbone 'local-dir:' names no folder: write local-dir:PATH")
        return BackboneName(text=text, kind="folder", path=Path(rest).expanduser())
    if prefix == "checkpoint":
        return _checkpoint(text, rest)
    raise BackboneError(
        f"backbone {text!r}: unknown prefix {prefix!r}{suggest_names(prefix, PREFIXES)}; names are {FORMS}"
    )


PREFIXES = ("hf-hub", "local-dir", "checkpoint")


def _checkpoint(text: str, rest: str) -> BackboneName:
    name, colon, path = rest.partition(":")
    if not colon or not name or not path:
        raise BackboneError(
            f"backbone {text!r}: write checkpoint:ARCH:PATH.safetensors (or checkpoint:ARCH/TAG:PATH)"
        )
    architecture, tag = architecture_and_tag(name)
    if Path(path).suffix != ".safetensors":
        raise BackboneError(
            f"backbone {text!r}: only .safetensors files are loaded; turn {Path(path).name} into a folder "
            f"once with `fedsigma backbone convert {path} {name} DIR` and use local-dir:DIR"
        )
    file = Path(path).expanduser()
    return BackboneName(text=text, kind="checkpoint", architecture=architecture, tag=tag, path=file)


def architecture_and_tag(text: str) -> tuple[str, str]:
    """Split ARCH or ARCH/TAG and check both against open_clip's tables.

    Raises:
        BackboneError: open_clip has no such architecture, or no such tag for it.
    """
    import open_clip

    known = open_clip.list_models()
    architecture, _, tag = text.partition("/")
    if architecture not in known:
        raise BackboneError(
            f"unknown backbone {text!r}{suggest_names(text, ['starter', *known])}; names are {FORMS}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    # open_clip compares tags in this form.
    tag = tag.lower().replace("-", "_") if tag else ""
    if tag and tag not in {t.lower().replace("-", "_") for t in tags}:
        listed = ", ".join(sorted(tags)) or "none"
        raise BackboneError(
            f"{architecture} has no pretrained tag {tag!r}{suggest_names(tag, tags)}; its tags: {listed}"
        )
    return architecture, tag


def suggest_names(word: str, known: Iterable[str]) -> str:
    """` (did you mean A or B?)`, or nothing when no known word is near."""
    folded = {k.lower().replace("/", "-"): k for k in known}
    close = difflib.get_close_matches(word.lower().replace("/", "-"), folded, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(folded[c] for c in close)}?)" if close else ""
