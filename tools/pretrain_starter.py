"""Pre-train the bundled starter backbone on the pre-training sets and procedural drawings.

    python -m tools.pretrain_starter --data DIR --out out/starter --steps 1600 --cooldown 600

The image tower is XCiT-nano (El-Nouby et al. 2021, arXiv:2106.09681): its convolutional stem and local
mixing learn from few pictures what a plain ViT of twice the size does not in the same time (`--tower vit`
to compare). The rate is constant after a warm-up, so that a later run can go on from
any checkpoint (`--resume`, with another `--seed`); the cool-down ends it. Blood and skin pictures are never
shown: only `--data` is read.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tools.starter import corpus as C
from tools.starter.muon import optimisers
from tools.starter.shapes import ATTRIBUTES, PROMPTS

TOWERS = {
    "xcit": {
        "image_size": 112,
        "timm_model_name": "xcit_nano_12_p16_224",
        "timm_pool": "",
        "timm_proj": "linear",
    },
    "vit": {"image_size": 112, "layers": 12, "width": 192, "head_width": 64, "patch_size": 16},
}
"""Image towers to compare; the first is the starter's."""

MODEL = {
    "embed_dim": 256,
    "vision_cfg": TOWERS["xcit"],
    "text_cfg": {"context_length": 48, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4},
}
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
PIXELS, BATCH, DRAWN = 112, 128, 32
EVERY = 200
TOKENIZE = open_clip.SimpleTokenizer(context_length=48)


@dataclass(frozen=True)
class Stage:
    """Steps at a constant rate after a warm-up, or a linear cool-down to zero.

    kept is the moving average's share of its own past: its memory has to be shorter than a cool-down.
    """

    name: str
    steps: int
    rate: float
    cooldown: bool = False
    warmup: int = 150
    kept: float = 0.998

    def rate_at(self, step: int) -> float:
        """The rate of step 1 to `steps`."""
        return self.rate * (1 - step / (self.steps + 1) if self.cooldown else min(1.0, step / self.warmup))


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
        pictures = normalise(torch.cat([medical, geometry])).to(memory_format=torch.channels_last)
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


def follow(average: CLIP, model: CLIP, kept: float) -> None:
    """Move the average towards the model, its running statistics included."""
    with torch.no_grad():
        for mine, other in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(other, 1 - kept)
            else:
                mine.copy_(other)


def save(model: CLIP, file: Path, dtype: torch.dtype | None = None) -> None:
    """Write the weights, in another precision if asked."""
    state = {k: v.to(dtype if v.is_floating_point() else None) for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, file, metadata={"format": "pt"})


def run_stage(model: CLIP, batches: Batches, s: Stage, test: C.Corpus, log: Path) -> CLIP:
    """Train one stage; returns the moving average of the weights."""
    average = copy.deepcopy(model).requires_grad_(False)
    both = optimisers(model, s.rate)
    started, sums = time.time(), dict[str, float]()
    for step in range(1, s.steps + 1):
        for group in both[0].param_groups + both[1].param_groups:
            group["lr"] = s.rate_at(step)
        terms = loss_of(model, batches, PIXELS)
        model.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in both:
            optimiser.step()
        follow(average, model, min(s.kept, step / (step + 10)))
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        if step % EVERY == 0 or step == s.steps:
            count = (step - 1) % EVERY + 1
            line = {"stage": s.name, "step": step, "seconds": round(time.time() - started)}
            line |= {name: round(v / count, 4) for name, v in sums.items()}
            line |= zero_shot(average, test, PIXELS)
            save(average, log.parent / f"average-{s.name}.safetensors")
            save(model, log.parent / f"model-{s.name}.safetensors")
            with log.open("a") as file:
                print(json.dumps(line), file=file)
            print(line, flush=True)
            sums = {}
    return average


def main() -> None:
    """Run both stages and write `starter.safetensors` (float16) and its figures."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--tower", choices=list(TOWERS), default="xcit")
    p.add_argument("--steps", type=int, default=1600)
    p.add_argument("--cooldown", type=int, default=600)
    p.add_argument("--resume", type=Path, help="a model-*.safetensors to go on from")
    p.add_argument("--rate", type=float, default=2e-3)
    p.add_argument("--drawings", type=int, default=8000)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    a.out.mkdir(parents=True, exist_ok=True)
    corpus, test = C.load(a.data, "train"), C.load(a.data, "test")
    batches = Batches(corpus, C.drawings(a.drawings, a.seed), a.seed)
    print(f"{len(corpus.classes)} pictures, {len(corpus.names)} classes, {a.drawings} drawings", flush=True)
    # Convolutions of pictures are faster with the channels last.
    model = CLIP(**{**MODEL, "vision_cfg": TOWERS[a.tower]}).to(memory_format=torch.channels_last)
    if a.resume:
        model.load_state_dict(load_file(a.resume))
    average = model
    for stage in (
        Stage("constant", a.steps, a.rate),
        Stage("cooldown", a.cooldown, a.rate, cooldown=True, kept=0.99),
    ):
        if stage.steps:
            average = run_stage(model, batches, stage, test, a.out / "log.jsonl")
    save(average, a.out / "starter.safetensors", torch.float16)
    print(json.dumps(zero_shot(average, test, PIXELS), indent=2))


if __name__ == "__main__":
    main()
