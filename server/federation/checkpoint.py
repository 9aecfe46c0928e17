"""What a run is gone on with: its model after the last finished round, and after the one before.

A file that a failing disk or a careless hand has changed must not end a study of many hours. So two rounds
are kept, and the one before is used, and trained on again, where the last does not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.registry.shift_file import SavedShift, ShiftFileError, load_shift
from fedsigma.common.utils.files import write_atomic
from fedsigma.server.federation.aggregation import StateError, restore_state, save_state
from fedsigma.server.runs.shift_magnitude import shift_magnitudes, to_towers

if TYPE_CHECKING:
    from fedsigma.common.sigma import Fingerprint, ParameterPartition
    from fedsigma.server.runs.run_dir import RunDir

__all__ = ["PREVIOUS", "keep", "latest"]

LAST, PREVIOUS = "sigma.safetensors", "sigma-previous.safetensors"

Vector = NDArray[np.float32]


def keep(
    folder: RunDir,
    averaging: FedAvg,
    shift: Vector,
    *,
    study: StudyConfig,
    split: ParameterPartition,
    fingerprint: Fingerprint,
    round: int,
) -> None:
    """Keep what a round made, model, heat and the averaging's state; the round before's stay beside them.

    Shapes: shift (size of the shared values,).

    Raises:
        ArtefactError: the shift is not a finite vector.
        OSError: a file cannot be written; the last round's are whole.
    """
    before = _read(folder.path / LAST)
    if before is not None and before.round < round:
        # A damaged file is not copied over a good one.
        write_atomic(folder.path / PREVIOUS, (folder.path / LAST).read_bytes())
        previous: SavedShift | None = before
    else:  # of another round than the one before, if LAST was damaged
        previous = _read(folder.path / PREVIOUS)
    save_state(averaging, _state_path(folder, round))
    # Whole, with zeros where values are personal: the pretrained ones, and a file like any other.
    whole = split.combine(shift)
    # Before the model: a run killed between the two goes on with the round before, and writes both again.
    folder.log_shift_magnitude(round, to_towers(shift_magnitudes(whole, split.full)))
    folder.save_shift(
        whole,
        layout_json=split.full.to_json(),
        fingerprint_json=fingerprint.to_json(),
        study_yaml=study.to_yaml(),
        round=round,
        run=folder.key if split.personal_size else "",
    )
    kept = {_state_path(folder, round), _state_path(folder, previous.round if previous else 0)}
    for old in set(folder.path.glob("strategy-*.safetensors")) - kept:
        old.unlink(missing_ok=True)


def latest(
    folder: RunDir,
    averaging: FedAvg,
    *,
    study: StudyConfig,
    split: ParameterPartition,
    fingerprint: Fingerprint,
) -> tuple[Vector, int]:
    """The model to go on with and the round that made it, and put the averaging's state back.

    Zeros and 0 if the run ended before its first round did. What does not read is an event.

    Raises:
        ConfigError: the run has another backbone or layout, or nothing that it kept reads.
    """
    from fedsigma.common.sigma import Fingerprint

    problems = []
    for name in (LAST, PREVIOUS):
        if not (folder.path / name).exists():
            continue
        try:
            saved = load_shift(folder.path / name)
            difference = fingerprint.describe_mismatch(Fingerprint.from_json(saved.fingerprint_json))
            if difference:
                raise ConfigError(f"{folder.path} cannot be gone on with: {difference}")
            shared = split.shared_values(saved.shift.numpy())
            restore_state(averaging, _state_path(folder, saved.round), size=split.shared.size)
        except (ShiftFileError, StateError) as error:
            problems.append(str(error))
            folder.log_event("checkpoint_damaged", file=name, reason=str(error))
            continue
        return shared, min(saved.round, study.federation.rounds)
    if problems:
        raise ConfigError(f"{folder.path} cannot be gone on with: {'; '.join(problems)}")
    return np.zeros(split.shared.size, dtype=np.float32), 0


def _read(path: Path) -> SavedShift | None:
    try:
        return load_shift(path)
    except ShiftFileError:
        return None


def _state_path(folder: RunDir, round: int) -> Path:
    return folder.path / f"strategy-{round}.safetensors"
