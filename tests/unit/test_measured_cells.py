"""The measured cells in bench/results/ are found by the commands that measured them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from bench import cell_store
from bench.cell_store import CellStore, recipe_digest
from bench.gap.cells import Cell as GapCell
from bench.gap.cells import Runner, product_recipe
from bench.methods.cells import Cell as MethodCell
from bench.methods.cells import Plan
from bench.paper_cells import export_cells, import_cells
from fedsigma.common.config.study import StudyConfig
from fedsigma.server.paper.results import ResultsDatabase

RESULTS = Path(cell_store.__file__).parent / "results"


@dataclass(frozen=True)
class Key:
    key: str


def rows(name: str) -> list[dict]:
    text = (RESULTS / name).read_text(encoding="utf-8")
    parsed = [json.loads(line) for line in text.splitlines()]
    keys = [json.dumps(row["cell"], sort_keys=True) for row in parsed]
    assert keys == sorted(set(keys))
    return parsed


def test_cells_of_other_methods_are_found_with_todays_recipes() -> None:
    store = CellStore(RESULTS / "methods.jsonl")
    plan = Plan(store, rounds=60, run_missing=False)
    cells = rows("methods.jsonl")
    assert len(cells) == 506
    for row in cells:
        cell = MethodCell(**row["cell"])
        assert row["figures"].get("recipe") in (None, recipe_digest(plan._study(cell))), cell
    assert store.find(cell, recipe_digest(plan._study(cell))) == row["figures"]


def test_cells_of_sites_that_differ_are_found_with_todays_recipes() -> None:
    store = CellStore(RESULTS / "gap.jsonl")
    cells = rows("gap.jsonl")
    assert len(cells) == 125
    for row in cells:
        cell = GapCell(**row["cell"])
        assert json.loads(cell.key) == row["cell"]
        runner = Runner(store, sites=cell.sites, alpha=cell.alpha, steps=cell.steps, run_missing=False)
        studies = [runner.study(cell.study, cell.seed)]
        if cell.method == "product":
            studies.append(product_recipe())
        assert row["figures"].get("recipe") in (None, recipe_digest(*studies)), cell
    assert store.find(cell, recipe_digest(*studies)) == row["figures"]


def test_cells_of_the_papers_tables_go_to_a_database_and_back(tmp_path: Path) -> None:
    source, database, copy = RESULTS / "paper.jsonl", tmp_path / "out/results.sqlite", tmp_path / "copy.jsonl"
    assert import_cells(source, database) == 80
    assert import_cells(source, database) == 0
    assert export_cells(database, copy) == 80
    assert copy.read_bytes() == source.read_bytes()
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    results = ResultsDatabase(database)
    assert sum(len(line["scores"]) for line in lines) == 89
    for line in lines:
        digests = {score["evaluated_on"]: score["digest"] for score in line["scores"]}
        scores = results.find(line["cell"]["key"], digests)
        assert [score.scores for score in scores] == [score["scores"] for score in line["scores"]]
        assert StudyConfig.from_yaml(line["cell"]["study"]).backbone == line["cell"]["backbone"]
    results.close()


def test_a_cell_is_found_with_its_recipe_only_and_the_file_is_sorted(tmp_path: Path) -> None:
    path = tmp_path / "out" / "cells.jsonl"
    store, first, second = CellStore(path), Key('{"seed": 1}'), Key('{"seed": 2}')
    assert store.find(first, "recipe") is None
    store.save(second, {"accuracy": 0.5}, "recipe")
    store.save(first, {"accuracy": 0.25}, "recipe")
    assert CellStore(path).find(second, "recipe")["accuracy"] == 0.5
    assert store.find(second, "another recipe") is None
    store.save(second, {"accuracy": 0.75}, "another recipe")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["cell"]["seed"], line["figures"]["accuracy"]) for line in lines] == [(1, 0.25), (2, 0.75)]


def test_a_recipe_is_what_training_depends_on() -> None:
    study = StudyConfig.from_yaml("{name: a, backbone: b, classes: [c, d], data: {source: demo}}")
    digest = recipe_digest(study)
    data = replace(study.data, sites_by={"iid": {"sites": 2}})  # type: ignore[type-var]
    assert recipe_digest(replace(study, name="other", seed=5, baselines=())) == digest
    assert recipe_digest(replace(study, data=replace(study.data, source="folder:x"))) == digest  # type: ignore[type-var]
    for changed in (
        replace(study, shots=4),
        replace(study, data=data),
        replace(study, training=replace(study.training, learning_rate=0.5)),
        replace(study, federation=replace(study.federation, options={"server_momentum": 0.5})),
    ):
        assert recipe_digest(changed) != digest
