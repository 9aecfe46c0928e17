"""One training step of sigma against the published form, and evaluation against plain open_clip.

    python -m bench.step --json out/step.json

CLIP ViT-B/16 with random weights (time and memory do not depend on their values), batch 32, 8 classes, both
towers. The published form, written here as the baseline: each weight as two dense layers U and V with the
vector of singular values between, separate q, k and v, 77-token prompts, float32 storage under autocast to
bfloat16 where the processor supports it. Both forms run in turns in one process, so that other work on the
machine slows both; each one's peak memory is that of a process of its own that makes three steps.

In the same turns runs the floor, below which no method can train both towers: the plain image tower with
nothing to train, stored in the precision that it computes in, forward and back to the pixels.

The first run computes a basis, which takes minutes and is cached.
"""

from __future__ import annotations

import logging
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from torch.nn import functional as F

from bench.harness import (
    Table,
    alternate,
    argument_parser,
    parse_arguments,
    peak_mib,
    timed,
    write_json,
)
from fedsigma.common.backbones import Backbone
from fedsigma.common.sigma import Basis, SigmaModel, cached_basis, default_cache_dir, find_layout
from fedsigma.common.sigma.basis import SVD
from fedsigma.common.training.attention import training_attention
from fedsigma.common.training.classifier import ClipClassifier, autocast, supports_bfloat16
from fedsigma.common.training.loop import accumulate_gradient
from fedsigma.common.training.prompts import PromptEncoder

CLASSES = [
    "neutrophil",
    "lymphocyte",
    "monocyte",
    "eosinophil",
    "basophil",
    "platelet",
    "blast",
    "erythrocyte",
]
ARCHITECTURE = "ViT-B-16"
SLOW_S = 60.0
MEMORY_STEPS = 3
FLOOR_PARTS = 8  # as sigma's
PROMPTS = [f"a photo of a {c}." for c in CLASSES]
LOGIT_SCALE = 100.0
Step = Callable[[Tensor, Tensor], float]


class FactoredLinear(nn.Module):
    """The published form of a linear layer: y = U (s * (V^T x)) + b."""

    def __init__(self, svd: SVD, bias: Tensor | None) -> None:
        super().__init__()
        self.u = nn.Parameter(svd.u.clone(), requires_grad=False)
        self.vh = nn.Parameter(svd.vh.clone(), requires_grad=False)
        self.s = nn.Parameter(svd.s.clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., columns) to (..., rows)."""
        return F.linear(F.linear(x, self.vh) * self.s, self.u, self.bias)


class FactoredAttention(nn.Module):
    """Multi-head attention with separate factored q, k, v and o, called as open_clip's own."""

    def __init__(self, plain: nn.MultiheadAttention, svds: list[SVD]) -> None:
        super().__init__()
        biases = [*plain.in_proj_bias.detach().chunk(3), plain.out_proj.bias.detach()]
        self.heads = plain.num_heads
        self.q, self.k, self.v, self.o = (FactoredLinear(t, b) for t, b in zip(svds, biases, strict=True))

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: bool) -> tuple[Tensor]:
        """Return the attention over x (batch, length, width)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mask = None if attn_mask is None else attn_mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (self.o(out.transpose(1, 2).flatten(2)),)


def published_form(model: nn.Module, basis: Basis) -> nn.Module:
    """Replace each adapted layer of a plain CLIP by the published form."""
    svds: dict[str, list[SVD]] = {}
    for entry, svd in zip(basis.layout.entries, basis.svds, strict=True):
        svds.setdefault(entry.weight.partition("resblocks.")[0] + str(entry.layer), []).append(svd)
    model.requires_grad_(False)
    for prefix, blocks in (
        ("visual.transformer.", model.visual.transformer.resblocks),
        ("transformer.", model.transformer.resblocks),
    ):
        for number, block in enumerate(blocks):
            q, k, v, o, fc, proj = svds[f"{prefix}{number}"]
            block.attn = FactoredAttention(block.attn, [q, k, v, o])
            for name, svd in (("c_fc", fc), ("c_proj", proj)):
                plain = getattr(block.mlp, name)
                setattr(block.mlp, name, FactoredLinear(svd, plain.bias.detach()))
    # open_clip reads the type to compute in from this weight.
    for transformer in (model.visual.transformer, model.transformer):
        transformer.get_cast_dtype = lambda: torch.float32
    return model


def build() -> tuple[nn.Module, Basis]:
    """Return a plain model with fixed random weights, and its basis."""
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE, pretrained=None).eval().requires_grad_(False)
    return model, cached_basis(model, find_layout(model), default_cache_dir())


def backbone(model: nn.Module) -> Backbone:
    """Return a model as a `Backbone`, for `PromptEncoder`."""
    tokenizer = open_clip.get_tokenizer(ARCHITECTURE)
    return Backbone(
        name=ARCHITECTURE,
        model=model,
        tokenizer=tokenizer,
        image_size=224,
        mean=OPENAI_DATASET_MEAN,
        std=OPENAI_DATASET_STD,
        interpolation="bicubic",
        logit_scale=LOGIT_SCALE,
    )


def stepper(parameters: list[nn.Parameter], gradient: Step) -> Step:
    """Return a step of the optimiser, given a function that adds a batch's gradient and returns its loss."""
    optimiser = torch.optim.AdamW(parameters, lr=1e-4)

    def step(images: Tensor, labels: Tensor) -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = gradient(images, labels)
        optimiser.step()
        return loss

    return step


def sigma_step(precision: str) -> Step:
    """Return FedSigma's step, as a site makes it."""
    model, basis = build()
    sigma = SigmaModel(model, basis)
    task = ClipClassifier(backbone(model), sigma, PROMPTS, device="cpu")
    return stepper([sigma.shift], partial(accumulate_gradient, task, precision=precision))


def published_step(precision: str) -> Step:
    """Return the published form's step: the batch and the uncut prompts in one pass."""
    model = published_form(*build())
    prompts = PromptEncoder(backbone(model), PROMPTS, cut=False)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))

    def gradient(images: Tensor, labels: Tensor) -> float:
        with autocast(precision, torch.device("cpu")):
            features = F.normalize(model.encode_image((images.float() / 255 - mean) / std).float(), dim=-1)
            logits = LOGIT_SCALE * features @ prompts.features().T
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        return loss.item()

    return stepper([p for p in model.parameters() if p.requires_grad], gradient)


def floor_step(precision: str) -> Step:
    """Return the least work of training both towers: the image tower forward, and back to its input.

    No gradient of a weight, no adapted weight, no text and no cast, in parts and with attention as sigma's.
    Every method that trains values in the first layers needs it, so the published form's seconds over its
    seconds bound the gain on a machine.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = build()[0].visual.to(dtype)

    def step(images: Tensor, _: Tensor) -> float:
        with training_attention(model, precision, torch.device("cpu")):
            for part in images.split(FLOOR_PARTS):
                pixels = (part.to(dtype) / 255).requires_grad_()
                model(pixels).sum().backward()
        return float("nan")

    return step


def make(form: str, precision: str) -> Step:
    """Return the step of one form: "sigma", "paper" or "floor"."""
    return {"sigma": sigma_step, "paper": published_step, "floor": floor_step}[form](precision)


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Return random images, uint8 (size, 3, 224, 224), and labels (size,)."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (size, 3, 224, 224), generator=generator, dtype=torch.uint8)
    return images, torch.randint(len(CLASSES), (size,), generator=generator)


def _report_peak(form: str, precision: str, size: int, out: multiprocessing.SimpleQueue[float]) -> None:
    step = make(form, precision)
    for _ in range(MEMORY_STEPS):  # one lacks the optimiser's state and the allocator's leftovers
        step(*batch(size))
    out.put(peak_mib())


def peak_memory(form: str, precision: str, size: int) -> float:
    """Return the peak resident memory of a process that makes a few steps, in MiB."""
    context = multiprocessing.get_context("spawn")
    out: multiprocessing.SimpleQueue[float] = context.SimpleQueue()
    worker = context.Process(target=_report_peak, args=(form, precision, size, out))
    worker.start()
    worker.join()
    if worker.exitcode:
        raise SystemExit(f"the {form} process ended with code {worker.exitcode}: is there enough memory?")
    return out.get()


def compare_evaluation(precision: str, size: int, rounds: int) -> float:
    """Return the images per second of the adapted model over those of plain open_clip.

    In each round eight batches by each, in turns; the adapted weights are computed in each round, as in a
    study.
    """
    plain, basis = build()
    adapted = SigmaModel(build()[0], basis)
    adapted.set_shift(0.01 * torch.randn(adapted.layout.size))
    images = batch(size)[0].float() / 255
    ratios = []
    with torch.no_grad(), autocast(precision, torch.device("cpu")):
        plain.encode_image(images)  # warms up
        for _ in range(rounds):
            with adapted.inference_mode() as model:
                first, second = alternate(
                    lambda: plain.encode_image(images), lambda m=model: m.encode_image(images), 4
                )
            ratios.append(sum(first) / sum(second))
    return statistics.median(ratios)


def startup(rounds: int = 3) -> float:
    """Return the seconds that the adapter adds to a loaded model when its basis is cached."""
    times = []
    for _ in range(rounds):
        model, _ = build()
        times.append(timed(lambda m=model: SigmaModel.adapt(m)))
    return min(times)


def alternating(steps: dict[str, Step], size: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the loss of each form's first step, and the median seconds of the others, made in turns.

    A form that takes minutes a step, such as emulated bfloat16, makes only one more step.
    """
    data = batch(size)
    first: dict[str, float] = {}
    losses: dict[str, float] = {}
    for form, step in steps.items():
        first[form] = timed(lambda s=step, f=form: losses.update({f: s(*data)}))
        print(f"{form}: the first step took {first[form]:.1f} s", file=sys.stderr, flush=True)
    times: dict[str, list[float]] = {form: [] for form in steps}
    for _ in range(rounds):
        for form, step in steps.items():
            if first[form] < SLOW_S or not times[form]:
                times[form].append(timed(lambda s=step: s(*data)))
    return losses, {form: statistics.median(t) for form, t in times.items()}


def sweep(precision: str, size: int, rounds: int) -> dict[int, float]:
    """Return the median seconds of sigma's step by micro-batch: 1, 2, 4 and so on up to the batch."""
    sizes = [2**n for n in range(size.bit_length()) if 2**n < size] + [size]
    model, basis = build()
    task = ClipClassifier(backbone(model), SigmaModel(model, basis), PROMPTS, device="cpu")
    times: dict[int, list[float]] = {s: [] for s in sizes}
    data = batch(size)
    for number in range(rounds + 1):
        for task.micro_batch in sizes:
            seconds = timed(lambda: accumulate_gradient(task, *data, precision=precision))
            if number:  # the first round warms up
                times[task.micro_batch].append(seconds)
        print(f"micro-batches: round {number} of {rounds}", file=sys.stderr, flush=True)
    return {s: statistics.median(t) for s, t in times.items()}


def main() -> None:
    """Measure and print."""
    p = argument_parser(__doc__, rounds=3, rounds_help="timed steps of each form")
    p.add_argument("--batch", type=int, default=32)
    choices = ["auto", "float32", "bfloat16"]
    help_text = "of the published form; auto: bfloat16 where the processor supports it, else float32"
    p.add_argument("--precision", choices=choices, default="auto", help=help_text)
    p.add_argument("--ours", choices=choices, default="auto", help="precision of sigma")
    p.add_argument("--sweep", action="store_true", help="also time micro-batches of every size")
    options = parse_arguments(p)
    native = supports_bfloat16(torch.device("cpu"))
    auto = "bfloat16" if native else "float32"
    ours, published = (auto if choice == "auto" else choice for choice in (options.ours, options.precision))
    forms = {"sigma": ("sigma", ours), "paper": ("paper", published)}
    if ours != published:
        forms["same"] = ("paper", ours)
    forms["floor"] = ("floor", ours)
    steps = {name: make(*form) for name, form in forms.items()}
    losses, seconds = alternating(steps, options.batch, options.rounds)
    memory = {}
    for name, form in forms.items():
        print(f"{name}: {MEMORY_STEPS} steps in a process of its own", file=sys.stderr, flush=True)
        memory[name] = peak_memory(*form, options.batch)
    same = "same" if "same" in forms else "paper"
    figures: dict[str, Any] = {
        "step_speedup": seconds["paper"] / seconds["sigma"],
        "step_speedup_same_precision": seconds[same] / seconds["sigma"],
        "memory_ratio": memory["sigma"] / memory["paper"],
        "memory_ratio_same_precision": memory["sigma"] / memory[same],
        "eval_ratio": compare_evaluation(ours, options.batch, options.rounds),
        "startup_seconds": startup(),
        "attainable_speedup": seconds["paper"] / seconds["floor"],
        "native_bfloat16": native,
        "precision": {"sigma": ours, "paper": published},
    }
    print(f"bfloat16 in the processor: {'yes' if native else 'no'}; threads: {torch.get_num_threads()}")
    columns = {"form": "<8", "precision": ">11", "first loss": ">11.4f", "s a step": ">11.2f"}
    table = Table(columns | {"peak GiB": ">11.2f", "speed-up": ">11.2f"})
    for name, (form, precision) in forms.items():
        speedup = seconds[name] / seconds["sigma"]
        table.row(form, precision, losses[name], seconds[name], memory[name] / 1024, speedup)
    print(f"steps a second of the floor, the most attainable: {figures['attainable_speedup']:.2f}")
    print(f"memory, sigma's share of the published form's: {figures['memory_ratio']:.2f}")
    print(f"evaluation, share of plain open_clip's images a second: {figures['eval_ratio']:.3f}")
    print(f"start-up with a warm basis cache, seconds added: {figures['startup_seconds']:.2f}")
    if options.sweep:
        figures["micro_batch_seconds"] = by_size = sweep(ours, options.batch, options.rounds)
        print("images at once in a step: " + ", ".join(f"{n}: {t:.1f} s" for n, t in by_size.items()))
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
