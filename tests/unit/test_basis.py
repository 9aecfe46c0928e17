"""The basis cache and the handshake's comparison of fingerprints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.sigma import Basis, BasisError, Fingerprint, SigmaModel, cached_basis, find_layout
from fedsigma.common.sigma.basis import SVD, decompose, sketch
from tests.helpers.tiny import tiny_clip


def basis_of(model: torch.nn.Module) -> Basis:
    return Basis.compute(model, find_layout(model))


def resketched(basis: Basis, svds: list[SVD]) -> Fingerprint:
    rows = tuple(sketch(e, t) for e, t in zip(basis.layout.entries, svds, strict=True))
    return replace(basis.fingerprint, sketch=rows)


def test_same_backbone_agrees_through_json() -> None:
    one, two = basis_of(tiny_clip()), basis_of(tiny_clip())
    assert one.fingerprint.describe_mismatch(Fingerprint.from_json(two.fingerprint.to_json())) is None


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_joint_sign_flips_pass(seed: int) -> None:
    basis = basis_of(tiny_clip())
    generator = torch.Generator().manual_seed(seed)
    flipped = []
    for t in basis.svds:
        signs = torch.randint(0, 2, t.s.shape, generator=generator) * 2.0 - 1
        flipped.append(SVD(t.u * signs, t.s, signs[:, None] * t.vh))
    assert basis.fingerprint.describe_mismatch(resketched(basis, flipped)) is None


@pytest.mark.parametrize("angle", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("number", [0, 5, 20])
def test_rotated_near_degenerate_pair_is_refused(angle: float, number: int) -> None:
    """The weights are the same to the last digit; only the choice of vectors differs."""
    basis = basis_of(tiny_clip())
    t = basis.svds[number]
    turn = torch.tensor(
        [
            [torch.tensor(angle).cos(), -torch.tensor(angle).sin()],
            [torch.tensor(angle).sin(), torch.tensor(angle).cos()],
        ]
    )
    u, vh = t.u.clone(), t.vh.clone()
    u[:, 3:5], vh[3:5] = u[:, 3:5] @ turn, turn.T @ vh[3:5]
    pair = SVD(u, t.s, vh)
    same = torch.ones_like(t.s)
    torch.testing.assert_close(u @ torch.diag(same) @ vh, t.u @ torch.diag(same) @ t.vh, atol=1e-5, rtol=1e-4)
    svds = [pair if i == number else x for i, x in enumerate(basis.svds)]
    verdict = basis.fingerprint.describe_mismatch(resketched(basis, svds))
    assert verdict is not None and f"bases differ at entry {number}" in verdict


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_refused(dtype: torch.dtype) -> None:
    exact, half = basis_of(tiny_clip()), basis_of(tiny_clip().to(dtype).float())
    verdict = exact.fingerprint.describe_mismatch(half.fingerprint)
    assert verdict is not None and "backbone weights differ" in verdict
    # The sketch alone notices too, should a digest ever be forged or left out.
    verdict = exact.fingerprint.describe_mismatch(
        replace(half.fingerprint, weights=exact.fingerprint.weights)
    )
    assert verdict is not None and "bases differ" in verdict


def test_other_layout_is_refused() -> None:
    model = tiny_clip()
    part = Basis.compute(model, find_layout(model, SigmaConfig(parts=("o",))))
    verdict = basis_of(model).fingerprint.describe_mismatch(part.fingerprint)
    assert verdict is not None and "layouts differ" in verdict


def test_nan_in_a_sketch_is_a_difference() -> None:
    mine = basis_of(tiny_clip()).fingerprint
    forged = replace(mine, sketch=((float("nan"),) * len(mine.sketch[0]), *mine.sketch[1:]))
    assert mine.describe_mismatch(forged) is not None and forged.describe_mismatch(mine) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 1}',
        '{"version": 99}',
        '{"version":1,"weights":"","layout":"","sketch":[["x"]]}',
    ],
)
def test_garbage_fingerprint_is_named(text: str) -> None:
    with pytest.raises(BasisError, match="fingerprint"):
        Fingerprint.from_json(text)


def test_a_cached_basis_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_clip()
    first = cached_basis(model, find_layout(model), tmp_path)
    assert len(list(tmp_path.glob("basis-*.safetensors"))) == 1

    def never(weight: torch.Tensor) -> SVD:
        raise AssertionError("decomposed again")

    monkeypatch.setattr("fedsigma.common.sigma.basis.decompose", never)
    again = cached_basis(model, find_layout(model), tmp_path)
    assert again.fingerprint.describe_mismatch(first.fingerprint) is None
    assert all(torch.equal(a.u, b.u) for a, b in zip(first.svds, again.svds, strict=True))


def test_processes_share_the_pages_of_a_cached_basis(tmp_path: Path) -> None:
    model = tiny_clip()
    basis = cached_basis(model, find_layout(model), tmp_path)
    (file,) = tmp_path.glob("basis-*.safetensors")
    mapped = [
        line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line
    ]
    parts = [tuple(int(end, 16) for end in part.split("-")) for part in mapped]
    for svd in basis.svds:
        for tensor in (svd.u, svd.s, svd.vh):
            assert any(start <= tensor.data_ptr() < end for start, end in parts)


def test_other_weights_get_another_cache_file(tmp_path: Path) -> None:
    SigmaModel.adapt(tiny_clip(0), cache_dir=tmp_path)
    SigmaModel.adapt(tiny_clip(1), cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_damaged_cache_file_is_named(tmp_path: Path) -> None:
    model = tiny_clip()
    cached_basis(model, find_layout(model), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BasisError, match="delete it"):
        cached_basis(model, find_layout(model), tmp_path)


def test_vectors_that_are_not_those_of_their_fingerprint_are_refused(tmp_path: Path) -> None:
    model = tiny_clip()
    layout = find_layout(model)
    cached_basis(model, layout, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 4096] = bytes(4096)
    file.write_bytes(damaged)
    with pytest.raises(BasisError, match="is damaged: its vectors do not match"):
        cached_basis(model, layout, tmp_path)
    file.write_bytes(whole)
    cached_basis(model, layout, tmp_path)
    # Another backbone's vectors under this one's name and fingerprint.
    mine, other = basis_of(model), basis_of(tiny_clip(1))
    replace(mine, svds=other.svds).save(file)
    with pytest.raises(BasisError, match="is damaged"):
        cached_basis(model, layout, tmp_path)


def test_weight_that_is_not_finite_is_named() -> None:
    with pytest.raises(BasisError, match="not finite"):
        decompose(torch.tensor([[1.0, float("inf")]]))
