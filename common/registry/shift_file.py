"""The file of a sigma shift: one float32 safetensors tensor `shift`, with layout, fingerprint and study.

The layout, the fingerprint of the backbone and the study are stored as text in the metadata.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.files import write_atomic

__all__ = ["SavedShift", "ShiftFileError", "load_shift", "save_shift", "to_bytes"]

FORMAT = "fedsigma-shift-1"
_TEXTS = ("layout", "fingerprint", "study")


class ShiftFileError(FedSigmaError, ValueError):
    """A shift file is missing, damaged, or not in FedSigma's format."""


@dataclass(frozen=True, kw_only=True)
class SavedShift:
    """The content of a shift file.

    Attributes:
        shift: Shape (layout size,), float32.
        layout_json: Layout of the shift, JSON.
        fingerprint_json: Fingerprint of the backbone and basis, JSON.
        study_yaml: Resolved study, YAML.
        round: Number of the last round.
        run: Key of the sites' personal values of this run; empty without personal values.
    """

    shift: Tensor
    layout_json: str
    fingerprint_json: str
    study_yaml: str
    round: int
    run: str = ""


def save_shift(
    path: Path,
    shift: Tensor | np.ndarray,
    *,
    layout_json: str,
    fingerprint_json: str,
    study_yaml: str,
    round: int,
    run: str = "",
) -> None:
    """Write a shift file atomically; the shift has any floating type. Raises as `to_bytes`."""
    saved = SavedShift(
        shift=torch.as_tensor(shift),
        layout_json=layout_json,
        fingerprint_json=fingerprint_json,
        study_yaml=study_yaml,
        round=round,
        run=run,
    )
    write_atomic(Path(path), to_bytes(saved))


def to_bytes(saved: SavedShift) -> bytes:
    """Encode a shift file.

    Raises:
        ShiftFileError: The shift is not one-dimensional, is empty, or holds a value that is not finite.
    """
    tensor = saved.shift.detach().to("cpu", torch.float32).contiguous()
    _check(tensor, "the shift to save")
    metadata = {
        "format": FORMAT,
        "layout": saved.layout_json,
        "fingerprint": saved.fingerprint_json,
        "study": saved.study_yaml,
        "round": str(int(saved.round)),
    }
    if saved.run:
        metadata["run"] = saved.run
    metadata["sha256"] = _digest(tensor, metadata)
    return save({"shift": tensor}, metadata=metadata)


def load_shift(path: Path) -> SavedShift:
    """Read a sigma file, or the `sigma.safetensors` inside a run folder.

    Raises:
        ShiftFileError: There is no such file, it is damaged, or it is not a sigma file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "sigma.safetensors"
    if not path.is_file():
        raise ShiftFileError(f"no sigma file at {path}: name a run folder or its sigma.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or list(file.keys()) != ["shift"]:
                raise ShiftFileError(
                    f"{path} is a safetensors file but not a sigma file "
                    f"(format {metadata.get('format')!r}, expected {FORMAT!r}): name the one a run wrote"
                )
            shift = file.get_tensor("shift")
    except (SafetensorError, OSError) as error:
        raise ShiftFileError(f"{path} cannot be read ({error}): copy it again from the run folder") from error
    _check(shift, str(path))
    digest = metadata.pop("sha256", "")
    # Older files have no digest.
    if digest and digest != _digest(shift, metadata):
        raise ShiftFileError(f"{path} was changed or damaged since it was written: copy it again")
    if missing := [key for key in _TEXTS if key not in metadata]:
        raise ShiftFileError(
            f"{path} lacks {', '.join(missing)} in its metadata: it cannot be applied safely"
        )
    for key in ("layout", "fingerprint"):
        try:
            json.loads(metadata[key])
        except json.JSONDecodeError as error:
            raise ShiftFileError(f"{path}: its {key} is not valid JSON ({error})") from error
    if not metadata.get("round", "").isdecimal():
        raise ShiftFileError(f"{path}: its round is {metadata.get('round', '')!r}, expected a whole number")
    return SavedShift(
        shift=shift,
        layout_json=metadata["layout"],
        fingerprint_json=metadata["fingerprint"],
        study_yaml=metadata["study"],
        round=int(metadata["round"]),
        run=metadata.get("run", ""),
    )


def _digest(shift: Tensor, metadata: dict[str, str]) -> str:
    """SHA-256 of a file's content and metadata; detects damage, but not deliberate changes."""
    digest = hashlib.sha256(shift.numpy().tobytes())
    for key, text in sorted(metadata.items()):
        digest.update(f"{len(key)}:{key}{len(text.encode())}:{text}".encode())
    return digest.hexdigest()


def _check(shift: Tensor, what: str) -> None:
    if shift.ndim != 1 or shift.numel() == 0 or shift.dtype != torch.float32:
        raise ShiftFileError(
            f"{what} has shape {tuple(shift.shape)} and type {shift.dtype}, expected a float32 vector"
        )
    if not bool(torch.isfinite(shift).all()):
        raise ShiftFileError(f"{what} contains values that are not finite: the training diverged")
