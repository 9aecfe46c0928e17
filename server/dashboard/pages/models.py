"""The registry's versions, as the pages show them."""

from __future__ import annotations

from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markupsafe import Markup

from fedsigma.common.registry import ModelError, ModelRegistry
from fedsigma.server.report.formatting import NOTHING, format_percent

__all__ = ["card", "model_rows"]


def model_rows(registry: ModelRegistry) -> tuple[list[dict[str, str]], list[str]]:
    """A row for each version, the newest first, and what is wrong with those that were changed."""
    if not registry.path.is_dir():
        return [], []
    try:
        versions = registry.versions()
    except ModelError as error:
        return [], [str(error)]
    rows = []
    for one in sorted(versions, key=lambda one: one.manifest.created, reverse=True):
        about = one.manifest
        row: dict[str, Any] = {"reference": about.reference, "labels": ", ".join(one.labels) or NOTHING}
        row |= {"origin": about.origin, "parents": ", ".join(about.parents) or NOTHING}
        row |= {"backbone": about.backbone, "created": about.created}
        for name, key in (("accuracy", "federated"), ("zero_shot", "zero_shot")):
            row[name] = format_percent(about.results.get(key, {}).get("accuracy"))
        rows.append(row)
    return rows, []


def card(registry: ModelRegistry, reference: str) -> Markup:
    """A version's card as HTML; markup inside the card is shown, not followed.

    Raises:
        ModelError: there is no such version, or it was changed.
    """
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.core.ruler.push("classes", _classes)
    text = (registry.find(reference).path / "card.md").read_text(encoding="utf-8")
    return Markup(reader.render(text))


def _classes(state: StateCore) -> None:
    """Have the cells of tables say by a class how they are set: the pages' policy lets no style be inline."""
    for token in state.tokens:
        if style := token.attrs.pop("style", None):
            token.attrSet("class", str(style).rpartition(":")[2])
