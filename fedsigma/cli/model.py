"""The commands that inspect and prepare backbones, and that use a trained model.

Heavy imports happen when a command runs, so that help is quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsigma.common.utils.errors import PROBLEMS

if TYPE_CHECKING:
    from fedsigma.common.backbones import Backbone

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Commands for a site.")
backbone_app = typer.Typer(no_args_is_help=True, help="Prepare a backbone for a machine without internet.")
app.add_typer(backbone_app, name="backbone")

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, a sigma.safetensors, or NAME@N.")]
BackboneOption = Annotated[
    str | None,
    typer.Option("--backbone", help="The study's backbone on this machine, such as local-dir:DIR."),
]
Personal = Annotated[
    Path | None,
    typer.Option("--personal", help="File of the site's personal values, for a study that has them."),
]


@app.command()
def identity(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The private key file to write; name it in site.yaml.")
    ],
) -> None:
    """Create this site's identity key for secure aggregation, and print the public key.

    The private key stays in FILE, readable by its owner only. Send the public key to the other sites over a
    channel that the server does not control; they enter it in their site.yaml under peers.

    Exit codes: 0 created, 3 FILE exists.
    """
    from fedsigma.client.site.identity import new_identity

    typer.echo(new_identity(file))


@app.command()
def budget(
    file: Annotated[Path, typer.Argument(metavar="SITE_YAML", help="The site's policy file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the privacy budget that studies have spent at this site, by study and in total.

    Exit codes: 0 success, 3 SITE_YAML or the ledger is invalid.

    Example: fedsigma budget site.yaml
    """
    from fedsigma.client.site.policy import SitePolicy
    from fedsigma.client.site.privacy_ledger import PrivacyLedger
    from fedsigma.common.privacy.accounting import epsilon

    policy = SitePolicy.read(file)
    entries = PrivacyLedger(file.resolve().parent / Path(policy.ledger).expanduser()).entries()
    studies = {
        study: epsilon([e.event for e in entries if e.study == study], policy.delta)
        for study in sorted({e.study for e in entries})
    }
    total = epsilon([e.event for e in entries], policy.delta)
    if as_json:
        values = {"studies": studies, "all": total, "budget": policy.epsilon, "delta": policy.delta}
        typer.echo(json.dumps(values, indent=2))
        return
    for study, spent in studies.items():
        typer.echo(f"{study}: epsilon {spent:.2f}")
    allowed = "no budget of the site" if policy.epsilon is None else f"budget {policy.epsilon:g}"
    typer.echo(f"all studies: epsilon {total:.2f} at delta {policy.delta:g}; {allowed}")


@app.command()
def inspect(
    name: Annotated[
        str, typer.Argument(help="A backbone: starter, ViT-B-16, ViT-B-16/openai, local-dir:DIR, ...")
    ],
    towers: Annotated[str, typer.Option(help="Towers to adapt, separated by commas.")] = "image,text",
    layers: Annotated[str, typer.Option(help="all, top, middle, bottom, or numbers such as 0,1,2.")] = "all",
    parts: Annotated[str, typer.Option(help="Parts of a layer, separated by commas.")] = "q,k,v,o,mlp",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count the values that a study would train on a backbone, without weights or a download.

    Example: fedsigma inspect ViT-B-16 --towers image --parts q,v
    """
    from fedsigma.common.backbones import load_meta_model
    from fedsigma.common.config.sigma import SigmaConfig
    from fedsigma.common.sigma import find_layout

    selection = SigmaConfig(towers=_split(towers), layers=_layers(layers), parts=_split(parts))
    model = load_meta_model(name)
    layout = find_layout(model, selection)
    total = sum(p.numel() for p in model.parameters())
    rows = [
        {"tower": tower, "part": part, "matrices": len(sizes), "sigma_values": sum(sizes)}
        for tower in selection.towers
        for part in selection.parts
        if (sizes := [e.size for e in layout.entries if (e.tower, e.part) == (tower, part)])
    ]
    summary = {
        "backbone": name,
        "sigma_values": layout.size,
        "backbone_parameters": total,
        "share": layout.size / total,
        "bytes_per_upload": 4 * layout.size,
        "layout_digest": layout.digest,
        "parts": rows,
    }
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        _print_counts(summary, rows)


def _print_counts(summary: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("tower", "part", title=f"sigma values of {summary['backbone']}", title_justify="left")
    for head in ("matrices", "sigma values"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(row["tower"], row["part"], f"{row['matrices']:,}", f"{row['sigma_values']:,}")
    table.add_section()
    table.add_row("all", "", f"{sum(r['matrices'] for r in rows):,}", f"{summary['sigma_values']:,}")
    Console().print(table)
    typer.echo(
        f"{summary['sigma_values']:,} of {summary['backbone_parameters']:,} parameters are trained "
        f"({100 * summary['share']:.4f}%); "
        f"one upload is {summary['bytes_per_upload'] / 1000:,.0f} kB as float32."
    )


@backbone_app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="ARCH/TAG, hf-hub:org/name, or local-dir:DIR.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must be new or empty.")],
) -> None:
    """Download a backbone into one folder that can be copied to the sites.

    Example: fedsigma backbone fetch ViT-B-16/openai clip-b16
    """
    from fedsigma.common.backbones import fetch as fetch_backbone

    _written(fetch_backbone(name, folder), folder)


@backbone_app.command()
def convert(
    torch_file: Annotated[Path, typer.Argument(help="A torch checkpoint (.pt, .pth, .bin) of tensors.")],
    architecture: Annotated[
        str, typer.Argument(help="ARCH, ARCH/TAG, hf-hub:org/name, or local-dir:DIR with its configuration.")
    ],
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must be new or empty.")],
) -> None:
    """Convert a torch checkpoint to a folder of safetensors, without running code in the checkpoint.

    Example: fedsigma backbone convert model.pt ViT-B-16/laion2b_s34b_b88k clip-b16
    """
    from fedsigma.common.backbones import convert as convert_file

    _written(convert_file(torch_file, architecture, folder), folder)


def _written(backbone: Backbone, folder: Path) -> None:
    size = sum(path.stat().st_size for path in folder.iterdir())
    mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (backbone.mean, backbone.std))
    notes = json.loads((folder / "fedsigma_backbone.json").read_text("utf-8"))["notes"]
    typer.echo(f"Wrote {folder} ({size / 1e6:,.1f} MB) and loaded it as a check.")
    typer.echo(
        f"Images: {backbone.image_size} pixels, {backbone.interpolation}, {backbone.resize_mode} side; "
        f"mean {mean}, std {std}."
    )
    for note in notes:
        typer.echo(f"Note: {note}.")
    typer.echo(f"Name it local-dir:{folder} at a site, or the path of its copy there.")


@app.command()
def predict(
    run: Run,
    folder: Annotated[Path, typer.Argument(help="Folder of images or DICOM files, with its subfolders.")],
    out: Annotated[Path, typer.Option(help="The CSV file to write.")],
    backbone: BackboneOption = None,
    personal: Personal = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one batch.")] = 64,
    maps: Annotated[
        Path | None,
        typer.Option(help="Folder for PNG attribution maps of the adapted and the zero-shot model."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Calibration file written by `fedsigma calibrate`.", exists=True),
    ] = None,
    abstain_below: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Leave the prediction empty below this probability.")
    ] = 0.0,
    series: Annotated[
        bool, typer.Option("--series", help="One prediction a DICOM series: the mean over its images.")
    ] = False,
    most_maps: Annotated[int, typer.Option(min=1, help="Highest number of maps.")] = 20,
) -> None:
    """Predict images or DICOM files in a folder with a trained model. Research use only.

    Writes a CSV with file, prediction, and a probability for each class, after comparing the backbone's
    fingerprint with the study's.

    Exit codes: 0 success, 3 bad input, 4 some images could not be read.

    Example: fedsigma predict runs/demo pictures --out predictions.csv
    """
    from fedsigma.client.inference.batch import predict_folder
    from fedsigma.client.inference.calibration import Calibration
    from fedsigma.client.inference.loaded_model import load_model

    model = load_model(run, backbone, personal)
    fitted = Calibration.load_for(model, calibration)
    unreadable = predict_folder(
        model,
        folder,
        out,
        batch_size=batch_size,
        progress=True,
        temperature=fitted.temperature if fitted else 1.0,
        abstain_below=abstain_below,
        by_series=series,
    )
    typer.echo(f"Wrote {out}.")
    if maps is not None:
        from fedsigma.client.inference.attribution import write_maps

        typer.echo(f"Wrote {write_maps(model, folder, maps, limit=most_maps)} maps into {maps}.")
    if unreadable:
        for line in unreadable:
            typer.echo(f"Could not read {line}", err=True)
        raise typer.Exit(PROBLEMS)


@app.command()
def calibrate(
    run: Run,
    data: Annotated[str, typer.Option(help="Labelled images: folder:PATH, csv:PATH, parquet:PATH or demo.")],
    out: Annotated[Path, typer.Option(help="The JSON file to write.")],
    backbone: BackboneOption = None,
    personal: Personal = None,
) -> None:
    """Calibrate a model's probabilities by one temperature, on labelled images that it was not trained on.

    No predicted class changes.

    Exit codes: 0 success, 3 too few images have one of the study's classes.

    Example: fedsigma calibrate runs/demo --data folder:labelled --out calibration.json
    """
    from fedsigma.client.inference.calibration import calibrate as fit
    from fedsigma.client.inference.loaded_model import load_model
    from fedsigma.common.data.sources.registry import open_source

    calibration = fit(load_model(run, backbone, personal), open_source(data))
    calibration.write(out)
    typer.echo(f"Temperature {calibration.temperature:.3f}, fitted on {calibration.images} images.")
    typer.echo(f"Expected calibration error {calibration.before:.3f} before, {calibration.after:.3f} after.")
    typer.echo(f"Wrote {out}.")


@app.command()
def explain(
    run: Run,
    phrases: Annotated[
        Path | None,
        typer.Option(help="YAML file of descriptions: a list, or a mapping of kinds to lists.", exists=True),
    ] = None,
    template: Annotated[str, typer.Option(help="Template that each description is inserted into.")] = "{}",
    heads: Annotated[int, typer.Option(min=1, help="Number of attention heads.")] = 8,
    words: Annotated[int, typer.Option(min=1, help="Number of descriptions of each head.")] = 5,
    backbone: BackboneOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe in words how a study changed the model: which attention heads, and in which directions.

    Needs no images. docs/explain.md has the formulas and their limits.

    Example: fedsigma explain runs/demo --template "a photo of {}"
    """
    from fedsigma.client.inference.loaded_model import load_model
    from fedsigma.common.explain import Phrases
    from fedsigma.common.explain.report import build_explainer, format_explanation, to_rows

    corpus = Phrases.parse(phrases.read_text(encoding="utf-8")) if phrases else Phrases.bundled()
    model = load_model(run, backbone)
    explainer = build_explainer(model.backbone, model.sigma, corpus, template=template)
    explanation = explainer.explain(model.sigma.get_shift().cpu(), heads=heads, phrases=words)
    typer.echo(json.dumps(to_rows(explanation), indent=2) if as_json else format_explanation(explanation))


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.")],
    backbone: BackboneOption = None,
    personal: Personal = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write image.onnx and text.onnx.")] = False,
) -> None:
    """Export a trained model, merged into its backbone, as a plain open_clip folder.

    Example: fedsigma export runs/demo --out adapted-clip
    """
    from fedsigma.client.inference.loaded_model import export as write_merged
    from fedsigma.client.inference.loaded_model import load_model

    folder = write_merged(load_model(run, backbone, personal), out, onnx=onnx)
    typer.echo(f"Wrote {folder}.")
    if onnx:
        typer.echo("The features of image.onnx and text.onnx match those of torch to within 1e-3.")
    typer.echo(f"With open_clip: open_clip.create_model_and_transforms('local-dir:{folder}')")


def _split(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _layers(text: str) -> str | tuple[int, ...]:
    items = _split(text)
    numbers = tuple(int(item) for item in items if item.isdecimal())
    if not numbers:
        return text.strip()
    if len(numbers) != len(items):
        raise typer.BadParameter(f"{text!r}: expected all, top, middle, bottom, or numbers such as 0,1,2")
    return numbers
