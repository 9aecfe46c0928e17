"""What the service answers."""

from __future__ import annotations

from pydantic import BaseModel, Field

__all__ = ["NOTICE", "CalibrationInfo", "Health", "ImagePrediction", "LimitsInfo", "ModelInfo", "Predictions"]

NOTICE = "For research, not for clinical use: this is no medical device."


class Health(BaseModel):
    """That the service answers."""

    status: str = Field(description="Always ok.", examples=["ok"])


class ImagePrediction(BaseModel):
    """What is said of one image."""

    image: int = Field(description="Which image of the request, counted from 1.", examples=[1])
    prediction: str | None = Field(
        description="The most probable class; null where its probability is below abstain_below.",
        examples=["neutrophil"],
    )
    probabilities: dict[str, float] = Field(
        description="By class, of all classes of the model; calibrated if the model is.",
        examples=[{"neutrophil": 0.91, "lymphocyte": 0.06, "monocyte": 0.03}],
    )
    frames: int = Field(
        description="How many frames the probabilities are the mean of; 1 but for DICOM of several frames.",
        examples=[1],
    )


class Predictions(BaseModel):
    """The judgements of a request, in the order of its images."""

    model: str = Field(description="NAME@N, or the study.", examples=["white-cells@3"])
    results: list[ImagePrediction]
    notice: str = Field(description="What it may be used for.", examples=[NOTICE])


class CalibrationInfo(BaseModel):
    """The temperature by which probabilities are scaled, and what it was fitted on."""

    temperature: float = Field(examples=[1.4])
    images: int = Field(description="How many it was fitted on.", examples=[120])
    before: float = Field(description="Expected calibration error on them before, a share.", examples=[0.11])
    after: float = Field(description="And after.", examples=[0.04])


class LimitsInfo(BaseModel):
    """What one request may ask for."""

    body_bytes: int = Field(description="Bytes of its body.", examples=[33554432])
    images: int = Field(description="Images, frames counted singly.", examples=[64])
    pixels: int = Field(description="Pixels of an image or frame.", examples=[25000000])
    per_client: int = Field(description="Requests of one address under way at once.", examples=[16])
    timeout_s: float = Field(description="Seconds until it is given up.", examples=[60])


class ModelInfo(BaseModel):
    """What is served."""

    model: str = Field(description="NAME@N of the registry, else the study.", examples=["white-cells@3"])
    study: str = Field(description="The study that made it.", examples=["white-cells"])
    round: int = Field(description="After which round of it.", examples=[40])
    personal_round: int | None = Field(
        description="After which round a site's own values on top are; null without such values.",
        examples=[None],
    )
    classes: list[str] = Field(examples=[["neutrophil", "lymphocyte", "monocyte"]])
    backbone: str = Field(description="Name of the CLIP model below.", examples=["starter"])
    backbone_digest: str = Field(description="SHA-256 of the backbone's weights, hex.", examples=["9c1e..."])
    digest: str = Field(description="SHA-256 of the sigma file, hex.", examples=["51d0..."])
    calibration: CalibrationInfo | None = Field(description="null where probabilities are as they came.")
    abstain_below: float = Field(description="Below this probability no class is named.", examples=[0.7])
    limits: LimitsInfo
    fedsigma: str = Field(description="Version of FedSigma.", examples=["0.1.0"])
    notice: str = Field(description="What it may be used for.", examples=[NOTICE])
