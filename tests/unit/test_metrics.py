"""Metrics against hand-made cases and scikit-learn's definitions written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsigma.common.training.metrics import Predictions, compute_metrics
from fedsigma.server.federation.validation import metrics_of_confusion


def predictions(rows: list[list[float]], labels: list[int]) -> Predictions:
    return Predictions(torch.tensor(rows), torch.tensor(labels))


def test_hand_made_case() -> None:
    p = predictions([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]], [0, 0, 1, 1])
    s = compute_metrics(p)
    assert s.accuracy == pytest.approx(0.75)
    assert s.balanced_accuracy == pytest.approx(0.75)
    assert s.auroc == pytest.approx(1.0)
    assert s.f1 == pytest.approx((0.8 + 2 / 3) / 2)
    assert s.confusion.tolist() == [[2, 0], [1, 1]]
    assert s.ece == pytest.approx((0.1 + 0.2 + 0.6 + 0.3) / 4)


def test_balanced_accuracy_differs_from_accuracy() -> None:
    s = compute_metrics(predictions([[1.0, 0.0]] * 10, [0] * 9 + [1]))
    assert s.accuracy == pytest.approx(0.9) and s.balanced_accuracy == pytest.approx(0.5)


def test_class_that_never_occurs_is_left_out() -> None:
    s = compute_metrics(predictions([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]], [0, 1]))
    assert s.balanced_accuracy == s.f1 == s.auroc == pytest.approx(1.0)


def test_undefined_metrics_are_absent() -> None:
    one = compute_metrics(predictions([[0.8, 0.2]], [0]))
    assert one.auroc is None and "auroc" not in one.to_dict() and one.to_dict()["accuracy"] == 1
    nothing = compute_metrics(Predictions(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)))
    assert nothing.to_dict() == {"examples": 0}


def test_shapes_and_labels_are_checked() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        predictions([[1.0, 0.0]], [0, 1])
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        predictions([[1.0, 0.0]], [2])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(1, 30), st.integers(0, 2**31))
def test_accuracy_of_all_sites_is_their_weighted_mean(classes: int, count: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    parts = [
        Predictions(torch.rand(n, classes, generator=g).softmax(1), torch.randint(classes, (n,), generator=g))
        for n in (count, 7)
    ]
    pooled, (a, b) = compute_metrics(Predictions.concatenate(parts)), (compute_metrics(p) for p in parts)
    assert pooled.accuracy == pytest.approx((count * a.accuracy + 7 * b.accuracy) / (count + 7))
    assert torch.equal(pooled.confusion, a.confusion + b.confusion)
    assert all(0 <= v <= 1 for k, v in pooled.to_dict().items() if k != "examples")


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(1, 30), st.integers(0, 2**31))
def test_metrics_of_a_confusion_matrix_equal_those_of_predictions(
    classes: int, count: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=g)
    s = compute_metrics(Predictions(torch.rand(count, classes, generator=g).softmax(1), labels))
    settled = metrics_of_confusion(s.confusion.numpy())
    assert settled == pytest.approx({name: getattr(s, name) for name in settled}, abs=1e-6)
