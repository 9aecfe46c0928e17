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

from fedsigma.common.utils.errors import INTERRUPTED, PROBLEMS, InputError
from fedsigma.server.paper import MAX_ROUNDS, NO_STEP_LIMIT

if TYPE_CHECKING:
    from fedsigma.server.paper.runner import TableResults
    from fedsigma.server.paper.sets import TableSets
    from fedsigma.server.paper.study_builder import CellSettings
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
    rounds: Annotated[int, typer.Option(min=1, help="Most rounds of a federated run.")] = MAX_ROUNDS,
    most_steps: Annotated[
        int, typer.Option(min=1, help="Most steps a site, for a quick try.")
    ] = NO_STEP_LIMIT,
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
    from fedsigma.server.paper.runner import check_settings, run_cells, select_share
    from fedsigma.server.paper.sets import find_sets
    from fedsigma.server.paper.study_builder import CellSettings, read_overrides
    from fedsigma.server.paper.tables import list_cells, parse_settings

    paper_table = _find_table(table)
    settings = parse_settings(
        _split(setting),
        sites=_parse_integers("sites", sites),
        participation=_parse_shares(participation),
        pooled=pooled,
    )
    shot_counts, seed_list = _parse_integers("shots", shots), _parse_integers("seeds", seeds)
    cell_settings = CellSettings(
        backbone=backbone, rounds=rounds, max_steps=most_steps, overrides=read_overrides(change or [])
    )
    sets = find_sets(paper_table, data.expanduser(), _split(datasets))
    _check_sets(sets, allow_differences)
    names = [published.name for published in sets.evaluated]
    cells = list(list_cells(paper_table, names, settings=settings, shots=shot_counts, seeds=seed_list))
    selected = select_share(cells, share)
    by_name = {published.name: published for published in sets.found}
    check_settings(cells, by_name, cell_settings)
    for option, folder in (("out", out), ("json", as_json.parent if as_json else out)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--{option}: {folder} cannot be created ({error.strerror}): name another folder"
            ) from error
    results_database = ResultsDatabase(database or (out / "results.sqlite").resolve())
    run = set() if show else selected
    try:
        results = run_cells(cells, by_name, results_database, cell_settings, out.resolve() / "runs", run=run)
    except KeyboardInterrupt:
        typer.echo(
            "Interrupted. The same command resumes; with --show it prints the finished results.", err=True
        )
        raise typer.Exit(INTERRUPTED) from None
    finally:
        results_database.close()
    _write(table, sets, cell_settings, results, out, as_json)
    if results.done < len(cells):
        raise typer.Exit(PROBLEMS)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _parse_integers(name: str, text: str) -> list[int]:
    parts = _split(text)
    if not parts or not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--{name} is '{text}', expected comma-separated whole numbers above 0")
    return list(dict.fromkeys(map(int, parts)))


def _parse_shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in _split(text)]
    except ValueError:
        shares = []
    if not shares:
        raise InputError(f"--participation is '{text}', expected comma-separated shares, such as 1,0.1")
    return shares


def _find_table(name: str) -> PaperTable:
    """Return the table of this name; `list` prints all names and exits."""
    from fedsigma.common.config.schema import did_you_mean
    from fedsigma.server.paper.tables import TABLES

    if name == "list":
        for key, table in TABLES.items():
            typer.echo(f"{key:<26} {table.title}")
        raise typer.Exit
    if name not in TABLES:
        raise InputError(f"there is no table '{name}'{did_you_mean(name, TABLES)}")
    return TABLES[name]


def _check_sets(sets: TableSets, allow_differences: bool) -> None:
    """Print the sets that are missing, and the differences from the cards.

    Raises:
        CardError: There is no set to train or evaluate on, or differences are not allowed.
    """
    from fedsigma.common.data.catalog.card import CardError

    for name, reason in sets.missing.items():
        typer.echo(f"Left out: {name}: {reason}", err=True)
    if not (sets.trained and sets.evaluated):
        raise CardError("no set of this table was found, or not the one to train on: check --data")
    differences = [f"{published.name}: {line}" for published in sets.found for line in published.differences]
    for difference in differences:
        typer.echo(difference, err=True)
    if differences and not allow_differences:
        raise CardError(
            "these are not the published sets, so results on them are not comparable with the paper's:"
            " repair them, or use them with --allow-differences"
        )


def _write(
    name: str, sets: TableSets, settings: CellSettings, results: TableResults, out: Path, as_json: Path | None
) -> None:
    """Print the table and write it as Markdown, CSV and JSON."""
    from fedsigma.common.utils.files import write_atomic
    from fedsigma.server.paper.markdown import build_blocks, flatten_blocks, render_markdown

    blocks = build_blocks(sets.table, results.cells, [s.name for s in sets.evaluated], sets.averaged)
    entries = flatten_blocks(blocks)
    text = render_markdown(sets.table, blocks, notes=_notes(sets, settings, results))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(entries[0]))
    writer.writeheader()
    writer.writerows(entry | {"seeds": " ".join(map(repr, entry["seeds"]))} for entry in entries)
    write_atomic(out / f"{name}.md", text.encode())
    write_atomic(out / f"{name}.csv", stream.getvalue().encode())
    if as_json:
        content = {"table": name, "cells": len(results.cells), "done": results.done, "entries": entries}
        write_atomic(as_json, (json.dumps(content, indent=2) + "\n").encode())
    Console().print(Markdown(text))
    typer.echo(f"{results.done} of {len(results.cells)} cells. Table: {out / name}.md")


def _notes(sets: TableSets, settings: CellSettings, results: TableResults) -> list[str]:
    """Return the notes below the table."""
    from fedsigma.server.paper.sets import published_on

    table, found, averaged = sets.table, sets.found, sets.averaged
    backbones = sorted({study.backbone for study in results.studies.values()})
    notes = [
        "Accuracy on the test part in per cent, mean ± standard deviation over seeds."
        f" Backbone: {', '.join(backbones)}."
    ]
    of_paper = sorted({published.backbone for published in found})
    if changes := settings.describe_changes():
        notes.append(f"With other settings than the table's: {', '.join(changes)}.")
    if table.published and backbones == of_paper and not changes:
        averages = ", ".join(f"{column} {value:.2f}" for column, value in table.published.items())
        notes.append(f"Published average, central: {averages} (CLIP-SVD's README).")
        if set(averaged) != published_on(table):
            notes.append(
                f"It is over other sets than the average here ({', '.join(averaged)}), so not to be compared."
            )
    elif table.published and backbones != of_paper:
        notes.append(f"Not the paper's backbone ({', '.join(of_paper)}), so not the paper's figures.")
    if unpublished := [s.name for s in sets.trained if not s.has_protocol(table.protocol)]:
        outside = "" if set(unpublished) & set(averaged) else " and in no average"
        notes.append(
            "No published configuration of this protocol, so with that of few-shot, or its commonest where"
            f" there is none{outside}: {', '.join(unpublished)}."
        )
    notes += [f"{s.name} differs from its card: {'; '.join(s.differences)}." for s in found if s.differences]
    if sets.missing:
        notes.append(f"Missing, so in no average: {', '.join(sets.missing)}.")
    return notes + [f"Failed: {cell}: {reason}" for cell, reason in results.failures.items()]
