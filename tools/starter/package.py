"""Turn a pre-training run into the bundled starter backbone: `common/backbones/starter/`.

    python -m tools.starter.package out/starter --figures out/starter/figures.json

Run it from the project's folder. Reads OUT/starter.safetensors and OUT/log.jsonl as
`tools/pretrain_starter.py` writes them. The figures file is a JSON table; each key becomes a heading of the
model card: a table of numbers, a table of tables, or a text.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fedsigma.common.backbones import (
    Backbone,
    BackboneError,
    Preprocessing,
    assemble,
    build_model,
    save_backbone,
)
from fedsigma.common.backbones.build import load_weights_file
from fedsigma.common.backbones.tokenizer import load_tokenizer
from tools.pretrain_starter import MEAN, MODEL, STD

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 30_000_000
CARD = """# The starter backbone

A small CLIP that comes with FedSigma: with it you can run the demonstration and the tests without a download.

**For research and demonstration only. Not a medical device, not for clinical use, never validated on
patients.**

| | |
|---|---|
| form | open_clip: an image tower from timm, open_clip's own text tower |
| image tower | {image} |
| text tower | {text} |
| parameters | {parameters:,} ({image_parameters:,} in the image tower) |
| images | {size} x {size} pixels, bicubic, OpenAI's mean and std |
| weights | {megabytes:.1f} MB safetensors, float16; loaded as float32 |
| loaded by | `backbone: starter` in a study, or `open_clip.create_model("local-dir:PATH")` |

## Trained on

Public images of brain MRI, chest X-ray, abdominal CT, knee X-ray and lung histology, at 128 pixels, and
procedural drawings of shapes with captions. It has seen no blood smear and no skin image: these two are kept
to evaluate adaptation. The licences of the public sets are known only in part, and none is confirmed for
commercial use. The same holds for this model.

## Recipe

Contrastive training of both towers from random weights by `tools/pretrain_starter.py`, with a class term
within each source and an attribute term on the drawings; Muon and AdamW, batches of 96 images and 32
drawings, moving average of the weights. The image tower was chosen among a few by the training loss after
equal time. Test images were neither trained on nor used to decide when to stop; their accuracy was printed
during training.

{steps}
{figures}
## Known limits

- It has seen few kinds of images, most of them grey, all of them small: expect it to be weak on others.
- Several of its sets have no patient numbers, so its scores on their test parts may be too high.
- Its text tower knows the words of its captions and little else; name classes in plain words.
- Its sets are not balanced by age, sex, ethnicity, scanner or country, and it has their biases.
"""


def load_trained(weights: Path) -> Backbone:
    """The pre-trained model as a backbone.

    Raises:
        BackboneError: the file is missing or is not of this architecture.
    """
    if not weights.is_file():
        raise BackboneError(f"there is no {weights}: run tools/pretrain_starter.py first")
    cfg = copy.deepcopy(MODEL)
    vision: Any = cfg["vision_cfg"]
    model = build_model(cfg, "starter")
    load_weights_file(model, weights, "starter")
    preprocessing = Preprocessing(
        size=vision["image_size"], mean=MEAN, std=STD, interpolation="bicubic", resize_mode="shortest"
    )
    tokenizer = load_tokenizer(cfg, model, "", "starter")
    return assemble("starter", model, tokenizer, preprocessing, cfg, architecture="starter")


def package(out: Path, target: Path, figures: dict[str, Any]) -> Path:
    """Write the folder; an older one is replaced only once the new one is complete.

    Raises:
        BackboneError: the weights do not load, or are larger than 30 MB.
    """
    backbone = load_trained(out / "starter.safetensors")
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        save_backbone(backbone, fresh, source="tools/pretrain_starter.py", dtype=torch.float16)
        size = (fresh / "open_clip_model.safetensors").stat().st_size
        if size > LIMIT:
            raise BackboneError(f"the starter's weights take {size} bytes, at most {LIMIT} are bundled")
        log = read_log(out / "log.jsonl")
        (fresh / "README.md").write_text(
            card(backbone, size, figures or zero_shot_figures(log), log), "utf-8"
        )
        shutil.rmtree(target, ignore_errors=True)
        fresh.replace(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log, or none."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def zero_shot_figures(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The last zero-shot accuracies in a log, where no figures were given."""
    losses = {"stage", "step", "seconds", "class", "image_to_text", "text_to_image", "attributes"}
    for line in reversed(log):
        scores = {k: v for k, v in line.items() if k not in losses}
        if scores:
            return {"Zero-shot accuracy on the test part of its own sets": scores}
    return {}


def card(backbone: Backbone, size: int, figures: dict[str, Any], log: list[dict[str, Any]]) -> str:
    """The model card, in Markdown."""
    vision, text = backbone.model_cfg["vision_cfg"], backbone.model_cfg["text_cfg"]
    visual: Any = backbone.model.visual
    # The log counts from each stage's start: the last line before a fall is the stage's end.
    ends = [a for a, b in zip(log, [*log[1:], {"step": 0}], strict=True) if b["step"] <= a["step"]]
    steps = [[e["stage"], e["step"], round(e["seconds"] / 60)] for e in ends]
    return CARD.format(
        image="{}: {} wide, {} layers".format(
            vision["timm_model_name"], visual.trunk.embed_dim, len(visual.trunk.blocks)
        ),
        text="{layers} layers of width {width}, {heads} heads, {context_length} tokens".format(**text),
        parameters=sum(p.numel() for p in backbone.model.parameters()),
        image_parameters=sum(p.numel() for p in visual.parameters()),
        size=backbone.image_size,
        megabytes=size / 1e6,
        steps=table(["rate", "steps", "minutes"], steps) if steps else "",
        figures="".join(section(name, value) for name, value in figures.items()),
    )


def section(name: str, value: Any) -> str:
    """One heading of the card."""
    if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
        columns = list(dict.fromkeys(k for row in value.values() for k in row))
        body = table(
            ["", *columns], [[key, *(row.get(c, "") for c in columns)] for key, row in value.items()]
        )
    elif isinstance(value, dict):
        body = table(["", ""], [[k, v] for k, v in value.items()])
    else:
        body = f"{value}\n"
    return f"\n## {name}\n\n{body}"


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; fractions with three decimals."""
    lines = [head, ["---"] * len(head), *([shown(c) for c in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def shown(value: Any) -> str:
    """A cell."""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Write common/backbones/starter from a training run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder that tools/pretrain_starter.py wrote")
    parser.add_argument("--figures", type=Path, help="JSON table of figures; the log's own by default")
    parser.add_argument("--target", type=Path, default=ROOT / "common" / "starter")
    args = parser.parse_args()
    figures = json.loads(args.figures.read_text("utf-8")) if args.figures else {}
    folder = package(args.out, args.target, figures)
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:>10}  {path}")


if __name__ == "__main__":
    main()
