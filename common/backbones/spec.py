"""Names of backbones in study files and commands."""

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
    """A backbone cannot be loaded or written; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class BackboneName:
    """A parsed name.

    Attributes:
        text: the name itself.
        kind: its form.
        architecture: open_clip's name of the architecture.
        tag: open_clip's name of the pretrained weights.
        hub: organisation and name on the Hugging Face hub.
        path: folder or file.
    """

    text: str
    kind: Kind
    architecture: str = ""
    tag: str = ""
    hub: str = ""
    path: Path = Path()


def parse_name(text: str) -> BackboneName:
    """Parse a backbone's name, without access to files or the hub.

    Raises:
        BackboneError: the form, architecture or tag is unknown; the message suggests similar ones.
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
        f"backbone {text!r}: unknown prefix {prefix!r}{_suggest(prefix, PREFIXES)}; names are {FORMS}"
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
            f"backbone {text!r}: only .safetensors files are loaded; convert {Path(path).name} to a folder "
            f"once with `fedsigma backbone convert {path} {name} DIR` and use local-dir:DIR"
        )
    file = Path(path).expanduser()
    return BackboneName(text=text, kind="checkpoint", architecture=architecture, tag=tag, path=file)


def architecture_and_tag(text: str) -> tuple[str, str]:
    """Split ARCH or ARCH/TAG, and check that open_clip has both; else raise BackboneError."""
    import open_clip

    architectures = open_clip.list_models()
    architecture, _, tag = text.partition("/")
    if architecture not in architectures:
        hint = _suggest(text, ["starter", *architectures])
        raise BackboneError(f"unknown backbone {text!r}{hint}; names are {FORMS}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    # open_clip compares tags in this form.
    tag = tag.lower().replace("-", "_") if tag else ""
    if tag and tag not in {t.lower().replace("-", "_") for t in tags}:
        listed = ", ".join(sorted(tags)) or "none"
        raise BackboneError(
            f"{architecture} has no pretrained tag {tag!r}{_suggest(tag, tags)}; its tags: {listed}"
        )
    return architecture, tag


def _suggest(word: str, names: Iterable[str]) -> str:
    """` (did you mean A or B?)`, or nothing; `did_you_mean` would list hundreds of names."""
    folded = {name.lower().replace("/", "-"): name for name in names}
    close = difflib.get_close_matches(word.lower().replace("/", "-"), folded, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(folded[match] for match in close)}?)" if close else ""
