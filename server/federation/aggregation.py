"""Flower's averaging strategies by name, and what has to be kept of them to go on after an interruption."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from fedsigma.common.config.federation import STEPS
from fedsigma.common.config.schema import ConfigError, check_number, did_you_mean
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.config.training import cosine_decay
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.files import write_atomic
from fedsigma.server.federation.validation import ValidUpdate, dot, l2_norm

__all__ = [
    "ARRAY",
    "EXAMPLES",
    "LOSS",
    "StateError",
    "begin_round",
    "drift",
    "make_averaging",
    "proximal",
    "restore_state",
    "save_state",
    "set_step",
    "weighted_mean_update",
]

ARRAY = "shift"
EXAMPLES = "num-examples"
LOSS = "train_loss"


class StateError(FedSigmaError, ValueError):
    """What was kept of a strategy cannot be put back."""


_STRATEGIES: dict[str, type[FedAvg]] = {
    "fedavg": flower.FedAvg,
    "fedprox": flower.FedProx,
    "fedavgm": flower.FedAvgM,
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
    "fedmedian": flower.FedMedian,
    "fedtrimmedavg": flower.FedTrimmedAvg,
    "krum": flower.Krum,
    "multikrum": flower.MultiKrum,
    "qfedavg": flower.QFedAvg,
}
# Flower takes any value, and fails in the first round, or makes models that are none.
_BELOW_1 = 0.999999
_BOUNDS: dict[str, tuple[float, float]] = {
    "proximal_mu": (0, 1e6),
    "server_learning_rate": (1e-9, 1e6),
    "server_momentum": (0, _BELOW_1),
    "eta": (1e-9, 1e6),
    "eta_l": (1e-9, 1e6),
    "beta_1": (0, _BELOW_1),
    "beta_2": (0, _BELOW_1),
    "tau": (1e-12, 1e6),
    "beta": (0, 0.499999),
    "num_malicious_nodes": (0, 100_000),
    "num_nodes_to_select": (1, 100_000),
    "client_learning_rate": (1e-12, 1e6),
    "q": (0, 1e6),
}
# Choosing sites, naming records and averaging metrics are not the inner strategy's business here.
_OURS = set(inspect.signature(FedAvg.__init__).parameters) | {"train_loss_key"}


class _Cohort(Grid):
    """A grid of the sites that are asked anyway, for the inner strategy to choose from; it sends nothing."""

    def __init__(self, nodes: Iterable[int]) -> None:
        self._nodes = list(nodes)

    def get_node_ids(self) -> Iterable[int]:
        """Return the cohort's node ids."""
        return self._nodes

    def _no(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("the inner strategy averages only")

    set_run = create_message = get_nodes = push_messages = pull_messages = send_and_receive = _no  # type: ignore[assignment]
    run = property(_no)  # type: ignore[assignment]


def set_step(averaging: FedAvg, study: StudyConfig, number: int) -> None:
    """Give the inner strategy its own step for a round, by the study's schedule.

    Cosine: from the step that the study names in round 1 towards zero after the last.
    """
    federation = study.federation
    if federation.schedule == "cosine":
        name = STEPS[federation.strategy]
        default = inspect.signature(type(averaging).__init__).parameters[name].default
        factor = cosine_decay((number - 1) / federation.rounds)
        setattr(averaging, name, factor * float(federation.options.get(name, default)))
        if isinstance(averaging, flower.FedAvgM):
            # Flower decides once, by the step and momentum that it is built with, whether it makes a step.
            averaging.server_opt = True


def begin_round(averaging: FedAvg, number: int, shift: NDArray[np.float32], nodes: Iterable[int]) -> None:
    """Tell the inner strategy a round's model; the messages that it builds are not used."""
    _forget_model(averaging)
    arrays = ArrayRecord({ARRAY: Array(shift.astype(np.float64))})
    list(averaging.configure_train(number, arrays, ConfigRecord(), _Cohort(nodes)))


def make_averaging(study: StudyConfig) -> FedAvg:
    """Build the Flower strategy that the study names, with the study's options for it.

    Raises:
        ConfigError: an option is not one of the strategy's, or the strategy refuses its value.
    """
    name, options = study.federation.strategy, dict(study.federation.options)
    cls = _STRATEGIES[name]
    own = [key for key in inspect.signature(cls.__init__).parameters if key not in _OURS]
    for key, value in options.items():
        if key not in own:
            hint = did_you_mean(key, own) if own else f": {name} has no options"
            raise ConfigError(f"federation.options.{key} is not an option of {name}{hint}")
        _check_option(f"federation.options.{key}", value, *_BOUNDS.get(key, (-math.inf, math.inf)))
    if name == "qfedavg":
        options.setdefault("client_learning_rate", study.training.learning_rate)
    if name == "fedprox":
        options.setdefault("proximal_mu", study.training.proximal)
    try:
        return cls(
            min_train_nodes=1,
            min_evaluate_nodes=1,
            min_available_nodes=1,
            weighted_by_key=EXAMPLES,
            **options,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"federation.options: {name} refuses {options}: {error}") from error


def _check_option(where: str, value: object, low: float, high: float) -> None:
    whole = where.rpartition(".")[2].startswith("num_")
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ConfigError(f"{where} is {value!r}, expected a {'whole ' if whole else ''}number")
    check_number(where, value, low=low, high=high)


def proximal(averaging: FedAvg, study: StudyConfig) -> float:
    """Return the weight of the proximal term at the sites: FedProx's own, else the training recipe's."""
    return float(getattr(averaging, "proximal_mu", study.training.proximal))


def _forget_model(averaging: FedAvg) -> None:
    """Make FedAvgM take the model of this round as its starting point, as the other strategies do.

    It keeps the model it made; ours is rounded to float32 for the wire, and a resumed run has no other.
    """
    if isinstance(averaging, flower.FedAvgM):
        averaging.current_arrays = None


def save_state(averaging: FedAvg, path: Path) -> None:
    """Write the strategy's momentum arrays, if it has any, to a safetensors file."""
    from safetensors.numpy import save

    arrays = _state(averaging)
    if arrays:
        write_atomic(path, save(arrays))


def restore_state(averaging: FedAvg, path: Path, *, size: int) -> None:
    """Put back what `save_state` wrote; a strategy without state, or a file never written, changes nothing.

    Shapes: every array is (size,).

    Raises:
        StateError: the file does not read or does not fit this study.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        return
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path} cannot be read ({error}): delete it to go on without momentum") from error
    fits = all(array.shape == (size,) and bool(np.isfinite(array).all()) for array in arrays.values())
    if not fits or not set(arrays) <= {"momentum", "first", "second"}:
        raise StateError(f"{path} is not of this study: delete it to go on without momentum")
    if isinstance(averaging, flower.FedAvgM) and "momentum" in arrays:
        averaging.momentum_vector = [arrays["momentum"]]
    elif {"first", "second"} <= set(arrays) and isinstance(averaging, flower.FedAdam | flower.FedYogi):
        averaging.m_t, averaging.v_t = {ARRAY: arrays["first"]}, {ARRAY: arrays["second"]}


def _state(averaging: Any) -> dict[str, NDArray[Any]]:
    if isinstance(averaging, flower.FedAvgM) and averaging.momentum_vector:
        return {"momentum": np.ascontiguousarray(averaging.momentum_vector[0])}
    if isinstance(averaging, flower.FedAdam | flower.FedYogi) and averaging.m_t and averaging.v_t:
        first, second = averaging.m_t[ARRAY], averaging.v_t[ARRAY]
        return {"first": np.ascontiguousarray(first), "second": np.ascontiguousarray(second)}
    return {}


Vector = NDArray[np.float32]


def weighted_mean_update(
    accepted: Mapping[int, ValidUpdate], changes: Mapping[int, Vector]
) -> NDArray[np.float64]:
    """The weighted mean of the changes of the accepted replies (layout size,), at least one.

    Added up in float64 and in the order of `accepted`, so that its last bit does not depend on who was first.
    One change is in memory at a time.
    """
    total: NDArray[np.float64] | None = None
    for node, one in accepted.items():
        change = changes[node]
        if total is None:
            total, part = np.zeros((2, change.size))
        total += np.multiply(change, one.weight, out=part, dtype=np.float64)
    assert total is not None
    return total / sum(one.weight for one in accepted.values())


def drift(
    accepted: Mapping[int, ValidUpdate], changes: Mapping[int, Vector], mean: NDArray[np.float64]
) -> dict[int, dict[str, float]]:
    """The drift of each accepted reply of a round, by the names of its columns in rounds.csv.

    A change, or a mean of them, that is zero has no direction: `update_cosine` is then absent.

    Shapes: mean, that of `weighted_mean_update`, (layout size,).
    """
    length = l2_norm(mean)
    found = {}
    for node, one in accepted.items():
        found[node] = {"update_norm": one.update_norm, "shift_norm": one.shift_norm}
        if lengths := one.update_norm * length:
            cosine = dot(changes[node], mean) / lengths
            # Rounding may take it a little past 1.
            found[node]["update_cosine"] = float(np.clip(cosine, -1.0, 1.0))
    return found
