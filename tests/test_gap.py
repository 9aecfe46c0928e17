"""The bench of unlike sites: what it reckons in one pass is what the product does site by site."""

from __future__ import annotations

import math

import pytest
import torch

from bench.gap.rounds import _divergence, site_offsets
from bench.gap.ways import Server, Way


def test_offsets_are_logs_of_raised_shares() -> None:
    found = site_offsets(torch.tensor([2, 0, 1]), 1.5, 1.0)
    torch.testing.assert_close(found, 1.5 * torch.tensor([3 / 6, 1 / 6, 2 / 6]).log())


def test_divergence_is_that_of_the_chosen_classes_alone() -> None:
    teacher, student = torch.tensor([[5.0, 0.0, 0.0]]).repeat(3, 1), torch.zeros(3, 3)
    student[0] = torch.tensor([-9.0, 2.0, 2.0])
    student[1, 1] = math.log(3)
    among = torch.tensor([[False, True, True], [False, True, True], [False, False, True]])
    found = _divergence(teacher, student, among)
    # Halves against halves; halves against three quarters and one quarter; one class alone.
    wanted = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    torch.testing.assert_close(found, torch.tensor([0.0, wanted, 0.0]))


@pytest.mark.parametrize("beta2", [0.9, 0.99])
def test_the_servers_adam_is_flowers(beta2: float) -> None:
    from bench.methods.federation import _Strategy
    from fedsigma.common.config import StudyConfig

    options = f"{{eta: 0.2, beta_1: 0.9, beta_2: {beta2}, tau: 1.0e-8}}"
    federation = f"{{strategy: fedadam, schedule: cosine, rounds: 5, options: {options}}}"
    study = StudyConfig.from_yaml(f"{{name: s, backbone: b, classes: [a, b], federation: {federation}}}")
    strategy = _Strategy(study)
    way = Way(steps=1, server="adam", flat=True, eta=0.2, beta1=0.9, beta2=beta2)
    server, shift = Server(way, torch.ones(4), [slice(0, 4)]), torch.zeros(4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for number in range(1, 6):
        change = torch.randn(4, generator=generator, dtype=torch.float64)
        theirs = strategy.of_round(number, [0.0])(shift.numpy(), [(shift + change).numpy()], [1])
        shift = shift + server.step(change, number, 5)
        torch.testing.assert_close(torch.from_numpy(theirs), shift, rtol=1e-5, atol=1e-6)
        shift = torch.from_numpy(theirs)
