"""The real method, the demonstration images and both apps, in one process, on a tiny random backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_grid import FakeGrid
from flwr.app import Context, RecordDict
from tiny_backbones import tiny_clip

from fedsigma.client import site as client_site
from fedsigma.client.app import app as client
from fedsigma.common.backbones import save_backbone
from fedsigma.server.app import app as server
from fedsigma.server.store import RunFolder

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


def test_a_study_of_the_demonstration_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIGMA_AUDIT", str(tmp_path / "audit"))
    monkeypatch.setenv("FEDSIGMA_CACHE", str(tmp_path / "cache"))
    client_site._images.cache_clear()
    backbone = save_backbone(tiny_clip(), tmp_path / "backbone", source="tests")
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(backbone=backbone))
    config = {"study": str(file), "out": str(tmp_path / "out"), "resume": False, "seed": -1, "rounds": 0}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    server(FakeGrid(client, 4), context)
    folder = RunFolder.open(tmp_path / "out")
    summary = folder.read_summary()
    for method in ("zero_shot", "local_only", "pooled", "federated"):
        assert len(summary[method]["per_site"]) == 4 and 0 <= summary[method]["accuracy"] <= 1
    saved = folder.load_sigma()
    assert saved.round == 2 and np.abs(saved.shift.numpy()).max() > 0
    bad = [e for e in folder.events() if e["kind"] in ("site_failed", "reply_rejected", "site_late")]
    assert bad == []
    assert folder.report_path.is_file()
    first = [row for row in folder.rounds() if row["round"] == 1 and row["site"] != "pooled"]
    # Accuracy is a count over a count, without float32's error.
    assert all(
        row["accuracy"] == round(row["accuracy"] * n) / n for row in first for n in [row["test_examples"]]
    )
    # The upload is the float32 shift and a few hundred bytes.
    assert all(0 < row["bytes_up"] - 4 * saved.shift.numel() < 600 for row in first)
