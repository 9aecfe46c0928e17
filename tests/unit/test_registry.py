"""The registry: versions are signed, tampering is found, and shifts are added as the mathematics says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedsigma.cli import models
from fedsigma.common.registry import Manifest, ModelError, ModelRegistry, SiteRow, Version, registry_folder
from fedsigma.common.registry.compare import compare
from fedsigma.common.registry.publish import publish
from fedsigma.common.registry.shift_file import SavedShift, load_shift, to_bytes
from fedsigma.common.registry.task_arithmetic import combine, publish_combination
from fedsigma.common.sigma import Entry, Fingerprint, Layout

SIZES = (("image", "q", 4), ("image", "mlp", 3), ("text", "v", 5))
STUDY = "name: demo\nbackbone: starter\nclasses: [cat, dog]\n"
SUMMARY = {
    "sites": ["north", "south"],
    "zero_shot": {"accuracy": 0.25, "metrics": {"f1": 0.2}},
    "federated": {
        "accuracy": 0.75,
        "metrics": {"f1": 0.7, "auroc": 0.9},
        "per_site": {"north": 0.8, "south": 0.7},
    },
}


def layout() -> Layout:
    entries, offset = [], 0
    for number, (tower, part, size) in enumerate(SIZES):
        entries.append(
            Entry(
                weight=f"{tower}.{number}.{part}",
                part=part,
                tower=tower,
                layer=0,
                offset=offset,
                size=size,
                rows=(0, size),
            )
        )
        offset += size
    return Layout(entries=tuple(entries))


def saved(seed: int = 0, *, weights: str = "ab" * 32, study: str = STUDY) -> SavedShift:
    shift = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    fingerprint = Fingerprint(weights=weights, layout=layout().digest, sketch=((0.0,),))
    return SavedShift(
        shift=shift,
        layout_json=layout().to_json(),
        fingerprint_json=fingerprint.to_json(),
        study_yaml=study,
        round=3,
    )


def add(registry: ModelRegistry, folder: Path, seed: int = 0, **options: str) -> Version:
    folder.mkdir(exist_ok=True)
    (folder / "sigma.safetensors").write_bytes(to_bytes(saved(seed, **options)))
    return publish(registry, folder, SUMMARY, named={"north"})


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(tmp_path / "models")


def test_a_run_becomes_the_next_version(registry: ModelRegistry, tmp_path: Path) -> None:
    assert add(registry, tmp_path / "run", 0).manifest.reference == "demo@1"
    version = add(registry, tmp_path / "run", 1)
    manifest = registry.find("demo").manifest
    assert manifest == version.manifest and manifest.reference == "demo@2"
    assert registry.find("demo@1").manifest.version == 1
    assert manifest.results["federated"]["accuracy"] == 0.75
    # One site wants to be named, the other counts; the order does not tell which it is.
    assert manifest.sites == (SiteRow(name="", accuracy=0.7), SiteRow(name="north", accuracy=0.8))
    assert "south" not in "".join(p.read_text(errors="replace") for p in version.path.iterdir())
    card = (version.path / "card.md").read_text()
    assert "not a medical device" in card and "75.0 %" in card and "2: north, 1 not named" in card
    assert "cat, dog" in card and "was not differentially private" in card
    np.testing.assert_array_equal(load_shift(version.path).shift, saved(1).shift)
    assert registry.verify() == []


@pytest.mark.parametrize(
    "file", ["sigma.safetensors", "study.yaml", "card.md", "manifest.json", "manifest.sig"]
)
def test_a_changed_file_is_refused(registry: ModelRegistry, tmp_path: Path, file: str) -> None:
    folder = add(registry, tmp_path / "run").path
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(ModelError):
        registry.find("demo")
    assert len(registry.verify()) == 1
    done = CliRunner().invoke(models.app, ["models", "verify", "--registry", str(registry.path)])
    assert done.exit_code == 4


def test_removed_added_or_swapped_lines_are_detected(registry: ModelRegistry, tmp_path: Path) -> None:
    one, two = add(registry, tmp_path / "run", 0).path, add(registry, tmp_path / "run", 1).path
    (one / "extra.txt").write_text("x")
    assert "extra.txt" in registry.verify()[0]
    (one / "extra.txt").unlink()
    shutil.rmtree(two)
    assert registry.verify() == ["demo@2 is missing"]
    shutil.copytree(one, two)
    with pytest.raises(ModelError, match="moved or replaced"):
        registry.find("demo@2")


def test_a_version_signed_by_another_key_is_refused(registry: ModelRegistry, tmp_path: Path) -> None:
    add(registry, tmp_path / "run", 0)
    other = ModelRegistry(tmp_path / "other")
    foreign = add(other, tmp_path / "run", 1)
    shutil.rmtree(registry.path / "demo" / "1")
    shutil.copytree(foreign.path, registry.path / "demo" / "1")
    with pytest.raises(ModelError, match="is signed by"):
        registry.find("demo@1")
    assert Manifest.read(foreign.path).signer == other.public_key
    with pytest.raises(ModelError, match="is signed by"):
        Manifest.read(foreign.path, signer=registry.public_key)


def test_labels_move(registry: ModelRegistry, tmp_path: Path) -> None:
    add(registry, tmp_path / "run", 0)
    add(registry, tmp_path / "run", 1)
    assert registry.promote("demo@1", "production").labels == ("production",)
    assert registry.find("demo@production").manifest.version == 1
    registry.promote("demo", "production")
    assert registry.find("demo@production").manifest.version == 2 and registry.find("demo@1").labels == ()
    for reference, label, words in (
        ("demo@9", "production", "has no version '9'"),
        ("cats", "production", "no model 'cats'"),
        ("demo", "In Use", "the label is"),
        ("../demo", "production", "the model name"),
    ):
        with pytest.raises(ModelError, match=words):
            registry.promote(reference, label)


@given(st.floats(-2, 2), st.floats(-2, 2))
def test_a_combination_is_the_sum_of_the_shifts(a: float, b: float) -> None:
    one, other = saved(0), saved(1)
    found = combine([(one, a), (other, b)])
    expected = a * one.shift.double().numpy() + b * other.shift.double().numpy()
    np.testing.assert_allclose(found.shift.numpy(), expected, atol=1e-6)


def test_a_combination_is_a_version_with_parents_and_only_of_one_basis(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    terms = [(add(registry, tmp_path / "run", seed), 0.5) for seed in (0, 1)]
    made = publish_combination(registry, "both", terms).manifest
    assert made.parents == ("demo@1", "demo@2") and made.origin == "computed as 0.5 demo@1 + 0.5 demo@2"
    assert (
        made.results == {}
        and "has not been evaluated" in (registry.find("both").path / "card.md").read_text()
    )
    other = add(registry, tmp_path / "run", 2, weights="cd" * 32)
    with pytest.raises(ModelError, match="different bases"):
        publish_combination(registry, "none", [terms[0], (other, 1.0)])
    with pytest.raises(ModelError, match="no versions to combine"):
        combine([])
    with pytest.raises(ModelError, match="cannot be compared"):
        compare(terms[0][0], other)


def test_a_comparison_says_where_two_shifts_lie_apart(registry: ModelRegistry, tmp_path: Path) -> None:
    one = add(registry, tmp_path / "run", 0)
    other = add(registry, tmp_path / "run", 1, study=STUDY + "shots: 4\n")
    found = compare(one, other)
    rows = {row.group: row for row in found.shifts}
    assert set(rows) == {"all", "image q", "image mlp", "text v"}
    a, b = saved(0).shift.double().numpy(), saved(1).shift.double().numpy()
    np.testing.assert_allclose(rows["image mlp"].norm, np.linalg.norm(a[4:7]))
    np.testing.assert_allclose(rows["text v"].distance, np.linalg.norm(a[7:] - b[7:]))
    np.testing.assert_allclose(rows["all"].cosine, a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert "+shots: 4" in found.study and found.accuracy["federated"] == (0.75, 0.75)
    same = compare(one, one)
    assert same.study == "" and same.shifts[0].cosine == pytest.approx(1) and same.shifts[0].distance == 0


def test_the_commands(registry: ModelRegistry, tmp_path: Path) -> None:
    add(registry, tmp_path / "run", 0)
    add(registry, tmp_path / "run", 1)

    def run(*words: str) -> str:
        done = CliRunner().invoke(models.app, ["models", *words, "--registry", str(registry.path)])
        assert done.exit_code == 0, done.output
        return done.output

    assert "demo@2 is candidate." in run("promote", "demo", "candidate")
    assert "both@1" in run("combine", "both", "demo@1=0.25", "demo@candidate=0.75")
    listed = json.loads(run("list", "--json"))
    assert [row["model"] for row in listed] == ["both@1", "demo@1", "demo@2"]
    assert listed[2]["labels"] == "candidate" and listed[2]["accuracy"] == 0.75
    assert "medical device" in run("show", "demo@1")
    assert json.loads(run("show", "demo@1", "--json"))["version"] == 1
    assert "image mlp" in run("diff", "demo@1", "demo@2")
    assert "3 versions, all as" in run("verify")
    assert "demo@1, as" in run("verify", str(registry.path / "demo" / "1"))


def test_where_models_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEDSIGMA_MODELS", "FEDSIGMA_SERVER"):
        monkeypatch.delenv(name, raising=False)
    assert registry_folder(tmp_path) == tmp_path / "models"
    monkeypatch.setenv("FEDSIGMA_SERVER", "/server")
    assert registry_folder(tmp_path) == Path("/server/models")
    monkeypatch.setenv("FEDSIGMA_MODELS", "/elsewhere")
    assert registry_folder(tmp_path) == Path("/elsewhere")


def test_a_shift_of_which_a_part_is_at_the_sites_is_not_combined(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "sigma.safetensors").write_bytes(to_bytes(replace(saved(), run="0123456789abcdef")))
    version = publish(registry, folder, SUMMARY, named=())
    with pytest.raises(ModelError, match="personal values at its sites"):
        publish_combination(registry, "half", [(version, 0.5)])


def test_a_curve_begins_at_the_pretrained_model_and_ends_at_the_version(tmp_path: Path) -> None:
    """With the bundled backbone: factor 0 is zero-shot, bit for bit, and 1 the version."""
    from fedsigma.client.inference.interpolation import evaluate_curve
    from fedsigma.client.inference.loaded_model import load_model
    from fedsigma.common.backbones import load_backbone
    from fedsigma.common.config.sigma import SigmaConfig
    from fedsigma.common.data.sources.registry import open_source
    from fedsigma.common.sigma import SigmaModel

    study = "name: demo\nbackbone: starter\nclasses: [neutrophil, lymphocyte]\n"
    sigma = SigmaModel.adapt(load_backbone("starter").model, SigmaConfig())
    shift = 0.05 * torch.randn(sigma.layout.size, generator=torch.Generator().manual_seed(0))
    (tmp_path / "sigma.safetensors").write_bytes(
        to_bytes(
            SavedShift(
                shift=shift,
                layout_json=sigma.layout.to_json(),
                fingerprint_json=sigma.fingerprint.to_json(),
                study_yaml=study,
                round=1,
            )
        )
    )
    restored = load_model(tmp_path)
    source = open_source("demo", laboratories=["east"], train=2, test=1)
    points = [metrics for _, metrics in evaluate_curve(restored, None, source, (0, 1))]
    again = [metrics for _, metrics in evaluate_curve(restored, restored.saved, source, (0, 0.5, 1))]
    assert again == [points[1]] * 3 != [points[0]] * 3
    nothing = list(
        evaluate_curve(restored, replace(restored.saved, shift=torch.zeros_like(shift)), source, (1,))
    )
    assert nothing[0][1] == points[0]
    with pytest.raises(ModelError, match="no image has one of"):
        list(
            evaluate_curve(
                replace(restored, study=replace(restored.study, classes=("x", "y"))), None, source, (0,)
            )
        )
