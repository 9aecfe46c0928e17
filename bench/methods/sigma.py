"""Sigma as a method among others: the product's model, training loop and codec."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import RecordDict

from bench.methods.method import FLOAT, Trained, TrainedMethod, Turn, Upload
from bench.methods.tuning import State
from fedsigma.client.site.error_feedback import ErrorFeedback
from fedsigma.common.backbones import Backbone
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.sigma import SigmaModel
from fedsigma.common.training.classifier import ClipClassifier, Example
from fedsigma.common.training.trainer import derive_seed
from fedsigma.common.wire.codec import decode, download_level, encode

__all__ = ["Sigma", "ZeroShot"]

SHIFT = "shift"


class Sigma(TrainedMethod):
    """The sigma shift, coded on its way in both directions as the product codes it.

    Args:
        backbone: adapted here.
        study: whose selection, prompts and seed are used.
        codec: level of an upload.
    """

    def __init__(self, backbone: Backbone, study: StudyConfig, codec: str = "exact") -> None:
        self._sigma = SigmaModel.adapt(backbone.model, study.sigma)
        self.task = ClipClassifier(backbone, self._sigma, study.prompts)
        self._start, self._study, self._codec = self._state(), study, codec
        self._lost: dict[str, ErrorFeedback] = {}

    def initial(self, sites: Mapping[str, Sequence[Example]]) -> State:
        """Zero: the pretrained values. What coding lost at the sites in an earlier study is forgotten."""
        self._lost = defaultdict(lambda: ErrorFeedback(RecordDict()))
        return self._start

    def train(self, state: State, examples: Sequence[Example], recipe: TrainingConfig, turn: Turn) -> Trained:
        """See `Method.train`."""
        return super().train(self._received(state, turn), examples, recipe, turn)

    def upload(self, start: State, trained: State, turn: Turn) -> Upload:
        """Code the change, with what coding lost of this site's last one, as `client.app` does."""
        layout, feedback = self._sigma.layout, self._lost[turn.site]
        seed = derive_seed(self._study.seed, turn.site, "round", turn.round, "codec")
        change = (trained[SHIFT] - self._received(start, turn)[SHIFT]).numpy()
        change = change + feedback.residual(layout, before=turn.round)
        data = encode(change, layout, level=self._codec, seed=seed)
        arrived = decode(data, layout)
        feedback.store(change - arrived, layout, round=turn.round)
        # In float64, as the server adds it, so that the mean is rounded once.
        whole = start[SHIFT].double() + torch.from_numpy(arrived)
        return Upload(state={SHIFT: whole}, bytes=len(data))

    def bytes_up(self, state: State) -> int:
        """Four bytes a value, without the codec's header."""
        return FLOAT * state[SHIFT].numel()

    def _received(self, state: State, turn: Turn) -> State:
        """The state as a site gets it."""
        layout, level = self._sigma.layout, download_level(self._codec)
        seed = derive_seed(self._study.seed, "pooled", "round", turn.round, "codec")
        data = encode(state[SHIFT].numpy().astype(np.float32), layout, level=level, seed=seed)
        return {SHIFT: torch.from_numpy(decode(data, layout))}

    def _load(self, state: State) -> None:
        self._sigma.set_shift(state[SHIFT].float())

    def _state(self) -> State:
        return {SHIFT: self._sigma.get_shift()}


class ZeroShot(Sigma):
    """No training and nothing sent: the backbone as it came."""

    def train(self, state: State, examples: Sequence[Example], recipe: TrainingConfig, turn: Turn) -> Trained:
        """Nothing."""
        return Trained(state=state, loss=0.0)

    def upload(self, start: State, trained: State, turn: Turn) -> Upload:
        """Nothing."""
        return Upload(state=trained, bytes=0)

    def bytes_up(self, state: State) -> int:
        """Nothing."""
        return 0
