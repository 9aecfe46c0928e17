"""The candidates that were tried, by name."""

from __future__ import annotations

from dataclasses import replace

from bench.gap.candidate import Candidate

POOLED_RATES = (0.01, 0.02, 0.04)
TODAY = Candidate()
ADAM = Candidate(
    optimiser="sgd", learning_rate=1.0, constant_rate=True, server_optimiser="adam", beta1=0.9, eta=0.2
)
SUM = replace(ADAM, local_steps=1, eta=0.04)
TURNS = replace(SUM, cohort_size=1)
PAIRS = replace(SUM, cohort_size=2, eta=0.06)
DEALT = replace(TURNS, by_images=True)

CANDIDATES: dict[str, Candidate] = {
    "fedavg-long": replace(TODAY, local_steps=12, beta1=0.0),
    "today": TODAY,
    "today-adjust-1": replace(TODAY, logit_adjustment=1.0),
    "today-absent-0.5": replace(TODAY, absent_scale=0.5),
    "today-distil": replace(TODAY, distillation=1.0),
    "today-not-true": replace(TODAY, not_true_distillation=1.0),
    "today-proximal": replace(TODAY, proximal=0.1),
    "client-momentum": replace(ADAM, client_momentum=0.5),
    "control": replace(ADAM, control_variates=True),
    "sum-adam-0.1": replace(SUM, eta=0.1),
    "sum-adam-0.1-b2-0.9": replace(SUM, eta=0.1, beta2=0.9),
    "sum-adam-0.2": replace(SUM, eta=0.2),
    "sum-adam-0.2-adjust-1": replace(SUM, eta=0.2, logit_adjustment=1.0),
    "sum-equal": replace(SUM, eta=0.2, equal_weights=True),
    "sum-frozen-text": replace(SUM, eta=0.2, frozen_text=True),
    "sum-matrix": replace(SUM, server_optimiser="matrix", eta=0.1),
    "sum-power-0.5": replace(SUM, eta=0.2, spectrum_power=0.5),
    "sum-yogi-0.2": replace(SUM, server_optimiser="yogi", eta=0.2),
    "turns-0.04": TURNS,
    "turns-0.04-equal": replace(TURNS, equal_weights=True),
    "turns-0.08": replace(TURNS, eta=0.08),
    "pairs-0.06": PAIRS,
    "pairs-0.06-equal": replace(PAIRS, equal_weights=True),
    "pairs-0.08": replace(PAIRS, eta=0.08),
    "dealt-0.04": DEALT,
    "dealt-distil": replace(DEALT, distillation=1.0),
    "dealt-pairs-0.06": replace(PAIRS, by_images=True),
}
"""`today` is the recipe of the two studies, `sum` one plain step of all sites a round, `turns` and `pairs`
one of one or two sites, `dealt` one of a site sampled by its images; the rest of a name is the difference."""
