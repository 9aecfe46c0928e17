"""How a round's updates become the next global shift: the weighted mean, and server optimisers on top of it.

With w the global shift of the round, u_i the update of site i and n_i its weight, the weighted mean update is
u = sum_i n_i u_i / sum_i n_i, and FedAvg's next shift is w + u. The server optimisers (Reddi et al. 2021,
arXiv:2003.00295; Hsu et al. 2019, arXiv:1909.06335) take -u as a gradient. Names, defaults and results are
those of Flower's strategies, bit for bit.

An optimiser is a function `rule(shift, mean_model, state, *, round, **options) -> (next shift, state)`:

    shift, mean_model: w and w + u, shape (values,), float64.
    state: what the rule keeps from round to round, by name, shape (values,) each; empty before the first
    round. round: the number of the round, from 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedsigma.common.config.federation import STEPS
from fedsigma.common.config.schema import ConfigError, check_number, did_you_mean
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.config.training import cosine_decay
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.utils.files import write_atomic
from fedsigma.server.federation import robust_aggregation
from fedsigma.server.federation.validation import SiteUpdate, dot, l2_norm

__all__ = [
    "AggregationError",
    "Aggregator",
    "OptimizerStateError",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedprox",
    "fedyogi",
    "update_statistics",
    "weighted_mean_update",
]

Vector = NDArray[np.float32]
Values = NDArray[np.float64]
State = dict[str, Values]


class OptimizerStateError(FedSigmaError, ValueError):
    """The saved state of a server optimiser cannot be used."""


class AggregationError(FedSigmaError, RuntimeError):
    """A rule's result is not a finite shift."""

    code = 1


def fedavg(shift: Values, mean_model: Values, state: State, *, round: int) -> tuple[Values, State]:
    """The weighted mean of the sites' models (McMahan et al. 2017, arXiv:1602.05629)."""
    return mean_model, state


def fedprox(
    shift: Values, mean_model: Values, state: State, *, round: int, proximal_mu: float = 0.0
) -> tuple[Values, State]:
    """As `fedavg`; the proximal term acts while sites train (Li et al. 2020, arXiv:1812.06127)."""
    return mean_model, state


def fedavgm(
    shift: Values,
    mean_model: Values,
    state: State,
    *,
    round: int,
    server_learning_rate: float = 1.0,
    server_momentum: float = 0.0,
) -> tuple[Values, State]:
    """Server momentum: m = momentum m - u, w = w - rate m (Hsu et al. 2019, arXiv:1909.06335)."""
    if server_momentum == 0.0 and server_learning_rate == 1.0:
        return mean_model, state
    gradient = shift - mean_model
    if server_momentum > 0.0:
        if "momentum" in state:
            gradient = server_momentum * state["momentum"] + gradient
        state = {"momentum": gradient}
    return shift - server_learning_rate * gradient, state


def fedadam(
    shift: Values,
    mean_model: Values,
    state: State,
    *,
    round: int,
    eta: float = 1e-1,
    beta_1: float = 0.9,
    beta_2: float = 0.99,
    tau: float = 1e-3,
) -> tuple[Values, State]:
    """Adam on the mean update, with Flower's bias correction by round + 1 (Reddi et al. 2021)."""
    update = mean_model - shift
    first = beta_1 * state.get("first", np.zeros_like(shift)) + (1 - beta_1) * update
    second = beta_2 * state.get("second", np.zeros_like(shift)) + (1 - beta_2) * (update**2)
    rate = eta * np.sqrt(1 - np.power(beta_2, round + 1.0)) / (1 - np.power(beta_1, round + 1.0))
    return shift + rate * first / (np.sqrt(second) + tau), {"first": first, "second": second}


def fedyogi(
    shift: Values,
    mean_model: Values,
    state: State,
    *,
    round: int,
    eta: float = 1e-2,
    beta_1: float = 0.9,
    beta_2: float = 0.99,
    tau: float = 1e-3,
) -> tuple[Values, State]:
    """Yogi on the mean update (Reddi et al. 2021)."""
    update = mean_model - shift
    first = beta_1 * state.get("first", np.zeros_like(shift)) + (1 - beta_1) * update
    second = state.get("second", np.zeros_like(shift))
    second = second - (1.0 - beta_2) * (update**2) * np.sign(second - update**2)
    return shift + eta * first / (np.sqrt(second) + tau), {"first": first, "second": second}


Rule = Callable[..., Any]
OPTIMISERS: dict[str, Rule] = {rule.__name__: rule for rule in (fedavg, fedprox, fedavgm, fedadam, fedyogi)}
ROBUST_RULES: dict[str, Rule] = {
    name: getattr(robust_aggregation, name) for name in robust_aggregation.__all__
}
_BELOW_1 = 0.999999
_BOUNDS: dict[str, tuple[float, float]] = {
    "proximal_mu": (0, 1e6),
    "server_learning_rate": (1e-9, 1e6),
    "server_momentum": (0, _BELOW_1),
    "eta": (1e-9, 1e6),
    "beta_1": (0, _BELOW_1),
    "beta_2": (0, _BELOW_1),
    "tau": (1e-12, 1e6),
    "beta": (0, 0.499999),
    "num_malicious_nodes": (0, 100_000),
    "num_nodes_to_select": (1, 100_000),
    "client_learning_rate": (1e-12, 1e6),
    "q": (0, 1e6),
}


class Aggregator:
    """The aggregation rule of a study, with its options and its state.

    Args:
        study: Its `federation.strategy`, `federation.options` and `federation.schedule` are used.

    Attributes:
        needs_all_updates: Whether the rule needs all updates at once, so that memory grows with the sites.
        proximal: Weight of the proximal term at the sites.
        state: What the rule keeps from round to round.

    Raises:
        ConfigError: An option is unknown, of the wrong type or out of bounds.
    """

    def __init__(self, study: StudyConfig) -> None:
        self.name = study.federation.strategy
        self.needs_all_updates = self.name in ROBUST_RULES
        self._rule = (OPTIMISERS | ROBUST_RULES)[self.name]
        self._federation = study.federation
        self._defaults = {
            parameter.name: parameter.default
            for parameter in inspect.signature(self._rule).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "round"
        }
        self._options = dict(study.federation.options)
        self._check_options()
        if self.name == "qfedavg":
            self._options.setdefault("client_learning_rate", study.training.learning_rate)
        self.proximal = float(self._options.get("proximal_mu", study.training.proximal))
        self.state: State = {}

    def _check_options(self) -> None:
        for name, value in self._options.items():
            where = f"federation.options.{name}"
            if name not in self._defaults:
                known = list(self._defaults)
                hint = did_you_mean(name, known) if known else f": {self.name} has no options"
                raise ConfigError(f"{where} is not an option of {self.name}{hint}")
            is_count = name.startswith("num_")
            if isinstance(value, bool) or not isinstance(value, int if is_count else int | float):
                raise ConfigError(f"{where} is {value!r}, expected a {'whole ' if is_count else ''}number")
            low, high = _BOUNDS[name]
            check_number(where, value, low=low, high=high)

    def options(self, round: int) -> dict[str, Any]:
        """The rule's options in a round: the study's, with the server's step by its schedule."""
        if self._federation.schedule != "cosine":
            return self._options
        name = STEPS[self.name]
        factor = cosine_decay((round - 1) / self._federation.rounds)
        return self._options | {name: factor * float(self._options.get(name, self._defaults[name]))}

    def step(
        self, shift: Vector, mean: Values, each: Iterable[tuple[Vector, float, float]] = (), *, round: int
    ) -> Vector:
        """Compute the next global shift, and keep the rule's new state.

        Args:
            shift: The global shift that the round began with, shape (values,), float32.
            mean: The weighted mean update, shape (values,).
            each: The update, weight and training loss of each accepted site; used by robust rules alone.
            round: Number of the round, from 1.

        Returns:
            The next global shift, shape (values,), float32.

        Raises:
            AggregationError: The result is not finite.
        """
        start, options = shift.astype(np.float64), self.options(round)
        if self.needs_all_updates:
            sites = [(start + update, weight, loss) for update, weight, loss in each]
            result = self._rule(start, sites, **options)
        else:
            result, self.state = self._rule(start, start + mean, self.state, round=round, **options)
        next_shift: Vector = result.astype(np.float32)
        if not bool(np.isfinite(next_shift).all()):
            raise AggregationError(
                f"{self.name} gave no finite shift in round {round}: check federation.options"
            )
        return next_shift

    def save_state(self, path: Path) -> None:
        """Write the state to a safetensors file; nothing is written while there is none.

        Raises:
            OSError: The file cannot be written.
        """
        if self.state:
            write_atomic(path, save({name: np.ascontiguousarray(v) for name, v in self.state.items()}))

    def load_state(self, path: Path, *, size: int) -> None:
        """Read the state, arrays of `size` values each; without a file it stays empty.

        Raises:
            OptimizerStateError: The file cannot be parsed or is of another study.
        """
        if not path.is_file():
            return
        try:
            arrays = load_file(path)
        except (SafetensorError, OSError) as error:
            raise OptimizerStateError(
                f"{path} cannot be read ({error}): delete it to resume without momentum"
            ) from error
        fits = all(array.shape == (size,) and bool(np.isfinite(array).all()) for array in arrays.values())
        if not fits or not set(arrays) <= {"momentum", "first", "second"}:
            raise OptimizerStateError(f"{path} is not of this study: delete it to resume without momentum")
        self.state = arrays


def weighted_mean_update(weights: Mapping[int, float], updates: Mapping[int, Vector]) -> Values:
    """Compute the weighted mean update.

    Summed in float64 and in the order of `weights`, so that the last bit does not depend on who replied
    first. One update is in memory at a time.

    Args:
        weights: Weights of the accepted updates by node, at least one.
        updates: The updates by node, shape (values,) each.

    Returns:
        Shape (values,).
    """
    total, product = np.zeros((2, updates[next(iter(weights))].size))
    for node, weight in weights.items():
        total += np.multiply(updates[node], weight, out=product, dtype=np.float64)
    return total / sum(weights.values())


def update_statistics(
    accepted: Mapping[int, SiteUpdate], updates: Mapping[int, Vector], mean: Values
) -> dict[int, dict[str, float]]:
    """How far each site moved in a round, and how far in the direction of the mean.

    With w the global shift, u_i the update of site i and u the weighted mean update:

        update_norm_i = ||u_i||,  update_cosine_i = u_i . u / (||u_i|| ||u||),  shift_norm_i = ||w + u_i||.

    A cosine far below the others', or negative, is the sign of images that ask for another model. A site's
    own update is part of the mean, so a single site has a cosine of 1.

    Args:
        accepted: The accepted updates by node.
        updates: The vectors of these updates by node, shape (values,) each.
        mean: The result of `weighted_mean_update`, shape (values,).

    Returns:
        The values by node and by column of rounds.csv; no cosine where an update or the mean is zero.
    """
    mean_norm = l2_norm(mean)
    statistics = {}
    for node, update in accepted.items():
        statistics[node] = {"update_norm": update.update_norm, "shift_norm": update.shift_norm}
        if norms := update.update_norm * mean_norm:
            cosine = dot(updates[node], mean) / norms
            # Rounding may take it slightly past 1.
            statistics[node]["update_cosine"] = float(np.clip(cosine, -1.0, 1.0))
    return statistics
