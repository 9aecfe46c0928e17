"""The sections `sigma` and `personal` of a study: the adapted weights and those that stay at a site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsigma.common.config.constants import PARTS, THIRDS, TOWERS
from fedsigma.common.config.schema import ConfigError, check_choice, check_subset

__all__ = ["PersonalConfig", "SigmaConfig"]


@dataclass(frozen=True, kw_only=True)
class SigmaConfig:
    """Which weights are adapted.

    Attributes:
        towers: `image`, `text` or both.
        layers: `all`, a third of each tower (`bottom` is nearest the input), or layer numbers from 0.
        parts: the matrices of a layer, of `q`, `k`, `v`, `o` and `mlp`.

    Raises:
        ConfigError: an unknown or repeated value, or an empty list.
    """

    section: ClassVar[str] = "sigma"

    towers: tuple[str, ...] = TOWERS
    layers: str | tuple[int, ...] = "all"
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        section = self.section
        check_subset(f"{section}.towers", self.towers, TOWERS)
        check_subset(f"{section}.parts", self.parts, PARTS)
        if isinstance(self.layers, str):
            check_choice(f"{section}.layers", self.layers, THIRDS)
        elif not self.layers or min(self.layers) < 0 or len(set(self.layers)) != len(self.layers):
            raise ConfigError(
                f"{section}.layers is {list(self.layers)}, expected different layer numbers from 0, at least"
                " one"
            )

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


@dataclass(frozen=True, kw_only=True)
class PersonalConfig(SigmaConfig):
    """Which of the adapted weights stay at the site that trains them: those that match all three fields."""

    section: ClassVar[str] = "personal"
