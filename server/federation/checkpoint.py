"""The checkpoints from which a run resumes: its model after the last finished round, and after the one
before.

A damaged file must not end a study of many hours: where the last checkpoint cannot be read, the run resumes
from the one before.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsigma.common.config.schema import ConfigError
from fedsigma.common.registry.shift_file import SavedShift, ShiftFileError, load_shift, save_shift
from fedsigma.common.utils.files import write_atomic
from fedsigma.server.federation.aggregation import OptimizerStateError
from fedsigma.server.federation.federation import Federation
from fedsigma.server.runs.run_dir import RunDir
from fedsigma.server.runs.shift_magnitude import shift_magnitudes, to_towers

__all__ = ["load", "save"]

LAST, PREVIOUS = "sigma.safetensors", "sigma-previous.safetensors"

Vector = NDArray[np.float32]


def save(federation: Federation, shift: Vector, *, round: int) -> None:
    """Save the model of a round, its shift magnitudes and the optimiser's state, beside those of the round
    before.

    Args:
        federation: The federation; the state of its aggregation rule is saved.
        shift: The global shift, shape (shared values,).
        round: Number of the round.

    Raises:
        ShiftFileError: The shift is not a finite vector.
        OSError: A file cannot be written; the files of the round before are intact.
    """
    run_dir, partition = federation.run_dir, federation.partition
    previous = _read(run_dir.path / LAST)
    if previous is not None and previous.round < round:
        # A damaged file must not replace a good one.
        write_atomic(run_dir.path / PREVIOUS, (run_dir.path / LAST).read_bytes())
    else:  # of another round than the one before, if LAST was damaged
        previous = _read(run_dir.path / PREVIOUS)
    federation.aggregator.save_state(_state_path(run_dir, round))
    # All values, with zeros (the pretrained ones) where they are personal.
    full = partition.combine(shift)
    # Before the model: a run that is killed in between resumes from the round before and writes both again.
    run_dir.log_shift_magnitude(round, to_towers(shift_magnitudes(full, partition.full)))
    save_shift(
        run_dir.shift_path,
        full,
        layout_json=partition.full.to_json(),
        fingerprint_json=federation.fingerprint.to_json(),
        study_yaml=federation.study.to_yaml(),
        round=round,
        run=run_dir.key if partition.personal_size else "",
    )
    current = {_state_path(run_dir, round), _state_path(run_dir, previous.round if previous else 0)}
    for path in set(run_dir.path.glob("strategy-*.safetensors")) - current:
        path.unlink(missing_ok=True)


def load(federation: Federation) -> tuple[Vector, int]:
    """Load the last readable checkpoint, and the optimiser's state with it.

    Returns:
        The global shift, shape (shared values,), and the number of rounds done; zeros and 0 if no round did.
        A damaged file is logged as an event.

    Raises:
        ConfigError: The run has another backbone or layout, or no checkpoint can be read.
    """
    from fedsigma.common.sigma import Fingerprint

    run_dir, layout = federation.run_dir, federation.layout
    problems = []
    for name in (LAST, PREVIOUS):
        if not (run_dir.path / name).exists():
            continue
        try:
            saved = load_shift(run_dir.path / name)
            fingerprint = Fingerprint.from_json(saved.fingerprint_json)
            if mismatch := federation.fingerprint.describe_mismatch(fingerprint):
                raise ConfigError(f"{run_dir.path} cannot be resumed: {mismatch}")
            federation.aggregator.load_state(_state_path(run_dir, saved.round), size=layout.size)
        except (ShiftFileError, OptimizerStateError) as error:
            problems.append(str(error))
            run_dir.log_event("checkpoint_damaged", file=name, reason=str(error))
            continue
        shift = federation.partition.shared_values(saved.shift.numpy())
        return shift, min(saved.round, federation.study.federation.rounds)
    if problems:
        raise ConfigError(f"{run_dir.path} cannot be resumed: {'; '.join(problems)}")
    return np.zeros(layout.size, np.float32), 0


def _read(path: Path) -> SavedShift | None:
    try:
        return load_shift(path)
    except ShiftFileError:
        return None


def _state_path(run_dir: RunDir, round: int) -> Path:
    return run_dir.path / f"strategy-{round}.safetensors"
