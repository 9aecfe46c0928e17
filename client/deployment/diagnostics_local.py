"""Checks of the backbones, the GPU and the images of a site, with a training step on three images."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from fedsigma.client.deployment.findings import CheckFailed
from fedsigma.client.deployment.home import SiteHome
from fedsigma.client.site.policy import SitePolicy

__all__ = ["data_checks"]

DRY_IMAGES = 3


def data_checks(site: SiteHome, policy: SitePolicy) -> dict[str, Callable[[], str]]:
    """Return the checks of the GPU, each backbone of site.yaml, the images, and a training step."""
    return {
        "gpu": partial(_check_gpu, policy),
        **{f"backbone {name}": partial(_check_backbone, spec) for name, spec in policy.backbones.items()},
        "images": partial(_check_images, site, policy),
        "dry round": partial(_check_training, site, policy),
    }


def _check_gpu(policy: SitePolicy) -> str:
    if policy.gpus == "none":
        return "site.yaml allows none"
    import torch

    if not torch.cuda.is_available():
        if policy.gpus != "auto":
            raise CheckFailed(
                f"site.yaml names GPUs {policy.gpus}, and torch finds none", "check the GPU driver"
            )
        return f"none found: training on {policy.cpus or os.cpu_count()} processors"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}: {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _check_backbone(spec: str) -> str:
    from fedsigma.common.config.sigma import SigmaConfig
    from fedsigma.common.training.trainer import open_trainer

    try:
        trainer = open_trainer(spec, SigmaConfig(), ("one", "two"), ("one", "two"))
    except (ValueError, OSError) as error:
        remedy = "docs/backbones.md describes how to install weights at a site"
        raise CheckFailed(f"{spec} cannot be loaded: {error}", remedy) from None
    return f"{trainer.layout.size} singular values; weights {trainer.fingerprint.weights[:12]}"


def _check_images(site: SiteHome, policy: SitePolicy) -> str:
    from fedsigma.common.data.sources.registry import open_source
    from fedsigma.common.data.validation import check_source

    try:
        source = open_source(policy.source, base=site.path, **policy.options)
        classes = sorted({record.label for record in source.records if record.label is not None})
        report = check_source(source, classes=classes)
    except (ValueError, OSError) as error:
        raise CheckFailed(f"the images cannot be opened: {error}", "correct `source` in site.yaml") from None
    if not report.ok:
        raise CheckFailed(report.headline(), f"fedsigma data check {policy.source}")
    return report.headline()


def _check_training(site: SiteHome, policy: SitePolicy) -> str:
    """Train a step on three images and evaluate them; nothing is stored or sent."""
    import numpy as np

    from fedsigma.common.config.sigma import SigmaConfig
    from fedsigma.common.config.training import LocalTrainingConfig
    from fedsigma.common.data.loading import load_examples
    from fedsigma.common.data.sources.registry import open_source
    from fedsigma.common.training.trainer import open_trainer

    source = open_source(policy.source, base=site.path, **policy.options)
    records = [record for record in source.records if record.label is not None]
    if not records or not policy.backbones:
        raise CheckFailed(
            "no labelled image, or no backbone allowed", "correct `source` and `backbones` in site.yaml"
        )
    classes = tuple(sorted({str(record.label) for record in records}))
    trainer = open_trainer(next(iter(policy.backbones.values())), SigmaConfig(), classes, classes)
    examples = load_examples(source, records[:DRY_IMAGES], classes, side=trainer.image_side)
    zero = np.zeros(trainer.layout.size, np.float32)
    config = LocalTrainingConfig(batch_size=len(examples))
    output = trainer.train(zero, examples, config, first_step=0, steps=1, total_steps=1, seed=0)
    trainer.evaluate(output.shift, examples)
    return f"a step on {len(examples)} images, loss {output.loss:.2f}"
