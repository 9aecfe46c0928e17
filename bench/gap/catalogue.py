"""What was tried, by name."""

from __future__ import annotations

from dataclasses import replace

from bench.gap.ways import Way

__all__ = ["POOLED_RATES", "WAYS"]

POOLED_RATES = (0.01, 0.02, 0.04)
TODAY = Way()
SUM = Way(steps=1, optimiser="sgd", rate=1.0, flat=True, server="adam", beta1=0.9, beta2=0.99, eta=0.04)

WAYS: dict[str, Way] = {
    "fedavg-long": replace(TODAY, steps=12, server="momentum", beta1=0.0),
    "today": TODAY,
    "sum-adam-0.1": replace(SUM, eta=0.1),
    "sum-adam-0.2": replace(SUM, eta=0.2),
    "today-adjust-1": replace(TODAY, adjust=1.0),
    "sum-adam-0.2-adjust-1": replace(SUM, eta=0.2, adjust=1.0),
    "sum-adam-0.1-b2-0.9": replace(SUM, eta=0.1, beta2=0.9),
    "turns-0.04": replace(SUM, eta=0.04, beta1=0.9, at_once=1),
    "turns-0.08": replace(SUM, eta=0.08, beta1=0.9, at_once=1),
    "turns-0.04-equal": replace(SUM, eta=0.04, beta1=0.9, at_once=1, equal=True),
    "dealt-0.04": replace(SUM, eta=0.04, beta1=0.9, at_once=1, by_images=True),
    "dealt-distil": replace(SUM, eta=0.04, beta1=0.9, at_once=1, by_images=True, distil=1.0),
    "dealt-pairs-0.06": replace(SUM, eta=0.06, beta1=0.9, at_once=2, by_images=True),
    "pairs-0.08": replace(SUM, eta=0.08, beta1=0.9, at_once=2),
    "pairs-0.06": replace(SUM, eta=0.06, beta1=0.9, at_once=2),
    "pairs-0.06-equal": replace(SUM, eta=0.06, beta1=0.9, at_once=2, equal=True),
    "sum-matrix": replace(SUM, server="matrix", beta1=0.9, eta=0.1),
    "sum-yogi-0.2": replace(SUM, server="yogi", eta=0.2),
    "client-momentum": replace(
        TODAY, optimiser="sgd", server="adam", rate=1.0, flat=True, eta=0.2, beta1=0.9, client_momentum=0.5
    ),
    "control": replace(
        TODAY, optimiser="sgd", server="adam", rate=1.0, flat=True, eta=0.2, beta1=0.9, control=True
    ),
    "today-absent-0.5": replace(TODAY, absent=0.5),
    "today-distil": replace(TODAY, distil=1.0),
    "today-not-true": replace(TODAY, not_true=1.0),
    "today-proximal": replace(TODAY, proximal=0.1),
    "sum-equal": replace(SUM, eta=0.2, equal=True),
    "sum-power-0.5": replace(SUM, eta=0.2, power=0.5),
    "sum-frozen-text": replace(SUM, eta=0.2, frozen_text=True),
}
"""The candidates: `today` is the recipe of the two studies, `sum` plain steps; a name says what differs."""
