"""The benchmark of sites that differ: its steps equal the product's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bench.gap.__main__ import main
from bench.gap.candidate import Candidate, ServerStep
from bench.gap.rounds import _divergence, cohorts_by_images, cohorts_in_turns, logit_offsets
from fedsigma.common.config.study import StudyConfig


def test_offsets_are_logs_of_raised_shares() -> None:
    offsets = logit_offsets(torch.tensor([2, 0, 1]), 1.5, 1.0)
    torch.testing.assert_close(offsets, 1.5 * torch.tensor([3 / 6, 1 / 6, 2 / 6]).log())


def test_divergence_is_that_of_the_chosen_classes_alone() -> None:
    teacher, student = torch.tensor([[5.0, 0.0, 0.0]]).repeat(3, 1), torch.zeros(3, 3)
    student[0] = torch.tensor([-9.0, 2.0, 2.0])
    student[1, 1] = math.log(3)
    among = torch.tensor([[False, True, True], [False, True, True], [False, False, True]])
    divergence = _divergence(teacher, student, among)
    # Halves against halves; halves against three quarters and one quarter; one class alone.
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    torch.testing.assert_close(divergence, torch.tensor([0.0, expected, 0.0]))


def test_in_turns_all_make_the_same_steps_and_by_images_as_many_as_their_share() -> None:
    images = {"a": 30, "b": 1, "c": 20, "d": 9}
    weights = torch.tensor([30.0, 1.0, 20.0, 9.0]) / 60
    study = StudyConfig.from_yaml("{name: s, backbone: b, classes: [a, b]}")
    for size in (1, 2):
        shares, times = torch.zeros(4), torch.zeros(4)
        turns = cohorts_in_turns(weights, turns=10, size=size, seed=1)
        for cohort, share in turns:
            shares[cohort] += share
            times[cohort] += 1
        assert len(turns) == 40 // size and times.tolist() == [10] * 4
        torch.testing.assert_close(shares / shares.sum(), weights)
    dealt = cohorts_by_images(images, study, turns=30, size=1)
    counts = torch.bincount(torch.tensor([cohort[0] for cohort, _ in dealt]), minlength=4)
    assert len(dealt) == 120 and (counts - 120 * weights).abs().max() < 3
    assert all(share.tolist() == [1.0] for _, share in dealt)
    assert len(cohorts_in_turns(weights, turns=7, size=4, seed=1)) == 7
    with pytest.raises(ValueError, match="cannot take turns by 3"):
        cohorts_in_turns(weights, turns=1, size=3, seed=1)


@pytest.mark.parametrize("beta2", [0.9, 0.99])
def test_the_servers_adam_is_flowers(beta2: float) -> None:
    from bench.methods.federation import VectorAggregator

    options = f"{{eta: 0.2, beta_1: 0.9, beta_2: {beta2}, tau: 1.0e-8}}"
    federation = f"{{strategy: fedadam, schedule: cosine, rounds: 5, options: {options}}}"
    study = StudyConfig.from_yaml(f"{{name: s, backbone: b, classes: [a, b], federation: {federation}}}")
    strategy = VectorAggregator(study)
    candidate = Candidate(
        local_steps=1, server_optimiser="adam", constant_rate=True, eta=0.2, beta1=0.9, beta2=beta2
    )
    server, shift = ServerStep(candidate, torch.ones(4), [slice(0, 4)]), torch.zeros(4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for number in range(1, 6):
        change = torch.randn(4, generator=generator, dtype=torch.float64)
        flower = strategy.rule_of_round(number, [0.0])(shift.numpy(), [(shift + change).numpy()], [1])
        shift = shift + server.step(change, number, 5)
        torch.testing.assert_close(torch.from_numpy(flower), shift, rtol=1e-5, atol=1e-6)
        shift = torch.from_numpy(flower)


def test_the_test_part_chooses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["gap", "--data", str(tmp_path), "--out", str(tmp_path), "--show"]
    monkeypatch.setenv("FEDSIGMA_DATA", "")
    monkeypatch.setattr("sys.argv", [*arguments, "--test", "pooled", "--rates", "0.02", "0.04"])
    with pytest.raises(SystemExit, match="2"):
        main()
    monkeypatch.setattr("sys.argv", [*arguments, "--validate", "product"])
    with pytest.raises(SystemExit, match="evaluated on the test part only"):
        main()
