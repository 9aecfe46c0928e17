"""The versions of the model registry, as the pages show them."""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markupsafe import Markup

from fedsigma.common.registry import ModelError, ModelRegistry
from fedsigma.server.report.formatting import MISSING, format_percent

__all__ = ["model_rows", "render_card"]


def model_rows(registry: ModelRegistry) -> tuple[list[dict[str, str]], list[str]]:
    """Return a row per version, newest first, and the errors of versions that failed verification."""
    if not registry.path.is_dir():
        return [], []
    try:
        versions = registry.versions()
    except ModelError as error:
        return [], [str(error)]
    rows = []
    for version in sorted(versions, key=lambda version: version.manifest.created, reverse=True):
        manifest = version.manifest
        federated, zero_shot = (manifest.results.get(name, {}) for name in ("federated", "zero_shot"))
        row = {
            "reference": manifest.reference,
            "labels": ", ".join(version.labels) or MISSING,
            "origin": manifest.origin,
            "parents": ", ".join(manifest.parents) or MISSING,
            "backbone": manifest.backbone,
            "created": manifest.created,
            "accuracy": format_percent(federated.get("accuracy")),
            "zero_shot": format_percent(zero_shot.get("accuracy")),
        }
        rows.append(row)
    return rows, []


def render_card(registry: ModelRegistry, reference: str) -> Markup:
    """Return a version's model card as HTML; HTML inside the card is escaped.

    Raises:
        ModelError: There is no such version, or it was changed.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.core.ruler.push("classes", _replace_styles)
    text = (registry.find(reference).path / "card.md").read_text(encoding="utf-8")
    return Markup(markdown.render(text))


def _replace_styles(state: StateCore) -> None:
    """Replace the alignment style of table cells by a class: the content policy forbids inline styles."""
    for token in state.tokens:
        if style := token.attrs.pop("style", None):
            token.attrSet("class", str(style).rpartition(":")[2])
