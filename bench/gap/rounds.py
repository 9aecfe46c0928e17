"""Rounds in this process: a site's steps under a candidate's loss and optimiser, and the loop around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gap.candidate import (
    Candidate,
    ServerStep,
    image_tower_mask,
    matrix_slices,
    spectrum_factors,
)
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.config.training import cosine_decay
from fedsigma.common.training.attention import training_attention
from fedsigma.common.training.augment import build_augmentation
from fedsigma.common.training.classifier import ClipClassifier, Example, autocast
from fedsigma.common.training.loop import endless_batches, evaluate, train
from fedsigma.common.training.trainer import derive_seed
from fedsigma.server.federation.site_sampling import sample_sites


@dataclass
class Site:
    """A site.

    Attributes:
        name: Name of the site.
        examples: Its training images.
        offsets: Added to the logits in training (classes,).
        scale: Factor of the logits in training (classes,).
        absent: Whether the site lacks a class (classes,).
        teacher: The zero-shot model's probabilities (examples, classes), for distillation.
        control: The site's control variate (values,).
    """

    name: str
    examples: Sequence[Example]
    offsets: Tensor
    scale: Tensor
    absent: Tensor
    teacher: Tensor | None = None
    control: Tensor | None = None
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.labels = torch.tensor([e.label for e in self.examples])


def logit_offsets(counts: Tensor, factor: float, pseudo_count: float) -> Tensor:
    """Return `factor` times the log of a site's class shares (classes,)."""
    raised = counts.double() + pseudo_count
    return (factor * (raised / raised.sum()).log()).float()


def make_site(task: ClipClassifier, name: str, examples: Sequence[Example], candidate: Candidate) -> Site:
    """Return a site under a candidate's loss."""
    counts = torch.bincount(torch.tensor([e.label for e in examples]), minlength=task.class_count)
    absent = counts == 0
    teacher = None
    if candidate.distillation:
        task.sigma.set_shift(torch.zeros(task.sigma.layout.size))
        teacher = evaluate(task, list(examples)).probabilities
    offsets = torch.zeros(task.class_count)
    if candidate.logit_adjustment:
        offsets = logit_offsets(counts, candidate.logit_adjustment, candidate.pseudo_count)
    return Site(name, examples, offsets, torch.where(absent, candidate.absent_scale, 1.0), absent, teacher)


@dataclass(frozen=True)
class Batch:
    """Augmented images and the inputs of each one's loss; the first size of all tensors is that of images.

    Attributes:
        images: Augmented images (n, 3, size, size).
        labels: Their classes.
        weights: Their weights in the loss.
        offsets, scale, absent, teacher: See `Site`.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    offsets: Tensor
    scale: Tensor
    absent: Tensor
    teacher: Tensor | None

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Batch:
        """Return one batch of several, with their weights."""
        parts = zip(*(list(vars(b).values()) for b in batches), strict=True)
        return cls(*(None if p[0] is None else torch.cat(p) for p in parts))


def draw_batch(site: Site, chosen: list[int], augment: Callable[[Tensor], Tensor], weight: float) -> Batch:
    """Return a site's batch; the weights of its images sum to `weight`."""
    n = len(chosen)
    return Batch(
        torch.stack([augment(site.examples[i].image) for i in chosen]),
        site.labels[chosen],
        torch.full((n,), weight / n),
        site.offsets.expand(n, -1),
        site.scale.expand(n, -1),
        site.absent.expand(n, -1),
        None if site.teacher is None else site.teacher[chosen],
    )


def losses(logits: Tensor, batch: Batch, candidate: Candidate, first: Tensor | None) -> Tensor:
    """Return the loss of each image (n,); `first` are the logits of the round's first model, for FedNTD."""
    loss = F.cross_entropy(batch.scale * logits + batch.offsets, batch.labels, reduction="none")
    if candidate.distillation and batch.teacher is not None:
        loss = loss + candidate.distillation * _divergence(batch.teacher.log(), logits, batch.absent)
    if candidate.not_true_distillation and first is not None:
        others = torch.ones_like(batch.absent).scatter(1, batch.labels[:, None], False)
        loss = loss + candidate.not_true_distillation * _divergence(first, logits, others)
    return loss


def _divergence(teacher: Tensor, logits: Tensor, among: Tensor) -> Tensor:
    """Return the KL divergence from teacher to student among some classes (n,); 0 for fewer than two."""
    masked = torch.finfo(logits.dtype).min / 4
    target = teacher.masked_fill(~among, masked).log_softmax(1)
    student = logits.masked_fill(~among, masked).log_softmax(1)
    divergence = (target.exp() * (target - student)).masked_fill(~among, 0).sum(1)
    return torch.where(among.sum(1) > 1, divergence, 0.0)


def add_gradient(
    task: ClipClassifier, batch: Batch, candidate: Candidate, precision: str, first: Tensor | None = None
) -> float:
    """As `training.accumulate_gradient`, of the weighted sum of a candidate's losses."""
    total, start = 0.0, 0
    with task.sigma.accumulate_gradients(), training_attention(task.backbone.model, precision, task.device):
        with autocast(precision, task.device):
            text = task.text_features()
        leaf = text.detach().requires_grad_(text.requires_grad)
        for images in batch.images.split(task.micro_batch):
            rows = slice(start, start + len(images))
            part = Batch(*(None if v is None else v[rows] for v in vars(batch).values()))
            start += len(images)
            with autocast(precision, task.device):
                logits = task.logits(task.image_features(images), leaf)
            before = None if first is None else first[rows]
            loss = (losses(logits, part, candidate, before) * part.weights).sum()
            loss.backward()
            total += loss.item()
        text.backward(leaf.grad)
    return total


Cohorts = list[tuple[list[int], Tensor]]
"""The sites of each round by their index, and their shares in its mean."""


def cohorts_in_turns(weights: Tensor, *, turns: int, size: int, seed: int) -> Cohorts:
    """Return cohorts in which each site is once a turn, with the weight that it has among all (sites,)."""
    sites = len(weights)
    if sites % size:
        raise ValueError(f"{sites} sites cannot take turns by {size}: expected a divisor of {sites}")
    if size == sites:
        return [(list(range(sites)), weights)] * turns
    order = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(sites, generator=order).split(size) for _ in range(turns)]
    return [(cohort.tolist(), weights[cohort] * sites / size) for turn in drawn for cohort in turn]


def cohorts_by_images(images: Mapping[str, int], study: StudyConfig, *, turns: int, size: int) -> Cohorts:
    """Return cohorts as the product samples them, with as many updates of all sites as in so many turns."""
    count = len(images)
    federation = replace(study.federation, cohorts="by_images", participation=size / count, min_sites=1)
    study = replace(study, federation=federation)
    available, cohorts = dict(enumerate(images)), []
    for number in range(1, turns * count // size + 1):
        cohort = sample_sites(available, study, round=number, images=images)
        weights = torch.tensor([images[name] * cohort.factors[i] for i, name in cohort.sites.items()])
        cohorts.append((list(cohort.sites), weights / weights.sum()))
    return cohorts


class Federation:
    """The loop of one candidate.

    Args:
        task: Of the study's backbone and prompts; its shift is overwritten.
        study: Recipe, seed and all steps of a site.
        candidate: The candidate.
    """

    def __init__(self, task: ClipClassifier, study: StudyConfig, candidate: Candidate) -> None:
        self.task, self.study, self.candidate = task, study, candidate
        self.total = study.training.local_steps * study.federation.rounds
        self.rounds = 0
        self.recipe = replace(
            study.training, learning_rate=candidate.learning_rate, proximal=candidate.proximal
        )
        self.augment = build_augmentation(task, self.recipe)
        layout = task.sigma.layout
        factors = torch.ones(layout.size)
        if candidate.spectrum_power:
            values = [svd.s.float() for svd in task.sigma.basis.svds]
            factors = spectrum_factors(layout, values, candidate.spectrum_power)
        if candidate.frozen_text:
            factors = factors * image_tower_mask(layout)
        self.server = ServerStep(candidate, factors, matrix_slices(layout))
        self.global_control = torch.zeros(layout.size)
        self.last_update = torch.zeros(layout.size)

    def run(self, sites: Sequence[Site]) -> Tensor:
        """Train through all rounds; returns the last shift (values,)."""
        candidate = self.candidate
        shift = torch.zeros(self.task.sigma.layout.size)
        weights = torch.tensor([1.0 if candidate.equal_weights else float(len(s.examples)) for s in sites])
        weights /= weights.sum()
        size = candidate.cohort_size or len(sites)
        turns = self.total // candidate.local_steps
        if candidate.by_images:
            images = {site.name: len(site.examples) for site in sites}
            cohorts = cohorts_by_images(images, self.study, turns=turns, size=size)
        else:
            seed = derive_seed(self.study.seed, "turns")
            cohorts = cohorts_in_turns(weights, turns=turns, size=size, seed=seed)
        self.rounds = len(cohorts)
        for number, (indices, shares) in enumerate(cohorts, start=1):
            cohort = [sites[i] for i in indices]
            if candidate.is_one_gradient:
                mean = self._one_gradient(shift, cohort, shares, number)
            else:
                updates = [self._local_update(shift, site, number) for site in cohort]
                mean = (shares[:, None] * torch.stack(updates)).sum(0)
            if candidate.control_variates:
                self.global_control = -mean / (self._learning_rate(number) * candidate.local_steps)
            self.last_update = self.server.step(mean, number, self.rounds)
            shift = shift + self.last_update
        return shift

    def _learning_rate(self, number: int) -> float:
        done = 0.0 if self.candidate.constant_rate else (number - 1) / self.rounds
        return self.candidate.learning_rate * cosine_decay(done)

    def _batches(self, site: Site, number: int) -> Iterator[list[int]]:
        """Return the indices of a site's batches in a round."""
        return endless_batches(len(site.examples), self.recipe.batch_size, self._seed(site, number))

    def _seed(self, site: Site, number: int) -> int:
        first = (number - 1) * self.candidate.local_steps
        return derive_seed(self.study.seed, site.name, "round", number) + first

    def _one_gradient(self, shift: Tensor, sites: Sequence[Site], weights: Tensor, number: int) -> Tensor:
        """Return the mean update of one plain step a site: linear, so one pass over all images suffices."""
        batches = []
        for site, weight in zip(sites, weights.tolist(), strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed(site, number))
                chosen = next(self._batches(site, number))
                batches.append(draw_batch(site, chosen, self.augment, weight))
        return -self._learning_rate(number) * self._gradient(shift, Batch.join(batches))

    def _gradient(self, shift: Tensor, batch: Batch) -> Tensor:
        self.task.sigma.set_shift(shift)
        self.task.sigma.shift.grad = None
        add_gradient(self.task, batch, self.candidate, self.recipe.precision)
        grad = self.task.sigma.shift.grad
        if grad is None or not grad.isfinite().all():
            raise RuntimeError(f"the gradient is not finite under {self.candidate}")
        return grad.detach().clone()

    def _local_update(self, shift: Tensor, site: Site, number: int) -> Tensor:
        """Return a site's update of a round (values,)."""
        candidate = self.candidate
        if candidate.optimiser == "sgd":
            return self._descend(shift, site, number)
        self.task.sigma.set_shift(shift)
        train(
            self.task,
            site.examples,
            replace(self.recipe, schedule="constant") if candidate.constant_rate else self.recipe,
            first_step=(number - 1) * self.total // self.rounds,
            steps=candidate.local_steps,
            total_steps=self.total,
            seed=derive_seed(self.study.seed, site.name, "round", number),
            gradient=self._adjusted(shift, site, number) if candidate.changes_loss else None,
        )
        return self.task.sigma.get_shift() - shift

    def _adjusted(self, shift: Tensor, site: Site, number: int) -> Callable[[], float]:
        """Return what adds the gradient of the candidate's loss on the next batch, and returns the loss."""
        batches, precision = self._batches(site, number), self.recipe.precision

        def gradient() -> float:
            batch = draw_batch(site, next(batches), self.augment, 1.0)
            first = None
            if self.candidate.not_true_distillation:
                current = self.task.sigma.get_shift()
                self.task.sigma.set_shift(shift)
                with torch.no_grad(), autocast(precision, self.task.device):
                    features = self.task.image_features(batch.images)
                    first = self.task.logits(features, self.task.text_features())
                self.task.sigma.set_shift(current)
            return add_gradient(self.task, batch, self.candidate, precision, first)

        return gradient

    def _descend(self, shift: Tensor, site: Site, number: int) -> Tensor:
        """Return a site's update by plain steps, with control variates or the last global update in them."""
        candidate, rate, current = self.candidate, self._learning_rate(number), shift.clone()
        momentum = self.last_update / (candidate.local_steps * rate)
        control, total = site.control, torch.zeros_like(shift)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed(site, number))
            batches = self._batches(site, number)
            for _ in range(candidate.local_steps):
                g = self._gradient(current, draw_batch(site, next(batches), self.augment, 1.0))
                total += g
                if candidate.control_variates and control is not None:
                    g = g - control + self.global_control
                if candidate.client_momentum:
                    g = (1 - candidate.client_momentum) * g - candidate.client_momentum * momentum
                current = current - rate * g
        if candidate.control_variates:
            site.control = total / candidate.local_steps
        return current - shift


def federate(
    task: ClipClassifier,
    study: StudyConfig,
    sites: Mapping[str, Sequence[Example]],
    candidate: Candidate,
) -> Tensor:
    """Train a candidate through a study; returns its shift."""
    cohort = [make_site(task, name, examples, candidate) for name, examples in sites.items()]
    return Federation(task, study, candidate).run(cohort)


def train_pooled(
    task: ClipClassifier,
    study: StudyConfig,
    examples: Sequence[Example],
    learning_rate: float,
    sites: int,
) -> Tensor:
    """Train on all images in one place, for the steps of so many sites one after the other."""
    task.sigma.set_shift(torch.zeros(task.sigma.layout.size))
    steps = study.training.local_steps * study.federation.rounds * sites
    recipe = replace(study.training, learning_rate=learning_rate)
    train(task, examples, recipe, steps=steps, total_steps=steps, seed=derive_seed(study.seed, "pooled"))
    return task.sigma.get_shift()
