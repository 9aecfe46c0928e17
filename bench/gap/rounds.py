"""Rounds in this process: a site's steps under a candidate's loss and optimiser, and the loop around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gap.ways import Server, Way, direction_factors, image_tower, matrices
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.config.training import cosine_decay
from fedsigma.common.training.attention import training_attention
from fedsigma.common.training.augment import build_augmentation
from fedsigma.common.training.classifier import ClipClassifier, Example, autocast
from fedsigma.common.training.loop import endless_batches, evaluate, train
from fedsigma.common.training.trainer import derive_seed
from fedsigma.server.federation.site_sampling import sample_sites

__all__ = ["Outcome", "Site", "by_images", "federate", "in_turns", "pooled", "site_offsets"]


@dataclass
class Site:
    """A site's images, what its loss needs of them, and what it keeps between rounds."""

    name: str
    examples: Sequence[Example]
    offsets: Tensor
    scale: Tensor
    lacks: Tensor
    teacher: Tensor | None = None
    control: Tensor | None = None
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.labels = torch.tensor([e.label for e in self.examples])


@dataclass(frozen=True)
class Outcome:
    """The shift of the last round, and the mean of the last rounds' by share of them."""

    last: Tensor
    tails: dict[float, Tensor]


def site_offsets(counts: Tensor, adjust: float, pseudo: float) -> Tensor:
    """What is added to a site's logits in training: `adjust` times the log of its class shares (classes,)."""
    raised = counts.double() + pseudo
    return (adjust * (raised / raised.sum()).log()).float()


def make_site(task: ClipClassifier, name: str, examples: Sequence[Example], way: Way) -> Site:
    """A site under a candidate's loss; the zero-shot model's answers are computed once."""
    counts = torch.bincount(torch.tensor([e.label for e in examples]), minlength=task.class_count)
    lacks = counts == 0
    scale = torch.where(lacks, way.absent, 1.0)
    teacher = None
    if way.distil:
        task.sigma.set_shift(torch.zeros(task.sigma.layout.size))
        teacher = evaluate(task, list(examples)).probabilities
    offsets = site_offsets(counts, way.adjust, way.pseudo) if way.adjust else torch.zeros(task.class_count)
    return Site(name, examples, offsets, scale, lacks, teacher)


@dataclass(frozen=True)
class Batch:
    """Augmented images and what the loss of each needs; n images, all first sizes n."""

    images: Tensor
    labels: Tensor
    weights: Tensor
    offsets: Tensor
    scale: Tensor
    lacks: Tensor
    teacher: Tensor | None

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Batch:
        """One batch of several; their weights stay."""
        parts = zip(*(list(vars(b).values()) for b in batches), strict=True)
        return cls(*(None if p[0] is None else torch.cat(p) for p in parts))


def draw(site: Site, chosen: list[int], augment: object, weight: float) -> Batch:
    """A site's batch, whose images' weights sum to `weight`."""
    n = len(chosen)
    return Batch(
        torch.stack([augment(site.examples[i].image) for i in chosen]),  # type: ignore[operator]
        site.labels[chosen],
        torch.full((n,), weight / n),
        site.offsets.expand(n, -1),
        site.scale.expand(n, -1),
        site.lacks.expand(n, -1),
        None if site.teacher is None else site.teacher[chosen],
    )


def losses(logits: Tensor, batch: Batch, way: Way, first: Tensor | None) -> Tensor:
    """The loss of each image (n,). first: logits of the round's first model, FedNTD's teacher."""
    found = F.cross_entropy(batch.scale * logits + batch.offsets, batch.labels, reduction="none")
    if way.distil and batch.teacher is not None:
        found = found + way.distil * _divergence(batch.teacher.log(), logits, batch.lacks)
    if way.not_true and first is not None:
        others = torch.ones_like(batch.lacks).scatter(1, batch.labels[:, None], False)
        found = found + way.not_true * _divergence(first, logits, others)
    return found


def _divergence(teacher: Tensor, logits: Tensor, among: Tensor) -> Tensor:
    """KL of the teacher's and the student's distributions among some classes (n,); 0 for fewer than two."""
    away = torch.finfo(logits.dtype).min / 4
    wanted = teacher.masked_fill(~among, away).log_softmax(1)
    given = logits.masked_fill(~among, away).log_softmax(1)
    found = (wanted.exp() * (wanted - given)).masked_fill(~among, 0).sum(1)
    return torch.where(among.sum(1) > 1, found, 0.0)


def add_gradient(
    task: ClipClassifier, batch: Batch, way: Way, precision: str, first: Tensor | None = None
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
            loss = (losses(logits, part, way, None if first is None else first[rows]) * part.weights).sum()
            loss.backward()
            total += loss.item()
        text.backward(leaf.grad)
    return total


def first_logits(task: ClipClassifier, batch: Batch, precision: str) -> Tensor:
    """The logits of a batch under the task's shift, without gradients."""
    with torch.no_grad(), autocast(precision, task.device):
        return task.logits(task.image_features(batch.images), task.text_features())


Cohorts = list[tuple[list[int], Tensor]]
"""The sites of each round by their place, and their shares in its mean."""


def in_turns(weights: Tensor, *, turns: int, size: int, seed: int) -> Cohorts:
    """Each turn all sites, so many at once; over a turn each counts as in a round of all (sites,)."""
    sites = len(weights)
    if sites % size:
        raise ValueError(f"{sites} sites cannot take turns by {size}")
    if size == sites:
        return [(list(range(sites)), weights)] * turns
    order = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(sites, generator=order).split(size) for _ in range(turns)]
    return [(cohort.tolist(), weights[cohort] * sites / size) for turn in drawn for cohort in turn]


def by_images(images: Mapping[str, int], study: StudyConfig, *, turns: int, size: int) -> Cohorts:
    """As the product draws them, for as many steps of all sites together as so many turns have."""
    count = len(images)
    federation = replace(study.federation, cohorts="by_images", participation=size / count, min_sites=1)
    study = replace(study, federation=federation)
    ready, found = dict(enumerate(images)), []
    for number in range(1, turns * count // size + 1):
        drawn = sample_sites(ready, study, round=number, images=images)
        weights = torch.tensor([images[name] * drawn.factors[i] for i, name in drawn.sites.items()])
        found.append((list(drawn.sites), weights / weights.sum()))
    return found


class Federation:
    """The loop of one candidate.

    Args:
        task: of the study's backbone and prompts; its shift is used.
        study: recipe, seed and total steps a site.
        way: the candidate.
    """

    def __init__(self, task: ClipClassifier, study: StudyConfig, way: Way) -> None:
        self.task, self.study, self.way = task, study, way
        self.total = study.training.local_steps * study.federation.rounds
        self.rounds = 0
        self.recipe = replace(study.training, learning_rate=way.rate, proximal=way.proximal)
        self.augment = build_augmentation(task, self.recipe)
        layout = task.sigma.layout
        factors = torch.ones(layout.size)
        if way.power:
            factors = direction_factors(layout, [t.s.float() for t in task.sigma.basis.svds], way.power)
        if way.frozen_text:
            factors = factors * image_tower(layout)
        self.server = Server(way, factors, matrices(layout))
        self.global_control = torch.zeros(layout.size)
        self.last_change = torch.zeros(layout.size)

    def run(self, sites: Sequence[Site], tails: Sequence[float]) -> Outcome:
        """Train through all rounds."""
        shift = torch.zeros(self.task.sigma.layout.size)
        weights = torch.tensor([1.0 if self.way.equal else float(len(s.examples)) for s in sites])
        weights /= weights.sum()
        sums, counts = {t: torch.zeros_like(shift) for t in tails}, dict.fromkeys(tails, 0)
        turns, size = self.total // self.way.steps, self.way.at_once or len(sites)
        if self.way.by_images:
            images = {site.name: len(site.examples) for site in sites}
            cohorts = by_images(images, self.study, turns=turns, size=size)
        else:
            cohorts = in_turns(weights, turns=turns, size=size, seed=derive_seed(self.study.seed, "turns"))
        self.rounds = len(cohorts)
        for number, (cohort, share) in enumerate(cohorts, start=1):
            asked = [sites[i] for i in cohort]
            if self.way.one_gradient:
                mean = self._one_gradient(shift, asked, share, number)
            else:
                changes = [self._local(shift, site, number) for site in asked]
                mean = (share[:, None] * torch.stack(changes)).sum(0)
            if self.way.control:
                self.global_control = -mean / (self._rate(number) * self.way.steps)
            self.last_change = self.server.step(mean, number, self.rounds)
            shift = shift + self.last_change
            for tail in tails:
                if number > self.rounds * (1 - tail):
                    sums[tail], counts[tail] = sums[tail] + shift, counts[tail] + 1
        return Outcome(shift, {t: sums[t] / counts[t] for t in tails})

    def _rate(self, number: int) -> float:
        done = 0.0 if self.way.flat else (number - 1) / self.rounds
        return self.way.rate * cosine_decay(done)

    def _seed(self, site: Site, number: int) -> int:
        return derive_seed(self.study.seed, site.name, "round", number) + (number - 1) * self.way.steps

    def _one_gradient(self, shift: Tensor, sites: Sequence[Site], weights: Tensor, number: int) -> Tensor:
        """The sites' mean change where each makes one plain step: linear, so all images go in one pass."""
        batches = []
        for site, weight in zip(sites, weights.tolist(), strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed(site, number))
                order = endless_batches(len(site.examples), self.recipe.batch_size, self._seed(site, number))
                batches.append(draw(site, next(order), self.augment, weight))
        return -self._rate(number) * self._gradient(shift, Batch.join(batches))

    def _gradient(self, shift: Tensor, batch: Batch, first: Tensor | None = None) -> Tensor:
        self.task.sigma.set_shift(shift)
        self.task.sigma.shift.grad = None
        add_gradient(self.task, batch, self.way, self.recipe.precision, first)
        grad = self.task.sigma.shift.grad
        if grad is None or not grad.isfinite().all():
            raise RuntimeError(f"the gradient is not finite under {self.way}")
        return grad.detach().clone()

    def _local(self, shift: Tensor, site: Site, number: int) -> Tensor:
        """A site's change in a round (values,)."""
        way, steps = self.way, self.way.steps
        if way.optimiser == "sgd":
            return self._descend(shift, site, number)
        self.task.sigma.set_shift(shift)
        seed = derive_seed(self.study.seed, site.name, "round", number)
        first = (number - 1) * self.total // self.rounds
        where = {"first_step": first, "steps": steps, "total_steps": self.total, "seed": seed}
        gradient = self._adjusted(shift, site, number) if way.changes_loss else None
        recipe = replace(self.recipe, schedule="constant") if way.flat else self.recipe
        train(self.task, site.examples, recipe, gradient=gradient, **where)  # type: ignore[arg-type]
        return self.task.sigma.get_shift() - shift

    def _adjusted(self, shift: Tensor, site: Site, number: int):  # type: ignore[no-untyped-def]
        order = endless_batches(len(site.examples), self.recipe.batch_size, self._seed(site, number))

        def gradient() -> float:
            batch = draw(site, next(order), self.augment, 1.0)
            first = None
            if self.way.not_true:
                now = self.task.sigma.get_shift()
                self.task.sigma.set_shift(shift)
                first = first_logits(self.task, batch, self.recipe.precision)
                self.task.sigma.set_shift(now)
            return add_gradient(self.task, batch, self.way, self.recipe.precision, first)

        return gradient

    def _descend(self, shift: Tensor, site: Site, number: int) -> Tensor:
        """Plain steps, perhaps with control variates or the last global change in them."""
        way, rate, here = self.way, self._rate(number), shift.clone()
        mixed = self.last_change / (way.steps * rate)
        own, total = site.control, torch.zeros_like(shift)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed(site, number))
            order = endless_batches(len(site.examples), self.recipe.batch_size, self._seed(site, number))
            for _ in range(way.steps):
                g = self._gradient(here, draw(site, next(order), self.augment, 1.0))
                total += g
                if way.control and own is not None:
                    g = g - own + self.global_control
                if way.client_momentum:
                    g = (1 - way.client_momentum) * g - way.client_momentum * mixed
                here = here - rate * g
        if way.control:
            site.control = total / way.steps
        return here - shift


def federate(
    task: ClipClassifier,
    study: StudyConfig,
    sites: Mapping[str, Sequence[Example]],
    way: Way,
    tails: Sequence[float] = (),
) -> Outcome:
    """Train a candidate through a study."""
    made = [make_site(task, name, examples, way) for name, examples in sites.items()]
    return Federation(task, study, way).run(made, tails)


def pooled(
    task: ClipClassifier,
    study: StudyConfig,
    examples: Sequence[Example],
    rate: float,
    sites: int,
    name: str = "pooled",
) -> Tensor:
    """All images in one place, for the steps of so many sites one after the other."""
    task.sigma.set_shift(torch.zeros(task.sigma.layout.size))
    steps = study.training.local_steps * study.federation.rounds * sites
    recipe = replace(study.training, learning_rate=rate)
    train(task, examples, recipe, steps=steps, total_steps=steps, seed=derive_seed(study.seed, name))
    return task.sigma.get_shift()
