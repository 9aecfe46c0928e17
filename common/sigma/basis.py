"""The basis: frozen singular vectors of each adapted matrix, its cache, and the fingerprint.

W0 = U diag(s0) V^T. Sites average shifts, so all must hold the same U and V. The fingerprint tells
whether they do.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedsigma.common.sigma.layout import Entry, Layout, LayoutError
from fedsigma.common.utils.errors import FedSigmaError

VERSION = 1
PROBES = 4
# A pair of singular vectors rotated by an angle t moves a probe by about t (of sqrt(size) in all). Two
# LAPACKs differ by less than 1e-8; half-precision weights move probes by about 1.
TOLERANCE = 1e-4
# Above this many elements a float64 decomposition costs minutes a matrix; float32 is then used, and
# vectors of near-degenerate pairs may differ between machines, which the fingerprint will say.
FLOAT64_ELEMENTS = 64 * 2**20

ProgressCallback = Callable[[int, int], None]

_checked: set[tuple[str, int, int, int]] = set()
"""The files whose vectors were seen to be those of their fingerprint: path, inode, size, time of change."""


class BasisError(FedSigmaError, ValueError):
    """A basis that cannot be computed or read; the message says why and what to do."""


@dataclass(frozen=True)
class SVD:
    """U (rows, size), s (size,), V^T (size, columns) of one matrix, float32."""

    u: Tensor
    s: Tensor
    vh: Tensor


def decompose(weight: Tensor) -> SVD:
    """Singular value decomposition of a matrix (rows, columns), on the CPU.

    Raises:
        BasisError: a value that is not finite.
    """
    matrix = weight.detach().to("cpu", torch.float32)
    if not torch.isfinite(matrix).all():
        raise BasisError("a weight is not finite: the backbone file is damaged, fetch it again")
    exact = matrix.numel() <= FLOAT64_ELEMENTS
    u, s, vh = torch.linalg.svd(matrix.double() if exact else matrix, full_matrices=False)
    return SVD(*(t.float().contiguous() for t in (u, s, vh)))


def _signs(seed: str, length: int) -> Tensor:
    """A +1/-1 vector that every machine and library version derives alike."""
    raw = hashlib.shake_256(seed.encode()).digest(length)
    return (torch.frombuffer(bytearray(raw), dtype=torch.uint8) & 1).double() * 2 - 1


def _levels(seed: str, length: int) -> Tensor:
    """Weights in -1..1 for the singular directions, likewise reproducible."""
    raw = hashlib.shake_256(seed.encode()).digest(2 * length)
    words = torch.frombuffer(bytearray(raw), dtype=torch.uint8).double().reshape(length, 2)
    return (words[:, 0] * 256 + words[:, 1]) / 32767.5 - 1


def sketch(entry: Entry, svd: SVD) -> tuple[float, ...]:
    """Probes a^T U diag(w) V^T b with fixed random a, w, b.

    A joint sign flip of a pair (u, v) leaves every probe as it is; a rotation within a pair with
    different w changes it.
    """
    names = [f"fedsigma/{VERSION}/{entry.key}/{probe}" for probe in range(PROBES)]
    left = torch.stack([_signs(name + "/a", svd.u.shape[0]) for name in names])
    right = torch.stack([_signs(name + "/b", svd.vh.shape[1]) for name in names])
    weights = torch.stack([_levels(name + "/w", entry.size) for name in names])
    found = (left @ svd.u.double()) * weights * (svd.vh.double() @ right.T).T
    return tuple(float(probe) for probe in found.sum(1))


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over all parameters and buffers of a plain model in their own precision, with names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        data = value.detach().to("cpu").contiguous()
        digest.update(f"{name}:{data.dtype}:{tuple(data.shape)};".encode())
        if data.numel():
            digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """What two parties must share: digest of the weights, digest of the layout, sketch of the basis."""

    weights: str
    layout: str
    sketch: tuple[tuple[float, ...], ...]

    @classmethod
    def compute(cls, weights: str, layout: Layout, svds: Sequence[SVD]) -> Fingerprint:
        """The fingerprint of a basis: of weights with this digest, one svd an entry of the layout."""
        rows = tuple(sketch(entry, svd) for entry, svd in zip(layout.entries, svds, strict=True))
        return cls(weights, layout.digest, rows)

    def to_json(self) -> str:
        """The fingerprint as JSON."""
        rows = [[float(f"{x:.9g}") for x in row] for row in self.sketch]
        return json.dumps(
            {"version": VERSION, "weights": self.weights, "layout": self.layout, "sketch": rows}
        )

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """Read what `to_json` wrote.

        Raises:
            BasisError: not a fingerprint, or one of another version.
        """
        try:
            raw = json.loads(text)
            version = raw["version"]
            rows = tuple(tuple(float(x) for x in row) for row in raw.get("sketch", ()))
            found = cls(str(raw.get("weights")), str(raw.get("layout")), rows)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BasisError(
                f"not a fingerprint ({error}): expected what Fingerprint.to_json writes"
            ) from None
        if version != VERSION or not rows:
            raise BasisError(
                f"fingerprint version {version}, this program has {VERSION}: update the older side"
            )
        return found

    def describe_mismatch(self, other: Fingerprint) -> str | None:
        """None if both may average their shifts, else one sentence that says what differs."""
        if self.layout != other.layout:
            return (
                f"the layouts differ ({self.layout[:12]} and {other.layout[:12]}): "
                "use the same backbone architecture and the same selection of weights"
            )
        if self.weights != other.weights:
            return (
                f"the backbone weights differ ({self.weights[:12]} and {other.weights[:12]}): "
                "install the same backbone file in full precision on both sides"
            )
        if [len(a) for a in self.sketch] != [len(b) for b in other.sketch]:
            return "the sketches have different shapes: update the older side"
        for number, (mine, theirs) in enumerate(zip(self.sketch, other.sketch, strict=True)):
            scale = max(1.0, max(abs(x) for x in mine))
            # `not <=` rather than `>`: a NaN must count as a difference.
            if not all(abs(a - b) <= TOLERANCE * scale for a, b in zip(mine, theirs, strict=True)):
                return (
                    f"the bases differ at entry {number}: the same weights were decomposed differently; "
                    "copy the coordinating server's basis file to the site"
                )
        return None


@dataclass(frozen=True)
class Basis:
    """One svd an entry of the layout, in its order, and their fingerprint."""

    layout: Layout
    svds: tuple[SVD, ...]
    fingerprint: Fingerprint

    @classmethod
    def compute(cls, model: nn.Module, layout: Layout, *, progress: ProgressCallback | None = None) -> Basis:
        """Decompose every adapted matrix of a plain model; minutes for a ViT-B/16, once."""
        svds = []
        for number, entry in enumerate(layout.entries):
            rows = slice(*entry.rows)
            svds.append(decompose(model.get_parameter(entry.weight)[rows]))
            if progress:
                progress(number + 1, len(layout.entries))
        return cls(layout, tuple(svds), Fingerprint.compute(weights_digest(model), layout, svds))

    def save(self, path: Path) -> None:
        """Write as safetensors; readers see the whole file or none."""
        tensors: dict[str, Tensor] = {}
        for number, svd in enumerate(self.svds):
            tensors |= {f"{number}.u": svd.u, f"{number}.s": svd.s, f"{number}.vh": svd.vh}
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "fedsigma-basis", "layout": self.layout.to_json()}
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        try:
            save_file(tensors, name, metadata={**metadata, "fingerprint": self.fingerprint.to_json()})
            Path(name).chmod(0o644)  # mkstemp's files are the owner's alone; a cache may be shared
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> Basis:
        """Read a basis memory-mapped: pages are shared between processes and read when first used.

        Raises:
            BasisError: not a basis file, or a damaged one.
        """
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                layout = Layout.from_json(metadata["layout"])
                fingerprint = Fingerprint.from_json(metadata["fingerprint"])
                get = file.get_tensor
                svds = tuple(
                    SVD(get(f"{i}.u"), get(f"{i}.s"), get(f"{i}.vh")) for i in range(len(layout.entries))
                )
        except (SafetensorError, KeyError, LayoutError, OSError) as error:
            raise BasisError(
                f"{path} is no basis file ({error}): delete it, it will be computed again"
            ) from None
        return cls(layout, svds, fingerprint)


def cache_path(cache_dir: Path, weights: str, layout: Layout) -> Path:
    """Where the basis of a backbone and layout is cached."""
    key = hashlib.sha256(f"{VERSION}/{weights}/{layout.digest}".encode()).hexdigest()[:32]
    return cache_dir / f"basis-{key}.safetensors"


def cached_basis(
    model: nn.Module, layout: Layout, cache_dir: Path, *, progress: ProgressCallback | None = None
) -> Basis:
    """The basis of a plain model from the cache, computed and cached if it is not there."""
    weights = weights_digest(model)
    path = cache_path(cache_dir, weights, layout)
    if path.exists():
        basis = Basis.load(path)
        if basis.fingerprint.weights == weights and basis.layout == layout:
            _check(basis, path)
            return basis
        raise BasisError(f"{path} belongs to another backbone: delete it, it will be computed again")
    basis = Basis.compute(model, layout, progress=progress)
    basis.save(path)
    return Basis.load(path)


def _check(basis: Basis, path: Path) -> None:
    """See that the vectors in a file are those of its fingerprint, once in a process.

    Else a damaged file, or vectors under another file's fingerprint, would be averaged with those of other
    sites, and nobody would know.

    Raises:
        BasisError: they are not.
    """
    found = path.stat()
    file = (str(path), found.st_ino, found.st_size, found.st_mtime_ns)
    if file in _checked:
        return
    fingerprint = basis.fingerprint
    if fingerprint.describe_mismatch(Fingerprint.compute(fingerprint.weights, basis.layout, basis.svds)):
        raise BasisError(f"{path} is damaged: its vectors are not those that it was written with; delete it,"
                         " it will be computed again")  # fmt: skip
    _checked.add(file)
