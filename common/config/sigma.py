"""Sections `sigma` and `personal` of a study: which weights are adapted, and which of them stay at a site."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from fedsigma.common.config.constants import PARTS, THIRDS, TOWERS
from fedsigma.common.config.fields import Check, ListOf, distinct, one_of
from fedsigma.common.config.schema import did_you_mean, settings

__all__ = ["PersonalConfig", "SigmaConfig"]


def _check_layers(layers: str | tuple[int, ...]) -> None:
    if isinstance(layers, str):
        if layers not in THIRDS:
            raise ValueError(f"which is not known{did_you_mean(layers, THIRDS)}")
    elif not layers or min(layers) < 0 or len(set(layers)) != len(layers):
        raise ValueError("expected different layer numbers from 0, at least one")


_LAYERS = {
    "anyOf": [
        {"type": "string", "enum": list(THIRDS)},
        {
            "type": "array",
            "items": {"type": "integer", "minimum": 0},
            "minItems": 1,
            "uniqueItems": True,
        },
    ]
}


Tower = Annotated[str, one_of(TOWERS)]
Part = Annotated[str, one_of(PARTS)]


@settings
class SigmaConfig:
    """Which weights are adapted: those of these parts in these layers of these towers."""

    section: ClassVar[str] = "sigma"

    towers: Annotated[ListOf[Tower], Field(min_length=1), distinct] = TOWERS
    """image, text or both."""
    layers: Annotated[str | ListOf[int], Check(_check_layers, _LAYERS)] = "all"
    """Layers: all, a third (bottom, middle, top), or a list of numbers from 0."""
    parts: Annotated[ListOf[Part], Field(min_length=1), distinct] = PARTS
    """Parts of a layer: q, k, v, o, mlp."""

    def __str__(self) -> str:
        layers = self.layers if isinstance(self.layers, str) else list(self.layers)
        return f"{{towers: [{', '.join(self.towers)}], layers: {layers}, parts: [{', '.join(self.parts)}]}}"

    def picks(self, layer: int, depth: int) -> bool:
        """Whether layer number `layer`, from 0, of a tower of `depth` layers is adapted."""
        if self.layers == "all":
            return True
        if isinstance(self.layers, str):
            third = THIRDS.index(self.layers) - 1
            return third * depth <= 3 * layer < (third + 1) * depth
        return layer in self.layers


@settings
class PersonalConfig(SigmaConfig):
    """Which of the adapted weights stay at the site that trains them: those of all three kinds."""

    section: ClassVar[str] = "personal"
