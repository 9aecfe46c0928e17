"""The real method, the demonstration images and both apps, in one process, on a tiny random backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsigma.client.inference.loaded_model import ModelLoadError, load_model
from fedsigma.client.site.personal_state import PersonalError
from fedsigma.client.site.privacy_ledger import PrivacyLedger
from fedsigma.common.backbones import save_backbone
from fedsigma.common.config.constants import ALL_SITES
from fedsigma.common.sigma import Layout
from fedsigma.common.training.trainer import make_partition
from fedsigma.server.runs.run_dir import RunDir
from tests.helpers.fake_grid import run_in_process
from tests.helpers.tiny_backbones import tiny_clip

STUDY = """
name: tiny
backbone: local-dir:{backbone}
classes: [neutrophil, lymphocyte, monocyte, eosinophil]
data: {{source: demo, options: {{train: 3, test: 3}}}}
shots: 2
training: {{learning_rate: 0.05, batch_size: 8, local_steps: 2, augment: gentle, precision: float32}}
federation: {{rounds: 2, min_sites: 4, round_timeout_s: 60}}
baselines: [zero_shot, local_only, pooled]
"""


GUARDED = (
    STUDY.replace("rounds: 2", "masking: true, rounds: 2").replace("local_only, ", "")
    + """personal: {{towers: [text]}}
privacy: {{level: image, noise_multiplier: 4.0, clip_norm: 1.0, epsilon: 6}}
"""
)
"""Everything that guards a site at once: noise in training, masks, and the text tower kept at home."""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSIGMA_AUDIT", str(tmp_path / "audit"))
    monkeypatch.setenv("FEDSIGMA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def study_of(tmp_path: Path, text: str) -> RunDir:
    backbone = save_backbone(tiny_clip(), tmp_path / "backbone", source="tests")
    file = tmp_path / "study.yaml"
    file.write_text(text.format(backbone=backbone))
    return run_in_process(file, tmp_path / "out", sites=4)


def check_guarded(folder: RunDir, audit: Path) -> None:
    """What a guarded study leaves behind: at the server and at the sites."""
    summary, saved = folder.read_summary(), folder.load_shift()
    bad = [e for e in folder.events() if e["kind"] in ("site_failed", "reply_rejected", "site_timed_out")]
    assert bad == []
    assert {len(summary[name]["per_site"]) for name in ("federated", "shared_only", "pooled")} == {4}
    layout = Layout.from_json(saved.layout_json)
    text = np.concatenate([np.full(e.size, e.tower == "text") for e in layout.entries])
    shift = saved.shift.numpy()
    assert not shift[text].any() and np.abs(shift[~text]).min() > 0
    # A masked reply: 4 bytes a shared value, and those of the counts.
    first = [row for row in folder.rounds() if row["round"] == 1 and row["site"] != ALL_SITES]
    assert all(0 < row["bytes_up"] - 4 * int((~text).sum()) < 100 for row in first)
    ledgers = list((audit / "privacy").glob("*.jsonl"))
    assert len(ledgers) == 4
    for ledger in ledgers:
        assert [entry.event.steps for entry in PrivacyLedger(ledger).entries()] == [2, 2]
    assert len(list((audit / "personal").rglob("*.safetensors"))) == 4


def test_a_guarded_study_of_the_demonstration_images(places: Path) -> None:
    check_guarded(study_of(places, GUARDED), places / "audit")


def test_personal_values_extend_a_study(places: Path) -> None:
    folder = study_of(places, STUDY.replace("local_only, ", "") + "personal: {{towers: [text]}}\n")
    file = next((places / "audit" / "personal").rglob("*.safetensors"))
    plain, own = load_model(folder.path), load_model(folder.path, personal=file)
    split = make_partition(own.sigma, own.study.personal)
    shared, mine = plain.sigma.get_shift().numpy(), own.sigma.get_shift().numpy()
    assert np.array_equal(split.shared_values(shared), split.shared_values(mine))
    assert not split.personal_values(shared).any() and np.abs(split.personal_values(mine)).min() > 0
    with pytest.raises(PersonalError, match="is not a file of personal values"):
        load_model(folder.path, personal=folder.path / "sigma.safetensors")


def test_a_study_without_a_personal_part_takes_no_personal_values(places: Path) -> None:
    folder = study_of(places, STUDY.replace("[zero_shot, local_only, pooled]", "[]"))
    with pytest.raises(ModelLoadError, match="has no personal values: omit --personal"):
        load_model(folder.path, personal=places / "any.safetensors")


def test_a_study_of_the_demonstration_images(places: Path) -> None:
    folder = study_of(places, STUDY)
    summary = folder.read_summary()
    for method in ("zero_shot", "local_only", "pooled", "federated"):
        assert len(summary[method]["per_site"]) == 4 and 0 <= summary[method]["accuracy"] <= 1
    saved = folder.load_shift()
    assert saved.round == 2 and np.abs(saved.shift.numpy()).max() > 0
    bad = [e for e in folder.events() if e["kind"] in ("site_failed", "reply_rejected", "site_timed_out")]
    assert bad == []
    assert folder.report_path.is_file()
    first = [row for row in folder.rounds() if row["round"] == 1 and row["site"] != ALL_SITES]
    # Accuracy is a count over a count, without float32's error.
    assert all(
        row["accuracy"] == round(row["accuracy"] * n) / n for row in first for n in [row["test_examples"]]
    )
    # The upload is the float32 shift and a few hundred bytes.
    assert all(0 < row["bytes_up"] - 4 * saved.shift.numel() < 600 for row in first)
