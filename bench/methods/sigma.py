"""Sigma as a method among others: the product's model, training loop and codec."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import RecordDict

from bench.methods.method import Method, Turn, Untrained
from bench.methods.tuning import State
from fedsigma.client.site.error_feedback import ErrorFeedback
from fedsigma.common.backbones import Backbone
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.config.training import TrainingConfig
from fedsigma.common.sigma import SigmaModel
from fedsigma.common.training.classifier import ClipClassifier, Example
from fedsigma.common.training.trainer import derive_seed
from fedsigma.common.wire.codec import decode, download_level, encode, encode_update

SHIFT = "shift"


class Sigma(Method):
    """The sigma shift, coded in both directions as in the product.

    Args:
        backbone: It is adapted in place.
        study: Its selection, prompts and seed are used.
        codec: Coding level of an upload.
    """

    def __init__(self, backbone: Backbone, study: StudyConfig, codec: str = "exact") -> None:
        self._sigma = SigmaModel.adapt(backbone.model, study.sigma)
        self.task = ClipClassifier(backbone, self._sigma, study.prompts)
        self._start, self._study, self._codec = self._state(), study, codec

    def initial(self, sites: Mapping[str, Sequence[Example]]) -> State:
        """Return zero, and forget the residuals of an earlier study."""
        self._feedback: dict[str, ErrorFeedback] = defaultdict(lambda: ErrorFeedback(RecordDict()))
        return self._start

    def train(
        self, state: State, examples: Sequence[Example], recipe: TrainingConfig, turn: Turn
    ) -> tuple[State, float]:
        """See `Method.train`."""
        return super().train(self._received(state, turn), examples, recipe, turn)

    def upload(self, start: State, trained: State, turn: Turn) -> tuple[State, int]:
        """Code the update with error feedback, as the site does."""
        layout, feedback = self._sigma.layout, self._feedback[turn.site]
        seed = derive_seed(self._study.seed, turn.site, "round", turn.round, "codec")
        update = (trained[SHIFT] - self._received(start, turn)[SHIFT]).numpy()
        residual = feedback.residual(layout, before=turn.round)
        data, residual = encode_update(update, residual, layout, level=self._codec, seed=seed)
        feedback.store(residual, layout, round=turn.round)
        # In float64, as the server adds it, so that the mean is rounded once.
        shift = start[SHIFT].double() + torch.from_numpy(decode(data, layout))
        return {SHIFT: shift}, len(data)

    def _received(self, state: State, turn: Turn) -> State:
        """Return the state as a site receives it."""
        layout, level = self._sigma.layout, download_level(self._codec)
        seed = derive_seed(self._study.seed, "pooled", "round", turn.round, "codec")
        data = encode(state[SHIFT].numpy().astype(np.float32), layout, level=level, seed=seed)
        return {SHIFT: torch.from_numpy(decode(data, layout))}

    def _load(self, state: State) -> None:
        self._sigma.set_shift(state[SHIFT].float())

    def _state(self) -> State:
        return {SHIFT: self._sigma.get_shift()}


class ZeroShot(Untrained, Sigma):
    """The pretrained backbone."""
