"""The checkpoints from which a run resumes: its model after the last finished round, and after the one
before.

A damaged file must not end a study of many hours: where the last checkpoint cannot be read, the run resumes
from the one before.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.registry.shift_file import SavedShift, ShiftFileError, load_shift
from fedsigma.common.utils.files import write_atomic
from fedsigma.server.federation.aggregation import Aggregator, OptimizerStateError
from fedsigma.server.runs.shift_magnitude import shift_magnitudes, to_towers

if TYPE_CHECKING:
    from fedsigma.common.sigma import Fingerprint, ParameterPartition
    from fedsigma.server.runs.run_dir import RunDir

__all__ = ["PREVIOUS", "load", "save"]

LAST, PREVIOUS = "sigma.safetensors", "sigma-previous.safetensors"

Vector = NDArray[np.float32]


def save(
    run_dir: RunDir,
    aggregator: Aggregator,
    shift: Vector,
    *,
    study: StudyConfig,
    split: ParameterPartition,
    fingerprint: Fingerprint,
    round: int,
) -> None:
    """Save the model of a round, its shift magnitudes and the optimiser's state; the round before is kept,
    too.

    Args:
        run_dir: The run.
        aggregator: Its state is saved.
        shift: The global shift, shape (shared values,).
        study: The study.
        split: Which values are shared.
        fingerprint: Of the server's backbone and basis.
        round: Number of the round.

    Raises:
        ShiftFileError: The shift is not a finite vector.
        OSError: A file cannot be written; the files of the round before are intact.
    """
    before = _read(run_dir.path / LAST)
    if before is not None and before.round < round:
        # A damaged file must not replace a good one.
        write_atomic(run_dir.path / PREVIOUS, (run_dir.path / LAST).read_bytes())
        previous: SavedShift | None = before
    else:  # of another round than the one before, if LAST was damaged
        previous = _read(run_dir.path / PREVIOUS)
    aggregator.save_state(_state_path(run_dir, round))
    # All values, with zeros (the pretrained ones) where they are personal.
    full = split.combine(shift)
    # Before the model: a run that is killed in between resumes from the round before and writes both again.
    run_dir.log_shift_magnitude(round, to_towers(shift_magnitudes(full, split.full)))
    run_dir.save_shift(
        full,
        layout_json=split.full.to_json(),
        fingerprint_json=fingerprint.to_json(),
        study_yaml=study.to_yaml(),
        round=round,
        run=run_dir.key if split.personal_size else "",
    )
    current = {_state_path(run_dir, round), _state_path(run_dir, previous.round if previous else 0)}
    for old in set(run_dir.path.glob("strategy-*.safetensors")) - current:
        old.unlink(missing_ok=True)


def load(
    run_dir: RunDir,
    aggregator: Aggregator,
    *,
    study: StudyConfig,
    split: ParameterPartition,
    fingerprint: Fingerprint,
) -> tuple[Vector, int]:
    """Load the last readable checkpoint, and the optimiser's state with it.

    Args:
        run_dir: The run.
        aggregator: Receives the saved state.
        study: The study.
        split: Which values are shared.
        fingerprint: Of the server's backbone and basis.

    Returns:
        The global shift, shape (shared values,), and the round that produced it; zeros and 0 if the run ended
        before its first round did. A damaged file is logged as an event.

    Raises:
        ConfigError: The run has another backbone or layout, or no checkpoint can be read.
    """
    from fedsigma.common.sigma import Fingerprint

    problems = []
    for name in (LAST, PREVIOUS):
        if not (run_dir.path / name).exists():
            continue
        try:
            saved = load_shift(run_dir.path / name)
            difference = fingerprint.describe_mismatch(Fingerprint.from_json(saved.fingerprint_json))
            if difference:
                raise ConfigError(f"{run_dir.path} cannot be resumed: {difference}")
            shared = split.shared_values(saved.shift.numpy())
            aggregator.load_state(_state_path(run_dir, saved.round), size=split.shared.size)
        except (ShiftFileError, OptimizerStateError) as error:
            problems.append(str(error))
            run_dir.log_event("checkpoint_damaged", file=name, reason=str(error))
            continue
        return shared, min(saved.round, study.federation.rounds)
    if problems:
        raise ConfigError(f"{run_dir.path} cannot be resumed: {'; '.join(problems)}")
    return np.zeros(split.shared.size, dtype=np.float32), 0


def _read(path: Path) -> SavedShift | None:
    try:
        return load_shift(path)
    except ShiftFileError:
        return None


def _state_path(run_dir: RunDir, round: int) -> Path:
    return run_dir.path / f"strategy-{round}.safetensors"
