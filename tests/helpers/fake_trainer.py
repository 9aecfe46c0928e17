"""A federation without a model: each site's shift moves towards a target of its own."""

from __future__ import annotations

import hashlib
import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedsigma.common.config.privacy import PrivacyConfig
from fedsigma.common.config.study import DataConfig
from fedsigma.common.data.sources import site_data
from fedsigma.common.sigma import Entry, Fingerprint, Layout, ParameterPartition
from fedsigma.common.training.trainer import EvalOutput, TrainOutput, trainers
from fedsigma.server.federation import messenger

SIZE = 6
NAMES = ("barcelona", "bccd", "cellavision", "jiangxi")
TARGETS = {name: np.arange(SIZE, dtype=np.float32) * (i + 1) / 10 for i, name in enumerate(NAMES)}
# Sites of different size, so that a plain mean and a weighted mean differ.
IMAGES = {name: 2 * (i + 1) for i, name in enumerate(NAMES)}
LAYOUT = Layout((Entry(weight="w", part="q", tower="image", layer=0, offset=0, size=SIZE, rows=(0, SIZE)),))
FINGERPRINT = Fingerprint("a" * 64, LAYOUT.digest, ((1.0, 2.0),))
STUDY = """
name: fake
backbone: fake
classes: [a, b]
shots: 4
data: {source: demo}
training: {local_steps: 5}
federation: {rounds: 3, min_sites: 2, round_timeout_s: 5, wait_for_sites_s: 0}
baselines: [zero_shot, local_only, pooled]
"""


class FakeTrainer:
    """See `fedsigma.common.training.trainer.Trainer`."""

    image_side = 32
    parameter_count = 1000
    layout = LAYOUT
    fingerprint = FINGERPRINT

    def __init__(self, backbone: str, sigma: Any, classes: Any, prompts: Any) -> None:
        if backbone == "other":
            self.fingerprint = Fingerprint("b" * 64, LAYOUT.digest, ((1.0, 2.0),))

    def partition(self, personal: Any) -> ParameterPartition:
        return ParameterPartition(
            self.layout, None if personal is None else frozenset({self.layout.entries[-1].key})
        )

    def train(
        self,
        shift: Any,
        examples: Any,
        recipe: Any,
        *,
        first_step: int,
        steps: int,
        total_steps: int,
        seed: int,
        privacy: PrivacyConfig | None = None,
    ) -> TrainOutput:
        target = np.mean([one.target for one in examples], axis=0)
        # The step size depends on the place in the schedule, and the seed adds its part: a resumed run that
        # loses either ends elsewhere.
        pull = sum(0.05 * (1 - step / total_steps) for step in range(first_step, first_step + steps))
        noise = np.random.default_rng(seed).normal(size=SIZE) * 1e-3
        moved = (shift + pull * (target - shift) + noise).astype(np.float32)
        loss = math.nan if privacy and privacy.in_training else 1.0
        return TrainOutput(shift=moved, loss=loss, steps=steps, examples=len(examples))

    def evaluate(self, shift: Any, examples: Any) -> EvalOutput:
        distance = float(np.linalg.norm(shift - examples[0].target))
        right = round(len(examples) / (1 + distance))
        scores = {"accuracy": right / len(examples), "balanced_accuracy": 0.5, "f1": 0.5, "ece": 0.1}
        return EvalOutput(metrics=scores, confusion=(right, 0, len(examples) - right, 0))


def parts(data: DataConfig, classes: Any, seed: int) -> Any:
    names = data.options.get("names", list(NAMES))
    return "source", {name: [name] for name in names}


def load(source: Any, records: Any, *, name: str, **options: Any) -> Any:
    if name == "broken":
        raise FileNotFoundError("/data/patient-0815.png")
    examples = [
        SimpleNamespace(target=TARGETS[name], label=i % 2, image=np.zeros(3)) for i in range(IMAGES[name])
    ]
    return SimpleNamespace(name=name, train=examples, test=examples * 10)


class HurriedTime:
    """Time in which waiting takes none: sites of a `FakeGrid` that have not answered at once never will."""

    skipped = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped

    def sleep(self, seconds: float) -> None:
        self.skipped += seconds


@pytest.fixture
def fake_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Put the fake learner and fake images in place of the real ones."""
    monkeypatch.setattr(trainers, "factory", FakeTrainer)
    monkeypatch.setattr(site_data, "simulated_sites", parts)
    monkeypatch.setattr(site_data, "load_site", load)
    monkeypatch.setattr(site_data, "check_pictures", lambda *place: "")
    monkeypatch.setattr(messenger, "time", HurriedTime())
    monkeypatch.setenv("FEDSIGMA_AUDIT", str(tmp_path / "audit"))
    monkeypatch.setenv("FEDSIGMA_RUNS", str(tmp_path / "runs"))


def digest_of(vector: np.ndarray) -> str:
    return hashlib.sha256(vector.tobytes()).hexdigest()
