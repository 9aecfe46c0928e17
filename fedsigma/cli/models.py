"""The command `fedsigma models`: versions of finished models, compared, promoted, combined, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedsigma.common.utils.console import print_table
from fedsigma.common.utils.errors import PROBLEMS

if TYPE_CHECKING:
    from fedsigma.common.registry import ModelRegistry

__all__ = ["app"]


app = typer.Typer(no_args_is_help=True)
models_app = typer.Typer(no_args_is_help=True, help="Finished models and their versions.")
app.add_typer(models_app, name="models")


@app.callback()
def _group() -> None:
    """Keep `models` a group of its own."""


Where = Annotated[
    Path | None,
    typer.Option("--shelf", help="The folder of models.", show_default="$FEDSIGMA_MODELS, or by the runs"),
]
Ref = Annotated[str, typer.Argument(metavar="MODEL", help="NAME (its latest), NAME@N or NAME@LABEL.")]
Place = Annotated[
    str | None, typer.Option(help="Where the same backbone lies here, if not by the study's name.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of words.")]


@models_app.command("list")
def list_versions(
    name: Annotated[str, typer.Argument(help="Of one model; all without it.")] = "",
    shelf: Where = None,
    as_json: AsJson = False,
) -> None:
    """List the versions there are, each verified.

    Exit code 3: one was changed.
    """
    rows = []
    for version in _open(shelf).versions(name):
        manifest = version.manifest
        rows.append(
            {
                "model": manifest.reference,
                "labels": ", ".join(version.labels),
                "created": manifest.created,
                "made": manifest.made,
                "sites": len(manifest.sites),
                "accuracy": manifest.results.get("federated", {}).get("accuracy"),
                "folder": str(version.path),
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    heads = ("model", "labels", "created", "made", "sites", "accuracy")
    print_table(heads, [{head: _shown(row[head]) for head in heads} for row in rows])


@models_app.command()
def show(model: Ref, shelf: Where = None, as_json: AsJson = False) -> None:
    """Print the card of a version, or with --json its manifest.

    Exit code 3: there is none, or it was changed.
    """
    version = _open(shelf).find(model)
    if as_json:
        typer.echo(version.manifest.to_bytes().decode(), nl=False)
        return
    from rich.markdown import Markdown

    Console().print(Markdown((version.path / "card.md").read_text(encoding="utf-8")))


@models_app.command()
def diff(
    one: Ref,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Another version.")],
    shelf: Where = None,
    as_json: AsJson = False,
) -> None:
    """Say how two versions differ: the studies, the results, and the shifts by tower and part.

    Exit code 3: one is missing or was changed, or they are of different bases.
    """
    from fedsigma.common.registry.compare import compare

    place = _open(shelf)
    found = compare(place.find(one), place.find(other))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    typer.echo(found.study or "The studies are the same.")
    for method, (before, after) in found.accuracy.items():
        typer.echo(f"{method:<12} accuracy {_shown(before)} -> {_shown(after)}")
    typer.echo(f"\n{'':<14}{'norm':>8}{'norm':>8}{'cosine':>8}{'apart':>8}")
    for row in found.shifts:
        typer.echo(f"{row.where:<14}{row.one:>8.3f}{row.other:>8.3f}{row.cosine:>8.3f}{row.apart:>8.3f}")


@models_app.command()
def promote(
    model: Ref,
    label: Annotated[str, typer.Argument(help="Such as candidate or production.")],
    shelf: Where = None,
) -> None:
    """Give a version a label; another version of the model loses it.

    Exit code 3: there is no such version, or it was changed, or the label does not do.
    """
    version = _open(shelf).promote(model, label)
    typer.echo(f"{version.manifest.reference} is {', '.join(version.labels)}.")


@models_app.command()
def combine(
    name: Annotated[str, typer.Argument(help="Of the model that is made.")],
    terms: Annotated[
        list[str], typer.Argument(metavar="MODEL=FACTOR...", help="Versions and their factors: a@1=0.5 b=0.5")
    ],
    shelf: Where = None,
) -> None:
    """Make a version of a sum of shifts: one scaled (a=0.5 is half of the way from the pretrained model), or
    several merged.

    Exit code 3: a version is missing or was changed, or they are of different bases.

    Example: fedsigma models combine both white-cells@3=0.5 dermoscopy@1=0.5
    """
    from fedsigma.common.registry.task_arithmetic import WeightedVersion, publish_combination

    place = _open(shelf)
    found = [WeightedVersion(place.find(reference), factor) for reference, factor in map(_term, terms)]
    version = publish_combination(place, name, found)
    typer.echo(f"{version.manifest.reference} in {version.path}")


@models_app.command()
def curve(
    model: Ref,
    data: Annotated[str, typer.Option(help="Labelled images: folder:PATH, csv:PATH, parquet:PATH or demo.")],
    other: Annotated[
        str | None, typer.Option(help="A version to end at; else from pretrained to MODEL.")
    ] = None,
    factors: Annotated[str, typer.Option(help="Where to judge, by commas.")] = "0,0.25,0.5,0.75,1,1.25",
    backbone: Place = None,
    shelf: Where = None,
    as_json: AsJson = False,
) -> None:
    """Say how accuracy moves from the pretrained model (0) to a version (1), or from a version to another.

    Exit code 3: a version is missing or was changed, they are of different bases, or no image fits.

    Example: fedsigma models curve white-cells@3 --data folder:cells
    """
    from fedsigma.client.inference.interpolation import evaluate_curve as judge
    from fedsigma.client.inference.loaded_model import load_model
    from fedsigma.common.data.sources.registry import open_source
    from fedsigma.common.registry.publish import load

    place = _open(shelf)
    restored = load_model(place.find(model).path, backbone)
    end = load(place.find(other)) if other else None
    points = list(judge(restored, end, open_source(data), _factors(factors)))
    if as_json:
        typer.echo(json.dumps([{"factor": point.factor, **point.metrics} for point in points], indent=2))
        return
    names = ("accuracy", "balanced_accuracy", "auroc", "ece")
    typer.echo(f"{'factor':>8}" + "".join(f"{name:>20}" for name in names))
    for point in points:
        told = "".join(f"{_shown(point.metrics.get(name)):>20}" for name in names)
        typer.echo(f"{point.factor:>8g}{told}")


@models_app.command()
def export(
    model: Ref,
    out: Annotated[Path, typer.Option(help="The folder to write; new or empty.")],
    backbone: Place = None,
    shelf: Where = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write image.onnx and text.onnx, too.")] = False,
) -> None:
    """Merge a verified version into its backbone: a plain open_clip folder, with its card and manifest.

    Exit code 3: there is no such version, or it was changed, or the backbone is another.
    """
    import shutil

    from fedsigma.client.inference.loaded_model import export as write_merged
    from fedsigma.client.inference.loaded_model import load_model

    version = _open(shelf).find(model)
    folder = write_merged(load_model(version.path, backbone), out, onnx=onnx)
    for file in ("card.md", "manifest.json", "manifest.sig"):
        shutil.copyfile(version.path / file, folder / file)
    typer.echo(f"Wrote {folder}.")
    if onnx:
        typer.echo("image.onnx and text.onnx give the same features as torch, to 1e-3 at most.")
    typer.echo(f"With open_clip: open_clip.create_model_and_transforms('local-dir:{folder}')")


@models_app.command()
def verify(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="VERSION", help="A version's folder; all of the shelf without it."),
    ] = None,
    key: Annotated[str, typer.Option(help="The public key that must have signed it, 64 hex digits.")] = "",
    shelf: Where = None,
) -> None:
    """Find whether a version was changed, or any of the shelf was changed, exchanged or removed.

    Without --key, a single folder is verified with the key that it names itself: that finds damage, and no
    one who signs anew.

    Exit code 0: all is as it was written; 3: VERSION is none; 4: something was changed.
    """
    from fedsigma.common.registry import Manifest

    if folder is not None:
        manifest = Manifest.read(folder, signer=key)
        typer.echo(f"{manifest.reference}, as {manifest.signer} signed it.")
        return
    place = _open(shelf)
    wrong = place.check()
    for line in wrong:
        typer.echo(line, err=True)
    if wrong:
        raise typer.Exit(PROBLEMS)
    typer.echo(f"{len(place.versions())} versions, all as {place.public_key or 'nobody'} signed them.")


def _open(shelf: Path | None) -> ModelRegistry:
    from fedsigma.common.registry import ModelRegistry, registry_folder
    from fedsigma.common.utils.files import runs_folder

    return ModelRegistry(shelf or registry_folder(runs_folder()))


def _term(text: str) -> tuple[str, float]:
    reference, _, factor = text.partition("=")
    try:
        return reference, float(factor or 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected MODEL=FACTOR, such as white-cells@3=0.5") from None


def _factors(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected numbers by commas, such as 0,0.5,1") from None


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if isinstance(value, float) else str(value)
