"""The command `fedsigma bench`: the tables of CLIP-SVD's paper, in one place and federated."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from fedsigma.common.utils.errors import PROBLEMS, InputError
from fedsigma.server.paper import NO_END, ROUNDS

if TYPE_CHECKING:
    from fedsigma.server.paper.runner import CellSettings, Outcome
    from fedsigma.server.paper.sets import TableSets
    from fedsigma.server.paper.tables import PaperTable

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)
bench_app = typer.Typer(no_args_is_help=True, help="Run the tables of the paper: paper.")
app.add_typer(bench_app, name="bench")


@bench_app.command()
def paper(
    table: Annotated[str, typer.Option(help="Name of the table; list: print the names.")],
    data: Annotated[
        Path,
        typer.Option(envvar="FEDSIGMA_DATA", help="Folder of the sets, each in its own subfolder."),
    ] = Path(),
    out: Annotated[Path, typer.Option(help="Results database, run folders, tables.")] = Path("paper"),
    datasets: Annotated[
        str,
        typer.Option(
            help="Comma-separated sets, also medmnist:NAME:SIZE; default: all of the table's in --data."
        ),
    ] = "",
    setting: Annotated[
        str, typer.Option(help="Comma-separated: central, iid, dirichlet-ALPHA, disjoint, natural.")
    ] = "central,iid,dirichlet-0.5,dirichlet-0.1",
    sites: Annotated[str, typer.Option(help="Comma-separated numbers of sites, 2 to 10000.")] = "10",
    participation: Annotated[str, typer.Option(help="Comma-separated shares of the sites in a round.")] = "1",
    pooled: Annotated[bool, typer.Option(help="Also train each division's images in one place.")] = False,
    shots: Annotated[
        str, typer.Option(help="Comma-separated training images a class; few-shot tables only.")
    ] = "1,2,4,8,16",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "1,2,3",
    rounds: Annotated[int, typer.Option(min=1, help="Most rounds of a federated run.")] = ROUNDS,
    most_steps: Annotated[int, typer.Option(min=1, help="Most steps a site, for a quick try.")] = NO_END,
    backbone: Annotated[str, typer.Option(help="Backbone instead of that of the sets' cards.")] = "",
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting of all studies, such as federation.codec=small."),
    ] = None,
    share: Annotated[
        str, typer.Option(help="Run one share of the cells: 2/4 is the second of four machines.")
    ] = "1/1",
    show: Annotated[bool, typer.Option(help="Print the finished results, run nothing.")] = False,
    allow_differences: Annotated[
        bool, typer.Option(help="Use sets that differ from their cards; the table notes it.")
    ] = False,
    database: Annotated[str, typer.Option(help="SQLAlchemy URL.", show_default="OUT/results.sqlite")] = "",
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Also write the values to this file.")
    ] = None,
) -> None:
    """Train and evaluate all cells of a table, and print it with mean and standard deviation over seeds.

    Finished cells are saved in the results database; the same command resumes an interrupted table.
    Nothing is downloaded.

    Exit code 0: the table is complete; 3: invalid input, or no set was found; 4: cells are missing, which are
    listed; 130: interrupted.

    Example: fedsigma bench paper --table fewshot-biomedical --data sets --setting central,dirichlet-0.1
    """
    from fedsigma.server.paper.results import ResultsDatabase
    from fedsigma.server.paper.runner import CellSettings, run_cells, select_share
    from fedsigma.server.paper.sets import find_sets
    from fedsigma.server.paper.study_builder import read_overrides
    from fedsigma.server.paper.tables import list_cells, parse_settings

    chosen = _table(table)
    settings = parse_settings(
        _words(setting),
        sites=_whole("sites", sites),
        participation=_shares(participation),
        pooled=pooled,
    )
    numbers, draws = _whole("shots", shots), _whole("seeds", seeds)
    recipe = CellSettings(
        backbone=backbone, rounds=rounds, most_steps=most_steps, overrides=read_overrides(change or [])
    )
    sets = find_sets(chosen, data.expanduser(), _words(datasets))
    _print_missing(sets)
    _check_differences(sets, allow_differences)
    names = [one.name for one in sets.evaluated]
    cells = list(list_cells(chosen, names, settings=settings, shots=numbers, seeds=draws))
    selected = select_share(cells, share)
    by_name = {one.name: one for one in sets.found}
    recipe.check(cells, by_name)
    for option, folder in (("out", out), ("json", as_json.parent if as_json else out)):
        _make(option, folder)
    results = ResultsDatabase(database or (out / "results.sqlite").resolve())
    run = set() if show else selected
    try:
        outcome = run_cells(cells, by_name, results, recipe, out.resolve() / "runs", run=run)
    except KeyboardInterrupt:
        typer.echo(
            "Interrupted. The same command resumes; with --show it prints the finished results.", err=True
        )
        raise typer.Exit(130) from None
    finally:
        results.close()
    _write(table, sets, recipe, outcome, out, as_json)
    if outcome.done < len(cells):
        raise typer.Exit(PROBLEMS)


def _make(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--{option}: {folder} cannot be created ({error.strerror}): name another folder"
        ) from error


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _whole(name: str, text: str) -> list[int]:
    words = _words(text)
    if not words or not all(word.isascii() and word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(f"--{name} is '{text}', expected comma-separated whole numbers above 0")
    return list(dict.fromkeys(map(int, words)))


def _shares(text: str) -> list[float]:
    try:
        found = [float(word) for word in _words(text)]
    except ValueError:
        found = []
    if not found:
        raise InputError(f"--participation is '{text}', expected comma-separated shares, such as 1,0.1")
    return found


def _table(name: str) -> PaperTable:
    from fedsigma.common.config.schema import did_you_mean
    from fedsigma.server.paper.tables import TABLES

    if name == "list":
        for one, table in TABLES.items():
            typer.echo(f"{one:<26} {table.title}")
        raise typer.Exit
    if name not in TABLES:
        raise InputError(f"there is no table '{name}'{did_you_mean(name, TABLES)}")
    return TABLES[name]


def _print_missing(sets: TableSets) -> None:
    """Print the sets that are missing.

    Raises:
        CardError: No set was found, or none to train on, or none to evaluate on.
    """
    from fedsigma.common.data.catalog import CardError

    for name, reason in sets.missing.items():
        typer.echo(f"Left out: {name}: {reason}", err=True)
    if not (sets.trained and sets.evaluated):
        raise CardError("no set of this table was found, or not the one to train on: check --data")


def _check_differences(sets: TableSets, allowed: bool) -> None:
    """Print the differences from the cards.

    Raises:
        CardError: There are differences, and they are not allowed.
    """
    from fedsigma.common.data.catalog import CardError

    for one in sets.found:
        for line in one.differs:
            typer.echo(f"{one.name}: {line}", err=True)
    if any(one.differs for one in sets.found) and not allowed:
        raise CardError(
            "these are not the published sets, so results on them are not comparable with the paper's:"
            " repair them, or use them with --allow-differences"
        )


def _write(
    name: str, sets: TableSets, recipe: CellSettings, outcome: Outcome, out: Path, as_json: Path | None
) -> None:
    """Print the table and write it as Markdown, CSV and JSON."""
    from fedsigma.common.utils.files import write_atomic
    from fedsigma.server.paper.markdown import build_blocks, flatten_blocks, render_markdown

    blocks = build_blocks(sets.table, outcome.cells, [one.name for one in sets.evaluated], sets.averaged)
    entries = flatten_blocks(blocks)
    text = render_markdown(sets.table, blocks, notes=_notes(sets, recipe, outcome))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(entries[0]))
    writer.writeheader()
    writer.writerows(entry | {"seeds": " ".join(map(repr, entry["seeds"]))} for entry in entries)  # type: ignore[call-overload]
    write_atomic(out / f"{name}.md", text.encode())
    write_atomic(out / f"{name}.csv", stream.getvalue().encode())
    if as_json:
        content = {"table": name, "cells": len(outcome.cells), "done": outcome.done, "entries": entries}
        write_atomic(as_json, (json.dumps(content, indent=2) + "\n").encode())
    Console().print(Markdown(text))
    typer.echo(f"{outcome.done} of {len(outcome.cells)} cells. Table: {out / name}.md")


def _notes(sets: TableSets, recipe: CellSettings, outcome: Outcome) -> list[str]:
    """Return the notes below the table."""
    from fedsigma.server.paper.sets import published_on

    table, found, averaged = sets.table, sets.found, sets.averaged
    backbones = sorted({study.backbone for study in outcome.studies.values()})
    notes = [f"Accuracy on the test part in per cent, mean ± standard deviation over seeds. Backbone: "
             f"{', '.join(backbones)}."]  # fmt: skip
    own = sorted({one.backbone for one in found})
    if changed := recipe.changed():
        notes.append(f"With other settings than the table's: {', '.join(changed)}.")
    if table.published and backbones == own and not changed:
        averages = ", ".join(f"{column} {value:.2f}" for column, value in table.published.items())
        notes.append(f"Published average, central: {averages} (CLIP-SVD's README).")
        if set(averaged) != published_on(table):
            notes.append(
                f"It is over other sets than the average here ({', '.join(averaged)}), so not to be compared."
            )
    elif table.published and backbones != own:
        notes.append(f"Not the paper's backbone ({', '.join(own)}), so not the paper's figures.")
    if plain := [one.name for one in sets.trained if not one.publishes(table.protocol)]:
        outside = "" if set(plain) & set(averaged) else " and in no average"
        notes.append(
            "No published configuration of this protocol, so with that of few-shot, or its commonest where"
            f" there is none{outside}: {', '.join(plain)}."
        )
    notes += [f"{one.name} differs from its card: {'; '.join(one.differs)}." for one in found if one.differs]
    if sets.missing:
        notes.append(f"Missing, so in no average: {', '.join(sets.missing)}.")
    return notes + [f"Failed: {where}: {reason}" for where, reason in outcome.failures.items()]
