"""The command `fedsigma data`: validate images; list, check and fetch published data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsigma.common.utils.errors import PROBLEMS

if TYPE_CHECKING:
    from fedsigma.common.data.catalog.card import Archive, DatasetCard

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)
data_app = typer.Typer(no_args_is_help=True, help="Validate images before a study; published data sets.")
app.add_typer(data_app, name="data")


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@data_app.command()
def check(
    spec: Annotated[
        str,
        typer.Argument(
            help="folder:PATH, csv:PATH, parquet:PATH, dicom:PATH, coop:NAME:PATH, medmnist:NAME:SIZE or"
            " demo; or NAME:PATH, a card and a folder."
        ),
    ],
    classes: Annotated[
        str | None, typer.Option(help="The study's classes, by commas; default: the labels found.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Decode every image and report all problems, before a study starts. Exit code 4 if there are any.

    With the name of a card: compare a folder with this published set. Images are counted, not decoded; to
    decode them, write coop:NAME:PATH.

    Example: fedsigma data check csv:manifest.csv --classes neutrophil,lymphocyte

    Example: fedsigma data check btmri:data/BTMRI
    """
    from fedsigma.common.config.schema import did_you_mean
    from fedsigma.common.data.catalog.card import CardError, cards

    name, _, place = spec.partition(":")
    if name in cards():
        if not place:
            raise CardError(f"'{spec}' names a card: write {name}:PATH, a folder to compare with it")
        if classes is not None:
            raise CardError(f"--classes has no use here: the card has them; for a source write coop:{spec}")
        _check_card(cards()[name], Path(place).expanduser(), as_json)
        return
    from fedsigma.common.data.sources.registry import known_sources, open_source
    from fedsigma.common.data.validation import check_source

    if name not in known_sources() and not Path(spec).exists():
        raise CardError(
            f"'{spec}' is neither a data source nor a data set card"
            f"{did_you_mean(name.lower(), [*known_sources(), *cards()])}"
            f" Write KIND:PATH with one of {', '.join(known_sources())}, or NAME:PATH of a card"
            " (fedsigma data cards)"
        )
    source = open_source(spec)
    names = None if classes is None else [word.strip() for word in classes.split(",") if word.strip()]
    report = check_source(source, classes=names)
    if as_json:
        problems = [{"kind": p.kind, "where": p.where, "detail": p.detail} for p in report.problems]
        values = {"records": report.total, "usable": len(report.usable), "problems": problems}
        typer.echo(json.dumps(values, indent=2))
    else:
        typer.echo(report.to_text())
    if not report.ok:
        raise typer.Exit(PROBLEMS)


def _check_card(chosen: DatasetCard, path: Path, as_json: bool) -> None:
    from fedsigma.common.data.sources.verify import compare_with_card

    differences = compare_with_card(chosen, path)
    if as_json:
        typer.echo(json.dumps({"card": chosen.name, "differences": differences}, indent=2))
    elif differences:
        typer.echo(f"{path} is not {chosen.title} as its card has it:")
        for line in differences:
            typer.echo(f"  {line}")
    else:
        typer.echo(
            f"{path} is {chosen.title}: {_split_sizes(chosen)} images, {chosen.class_count:,} classes."
        )
    if differences:
        raise typer.Exit(PROBLEMS)


@data_app.command("cards")
def list_cards(
    name: Annotated[str, typer.Argument(help="Show this one; without it, list all.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the cards of published data sets, or show one: classes, split, licence, where to get it.

    Example: fedsigma data cards btmri
    """
    from fedsigma.common.config.schema import to_plain
    from fedsigma.common.data.catalog.card import card, card_text, cards
    from fedsigma.common.utils.console import print_table

    if name:
        typer.echo(json.dumps(to_plain(card(name)), indent=2) if as_json else card_text(name).rstrip())
        return
    if as_json:
        typer.echo(json.dumps([to_plain(entry) for entry in cards().values()], indent=2))
        return
    heads = ("name", "title", "classes", "train / val / test", "fetch")
    rows = [
        (c.name, c.title, c.class_count, _split_sizes(c), "yes" if c.archives else "by hand")
        for c in cards().values()
    ]
    print_table(heads, [dict(zip(heads, row, strict=True)) for row in rows])


def _split_sizes(chosen: DatasetCard) -> str:
    sizes = (chosen.images.train, chosen.images.val, chosen.images.test)
    return " / ".join(f"{size:,}" if size else "-" for size in sizes)


@data_app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="The name of a card, or medmnist:NAME[:SIZE].")],
    folder: Annotated[Path, typer.Argument(help="Output folder.")],
    yes: Annotated[bool, typer.Option("--yes", help="Accept the licence without asking.")] = False,
) -> None:
    """Download a published data set, check its checksum and unpack it. Asks first; resumes if interrupted.

    Example: fedsigma data fetch dtd data/dtd

    Exit code 3: declined, not available, wrong checksum, or unsafe to extract.
    """
    from fedsigma.common.data.catalog.card import CardError
    from fedsigma.common.data.catalog.fetch import fetch_archive

    archives, chosen = _archives(name)
    if folder.exists() and not folder.is_dir():
        raise CardError(f"{folder} is a file, and a set needs a folder: name another place")
    for one in archives:
        size = f"{one.size / 1e6:,.0f} MB" if one.size else "size not known"
        checksum = f"checksum stated by {one.stated_by}" if one.stated_by else "no published checksum"
        typer.echo(f"{one.url} ({size}; {checksum})")
    if chosen is not None:
        typer.echo(f"Licence: {chosen.licence}. Page: {chosen.page}")
    else:
        from fedsigma.common.data.sources.medmnist import medmnist_licence

        typer.echo(f"Licence: {medmnist_licence(name.split(':')[1])}. Page: https://medmnist.com/")
    if not yes and not _confirm(folder):
        raise CardError(
            f"nothing was fetched into {folder}: answer y, or give --yes once the licence is read"
        )
    for one in archives:
        with _Bar(one.name) as progress:
            fetched = fetch_archive(one, folder, progress=progress)
        if fetched.checked_by:
            typer.echo(f"{one.name}: matches the checksum stated by {fetched.checked_by}.")
        else:
            typer.echo(
                f"{one.name}: no checksum to verify. The file has SHA-256 {fetched.sha256}, recorded in"
                f" {folder / 'fetched.json'}."
            )
    if chosen is not None:
        for item in chosen.by_hand:
            typer.echo(f"Put into {folder} by hand: {item}")
        typer.echo(f"Then: fedsigma data check {chosen.name}:{folder}")


def _confirm(folder: Path) -> bool:
    try:
        return typer.confirm(f"Download into {folder}?")
    except typer.Abort:  # no terminal
        return False


def _archives(name: str) -> tuple[tuple[Archive, ...], DatasetCard | None]:
    from fedsigma.common.data.catalog.card import CardError, card

    if name.startswith("medmnist:"):
        from fedsigma.common.data.sources.medmnist import medmnist_archive

        _, chosen, *rest = name.split(":")
        if len(rest) > 1 or not all(word.isdecimal() for word in rest):
            raise CardError(f"'{name}' is no set of MedMNIST: write medmnist:NAME or medmnist:NAME:SIZE")
        return (medmnist_archive(chosen, *map(int, rest)),), None
    one = card(name)
    if not one.archives:
        raise CardError(
            f"{one.title} has no archive that can be fetched: get {'; '.join(one.by_hand)} ({one.page})"
        )
    return one.archives, one


class _Bar:
    """Progress bar of one download."""

    def __init__(self, name: str) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns)
        self._task = self._progress.add_task(name, total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total or None)
