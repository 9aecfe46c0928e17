"""Pre-train the bundled starter backbone on the pre-training sets and procedural drawings.

    python bench/pretrain_starter.py --data ../shared/data/pretrain --out out/starter \
        --stages 64:3300,112:1000:0.5 --cooldown 112:420 --compile

A stage is `pixels:steps[:dropped share of patches]`; positional embeddings are interpolated between
stages. Small pictures and dropped patches make most of the training three times cheaper. The rate is
constant after a warm-up, so that a later run can go on from any checkpoint (`--resume`, with another
`--seed`); the cool-down ends it. Blood and skin pictures are never shown: only `--data` is read.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import open_clip
import torch
from open_clip.model import CLIP
from open_clip.transformer import PatchDropout
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from bench.starter import corpus as C
from bench.starter.shapes import ATTRIBUTES, PROMPTS

MODEL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 112, "layers": 12, "width": 192, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 48, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
}
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
BATCH, DRAWN = 128, 32
TOKENIZE = open_clip.SimpleTokenizer(context_length=48)


@dataclass(frozen=True)
class Settings:
    """Optimiser settings of one stage."""

    pixels: int
    steps: int
    rate: float
    cooldown: bool
    dropped: float = 0.0
    compiled: bool = False
    warmup: int = 300

    @property
    def name(self) -> str:
        """Names the stage's checkpoint."""
        return f"{self.pixels}-cooldown" if self.cooldown else f"{self.pixels}-{self.dropped:g}"


def build(pixels: int) -> CLIP:
    """A starter model for pictures of the given side."""
    config = copy.deepcopy(MODEL)
    config["vision_cfg"]["image_size"] = pixels
    return CLIP(**config)


def mimetic_(model: CLIP) -> None:
    """Start attention near what trained transformers show (Trockman and Kolter 2023, arXiv:2305.09828).

    Query-key products near a multiple of the identity, value-output products near its negative: worth
    several points for vision transformers trained from little data. Sine positions, which the query-key
    start relies on and which survive interpolation.
    """
    visual = model.visual
    width, heads = visual.conv1.out_channels, visual.transformer.resblocks[0].attn.num_heads
    size = width // heads
    for block in visual.transformer.resblocks:
        attn, rows = block.attn, []
        for _ in range(heads):
            u, s, vh = torch.linalg.svd(0.7 * torch.randn(width, width) / width**0.5 + 0.7 * torch.eye(width))
            root = s[:size].sqrt()
            rows.append(((u[:, :size] * root).T, root[:, None] * vh[:size]))
        u, s, vh = torch.linalg.svd(0.4 * torch.randn(width, width) / width**0.5 - 0.4 * torch.eye(width))
        with torch.no_grad():
            attn.in_proj_weight.copy_(
                torch.cat(
                    [torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows]), s.sqrt()[:, None] * vh]
                )
            )
            attn.out_proj.weight.copy_(u * s.sqrt())
    side = math.isqrt(visual.positional_embedding.shape[0] - 1)
    steps = torch.exp(torch.arange(width // 4) * (-math.log(1e4) / (width // 4)))
    at = (torch.arange(side) / side * 16)[:, None] * steps
    wave = torch.cat([at.sin(), at.cos()], 1)
    grid = torch.cat([wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)], 2).reshape(
        -1, width
    )
    with torch.no_grad():
        visual.positional_embedding[1:] = 0.3 * grid


def fit_positions(state: dict[str, Tensor], pixels: int) -> dict[str, Tensor]:
    """Interpolate the image tower's positional embedding to another picture size."""
    key = "visual.positional_embedding"
    cls, grid = state[key][:1], state[key][1:]
    side, new = math.isqrt(grid.shape[0]), pixels // MODEL["vision_cfg"]["patch_size"]  # type: ignore[index]
    if side != new:
        square = grid.T.reshape(1, -1, side, side)
        square = F.interpolate(square, (new, new), mode="bicubic", align_corners=False)
        grid = square.reshape(square.shape[1], -1).T
    return {**state, key: torch.cat([cls, grid])}


def encode_texts(model: CLIP, texts: list[str]) -> Tensor:
    """Text features (len(texts), 256); the causal tower sees only up to the longest text."""
    tokens = TOKENIZE(texts)
    length = int((tokens != 0).sum(1).max())
    tokens = tokens[:, :length]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)
    return F.normalize(x[torch.arange(len(texts)), tokens.argmax(-1)] @ model.text_projection, dim=-1)


def normalise(pictures: Tensor) -> Tensor:
    """Scale 0..1 pictures (n, 3, h, w) to what open_clip feeds its models."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (pictures - mean) / std


class Batches:
    """Endless batches: BATCH - DRAWN medical pictures and DRAWN drawings."""

    def __init__(self, corpus: C.Corpus, drawn: C.Drawings, seed: int) -> None:
        self.corpus, self.drawn = corpus, drawn
        self.weights = C.sampling_weights(corpus)
        self.generator = torch.Generator().manual_seed(seed)
        self.random = random.Random(seed)

    def class_texts(self) -> list[str]:
        """One randomly worded text a class."""
        return [self.random.choice(C.TEMPLATES).format(label=c, hint=h) for _, c, h in self.corpus.names]

    def take(self, pixels: int) -> tuple[Tensor, Tensor, list[str], Tensor]:
        """Pictures (BATCH, 3, pixels, pixels), classes, captions of the drawings, attribute labels."""
        g = self.generator
        chosen = torch.multinomial(self.weights, BATCH - DRAWN, generator=g)
        other = torch.randint(len(self.drawn.captions), (DRAWN,), generator=g)
        medical = C.augment(self.corpus.pictures[chosen], pixels, g, crop=(0.5, 1.0), colour=0.3)
        geometry = C.augment(self.drawn.pictures[other], pixels, g, crop=(0.75, 1.0), colour=0.0)
        captions = [self.drawn.captions[i] for i in other.tolist()]
        pictures = normalise(torch.cat([medical, geometry]))
        return pictures, self.corpus.classes[chosen], captions, self.drawn.labels[other]


def loss_of(model: CLIP, batches: Batches, pixels: int, smoothing: float = 0.05) -> dict[str, Tensor]:
    """The four terms: classes within a source, pictures to texts, texts to pictures, attributes."""
    pictures, classes, captions, attributes = batches.take(pixels)
    class_texts = batches.class_texts()
    prompts = [PROMPTS[name].format(v) for name, values in ATTRIBUTES.items() for v in values]
    texts = encode_texts(model, class_texts + captions + prompts)
    k, m = len(class_texts), BATCH - DRAWN
    features = F.normalize(model.visual(pictures), dim=-1)
    scale = model.logit_scale.exp().clamp(max=100)
    logits = scale * features @ texts.T
    source = torch.zeros(k, dtype=torch.long)
    for number, members in enumerate(batches.corpus.sources().values()):
        source[members] = number
    foreign = source[classes][:, None] != source[None]
    within = logits[:m, :k].masked_fill(foreign, -1e4)
    target = F.one_hot(classes, k).float() * (1 - smoothing)
    target = target + smoothing * (~foreign) / (~foreign).sum(1, keepdim=True)
    terms = {"class": -(target * F.log_softmax(within, 1)).sum(1).mean()}
    paired = torch.cat([classes, k + torch.arange(DRAWN)])
    terms["image_to_text"] = 0.5 * F.cross_entropy(logits[:, : k + DRAWN], paired, label_smoothing=0.05)
    positive = F.one_hot(paired, k + DRAWN).T.float()
    present = positive.sum(1) > 0
    column = F.log_softmax(logits[:, : k + DRAWN].T[present], 1)
    share = positive[present] / positive[present].sum(1, keepdim=True)
    terms["text_to_image"] = -0.25 * (share * column).sum(1).mean()
    parts, start = [], k + DRAWN
    for column_number, values in enumerate(ATTRIBUTES.values()):
        part = logits[m:, start : start + len(values)]
        parts.append(F.cross_entropy(part, attributes[:, column_number], label_smoothing=0.05))
        start += len(values)
    terms["attributes"] = 0.5 * torch.stack(parts).mean()
    return terms


@torch.no_grad()
def zero_shot(model: CLIP, corpus: C.Corpus, pixels: int) -> dict[str, float]:
    """Accuracy on each source, its own classes only, prompts averaged over the templates."""
    model.eval()
    texts = torch.stack(
        [encode_texts(model, [t.format(label=c, hint=h) for _, c, h in corpus.names]) for t in C.TEMPLATES]
    ).mean(0)
    features = []
    for part in corpus.pictures.split(256):
        small = F.interpolate(part.float() / 255, (pixels, pixels), mode="bicubic", antialias=True).clamp(
            0, 1
        )
        features.append(F.normalize(model.visual(normalise(small)), dim=-1))
    logits, result = torch.cat(features) @ texts.T, {}
    for source, members in corpus.sources().items():
        rows = torch.isin(corpus.classes, torch.tensor(members))
        guess = torch.tensor(members)[logits[rows][:, members].argmax(1)]
        result[source] = round((guess == corpus.classes[rows]).float().mean().item(), 4)
    model.train()
    return result


def groups(model: CLIP, decay: float) -> list[dict[str, object]]:
    """Parameters with and without weight decay."""
    plain = [p for p in model.parameters() if p.ndim < 2]
    heavy = [p for p in model.parameters() if p.ndim >= 2]
    return [{"params": heavy, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]


def run_stage(model: CLIP, batches: Batches, s: Settings, test: C.Corpus, log: Path) -> CLIP:
    """Train one stage; returns the moving average of the weights."""
    average = copy.deepcopy(model).requires_grad_(False)
    model.visual.patch_dropout = PatchDropout(s.dropped) if s.dropped else torch.nn.Identity()
    if s.compiled:
        model.visual.compile()
    optimiser = torch.optim.AdamW(groups(model, 0.05), lr=s.rate, betas=(0.9, 0.98))
    started, sums = time.time(), {}
    for step in range(1, s.steps + 1):
        factor = 1 - step / (s.steps + 1) if s.cooldown else min(1.0, step / s.warmup)
        for group in optimiser.param_groups:
            group["lr"] = s.rate * factor
        terms = loss_of(model, batches, s.pixels)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        keep = min(0.998, step / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        if step % 250 == 0 or step == s.steps:
            line = {"pixels": s.pixels, "step": step, "seconds": round(time.time() - started)}
            count = (step - 1) % 250 + 1
            line |= {name: round(v / count, 4) for name, v in sums.items()}
            if step % 500 == 0 or step == s.steps:
                line |= zero_shot(average, test, s.pixels)
                save_file(average.state_dict(), log.parent / f"average-{s.name}.safetensors")
                save_file(model.state_dict(), log.parent / f"stage-{s.name}.safetensors")
            with log.open("a") as file:
                print(json.dumps(line), file=file)
            print(line, flush=True)
            sums = {}
    return average


def stages(text: str, rate: float, cooldown: bool, compiled: bool, warmup: int = 300) -> Iterator[Settings]:
    """Parse `pixels:steps[:dropped],...`."""
    for part in filter(None, text.split(",")):
        pixels, steps, *rest = part.split(":")
        dropped = float(rest[0]) if rest else 0.0
        yield Settings(int(pixels), int(steps), rate, cooldown, dropped, compiled and not dropped, warmup)


def main() -> None:
    """Run the stages and write `starter.safetensors` (float16) and its figures."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--stages", default="64:3300,112:1000:0.5")
    p.add_argument("--cooldown", default="112:420")
    p.add_argument("--resume", type=Path, help="a stage checkpoint to go on from")
    p.add_argument("--rate", type=float, default=1e-3)
    p.add_argument("--drawings", type=int, default=8000)
    p.add_argument("--compile", action="store_true", help="compile stages without dropped patches")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    a.out.mkdir(parents=True, exist_ok=True)
    corpus, test = C.load(a.data, "train"), C.load(a.data, "test")
    batches = Batches(corpus, C.drawings(a.drawings, a.seed), a.seed)
    print(f"{len(corpus.classes)} pictures, {len(corpus.names)} classes, {a.drawings} drawings", flush=True)
    state: dict[str, Tensor] | None = load_file(a.resume) if a.resume else None
    average = None
    plan = [
        *stages(a.stages, a.rate, False, a.compile, 50 if a.resume else 300),
        *stages(a.cooldown, a.rate, True, False),
    ]
    for stage in plan:
        model = build(stage.pixels)
        if state is None:
            mimetic_(model)
        else:
            model.load_state_dict(fit_positions(state, stage.pixels))
        average = run_stage(model, batches, stage, test, a.out / "log.jsonl")
        state = model.state_dict()
    assert average is not None
    final = {k: v.half().contiguous() for k, v in average.state_dict().items()}
    save_file(final, a.out / "starter.safetensors", metadata={"format": "pt"})
    print(json.dumps(zero_shot(average, test, plan[-1].pixels), indent=2))


if __name__ == "__main__":
    main()
