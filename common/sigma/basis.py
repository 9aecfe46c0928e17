"""The basis: the frozen singular vectors of each adapted matrix, their cache, and the fingerprint.

With W0 = U diag(s0) V^T, the mean of several shifts is meaningful only in one common basis. The fingerprint
shows whether two parties have the same U and V.
"""

from __future__ import annotations

import hashlib
import json
import secrets
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
# Above this many elements a float64 decomposition takes minutes per matrix, so float32 is used. The
# vectors of near-degenerate pairs may then differ between machines; the fingerprint shows it.
FLOAT64_ELEMENTS = 64 * 2**20

ProgressCallback = Callable[[int, int], None]
"""Called with the number of finished matrices and of all matrices."""

_verified: set[tuple[str, int, int, int]] = set()
"""Files whose vectors match their fingerprint: path, inode, size in bytes, modification time in ns."""


class BasisError(FedSigmaError, ValueError):
    """A basis or fingerprint cannot be computed or read."""


@dataclass(frozen=True)
class SVD:
    """The singular value decomposition of one matrix (rows, columns) of rank k, float32.

    Attributes:
        u: U, shape (rows, k).
        s: the singular values, shape (k,), in descending order.
        vh: V^T, shape (k, columns).
    """

    u: Tensor
    s: Tensor
    vh: Tensor


def decompose(weight: Tensor) -> SVD:
    """Decompose a matrix (rows, columns) on the CPU, in float64 unless it is very large.

    Raises:
        BasisError: the matrix has a value that is not finite.
    """
    matrix = weight.detach().to("cpu", torch.float32)
    if not torch.isfinite(matrix).all():
        raise BasisError("a weight is not finite: the backbone file is damaged; fetch it again")
    exact = matrix.numel() <= FLOAT64_ELEMENTS
    u, s, vh = torch.linalg.svd(matrix.double() if exact else matrix, full_matrices=False)
    return SVD(*(t.float().contiguous() for t in (u, s, vh)))


def _random_bytes(seed: str, length: int) -> Tensor:
    """Bytes (length,) that are the same on every machine and library version."""
    return torch.frombuffer(bytearray(hashlib.shake_256(seed.encode()).digest(length)), dtype=torch.uint8)


def _random_signs(seed: str, length: int) -> Tensor:
    """+1 and -1, float64, shape (length,)."""
    return (_random_bytes(seed, length) & 1).double() * 2 - 1


def _random_levels(seed: str, length: int) -> Tensor:
    """Values in [-1, 1], float64, shape (length,)."""
    pairs = _random_bytes(seed, 2 * length).double().reshape(length, 2)
    return (pairs[:, 0] * 256 + pairs[:, 1]) / 32767.5 - 1


def sketch(entry: Entry, svd: SVD) -> tuple[float, ...]:
    """Compute the probes a^T U diag(w) V^T b of one matrix, with fixed random a, w and b.

    A joint sign flip of a pair (u, v) leaves every probe as it is. A rotation within a pair with different w
    changes it. The seed of a, w and b is the entry's key.
    """
    names = [f"fedsigma/{VERSION}/{entry.key}/{probe}" for probe in range(PROBES)]
    left = torch.stack([_random_signs(name + "/a", svd.u.shape[0]) for name in names])
    right = torch.stack([_random_signs(name + "/b", svd.vh.shape[1]) for name in names])
    weights = torch.stack([_random_levels(name + "/w", entry.size) for name in names])
    products = (left @ svd.u.double()) * weights * (svd.vh.double() @ right.T).T
    return tuple(float(probe) for probe in products.sum(1))


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers of a plain model with their names, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        data = value.detach().to("cpu").contiguous()
        digest.update(f"{name}:{data.dtype}:{tuple(data.shape)};".encode())
        if data.numel():
            digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """What two parties must have in common to average their shifts.

    Attributes:
        weights: SHA-256 of the backbone's weights, see `weights_digest`.
        layout: SHA-256 of the layout.
        sketch: the probes of each entry of the layout.
    """

    weights: str
    layout: str
    sketch: tuple[tuple[float, ...], ...]

    @classmethod
    def compute(cls, weights: str, layout: Layout, svds: Sequence[SVD]) -> Fingerprint:
        """Compute the fingerprint of a basis, with one decomposition for each entry of the layout."""
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
        """Parse the output of `to_json`.

        Raises:
            BasisError: the text is not a fingerprint, or it has another version.
        """
        try:
            raw = json.loads(text)
            version = raw["version"]
            rows = tuple(tuple(float(x) for x in row) for row in raw.get("sketch", ()))
            fingerprint = cls(str(raw.get("weights")), str(raw.get("layout")), rows)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BasisError(
                f"not a fingerprint ({error}): expected the JSON that Fingerprint.to_json writes"
            ) from None
        if version != VERSION or not rows:
            raise BasisError(
                f"the fingerprint has version {version}, expected {VERSION}: update the older side"
            )
        return fingerprint

    def describe_mismatch(self, other: Fingerprint) -> str | None:
        """One sentence that says why two parties cannot average their shifts, or None if they can."""
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
            # `not <=` rather than `>`: a NaN is a difference.
            if not all(abs(a - b) <= TOLERANCE * scale for a, b in zip(mine, theirs, strict=True)):
                return (
                    f"the bases differ at entry {number}: the same weights were decomposed differently; "
                    "copy the coordinating server's basis file to the site"
                )
        return None


@dataclass(frozen=True)
class Basis:
    """The decompositions of all adapted matrices of a backbone.

    Attributes:
        layout: the adapted matrices.
        svds: one decomposition for each entry of the layout, in its order.
        fingerprint: of the backbone's weights, the layout and the decompositions.
    """

    layout: Layout
    svds: tuple[SVD, ...]
    fingerprint: Fingerprint

    @classmethod
    def compute(cls, model: nn.Module, layout: Layout, *, progress: ProgressCallback | None = None) -> Basis:
        """Decompose every adapted matrix of a plain model, which takes minutes for a ViT-B/16.

        Raises:
            BasisError: a weight is not finite.
        """
        svds = []
        for entry in layout.entries:
            svds.append(decompose(model.get_parameter(entry.weight)[slice(*entry.rows)]))
            if progress:
                progress(len(svds), len(layout.entries))
        return cls(layout, tuple(svds), Fingerprint.compute(weights_digest(model), layout, svds))

    def save(self, path: Path) -> None:
        """Write the basis as safetensors, atomically."""
        tensors: dict[str, Tensor] = {}
        for number, svd in enumerate(self.svds):
            tensors |= {f"{number}.u": svd.u, f"{number}.s": svd.s, f"{number}.vh": svd.vh}
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "format": "fedsigma-basis",
            "layout": self.layout.to_json(),
            "fingerprint": self.fingerprint.to_json(),
        }
        part = path.with_name(f"{secrets.token_hex(8)}.part")
        try:
            save_file(tensors, part, metadata=metadata)
            part.chmod(0o644)  # safetensors writes for the owner alone; a cache may be shared
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Basis:
        """Open a basis file, memory-mapped: processes share its pages, which are read when first used.

        Raises:
            BasisError: the file is not a basis, or is damaged.
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
                f"{path} is not a basis file ({error}): delete it, and it is computed again"
            ) from None
        return cls(layout, svds, fingerprint)


def cache_path(cache_dir: Path, weights: str, layout: Layout) -> Path:
    """The path of a cached basis of a backbone with this `weights_digest`."""
    key = hashlib.sha256(f"{VERSION}/{weights}/{layout.digest}".encode()).hexdigest()[:32]
    return cache_dir / f"basis-{key}.safetensors"


def cached_basis(
    model: nn.Module, layout: Layout, cache_dir: Path, *, progress: ProgressCallback | None = None
) -> Basis:
    """Load the basis of a plain model from the cache, or compute and cache it.

    Raises:
        BasisError: the cached file is damaged or belongs to another backbone.
    """
    weights = weights_digest(model)
    path = cache_path(cache_dir, weights, layout)
    if not path.exists():
        Basis.compute(model, layout, progress=progress).save(path)
        return Basis.load(path)
    basis = Basis.load(path)
    if basis.fingerprint.weights != weights or basis.layout != layout:
        raise BasisError(f"{path} belongs to another backbone: delete it, and it is computed again")
    # Once per process and file: a damaged file, or vectors under another file's fingerprint, would be
    # averaged with those of other sites unnoticed.
    status = path.stat()
    file = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
    if file not in _verified:
        if basis.fingerprint.describe_mismatch(Fingerprint.compute(weights, layout, basis.svds)):
            raise BasisError(
                f"{path} is damaged: its vectors do not match its fingerprint; delete it, and it is computed"
                " again"
            )
        _verified.add(file)
    return basis
