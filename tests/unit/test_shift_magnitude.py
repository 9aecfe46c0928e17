"""Where a shift is large: the mean by tower, part and layer, for the report and for the history."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fedsigma.common.sigma import Entry, Layout
from fedsigma.server.report.data import collect_report_data
from fedsigma.server.runs.shift_magnitude import shift_magnitudes, to_towers
from tests.helpers.synthetic_run import synthetic_layout, synthetic_shift, write_synthetic_run


def entry(part: str, tower: str, layer: int, offset: int, size: int) -> Entry:
    name = f"{tower}.{layer}.{part}.{offset}"
    return Entry(weight=name, part=part, tower=tower, layer=layer, offset=offset, size=size, rows=(0, size))


LAYOUT = Layout(
    (
        entry("q", "image", 0, 0, 2),
        entry("q", "image", 2, 2, 1),
        entry("mlp", "image", 2, 3, 1),
        entry("mlp", "image", 2, 4, 3),
        entry("v", "text", 5, 7, 1),
    )
)
SHIFT = np.array([1, -3, 1 / 3, -1, 2, 2, -3, 0], np.float32)


def test_cell_is_the_mean_magnitude_of_its_matrices() -> None:
    image, text = shift_magnitudes(SHIFT, LAYOUT)
    assert (image.tower, image.parts, image.layers) == ("image", ("q", "mlp"), (0, 2))
    np.testing.assert_allclose(image.values, [[2, 1 / 3], [np.nan, 2]], rtol=1e-6)
    assert (text.tower, text.layers, text.values.tolist()) == ("text", (5,), [[0]])


def test_as_json_four_digits_and_null_where_nothing_is_adapted() -> None:
    towers = to_towers(shift_magnitudes(SHIFT, LAYOUT))
    assert json.loads(json.dumps(towers, allow_nan=False)) == {
        "image": {"layers": [0, 2], "parts": {"q": [2.0, 0.3333], "mlp": [None, 2.0]}},
        "text": {"layers": [5], "parts": {"v": [0.0]}},
    }


def test_the_report_shows_what_the_history_ends_with(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path / "run", rounds=3)
    assert to_towers(collect_report_data(folder).shift_magnitudes) == folder.shift_magnitudes()[-1]["towers"]
    layout = synthetic_layout()
    assert (
        to_towers(shift_magnitudes(synthetic_shift(layout), layout))
        == folder.shift_magnitudes()[-1]["towers"]
    )
