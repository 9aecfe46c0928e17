"""The command `fedsigma models`: versions of finished models, compared, promoted, combined, exported."""

from __future__ import annotations

import json
from dataclasses import asdict
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

RegistryOption = Annotated[
    Path | None,
    typer.Option(help="Folder of the model registry.", show_default="$FEDSIGMA_MODELS, or by the runs"),
]
Ref = Annotated[str, typer.Argument(metavar="MODEL", help="NAME (its latest), NAME@N or NAME@LABEL.")]
BackboneOption = Annotated[
    str | None, typer.Option(help="Path of the same backbone on this machine, if not the study's name.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@models_app.command("list")
def list_versions(
    name: Annotated[str, typer.Argument(help="Name of one model; default: all.")] = "",
    registry: RegistryOption = None,
    as_json: AsJson = False,
) -> None:
    """List and verify the versions.

    Exit code 3: a version was changed.
    """
    rows = [
        {
            "model": version.manifest.reference,
            "labels": ", ".join(version.labels),
            "created": version.manifest.created,
            "origin": version.manifest.origin,
            "sites": len(version.manifest.sites),
            "accuracy": version.manifest.results.get("federated", {}).get("accuracy"),
            "folder": str(version.path),
        }
        for version in _open(registry).versions(name)
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    heads = ("model", "labels", "created", "origin", "sites", "accuracy")
    print_table(heads, [{head: _shown(row[head]) for head in heads} for row in rows])


@models_app.command()
def show(model: Ref, registry: RegistryOption = None, as_json: AsJson = False) -> None:
    """Print the model card of a version, or its manifest with --json.

    Exit code 3: the version is missing or was changed.
    """
    version = _open(registry).find(model)
    if as_json:
        typer.echo(version.manifest.to_bytes().decode(), nl=False)
        return
    from rich.markdown import Markdown

    Console().print(Markdown((version.path / "card.md").read_text(encoding="utf-8")))


@models_app.command()
def diff(
    one: Ref,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Another version.")],
    registry: RegistryOption = None,
    as_json: AsJson = False,
) -> None:
    """Compare two versions: studies, results, and shifts by tower and part.

    Exit code 3: a version is missing or was changed, or their bases differ.
    """
    from fedsigma.common.registry.compare import compare

    models = _open(registry)
    comparison = compare(models.find(one), models.find(other))
    if as_json:
        typer.echo(json.dumps(asdict(comparison), indent=2))
        return
    typer.echo(comparison.study or "The studies are the same.")
    for method, (before, after) in comparison.accuracy.items():
        typer.echo(f"{method:<12} accuracy {_shown(before)} -> {_shown(after)}")
    typer.echo(f"\n{'':<14}{'norm':>8}{'norm':>8}{'cosine':>8}{'distance':>8}")
    for row in comparison.shifts:
        typer.echo(
            f"{row.group:<14}{row.norm:>8.3f}{row.other_norm:>8.3f}{row.cosine:>8.3f}{row.distance:>8.3f}"
        )


@models_app.command()
def promote(
    model: Ref,
    label: Annotated[str, typer.Argument(help="Label, such as candidate or production.")],
    registry: RegistryOption = None,
) -> None:
    """Move a label to a version.

    Exit code 3: the version is missing or was changed, or the label is invalid.
    """
    version = _open(registry).promote(model, label)
    typer.echo(f"{version.manifest.reference} is {', '.join(version.labels)}.")


@models_app.command()
def combine(
    name: Annotated[str, typer.Argument(help="Name of the new model.")],
    terms: Annotated[
        list[str], typer.Argument(metavar="MODEL=FACTOR...", help="Versions and their factors: a@1=0.5 b=0.5")
    ],
    registry: RegistryOption = None,
) -> None:
    """Publish a weighted sum of shifts: one scaled (a=0.5 is halfway from the pretrained model), or several.

    Exit code 3: a version is missing or was changed, or their bases differ.

    Example: fedsigma models combine both white-cells@3=0.5 dermoscopy@1=0.5
    """
    from fedsigma.common.registry.task_arithmetic import publish_combination

    models = _open(registry)
    weighted = [(models.find(reference), factor) for reference, factor in map(_term, terms)]
    version = publish_combination(models, name, weighted)
    typer.echo(f"{version.manifest.reference} in {version.path}")


@models_app.command()
def curve(
    model: Ref,
    data: Annotated[str, typer.Option(help="Labelled images: folder:PATH, csv:PATH, parquet:PATH or demo.")],
    other: Annotated[
        str | None, typer.Option(help="Second version; default: from the pretrained model to MODEL.")
    ] = None,
    factors: Annotated[
        str, typer.Option(help="Factors to evaluate, separated by commas.")
    ] = "0,0.25,0.5,0.75,1,1.25",
    backbone: BackboneOption = None,
    registry: RegistryOption = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate on the line from the pretrained model (0) to a version (1), or between two versions.

    Exit code 3: a version is missing or was changed, their bases differ, or no image has a known class.

    Example: fedsigma models curve white-cells@3 --data folder:cells
    """
    from fedsigma.client.inference.interpolation import evaluate_curve
    from fedsigma.client.inference.loaded_model import load_model
    from fedsigma.common.data.sources.registry import open_source
    from fedsigma.common.registry.shift_file import load_shift

    models = _open(registry)
    loaded = load_model(models.find(model).path, backbone)
    end = load_shift(models.find(other).path) if other else None
    points = list(evaluate_curve(loaded, end, open_source(data), _factors(factors)))
    if as_json:
        typer.echo(json.dumps([{"factor": factor, **metrics} for factor, metrics in points], indent=2))
        return
    names = ("accuracy", "balanced_accuracy", "auroc", "ece")
    typer.echo(f"{'factor':>8}" + "".join(f"{name:>20}" for name in names))
    for factor, metrics in points:
        cells = "".join(f"{_shown(metrics.get(name)):>20}" for name in names)
        typer.echo(f"{factor:>8g}{cells}")


@models_app.command()
def export(
    model: Ref,
    out: Annotated[Path, typer.Option(help="Output folder; new or empty.")],
    backbone: BackboneOption = None,
    registry: RegistryOption = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write image.onnx and text.onnx.")] = False,
) -> None:
    """Merge a verified version into its backbone and write an open_clip folder with its card and manifest.

    Exit code 3: the version is missing or was changed, or the backbone differs.
    """
    import shutil

    from fedsigma.client.inference.loaded_model import export as write_merged
    from fedsigma.client.inference.loaded_model import load_model

    version = _open(registry).find(model)
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
        typer.Argument(metavar="VERSION", help="Folder of one version; default: the whole registry."),
    ] = None,
    key: Annotated[str, typer.Option(help="Public key of the expected signer, 64 hex digits.")] = "",
    registry: RegistryOption = None,
) -> None:
    """Verify the signature and files of a version, or of the whole registry and its history.

    Without --key, a single folder is verified with the key in its manifest. This detects damage, but not a
    manifest signed again with another key.

    Exit code 0: nothing was changed; 3: VERSION is not a valid version; 4: the registry was changed.
    """
    from fedsigma.common.registry import Manifest

    if folder is not None:
        manifest = Manifest.read(folder, signer=key)
        typer.echo(f"{manifest.reference}, as {manifest.signer} signed it.")
        return
    models = _open(registry)
    problems = models.verify()
    for line in problems:
        typer.echo(line, err=True)
    if problems:
        raise typer.Exit(PROBLEMS)
    typer.echo(f"{len(models.versions())} versions, all as {models.public_key or 'nobody'} signed them.")


def _open(registry: Path | None) -> ModelRegistry:
    from fedsigma.common.registry import ModelRegistry, registry_folder
    from fedsigma.common.utils.files import runs_folder

    return ModelRegistry(registry or registry_folder(runs_folder()))


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
        raise typer.BadParameter(f"{text!r}: expected numbers separated by commas, such as 0,0.5,1") from None


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if isinstance(value, float) else str(value)
