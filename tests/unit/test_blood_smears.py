"""The synthetic demonstration set: repeatable, uneven, and not to be learned from colour alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedsigma.common.data.partition import partition
from fedsigma.common.data.records import DataError, site_table
from fedsigma.common.data.sampling import few_shot
from fedsigma.common.data.sources.registry import open_source
from fedsigma.common.data.synthetic.blood_smears import LABORATORIES, draw_picture
from fedsigma.common.data.synthetic.drawing import CELL_TYPES, draw_smear
from fedsigma.common.data.validation import check_source

Array = NDArray[np.float64]
CLASSES = list(CELL_TYPES)


def test_records() -> None:
    source = open_source("demo")
    assert len({r.key for r in source.records}) == len(source.records)
    assert all(r.group == r.key and r.site in LABORATORIES for r in source.records)
    rows = site_table(source.records, CLASSES)
    assert len(rows) == 16 and all(row.train >= 10 and row.test >= 10 for row in rows)
    assert 300 <= sum(row.train for row in rows) <= 340
    shares = {row.site: [r.train for r in rows if r.site == row.site] for row in rows}
    assert len({tuple(counts) for counts in shares.values()}) == 4  # each laboratory its own mix
    assert all(max(counts) >= 1.5 * min(counts) for counts in shares.values())


def test_repeatable_and_seeded() -> None:
    one, two, other = open_source("demo"), open_source("demo:seed=1"), open_source("demo", seed=2)
    record = one.records[5]
    assert one.image(record).tobytes() == two.image(record).tobytes()
    assert one.image(record).tobytes() != other.image(record).tobytes()
    assert one.image(record).size == (128, 128) and one.image(record).mode == "RGB"
    everything = [draw_picture(r.key, seed=1).tobytes() for r in open_source("demo", train=2, test=2).records]
    assert len(set(everything)) == len(everything)


def test_small_set_passes_the_check() -> None:
    assert check_source(open_source("demo", train=1, test=1), classes=CLASSES).ok


def test_refusals() -> None:
    with pytest.raises(DataError, match="option train"):
        open_source("demo", train=0)
    with pytest.raises(ValueError, match="no drawing for 'basophil'; known cell types: neutrophil"):
        draw_smear("basophil", None, np.random.default_rng(0))  # type: ignore[arg-type]


def colours(picture: Array) -> Array:
    """16 brightness bins of each channel, of the middle of the picture, where the cell is."""
    middle = picture[24:-24, 24:-24].astype(int) // 16
    counts = [np.bincount(middle[..., channel].ravel(), minlength=16) for channel in range(3)]
    return np.sqrt(np.concatenate(counts) / middle[..., 0].size)


def mean_colour(picture: Array) -> Array:
    return picture.reshape(-1, 3).mean(0)


def grown(mask: NDArray[np.bool_], steps: int) -> NDArray[np.bool_]:
    for _ in range(steps):
        near = [np.roll(mask, shift, axis) for axis in (0, 1) for shift in (1, -1)]
        mask = mask | near[0] | near[1] | near[2] | near[3]
    return mask


def shapes(picture: Array) -> Array:
    """Form of the nucleus (size, spread, thickness) and coarseness around it; no colour."""
    red, green = picture[..., 0].astype(float), picture[..., 1].astype(float)
    inner = red[20:-20, 20:-20]
    nucleus = np.zeros(red.shape, bool)
    nucleus[20:-20, 20:-20] = inner < (np.quantile(inner, 0.02) + np.quantile(red, 0.6)) / 2
    y, x = np.nonzero(nucleus)
    area = len(x)
    spread = np.sort(np.linalg.eigvalsh(np.cov(np.stack([x, y])))) / area
    reach = np.hypot(x - x.mean(), y - y.mean()) / np.sqrt(area)
    profile = np.histogram(reach, bins=[0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1, 2])[0] / area
    thickness, outside = [], ~nucleus[12:-12, 12:-12]
    for _ in range(13):
        outside = grown(outside, 1)
        thickness.append((~outside).sum() / area)
    around = grown(nucleus, 9) & ~grown(nucleus, 3)
    detail = np.abs(4 * green - sum(np.roll(green, s, a) for a in (0, 1) for s in (1, -1)))
    return np.array([np.sqrt(area), *spread, *profile, *thickness, np.log1p(detail[around].mean())])


def fitted_accuracy(train: Array, labels: Array, test: Array, truth: Array) -> float:
    """Accuracy of a logistic regression with a mild penalty on standardised features."""
    mean, scale = train.mean(0), train.std(0) + 1e-6
    x, z = (torch.tensor((a - mean) / scale, dtype=torch.float64) for a in (train, test))
    y = torch.tensor(labels)
    weight = torch.zeros(x.shape[1] + 1, len(CLASSES), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight[:-1] + weight[-1], y)
        value = value + 5 / len(x) * weight[:-1].square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        return float(((z @ weight[:-1] + weight[-1]).argmax(1).numpy() == truth).mean())


def test_shape_tells_the_types_apart_and_colour_does_not() -> None:
    source = open_source("demo", test=11)
    by_site = partition(source.records, "site", 1).values()
    train = [r for part in by_site for r in few_shot(part, shots=16, classes=CLASSES, seed=1)]
    test = [r for r in source.records if r.split == "test"]
    labels, truth = (np.array([CLASSES.index(r.label or "") for r in part]) for part in (train, test))
    pictures = [[np.asarray(source.image(r)) for r in part] for part in (train, test)]

    def accuracy(feature: object) -> float:
        one, two = (np.stack([feature(p) for p in part]) for part in pictures)  # type: ignore[operator]
        return fitted_accuracy(one, labels, two, truth)

    found = {f.__name__: accuracy(f) for f in (mean_colour, colours, shapes)}
    assert found["mean_colour"] < 0.45, found
    assert found["colours"] < 0.6, found
    assert found["shapes"] > 0.7, found
    assert found["shapes"] > found["colours"] + 0.2, found


def test_a_laboratory_by_itself_has_the_pictures_that_it_has_among_all() -> None:
    everything, east = open_source("demo"), open_source("demo", laboratories=["east"])
    assert [r for r in everything.records if r.site == "east"] == list(east.records)
    with pytest.raises(DataError, match="laboratories names 'moon', known are"):
        open_source("demo", laboratories=["moon"])
