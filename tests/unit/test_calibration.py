"""Calibration: the temperature of made-up predictions is found, and what does not fit is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from fedsigma.cli.main import main
from fedsigma.client.inference.calibration import Calibration, fit_temperature, scale_probabilities
from fedsigma.client.inference.loaded_model import ModelLoadError
from fedsigma.common.data.sources.registry import open_source
from tests.helpers.finished_run import make_run


@settings(max_examples=10, deadline=None)
@given(st.floats(0.3, 4.0), st.integers(0, 100))
def test_the_temperature_that_made_overconfident_probabilities_is_found(true: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(20_000, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature((logits * true).softmax(1), labels) == pytest.approx(true, rel=0.06)


@given(st.floats(0.2, 5.0))
def test_scaling_changes_no_decision_and_is_undone_by_its_inverse(temperature: float) -> None:
    probabilities = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)).softmax(1).double()
    found = scale_probabilities(probabilities, temperature)
    assert torch.equal(found.argmax(1), probabilities.argmax(1))
    torch.testing.assert_close(scale_probabilities(found, 1 / temperature), probabilities)
    torch.testing.assert_close(found.sum(1), torch.ones(50, dtype=torch.float64))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def test_the_commands_calibrate_and_abstain(run: Path, tmp_path: Path) -> None:
    source = open_source("demo", laboratories=["east"], train=6, test=4)
    kinds = {record.label for record in source.records}
    for number, record in enumerate(source.records):
        (tmp_path / "cells" / str(record.label)).mkdir(parents=True, exist_ok=True)
        image = source.image(record)
        assert isinstance(image, Image.Image) and len(kinds) >= 3
        image.save(tmp_path / "cells" / str(record.label) / f"{number}.png")
    file = tmp_path / "calibration.json"
    words = ["calibrate", str(run), "--data", f"folder:{tmp_path / 'cells'}", "--out", str(file)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    found = Calibration.read(file)
    assert f"Temperature {found.temperature:.3f}" in done.output and found.images >= 20

    def predicted(*options: str) -> list[dict[str, str]]:
        out = tmp_path / "x.csv"
        done = CliRunner().invoke(
            main, ["predict", str(run), str(tmp_path / "cells"), "--out", str(out), *options]
        )
        assert done.exit_code == 0, done.output
        return list(csv.DictReader(out.open()))

    plain, scaled_rows = predicted(), predicted("--calibration", str(file))
    assert [r["prediction"] for r in plain] == [r["prediction"] for r in scaled_rows]
    name = "probability_neutrophil"
    assert [r[name] for r in plain] != [r[name] for r in scaled_rows]
    careful = predicted("--abstain-below", "0.999")
    assert any(row["prediction"] == "" for row in careful)
    assert [r[name] for r in careful] == [r[name] for r in plain]

    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "round": 7}))
    refused = CliRunner().invoke(
        main,
        [
            "predict",
            str(run),
            str(tmp_path / "cells"),
            "--out",
            str(tmp_path / "y.csv"),
            "--calibration",
            str(file),
        ],
    )
    assert refused.exit_code == 3 and "calibrate again" in refused.output


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": "other"}', '{"format": "fedsigma-calibration-1"}', ""]
)
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ModelLoadError, match="is not a calibration"):
        Calibration.read(tmp_path / "x.json")


def test_a_temperature_that_is_none_is_refused(tmp_path: Path) -> None:
    Calibration(-1.0, 20, 0.1, 0.1, "s", 1).write(tmp_path / "x.json")
    with pytest.raises(ModelLoadError, match="expected a positive number"):
        Calibration.read(tmp_path / "x.json")
