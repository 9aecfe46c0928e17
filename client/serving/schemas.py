"""The response schemas of the service."""

from __future__ import annotations

from pydantic import BaseModel, Field

__all__ = ["NOTICE", "CalibrationInfo", "Health", "ImagePrediction", "LimitsInfo", "ModelInfo", "Predictions"]

NOTICE = "For research, not for clinical use: this is no medical device."


class Health(BaseModel):
    """State of the service."""

    status: str = Field(description="Always ok.", examples=["ok"])


class ImagePrediction(BaseModel):
    """Prediction for one image."""

    image: int = Field(description="Number of the image in the request, from 1.", examples=[1])
    prediction: str | None = Field(
        description="The most probable class; null if its probability is below abstain_below.",
        examples=["neutrophil"],
    )
    probabilities: dict[str, float] = Field(
        description="Probability of each class; calibrated if the service has a calibration.",
        examples=[{"neutrophil": 0.91, "lymphocyte": 0.06, "monocyte": 0.03}],
    )
    frames: int = Field(
        description="Number of averaged frames; above 1 for multi-frame DICOM only.",
        examples=[1],
    )


class Predictions(BaseModel):
    """Predictions for the images of a request, in their order."""

    model: str = Field(description="NAME@N of the registry, or the study's name.", examples=["white-cells@3"])
    results: list[ImagePrediction]
    notice: str = Field(description="Permitted use.", examples=[NOTICE])


class CalibrationInfo(BaseModel):
    """The temperature of the probabilities, and its fit."""

    temperature: float = Field(examples=[1.4])
    images: int = Field(description="Number of images it was fitted on.", examples=[120])
    before: float = Field(
        description="Expected calibration error before, from 0 to 1.",
        examples=[0.11],
    )
    after: float = Field(description="The same after calibration.", examples=[0.04])


class LimitsInfo(BaseModel):
    """Limits of one request."""

    body_bytes: int = Field(description="Most bytes of the body.", examples=[33554432])
    images: int = Field(description="Most images; each frame counts as one.", examples=[64])
    pixels: int = Field(description="Most pixels of an image or frame.", examples=[25000000])
    per_client: int = Field(description="Most concurrent requests of one address.", examples=[16])
    timeout_s: float = Field(description="Seconds until a request times out.", examples=[60])


class ModelInfo(BaseModel):
    """Description of the served model."""

    model: str = Field(description="NAME@N of the registry, or the study's name.", examples=["white-cells@3"])
    study: str = Field(description="Name of the study that trained it.", examples=["white-cells"])
    round: int = Field(description="Round of the study.", examples=[40])
    personal_round: int | None = Field(
        description="Round of a site's personal values; null without them.",
        examples=[None],
    )
    classes: list[str] = Field(examples=[["neutrophil", "lymphocyte", "monocyte"]])
    backbone: str = Field(description="Name of the CLIP backbone.", examples=["starter"])
    backbone_digest: str = Field(description="SHA-256 of the backbone's weights, hex.", examples=["9c1e..."])
    digest: str = Field(description="SHA-256 of the sigma file, hex.", examples=["51d0..."])
    calibration: CalibrationInfo | None = Field(description="null without a calibration.")
    abstain_below: float = Field(description="Probability below which no class is predicted.", examples=[0.7])
    limits: LimitsInfo
    fedsigma: str = Field(description="Version of FedSigma.", examples=["0.1.0"])
    notice: str = Field(description="Permitted use.", examples=[NOTICE])
