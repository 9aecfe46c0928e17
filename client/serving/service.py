"""The service behind the API: from the bytes of uploads to predictions, within the limits."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
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
    """A predictor with a queue, limits and a token.

    Args:
        predictor: The predictor; its shift is merged, so that it costs as much as the plain model.
        info: Description of the model.
        limits: Limits of requests.
        token: Bearer token that requests must send; None for no token.
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

    def stop(self) -> None:
        """Predict the waiting images, and stop."""
        self.batcher.stop()
        self._decoders.shutdown()

    @contextmanager
    def admit(self, client: str) -> Iterator[None]:
        """Admit a request, and count it as active inside the context.

        Raises:
            Problem: This client, or all clients together, have too many active requests.
        """
        if self._active.total() >= self.limits.requests:
            raise Problem("busy", f"{self.limits.requests} requests are active: try again later.")
        if self._active[client] >= self.limits.per_client:
            detail = f"{self.limits.per_client} of your requests are active: wait for one to end."
            raise Problem("too-many-requests", detail)
        self._active[client] += 1
        try:
            yield
        finally:
            self._active[client] -= 1
            self._active += Counter()  # removes the zero counts

    async def predict(self, contents: Sequence[bytes]) -> Predictions:
        """Predict images, each by the mean of its frames.

        Args:
            contents: The bytes of each uploaded file.

        Raises:
            Problem: An image cannot be decoded, there are too many frames, or the queue is full.
        """
        with self.batcher.expect_images():
            images = await self._decode(contents)
            frames = sum(map(len, images))
            if frames > self.limits.images:
                limit = f"a request may have {self.limits.images}"
                raise Problem("too-many-images", f"The images have {frames} frames, {limit}.")
            try:
                futures = self.batcher.submit([frame for parts in images for frame in parts])
            except QueueFull:
                detail = "The queue is full, or the service is stopping: try again later."
                raise Problem("busy", detail) from None
        rows = iter(await asyncio.gather(*map(asyncio.wrap_future, futures)))
        results = [
            self._image_prediction(number, [next(rows) for _ in frames])
            for number, frames in enumerate(images, 1)
        ]
        return Predictions(model=self.info.model, results=results, notice=NOTICE)

    async def _decode(self, contents: Sequence[bytes]) -> list[list[Tensor]]:
        decode = partial(decode_image, backbone=self.predictor.backbone, limits=self.limits)
        tasks = [partial(decode, data, number=number) for number, data in enumerate(contents, 1)]
        run = asyncio.get_running_loop().run_in_executor
        return await asyncio.gather(*(run(self._decoders, task) for task in tasks))

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
    """Describe a model, which was loaded from this path, for the API.

    Raises:
        ModelError: The model is a version of the registry whose files were changed.
    """
    from fedsigma.common.registry.manifest import MANIFEST, Manifest, digest_of

    path = resolve_model_path(path)
    study, file = model.study, path / "sigma.safetensors" if path.is_dir() else path
    reference = Manifest.read(path).reference if (path / MANIFEST).is_file() else study.name
    return ModelInfo(
        model=reference,
        study=study.name,
        round=model.saved.round,
        personal_round=model.personal_round,
        classes=list(study.classes),
        backbone=study.backbone,
        backbone_digest=model.backbone.digest,
        digest=digest_of(file.read_bytes()),
        calibration=None if calibration is None else CalibrationInfo(**vars(calibration)),
        abstain_below=abstain_below,
        limits=LimitsInfo.model_validate(limits, from_attributes=True),
        fedsigma=__version__,
        notice=NOTICE,
    )
