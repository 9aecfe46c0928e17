"""A model being served: from the bytes of uploads to judgements, within the limits."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from fedsigma.client.inference.calibration import Calibration
from fedsigma.client.inference.loaded_model import LoadedModel, resolve_model_path
from fedsigma.client.inference.predictor import Predictor
from fedsigma.client.serving.batching import Batcher, QueueFull
from fedsigma.client.serving.errors import Problem
from fedsigma.client.serving.images import decode_image
from fedsigma.client.serving.limits import Limits
from fedsigma.client.serving.schemas import (
    NOTICE,
    CalibrationInfo,
    ImagePrediction,
    LimitsInfo,
    ModelInfo,
    Predictions,
)
from fedsigma.common import __version__

__all__ = ["Service", "describe_model"]


class Service:
    """A judge behind a queue, with its limits and its token.

    Args:
        judge: whose shift is merged, so that it costs what the plain model does.
        info: what is said of the model.
        limits: of requests.
        token: which requests must carry; None: none.
    """

    def __init__(
        self, predictor: Predictor, info: ModelInfo, limits: Limits, *, token: str | None = None
    ) -> None:
        self.predictor, self.info, self.limits, self.token = predictor, info, limits, token
        self.batcher = Batcher(
            predictor.probabilities,
            batch_size=limits.batch_size,
            wait_s=limits.wait_s,
            queue_size=limits.queue_size,
        )
        self._decoders = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decode")
        self._active = Counter[str]()

    def start(self) -> None:
        """Start judging."""
        self.batcher.start()

    def stop(self) -> None:
        """Judge what waits, and stop."""
        self.batcher.stop()
        self._decoders.shutdown()

    @contextmanager
    def admit(self, client: str) -> Iterator[None]:
        """Let a request in, and count it while it is under way.

        Raises:
            Problem: this client, or all together, have too many.
        """
        if self._active.total() >= self.limits.requests:
            raise Problem("busy", f"{self.limits.requests} requests are under way: try again later.")
        if self._active[client] >= self.limits.per_client:
            raise Problem(
                "too-many-requests", f"{self.limits.per_client} of your requests are under way: wait for one."
            )
        self._active[client] += 1
        try:
            yield
        finally:
            self._active[client] -= 1
            self._active += Counter()  # forgets those at zero

    async def predict(self, contents: Sequence[bytes]) -> Predictions:
        """Judge images, each by the mean of its frames.

        Raises:
            Problem: an image cannot be judged, there are too many frames, or the queue is full.
        """
        with self.batcher.expect_images():
            images = await self._decode(contents)
            together = sum(map(len, images))
            if together > self.limits.images:
                most = f"at most {self.limits.images} are judged in a request"
                raise Problem("too-many-images", f"The images have {together} frames, {most}.")
            try:
                futures = self.batcher.submit([frame for frames in images for frame in frames])
            except QueueFull:
                raise Problem("busy", "The queue is full, or the service is stopping: try later.") from None
        rows = iter(await asyncio.gather(*map(asyncio.wrap_future, futures)))
        results = [
            self._image_prediction(number, [next(rows) for _ in frames])
            for number, frames in enumerate(images, 1)
        ]
        return Predictions(model=self.info.model, results=results, notice=NOTICE)

    async def _decode(self, contents: Sequence[bytes]) -> list[list[Tensor]]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(
            *(
                loop.run_in_executor(
                    self._decoders, decode_image, content, self.predictor.backbone, self.limits, number
                )
                for number, content in enumerate(contents, 1)
            )
        )

    def _image_prediction(self, number: int, rows: Sequence[tuple[float, ...]]) -> ImagePrediction:
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        return ImagePrediction(
            image=number,
            prediction=self.predictor.choose_class(mean),
            probabilities=dict(zip(self.predictor.classes, mean, strict=True)),
            frames=len(rows),
        )


def describe_model(
    path: Path, model: LoadedModel, calibration: Calibration | None, abstain_below: float, limits: Limits
) -> ModelInfo:
    """What a service says of its model.

    Args:
        path: by which the model was named.
        restored: the model.
        calibration: where it has one.
        least: below this probability it names no class.
        limits: of requests.

    Raises:
        ModelError: it is a version of the registry that was changed.
    """
    from fedsigma.common.registry.manifest import MANIFEST, Manifest, digest_of

    place = resolve_model_path(path)
    study, file = model.study, place / "sigma.safetensors" if place.is_dir() else place
    version = Manifest.read(place).reference if (place / MANIFEST).is_file() else study.name
    known = None
    if calibration is not None:
        known = CalibrationInfo.model_validate(calibration, from_attributes=True)
    return ModelInfo(
        model=version,
        study=study.name,
        round=model.saved.round,
        personal_round=model.personal_round,
        classes=list(study.classes),
        backbone=study.backbone,
        backbone_digest=model.backbone.digest,
        digest=digest_of(file.read_bytes()),
        calibration=known,
        abstain_below=abstain_below,
        limits=LimitsInfo.model_validate(limits, from_attributes=True),
        fedsigma=__version__,
        notice=NOTICE,
    )
