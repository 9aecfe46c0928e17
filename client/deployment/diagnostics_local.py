"""The doctor's checks of backbones, images, and a dry round on three of them."""

from __future__ import annotations

import os
from collections.abc import Callable

from fedsigma.client.deployment.findings import CheckFailed
from fedsigma.client.deployment.home import SiteHome
from fedsigma.client.site.policy import SitePolicy

__all__ = ["data_checks"]

DRY_IMAGES = 3


def data_checks(site: SiteHome, policy: SitePolicy) -> dict[str, Callable[[], str]]:
    """Each backbone that site.yaml allows, the GPU, the images, and a dry round with the first backbone."""
    found: dict[str, Callable[[], str]] = {"gpu": lambda: _gpu(policy)}
    for name, place in policy.backbones.items():
        found[f"backbone {name}"] = lambda place=place: _backbone(place)  # type: ignore[misc]
    found["images"] = lambda: _images(site, policy)
    found["dry round"] = lambda: _dry_round(site, policy)
    return found


def _gpu(policy: SitePolicy) -> str:
    if policy.gpus == "none":
        return "none wanted"
    import torch

    if not torch.cuda.is_available():
        if policy.gpus != "auto":
            raise CheckFailed(
                f"site.yaml names GPUs {policy.gpus}, and torch finds none", "look at the driver"
            )
        return f"none found: training on {policy.cpus or os.cpu_count()} processors"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}: {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _backbone(place: str) -> str:
    from fedsigma.common.config.sigma import SigmaConfig
    from fedsigma.common.training.trainer import open_trainer

    try:
        learner = open_trainer(place, SigmaConfig(), ("one", "two"), ("one", "two"))
    except (ValueError, OSError) as error:
        raise CheckFailed(
            f"{place} cannot be loaded: {error}", "docs/backbones.md: how weights get to a site"
        ) from None
    return f"{learner.layout.size} singular values; weights {learner.fingerprint.weights[:12]}"


def _images(site: SiteHome, policy: SitePolicy) -> str:
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


def _dry_round(site: SiteHome, policy: SitePolicy) -> str:
    """Train a step on three images, and judge them; nothing of it is kept or sent."""
    import numpy as np

    from fedsigma.common.config.sigma import SigmaConfig
    from fedsigma.common.config.training import LocalTrainingConfig
    from fedsigma.common.data.loading import load_examples
    from fedsigma.common.data.sources.registry import open_source
    from fedsigma.common.training.trainer import open_trainer

    source = open_source(policy.source, base=site.path, **policy.options)
    records = [record for record in source.records if record.label is not None][:DRY_IMAGES]
    if not records or not policy.backbones:
        raise CheckFailed(
            "no labelled image, or no backbone allowed", "correct `source` and `backbones` in site.yaml"
        )
    classes = tuple(sorted({str(record.label) for record in source.records if record.label is not None}))
    learner = open_trainer(next(iter(policy.backbones.values())), SigmaConfig(), classes, classes)
    examples = load_examples(source, records, classes, side=learner.image_side)
    zero = np.zeros(learner.layout.size, np.float32)
    recipe = LocalTrainingConfig(batch_size=len(examples))
    done = learner.train(zero, examples, recipe, first_step=0, steps=1, total_steps=1, seed=0)
    learner.evaluate(done.shift, examples)
    return f"a step on {len(examples)} images, loss {done.loss:.2f}"
