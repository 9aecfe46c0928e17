"""The decoded images that a process keeps between messages."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsigma.common.data.loading import SiteData

__all__ = ["IMAGES", "ImageCache"]

MAX_BYTES = 2**30


class ImageCache:
    """Keeps the images of several sites, since one process of a simulation may work for a hundred.

    Args:
        max_bytes: Limit of the decoded images; above it the data loaded first are dropped, except the
            last ones.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._data: dict[Hashable, SiteData] = {}

    def get(self, key: Hashable, load: Callable[[], SiteData]) -> SiteData:
        """Return the images of a key, loaded at its first use."""
        if key not in self._data:
            self._data[key] = load()
            while len(self._data) > 1 and sum(map(_size, self._data.values())) > self.max_bytes:
                del self._data[next(iter(self._data))]
        return self._data[key]

    def reset(self) -> None:
        """Drop all images."""
        self._data.clear()


def _size(data: SiteData) -> int:
    return sum(example.image.nbytes for part in (data.train, data.test) for example in part)


IMAGES = ImageCache()
"""The cache of this process, used by `Site.images` alone."""
