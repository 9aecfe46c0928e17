"""The command line: help, counts, backbones, prediction and export, exit codes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fedsigma.cli.main import COMMANDS, FAILED, exit_code, main
from fedsigma.client.inference.batch import list_images, predict_folder
from fedsigma.client.inference.loaded_model import ModelLoadError, load_model
from fedsigma.client.site.privacy_ledger import LedgerEntry, PrivacyLedger
from fedsigma.common.backbones import load_backbone, save_backbone
from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.privacy.accounting import PrivacyEvent, epsilon
from fedsigma.common.registry.shift_file import save_shift
from fedsigma.common.sigma import SigmaModel
from fedsigma.common.utils.hash_chain import HashChainedLog
from tests.helpers.tiny_backbones import tiny_clip

CLASSES = ("round cell", "long cell", "spiky cell")
runner = CliRunner()


def run(*args: object) -> tuple[int, str, str]:
    result = runner.invoke(main, [str(a) for a in args])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDSIGMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("FEDSIGMA_DEBUG", raising=False)


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tiny_clip(), tmp_path_factory.mktemp("cli") / "tiny", source="tests")


@pytest.fixture
def sigma_file(backbone_folder: Path, tmp_path: Path) -> Path:
    """What a run of a study on the tiny backbone leaves: image tower only, with a shift that matters."""
    study = StudyConfig(
        name="tiny",
        backbone=f"local-dir:{backbone_folder}",
        classes=CLASSES,
        sigma=SigmaConfig(towers=("image",), parts=("q", "v", "mlp")),
    )
    model = load_backbone(study.backbone).model
    sigma = SigmaModel.adapt(model, SigmaConfig(towers=("image",), parts=("q", "v", "mlp")))
    shift = 0.3 * torch.randn(sigma.layout.size, generator=torch.Generator().manual_seed(5))
    path = tmp_path / "run" / "sigma.safetensors"
    save_shift(
        path,
        shift,
        layout_json=sigma.layout.to_json(),
        fingerprint_json=sigma.fingerprint.to_json(),
        study_yaml=study.to_yaml(),
        round=4,
    )
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five small pictures of different sizes, one in a folder below."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in [("a.png", 40), ("b.jpg", 33), ("c.PNG", 64), ("d.tif", 32), ("below/e.png", 50)]:
        array = rng.integers(0, 255, (size, size + 7, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / name)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not a picture")
    return folder


# Help


def test_help_lists_all_and_imports_nothing_heavy() -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)
    program = (
        "import sys\nfrom fedsigma.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'open_clip', 'flwr', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Half a second on an idle machine; the limit leaves room for a busy one.
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "command",
    [
        ["inspect"],
        ["backbone", "fetch"],
        ["backbone", "convert"],
        ["data", "check"],
        ["data", "cards"],
        ["data", "fetch"],
        ["predict"],
        ["export"],
        ["budget"],
        ["study", "privacy"],
    ],
)
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Example: fedsigma " + " ".join(command) in " ".join(out.split())


def test_version() -> None:
    assert run("--version")[1].startswith("fedsigma 0.")


# Privacy

PRIVATE = """
name: hidden
backbone: starter
classes: [a, b]
training: {batch_size: 16, local_steps: 2}
federation: {rounds: 4}
privacy: {level: image, noise_multiplier: 2.0, epsilon: 1.5}
"""


def test_privacy_of_a_study_is_computed_before_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(PRIVATE)
    code, out, err = run("study", "privacy", file, "--images", 64, "--json")
    assert code == 0, err
    values = json.loads(out)
    one = PrivacyEvent(rate=0.25, noise_multiplier=2.0, steps=2)
    assert values["release"] == {"rate": 0.25, "noise_multiplier": 2.0, "steps": 2}
    assert values["epsilon_after"]["4"] == epsilon([one] * 4, 1e-5)
    assert epsilon([one] * values["within"], 1e-5) <= 1.5 < epsilon([one] * (values["within"] + 1), 1e-5)
    words = " ".join(run("study", "privacy", file, "--images", 64)[1].split())
    assert "Hides each image, of 64 images at a site: noise multiplier 2" in words
    assert "The budget, epsilon 1.5, allows" in words


def test_budget_report_of_a_site(tmp_path: Path) -> None:
    rules = tmp_path / "site.yaml"
    rules.write_text("{name: h, source: 'folder:x', studies: [s], privacy: image, epsilon: 8}")
    assert "all studies: epsilon 0.00 at delta 1e-05; budget 8" in run("budget", rules)[1]
    one = PrivacyEvent(rate=0.25, noise_multiplier=2.0, steps=2)
    ledger, asked = PrivacyLedger(tmp_path / "privacy.jsonl"), PrivacyConfig(level="image", epsilon=9)
    for study in ("cells", "skin"):
        entry = LedgerEntry(study=study, run="1", round=1, mode="round", level="image", event=one)
        ledger.charge(entry, asked, budget=8.0, delta=1e-5)
    values = json.loads(run("budget", rules, "--json")[1])
    each, both = epsilon([one], 1e-5), epsilon([one, one], 1e-5)
    assert values == {"studies": {"cells": each, "skin": each}, "all": both, "budget": 8, "delta": 1e-5}


# Inspect


def test_inspect_counts_exactly() -> None:
    code, out, _ = run("inspect", "ViT-B-16", "--json")
    assert code == 0
    values = json.loads(out)
    assert values["sigma_values"] == 92_160
    assert values["backbone_parameters"] == 149_620_737
    assert values["share"] == pytest.approx(92_160 / 149_620_737)
    assert sum(row["sigma_values"] for row in values["parts"]) == 92_160


def test_inspect_with_a_selection_and_as_a_table() -> None:
    options = ("--towers", "image", "--layers", "0,11", "--parts", "q, v")
    values = json.loads(run("inspect", "ViT-B-16/openai", "--json", *options)[1])
    assert values["sigma_values"] == 2 * 2 * 768
    out = run("inspect", "ViT-B-16", *options)[1]
    assert "3,072 of 149,620,737" in out


def test_inspect_a_folder(backbone_folder: Path) -> None:
    values = json.loads(run("inspect", f"local-dir:{backbone_folder}", "--json")[1])
    assert values["backbone_parameters"] == sum(p.numel() for p in tiny_clip().model.parameters())


# Exit codes


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["inspect"], 2, "Missing argument"),
        (["nothing"], 2, "No such command"),
        (["inspect", "ViT-B-16", "--layers", "0,top"], 2, "expected all, top"),
        (["inspect", "ViT-B-17"], 3, "did you mean"),
        (["inspect", "ViT-B-16", "--parts", "q,w"], 3, "'w'"),
        (["inspect", "ViT-B-16", "--towers", ""], 3, "tower"),
        (["backbone", "fetch", "ViT-B-16/openai", "new"], 3, "connected machine"),
        (["backbone", "fetch", "ViT-B-16", "new"], 3, "choose one of ViT-B-16/openai"),
        (["backbone", "convert", "none.pt", "ViT-B-16/openai", "new"], 3, "there is no file"),
        (["predict", "nowhere", "x", "--out", "y.csv"], 3, "no sigma file"),
        (["export", "nowhere", "--out", "y"], 3, "no sigma file"),
        (["budget", "nowhere.yaml"], 3, "nowhere.yaml cannot be read"),
        (["study", "privacy", "demo"], 3, "study 'demo' has no privacy: give it a section"),
        (["study", "privacy", "demo", "--images", "0"], 2, "--images"),
    ],
)
def test_exit_codes(
    args: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, _, err = run(*args)
    assert found == code
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    if code == 3:
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] in ([], ["cache"])


def test_unexpected_error_is_one_line_unless_debugging(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(_: str) -> None:
        raise ZeroDivisionError("over\nthere")

    monkeypatch.setattr("fedsigma.common.backbones.load_meta_model", broken)
    code, _, err = run("inspect", "ViT-B-16")
    assert code == 1
    assert err == "Error: unexpected ZeroDivisionError: over there (FEDSIGMA_DEBUG=1 shows where)\n"
    monkeypatch.setenv("FEDSIGMA_DEBUG", "1")
    result = runner.invoke(main, ["inspect", "ViT-B-16"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_library_s_value_error_is_unexpected() -> None:
    try:
        int("x")
        raise AssertionError
    except ValueError as error:
        assert exit_code(error) == FAILED


# Backbones


def test_adopt_a_folder(backbone_folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("backbone", "fetch", f"local-dir:{backbone_folder}", tmp_path / "new")
    assert code == 0
    assert "32 pixels, bicubic" in out
    assert f"local-dir:{tmp_path / 'new'}" in out.replace("\n", "")
    assert load_backbone(f"local-dir:{tmp_path / 'new'}").image_size == 32


# Predict and export


def test_restore_refuses_another_backbone(sigma_file: Path, tmp_path: Path) -> None:
    other = save_backbone(tiny_clip(seed=9), tmp_path / "other", source="tests")
    code, _, err = run("export", sigma_file, "--out", tmp_path / "merged", "--backbone", f"local-dir:{other}")
    assert code == 3
    assert "weights differ" in err
    assert "--backbone" in err
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ModelLoadError):
        load_model(sigma_file, f"local-dir:{other}")


def test_export_is_the_adapted_model(sigma_file: Path, tmp_path: Path) -> None:
    adapted = load_model(sigma_file)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = adapted.backbone.model.encode_image(images)
        before = tiny_clip().model.encode_image(images)
    code, out, _ = run("export", sigma_file.parent, "--out", tmp_path / "merged")
    assert code == 0
    assert "open_clip.create_model_and_transforms" in out
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'merged'}")
    with torch.no_grad():
        found = model.eval().encode_image(images)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-2)
    notes = json.loads((tmp_path / "merged" / "fedsigma_backbone.json").read_text())["notes"]
    assert "study tiny, after round 4" in notes


def test_predict_writes_a_table(sigma_file: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "x.csv"
    code, _, err = run("predict", sigma_file, pictures, "--out", out, "--batch-size", 2)
    assert code == 0, err
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["a.png", "b.jpg", "below/e.png", "c.PNG", "d.tif"]
    for row in rows:
        probabilities = {name: float(row[f"probability_{name}"]) for name in CLASSES}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max(probabilities, key=probabilities.__getitem__)
    assert [p.name for p in out.parent.iterdir()] == ["x.csv"]


def test_predict_applies_the_shift(
    sigma_file: Path, pictures: Path, tmp_path: Path, backbone_folder: Path
) -> None:
    adapted = load_model(sigma_file)
    predict_folder(adapted, pictures, tmp_path / "with.csv")
    adapted.sigma.set_shift(torch.zeros(adapted.sigma.layout.size))
    predict_folder(adapted, pictures, tmp_path / "without.csv")
    assert (tmp_path / "with.csv").read_text() != (tmp_path / "without.csv").read_text()


def test_predict_names_what_it_cannot_read(sigma_file: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "broken.png").write_bytes((pictures / "a.png").read_bytes()[:200])
    out = tmp_path / "x.csv"
    code, _, err = run("predict", sigma_file, pictures, "--out", out)
    assert code == 4
    assert "Could not read broken.png" in err
    assert len(out.read_text().splitlines()) == 6


def test_predict_without_anything_to_read(sigma_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run("predict", sigma_file, tmp_path / "empty", "--out", tmp_path / "x.csv")[0] == 3
    (tmp_path / "empty" / "bad.png").write_bytes(b"x")
    code, _, err = run("predict", sigma_file, tmp_path / "empty", "--out", tmp_path / "x.csv")
    assert code == 3
    assert "none of the 1 images" in err
    assert not (tmp_path / "x.csv").exists()


def test_pictures_are_found_in_a_fixed_order(pictures: Path) -> None:
    assert list_images(pictures) == ["a.png", "b.jpg", "below/e.png", "c.PNG", "d.tif"]


# Data


def test_data_check(pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "classes"
    for label, names in {"long": ("a.png", "b.jpg"), "round": ("c.PNG", "d.tif")}.items():
        (root / label).mkdir(parents=True)
        for name in names:
            (root / label / name).write_bytes((pictures / name).read_bytes())
    code, out, err = run("data", "check", f"folder:{root}", "--classes", "long,round")
    assert code == 0, err
    assert "no problems" in out
    (root / "long" / "bad.png").write_bytes(b"nothing")
    code, out, _ = run("data", "check", f"folder:{root}", "--classes", "long,round,spiky", "--json")
    assert code == 4
    values = json.loads(out)
    assert {p["kind"] for p in values["problems"]} >= {"corrupt picture", "empty class"}
    assert any("spiky" in p["where"] + p["detail"] for p in values["problems"])
    assert values["usable"] == 4
    code, out, _ = run("data", "check", f"folder:{root}")
    assert code == 4
    assert "bad.png" in out
    code, _, err = run("data", "check", "foldr:x")
    assert code == 3
    assert "folder" in err


def test_tampered_audit_log_is_detected(tmp_path: Path) -> None:
    log = HashChainedLog(tmp_path / "audit.jsonl")
    for number in range(3):
        log.append({"number": number})
    code, out, _ = run("audit", "verify", log.path)
    assert code == 0 and "3 lines, none changed or removed" in out
    head = out.split()[-1]
    assert run("audit", "verify", log.path, "--head", head)[0] == 0
    log.path.write_text(log.path.read_text().replace('"number": 1', '"number": 7'))
    code, _, err = run("audit", "verify", log.path)
    assert code == 4 and "line 3 was changed, or a line before it" in err
    log.path.unlink()
    log.head_path.unlink()
    log.append({"number": 0})
    assert run("audit", "verify", log.path)[0] == 0
    assert run("audit", "verify", log.path, "--head", head)[0] == 4
    assert run("audit", "verify", log.path, "--head", "5")[0] == 3
    assert run("audit", "verify", tmp_path / "none")[0] == 3


def test_a_server_and_a_site_are_made_by_command(tmp_path: Path) -> None:
    server, site = tmp_path / "server", tmp_path / "north"
    code, out, _ = run("server", "init", server, "--address", "fl.example.org:443")
    assert code == 0 and "fedsigma server up" in out
    assert run("server", "init", server, "--address", "fl.example.org:443")[0] == 3
    assert run("server", "init", tmp_path / "other", "--address", "fl.example.org")[0] == 3
    join, keys = tmp_path / "join.json", tmp_path / "keys.json"
    code, out, _ = run("server", "invite", "north", "-f", server, "--out", join)
    words = out.split("phone: ")[1].split()[0]
    code, out, _ = run("site", "enrol", join, "-f", site, "--out", keys)
    assert code == 0 and words in out
    assert run("site", "enrol", join, "-f", site)[0] == 3
    assert run("site", "enrol", keys, "-f", tmp_path / "other")[0] == 3
    # No SuperLink runs here, so nobody can be let in, and the processes do not answer.
    code, _, err = run("server", "admit", keys, "-f", server)
    assert code == 3 and "does not answer: is `fedsigma server up` running?" in err
    code, out, _ = run("site", "status", "-f", site)
    assert code == 4 and "not supervised here" in out
    code, out, _ = run("site", "approve", "-f", site)
    assert code == 0 and "No bundle is pending" in out
    assert run("site", "rotate", "-f", site, "--switch")[0] == 3


def test_invalid_simulation_is_refused_before_flower_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIGMA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("fedsigma.server.simulation.simulate._superlink", None)  # so that none can be started
    (tmp_path / "file").write_text("")
    result = runner.invoke(main, ["study", "run", "demo", "--out", str(tmp_path / "file")])
    assert result.exit_code == 3 and "is a file, expected a folder" in " ".join(result.stderr.split())
    result = runner.invoke(main, ["study", "evaluate", "demo", "nosuch@9"])
    assert result.exit_code == 3 and "no model 'nosuch'" in " ".join(result.stderr.split())
    assert not (tmp_path / "runs").exists()
