"""The sigma file: round trip, atomic writing, refusal of damaged files."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import save_file

from fedsigma.common.registry import shift_file
from fedsigma.common.registry.shift_file import ShiftFileError, load_shift, save_shift
from fedsigma.common.utils import files
from fedsigma.common.utils.files import write_atomic

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
TEXTS = {"layout_json": '{"entries": []}', "fingerprint_json": '{"weights": "ab"}', "study_yaml": "name: é\n"}


@settings(max_examples=40, deadline=None)
@given(
    shift=arrays(np.float32, st.integers(1, 300), elements=FINITE),
    number=st.integers(0, 10**6),
    study=st.text(max_size=200),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, shift: np.ndarray, number: int, study: str
) -> None:
    path = tmp_path_factory.mktemp("sigma") / "sigma.safetensors"
    save_shift(path, shift, layout_json="[1]", fingerprint_json="{}", study_yaml=study, round=number)
    saved = load_shift(path)
    assert saved.shift.dtype == torch.float32
    assert np.array_equal(saved.shift.numpy(), shift)
    assert (saved.layout_json, saved.fingerprint_json) == ("[1]", "{}")
    assert (saved.study_yaml, saved.round) == (study, number)


def test_tensor_that_needs_grad_and_run_folder(tmp_path: Path) -> None:
    shift = torch.arange(4, dtype=torch.float64, requires_grad=True)
    save_shift(tmp_path / "run" / "sigma.safetensors", shift, **TEXTS, round=3)
    saved = load_shift(tmp_path / "run")
    assert saved.shift.tolist() == [0, 1, 2, 3]
    assert saved.study_yaml == "name: é\n"


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sigma.safetensors"
    save_shift(path, torch.ones(3), **TEXTS, round=1)

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save_shift(path, torch.zeros(3), **TEXTS, round=2)
    assert load_shift(path).round == 1
    assert [p.name for p in tmp_path.iterdir()] == ["sigma.safetensors"]


def test_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"x")
    write_atomic(tmp_path / "ours", b"x")
    plain, ours = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours"))
    assert ours == plain


@pytest.mark.parametrize("bad", [torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])])
def test_not_finite_is_refused(tmp_path: Path, bad: torch.Tensor) -> None:
    with pytest.raises(ShiftFileError, match="not finite"):
        save_shift(tmp_path / "s", bad, **TEXTS, round=1)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("bad", [torch.zeros(2, 2), torch.zeros(0), torch.tensor(1.0)])
def test_not_a_vector_is_refused(tmp_path: Path, bad: torch.Tensor) -> None:
    with pytest.raises(ShiftFileError, match="expected a float32 vector"):
        save_shift(tmp_path / "s", bad, **TEXTS, round=1)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "sigma.safetensors"
    with pytest.raises(ShiftFileError, match="no sigma file"):
        load_shift(path)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ShiftFileError, match="cannot be read"):
        load_shift(path)
    save_file({"shift": torch.ones(2)}, path)
    with pytest.raises(ShiftFileError, match="not a sigma file"):
        load_shift(path)
    good = {"format": shift_file.FORMAT, "layout": "{}", "fingerprint": "{}", "study": "", "round": "1"}
    save_file({"shift": torch.ones(2, dtype=torch.float16)}, path, metadata=good)
    with pytest.raises(ShiftFileError, match="float32"):
        load_shift(path)
    for key, value, message in [("layout", "{", "valid JSON"), ("round", "-1", "whole number")]:
        save_file({"shift": torch.ones(2)}, path, metadata={**good, key: value})
        with pytest.raises(ShiftFileError, match=message):
            load_shift(path)
    del good["fingerprint"]
    save_file({"shift": torch.ones(2)}, path, metadata=good)
    with pytest.raises(ShiftFileError, match="lacks fingerprint"):
        load_shift(path)


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "sigma.safetensors"
    save_shift(path, torch.ones(100), **TEXTS, round=1)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ShiftFileError, match="cannot be read"):
        load_shift(path)
