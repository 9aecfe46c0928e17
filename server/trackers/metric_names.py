"""The names under which trackers get what a run writes. Pure functions: nothing here knows a tracker."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fedsigma.server.runs.rounds_table import ALL_SITES

__all__ = ["final_figures", "parameters", "row_metrics", "safe"]

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_NOT_METRICS = frozenset({"round", "site", "status", "reason"})


def safe(word: str) -> str:
    """A site's or version's name as one part of a metric's name, different for different names.

    Trackers take letters, digits and little else. A name with more gets a digest in place of what is lost.
    """
    if _SAFE.fullmatch(word):
        return word
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", word).strip("_-")[:40] or "name"
    # A point, which no name that is kept as it is has: the two kinds cannot meet.
    return f"{plain}.{hashlib.sha256(word.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def row_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of rounds.csv, as `pooled/accuracy` or `site/NAME/accuracy`."""
    pooled = row["site"] == ALL_SITES
    prefix = ALL_SITES if pooled else f"site/{safe(row['site'])}"
    return {
        f"{prefix}/{name}": float(value)
        for name, value in row.items()
        # The line of all sites has no bytes of its own.
        if name not in _NOT_METRICS and _finite(value) and not (pooled and name.startswith("bytes_"))
    }


def final_figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of summary.json, as `final/federated/accuracy` or `final/federated/site/NAME`."""
    found: dict[str, float] = {}
    for name, value in summary.items():
        if name == "versions" and isinstance(value, Mapping):
            for version, entry in value.items():
                found |= _method(f"final/version/{safe(version)}", entry)
        elif isinstance(value, Mapping):
            found |= _method(f"final/{name}", value)
        elif _finite(value):
            found[f"final/{name}"] = float(value)
    return found


def _method(prefix: str, entry: Mapping[str, Any]) -> dict[str, float]:
    told: dict[str, Any] = {f"site/{safe(site)}": one for site, one in entry.get("per_site", {}).items()}
    told |= entry.get("metrics", {}) | {name: entry.get(name) for name in ("accuracy", "everywhere")}
    for name, value in entry.get("fairness", {}).items():
        told[name] = value.get("accuracy") if isinstance(value, Mapping) else value
    return {f"{prefix}/{name}": float(value) for name, value in told.items() if _finite(value)}


def parameters(study: Mapping[str, Any]) -> dict[str, str]:
    """The study's settings, flat: `training.learning_rate`, with lists in one piece."""
    return dict(_flat("", study))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), item)
    elif isinstance(value, list | tuple):
        yield prefix, ", ".join(str(item) for item in value)
    elif value is not None:
        yield prefix, str(value)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
