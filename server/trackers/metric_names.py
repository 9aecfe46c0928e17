"""The names of metrics and parameters in trackers, independent of the tracking library."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.config.schema import flatten

__all__ = ["final_metrics", "flatten_parameters", "row_metrics", "safe_name"]

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_NOT_METRICS = frozenset({"round", "site", "status", "reason"})


def safe_name(name: str) -> str:
    """Return the name of a site or version as a part of a metric's name, unique for each name.

    Trackers allow letters, digits and few other characters. Names with others end in a hash of the name.
    """
    if _SAFE.fullmatch(name):
        return name
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-")[:40] or "name"
    # The point keeps these names apart from those that are returned unchanged.
    return f"{plain}.{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def row_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a row of rounds.csv by name, such as `site/NAME/accuracy`."""
    is_all_sites = row["site"] == ALL_SITES
    prefix = "all_sites" if is_all_sites else f"site/{safe_name(row['site'])}"
    return {
        f"{prefix}/{name}": float(value)
        for name, value in row.items()
        # The row of all sites has no bytes.
        if name not in _NOT_METRICS and _is_finite(value) and not (is_all_sites and name.startswith("bytes_"))
    }


def final_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of summary.json by name, such as `final/federated/site/NAME`."""
    metrics: dict[str, float] = {}
    for name, value in summary.items():
        if name == "versions" and isinstance(value, Mapping):
            for version, entry in value.items():
                metrics |= _method_metrics(f"final/version/{safe_name(version)}", entry)
        elif isinstance(value, Mapping):
            metrics |= _method_metrics(f"final/{name}", value)
        elif _is_finite(value):
            metrics[f"final/{name}"] = float(value)
    return metrics


def _method_metrics(prefix: str, entry: Mapping[str, Any]) -> dict[str, float]:
    values: dict[str, Any] = {
        f"site/{safe_name(site)}": accuracy for site, accuracy in entry.get("per_site", {}).items()
    }
    values |= entry.get("metrics", {}) | {name: entry.get(name) for name in ("accuracy", "everywhere")}
    for name, value in entry.get("fairness", {}).items():
        values[name] = value.get("accuracy") if isinstance(value, Mapping) else value
    return {f"{prefix}/{name}": float(value) for name, value in values.items() if _is_finite(value)}


def flatten_parameters(study: Mapping[str, Any]) -> dict[str, str]:
    """Return the study's settings by full name, such as `training.learning_rate`; lists become one text."""
    return {
        name: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for name, value in flatten(study)
        if value is not None and value != {}
    }


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
