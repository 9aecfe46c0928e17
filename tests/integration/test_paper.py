"""The paper's tables on stand-ins of each published set: cells, studies, results, the printed form."""

from __future__ import annotations

import csv
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fedsigma.cli.main import main
from fedsigma.common.backbones import save_backbone
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.data.catalog.card import Protocol, card, cards
from fedsigma.common.data.records import PictureError
from fedsigma.common.data.sources.registry import open_source
from fedsigma.common.training.trainer import EvalOutput, TrainOutput, trainers
from fedsigma.server.federation import messenger
from fedsigma.server.paper import sets
from fedsigma.server.paper.cell import Score
from fedsigma.server.paper.lazy_images import lazy_examples
from fedsigma.server.paper.markdown import build_blocks, flatten_blocks, render_markdown
from fedsigma.server.paper.results import cell_key
from fedsigma.server.paper.runner import select_share
from fedsigma.server.paper.sets import PublishedSet, TableSets, find_sets, published_on
from fedsigma.server.paper.study_builder import CellSettings, build_study, count_steps, read_overrides
from fedsigma.server.paper.tables import CENTRAL, TABLES, Cell, Setting, parse_settings
from tests.helpers.fake_trainer import FakeTrainer, HurriedTime
from tests.helpers.medmnist_files import npz
from tests.helpers.published import stand_in
from tests.helpers.tiny_backbones import tiny_clip

runner = CliRunner()
BIOMEDICAL = [one.name for one in cards().values() if one.domain == "biomedical"]


class PictureTrainer(FakeTrainer):
    """A fake that needs the real pictures and labels: what it learns is how many images and steps it had."""

    made: list[tuple[int, int]] = []  # noqa: RUF012

    def __init__(self, backbone: str, sigma: Any, classes: Any, prompts: Any) -> None:
        super().__init__(backbone, sigma, classes, prompts)
        self.classes = len(classes)

    def train(self, shift: Any, examples: Any, recipe: Any, *, steps: int, **rest: Any) -> TrainOutput:
        self.made.append((len(examples), steps))
        assert all(0 <= one.label < self.classes and one.image.shape[0] == 3 for one in examples)
        moved = (shift + 0.01 * steps).astype(np.float32)
        return TrainOutput(shift=moved, loss=1.0, steps=steps, examples=len(examples))

    def evaluate(self, shift: Any, examples: Any) -> EvalOutput:
        images = [one.image.shape for one in list(examples)]
        assert len(images) == len(examples)
        known = float(min(1.0, 0.1 + abs(shift).mean()))
        scores = {"accuracy": known, "balanced_accuracy": 0.5, "f1": 0.5, "ece": 0.1}
        return EvalOutput(metrics=scores, confusion=(0,) * self.classes**2)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[int, int]]]:
    monkeypatch.setattr(trainers, "factory", PictureTrainer)
    monkeypatch.setattr(messenger, "time", HurriedTime())
    monkeypatch.setenv("FEDSIGMA_AUDIT", str(tmp_path / "audit"))
    PictureTrainer.made = []
    yield PictureTrainer.made


def stand_ins(root: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], *, train: int = 1) -> None:
    """Small sets that are just as their cards say, whose cards have the small sizes."""
    for name in names:
        chosen = card(name)
        monkeypatch.setitem(cards(), name, stand_in(chosen, root / chosen.layout.folder, train=train))


def paper(*args: object) -> tuple[int, str, str]:
    result = runner.invoke(main, ["bench", "paper", *(str(arg) for arg in args)])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def a_set(**changes: Any) -> PublishedSet:
    few = Protocol(learning_rate=0.007, weight_decay=0.0, epochs=100)
    values = {"few_shot": few, "base_to_novel": replace(few, learning_rate=0.001)}
    known: dict[str, Any] = {
        "name": "btmri",
        "source": "coop:btmri:/sets/BTMRI",
        "classes": ("a", "b", "c"),
        "template": "a photo of a {}.",
        "protocols": replace(card("btmri").protocols, **values),
        "backbone": "ViT-B-16/openai",
    }
    return PublishedSet(**known | changes)


def a_cell(**changes: Any) -> Cell:
    known: dict[str, Any] = {"protocol": "few_shot", "trained_on": "btmri", "shots": 16, "setting": CENTRAL}
    return Cell(**known | {"seed": 1, "evaluated_on": ("btmri",)} | changes)


def a_study(cell: Cell, rounds: int = 60, max_steps: int = 10**9, **overrides: Any) -> StudyConfig:
    return build_study(cell, a_set(), CellSettings(rounds=rounds, max_steps=max_steps, overrides=overrides))


@pytest.mark.parametrize(
    ("protocol", "shots", "classes", "steps"),
    [
        (Protocol(learning_rate=0.1, weight_decay=0, epochs=2, iterations_per_shot=200), 4, 37, 800),
        (Protocol(learning_rate=0.1, weight_decay=0, epochs=100), 16, 4, 200),
        (Protocol(learning_rate=0.1, weight_decay=0, epochs=100), 1, 4, 100),
        (Protocol(learning_rate=0.1, weight_decay=0, epochs=100), 16, 9, 400),
    ],
)
def test_lengths_are_those_of_the_published_code(
    protocol: Protocol, shots: int, classes: int, steps: int
) -> None:
    assert count_steps(protocol, shots=shots, classes=classes) == steps


def test_a_federated_study_has_the_steps_of_the_central_one() -> None:
    central, apart = (
        a_study(a_cell()),
        a_study(a_cell(setting=Setting(division="dirichlet", alpha=0.1, sites=7))),
    )
    assert central.data is None and apart.data is not None
    assert apart.data.sites_by == {"dirichlet": {"alpha": 0.1, "sites": 7}}
    assert apart.data.options == {"parts": ["train"]}
    for study in (central, apart):
        assert study.training.learning_rate == 0.007 and study.training.batch_size == 32
    # 100 epochs of 3 * 16 // 32 steps
    assert (central.training.local_steps, central.federation.rounds) == (100, 1)
    assert (apart.training.local_steps, apart.federation.rounds) == (2, 50)
    assert a_study(a_cell(), max_steps=7).training.local_steps == 7
    assert (
        a_study(a_cell(setting=Setting(division="iid", sites=2)), rounds=30).federation.rounds == 25
    )  # of 4 steps
    half = a_study(
        a_cell(protocol="base_to_novel", setting=Setting(division="iid", sites=2, participation=0.5))
    )
    assert half.classes == ("a", "b") and half.training.learning_rate == 0.001
    assert half.data is not None and half.data.options == {"parts": ["train"], "half": "base"}
    assert half.federation.participation == 0.5


def test_settings_of_all_studies() -> None:
    given = read_overrides(
        ["federation.codec=small", "training.learning_rate=0.5", "federation.strategy=fedavg"]
    )
    apart = Setting(division="iid", sites=2)
    study = a_study(a_cell(setting=apart), **given)
    assert (study.federation.codec, study.training.learning_rate) == ("small", 0.5)
    assert study.federation.strategy == "fedavg" and study.federation.options == {}
    # What a cell has no use for changes nothing in it, so it need not be run anew.
    for cell in (a_cell(), a_cell(setting=replace(apart, pooled=True))):
        assert a_study(cell, federation={"codec": "small"}) == a_study(cell)
        assert a_study(cell, **given).training.learning_rate == 0.5
    zero = a_cell(setting=None, shots=0)
    assert a_study(zero, max_steps=3, **given) == a_study(zero)
    for setting, says in (
        ("federation.codec", "expected SECTION.KEY=VALUE"),
        ("seed=3", "names 'seed', which the table decides"),
        ("federation.participation=0.5", "which the table decides"),
        (
            "federation={codec: small, rounds: 3}",
            "names 'federation.rounds', which the table decides: see --rounds",
        ),
        ("personal.towers=[image]", "names 'personal', which the table decides"),
        ("federation.codec=[", "--set federation.codec"),
        ("federation=foo", "--set federation is 'foo', expected federation.KEY=VALUE"),
        ("federation={1: 2}", r"'federation\.1', which is unknown"),
        ("training=5", "--set training is 5, expected training.KEY=VALUE"),
        ("federation.codek=small", r"'federation\.codek', which is unknown: did you mean 'codec'"),
    ):
        with pytest.raises(ConfigError, match=says):
            read_overrides([setting])
    for wrong, says in (
        ("batch_size=0", "training.batch_size is 0, expected a number between"),
        ("batch_size=[1]", "training.batch_size is"),
        ("local_steps=null", "training.local_steps is"),
    ):
        with pytest.raises(ConfigError, match=says):
            a_study(a_cell(), **read_overrides([f"training.{wrong}"]))


def test_settings_have_names() -> None:
    found = parse_settings(
        ["central", "iid", "dirichlet-0.1", "disjoint", "natural"],
        sites=[3, 100],
        participation=[1.0, 0.1],
        pooled=True,
    )
    assert [str(one) for one in found[:6]] == [
        "central",
        "IID, 3 sites",
        "pooled: IID, 3 sites",
        "IID, 3 sites, 10% a round",
        "pooled: IID, 3 sites, 10% a round",
        "IID, 100 sites",
    ]
    assert [str(one) for one in found[-4:]] == [
        "natural sites",
        "pooled: natural sites",
        "natural sites, 10% a round",
        "pooled: natural sites, 10% a round",
    ]
    assert len(found) == len(set(found)) == 1 + 3 * 8 + 4
    # Rows are told apart by these names.
    near = parse_settings(["iid"], sites=[100], participation=[0.12, 0.125, 0.07, 0.004], pooled=False)
    assert [str(one).partition("sites, ")[2] for one in near] == [
        "12% a round",
        "12.5% a round",
        "7% a round",
        "0.4% a round",
    ]
    for name in ("dirichlet", "dirichlet-0", "sorted"):
        with pytest.raises(ConfigError, match=f"the setting '{name}' is unknown"):
            parse_settings([name], sites=[3], participation=[1.0], pooled=False)
    with pytest.raises(ConfigError, match="sites is 1, expected 2"):
        parse_settings(["iid"], sites=[1], participation=[1.0], pooled=False)
    with pytest.raises(ConfigError, match="participation is 2, expected a share"):
        parse_settings(["iid"], sites=[3], participation=[2.0], pooled=False)


def test_cell_is_identified_by_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins(tmp_path / "a", monkeypatch, ["btmri"])
    stand_in(card("btmri"), tmp_path / "b" / "BTMRI")
    cell = a_cell(setting=Setting(division="iid", sites=2))

    def key(root: Path, cell: Cell = cell, **overrides: Any) -> str:
        (one,) = find_sets(TABLES["fewshot-biomedical"], root, ["btmri"]).found
        study = build_study(cell, one, CellSettings(max_steps=9, overrides=overrides))
        return cell_key(cell, study, one)

    first = key(tmp_path / "a")
    assert key(tmp_path / "b") == first
    assert key(tmp_path / "a", training={"learning_rate": 0.5}) != first
    assert key(tmp_path / "a", replace(cell, seed=2)) != first
    assert key(tmp_path / "a", replace(cell, setting=Setting(division="iid", sites=2, pooled=True))) != first
    assert key(tmp_path / "a", training={"proximal": 0.0}) == first  # as it is by default
    stand_in(card("btmri"), tmp_path / "c" / "BTMRI", train=2)
    assert key(tmp_path / "c") != first
    assert key(tmp_path / "a", replace(cell, evaluated_on=("btmri", "later"))) == first
    rows = "path,site\n" + "".join(
        f"{one.key},north\n" for one in open_source(f"coop:btmri:{tmp_path}/b/BTMRI").records
    )
    (tmp_path / "b" / "BTMRI" / "sites.csv").write_text(rows)
    sets._open_cached.cache_clear()
    assert key(tmp_path / "b") != first


def test_shares_of_machines_are_all_cells_once() -> None:
    cells = [a_cell(seed=seed) for seed in range(1, 8)]
    parts = [select_share(cells, f"{number}/3") for number in (1, 2, 3)]
    assert sorted(one.seed for part in parts for one in part) == list(range(1, 8))
    for wrong in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(ValueError, match="expected NUMBER/COUNT"):
            select_share(cells, wrong)


def scored(cell: Cell, *values: float) -> tuple[Cell, list[Score]]:
    halves = ("base", "novel") if cell.protocol == "base_to_novel" else ("",)
    return cell, [
        Score(evaluated_on=name, half=half, images=9, scores={"accuracy": value})
        for (name, half), value in zip(
            ((n, h) for n in cell.evaluated_on for h in halves), values, strict=True
        )
    ]


def test_mean_and_spread_over_seeds_and_the_average_over_sets() -> None:
    def few(name: str, seed: int, value: float) -> tuple[Cell, list[Score]]:
        return scored(a_cell(trained_on=name, evaluated_on=(name,), seed=seed), value)

    zero = a_cell(shots=0, setting=None, seed=0)
    cells: list[Any] = [
        scored(zero, 0.25),
        scored(replace(zero, trained_on="busi", evaluated_on=("busi",)), 0.35),
    ]
    cells += [few("btmri", 1, 0.5), few("btmri", 2, 0.7), few("busi", 1, 0.9)]
    table, names = TABLES["fewshot-biomedical"], ["btmri", "busi"]
    missing = (a_cell(trained_on="busi", evaluated_on=("busi",), seed=2), None)
    blocks = build_blocks(table, [*cells, missing], names, names)
    assert str(blocks["btmri"]["central"]["16"]) == "60.0 ± 14.1"
    assert str(blocks["btmri"]["zero-shot"]["16"]) == "25.0"
    assert str(blocks["busi"]["central"]["16"]) == "90.0 (1 of 2)"
    assert str(blocks["average"]["central"]["16"]) == "70.0 (1 of 2)"  # of seed 1, which both sets have
    whole = build_blocks(table, [*cells, few("busi", 2, 0.5)], names, names)
    assert "average" not in build_blocks(table, [*cells, missing], names, ["btmri"])
    one = next(e for e in flatten_blocks(blocks) if (e["block"], e["row"]) == ("busi", "central"))
    assert (one["seeds"], one["expected"], one["spread"]) == ([0.9], 2, None)
    assert str(whole["average"]["central"]["16"]) == "65.0 ± 7.1"  # of 70 and 60
    text = render_markdown(table, whole, notes=["a note"])
    assert "| zero-shot | 30.0 |" in text and "### average" in text and "- a note" in text


def test_the_harmonic_mean_is_that_of_the_averages() -> None:
    cell = a_cell(protocol="base_to_novel")
    other = replace(cell, trained_on="busi", evaluated_on=("busi",))
    blocks = build_blocks(
        TABLES["base-to-novel-biomedical"],
        [scored(cell, 0.8, 0.4), scored(other, 0.4, 0.8)],
        ["btmri", "busi"],
        ["btmri", "busi"],
    )
    assert str(blocks["btmri"]["central"]["harmonic mean"]) == "53.3"
    assert str(blocks["average"]["central"]["harmonic mean"]) == "60.0"


def test_one_source_and_many_targets_have_one_block() -> None:
    cell = a_cell(
        protocol="cross_dataset", trained_on="imagenet", evaluated_on=("imagenet", "dtd", "eurosat")
    )
    blocks = build_blocks(TABLES["cross-dataset"], [scored(cell, 0.9, 0.4, 0.6)], ["dtd", "eurosat"], [])
    assert {c: str(v) for c, v in blocks["From one data set to others"]["central"].items()} == {
        "imagenet": "90.0",
        "dtd": "40.0",
        "eurosat": "60.0",
        "average": "50.0",
    }


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("table", TABLES)
def test_every_table_on_stand_ins_of_each_of_its_sets(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 26 cards, centrally and among sites; the whole of what a machine with the sets would run."""
    chosen = TABLES[table]
    names = [one.name for one in cards().values() if one.domain == chosen.domain]
    names += [chosen.trained_on] if chosen.trained_on and chosen.trained_on not in names else []
    stand_ins(tmp_path / "sets", monkeypatch, names)
    settings = "central,iid,disjoint" if table == "fewshot-biomedical" else "central,iid"
    seeds = "1,2" if chosen.domain == "biomedical" else "1"
    common = ["--table", table, "--data", tmp_path / "sets", "--out", tmp_path / "out", "--sites", "2"]
    common += ["--setting", settings, "--shots", "1", "--seeds", seeds, "--rounds", "2", "--most-steps", "2"]
    code, told, wrong = paper(*common, "--json", tmp_path / "figures.json")
    assert (code, wrong.count("Left out")) == (0, 0), wrong
    figures = json.loads((tmp_path / "figures.json").read_text())
    trained = [chosen.trained_on] if chosen.trained_on else names
    assert (
        figures["done"]
        == figures["cells"]
        == len(trained) * (1 + len(seeds.split(",")) * len(settings.split(",")))
    )
    columns = {entry["column"] for entry in figures["entries"]}
    if chosen.trained_on:
        assert columns == {*names, "average"}
    else:
        assert columns == ({"1"} if chosen.protocol == "few_shot" else {"base", "novel", "harmonic mean"})
        assert {entry["block"] for entry in figures["entries"]} == {*names, "average"}
    with (tmp_path / "out" / f"{table}.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == len(figures["entries"])
    assert f"{figures['done']} of {figures['cells']} cells" in told


def test_interrupted_table_is_resumed(
    fake: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(tmp_path / "sets", monkeypatch, ["kvasir"], train=4)
    args = ["--table", "fewshot-biomedical", "--data", tmp_path / "sets", "--out", tmp_path / "out"]
    args += [
        "--setting",
        "central,iid",
        "--sites",
        "2",
        "--seeds",
        "1,2",
        "--shots",
        "1",
        "--most-steps",
        "2",
    ]
    plain = PictureTrainer.train

    def stopped(self: Any, *given: Any, **named: Any) -> TrainOutput:
        if len(fake) == 3:  # the first round of the first federated cell is through
            raise KeyboardInterrupt
        return plain(self, *given, **named)

    monkeypatch.setattr(PictureTrainer, "train", stopped)
    code, _, wrong = paper(*args)
    assert code == 130 and "The same command resumes" in wrong
    code, told, _ = paper(*args, "--show")
    assert code == 4 and "2 of 5 cells" in told
    monkeypatch.setattr(PictureTrainer, "train", plain)
    fake.clear()
    code, told, _ = paper(*args)
    assert code == 0 and "5 of 5 cells" in told
    # The rest of the interrupted cell (its second round, two sites), the central one of seed 2, its rounds.
    assert [steps for _, steps in fake] == [1, 1, 2, 1, 1, 1, 1]
    fake.clear()
    assert paper(*args)[0] == 0 and fake == []
    with closing(sqlite3.connect(tmp_path / "out" / "results.sqlite")) as database:
        rows = database.execute("SELECT setting, sites, examples, steps, bytes_up FROM cells").fetchall()
        assert database.execute("SELECT count(*) FROM scores").fetchone() == (5,)
    assert sorted(row[0] for row in rows) == ["IID, 2 sites"] * 2 + ["central"] * 2 + ["zero-shot"]
    federated = [row for row in rows if row[0] == "IID, 2 sites"]
    # A site has an image of each of the eight classes at most.
    assert all(row[1] == row[3] == 2 and 8 < row[2] <= 16 and row[4] > 0 for row in federated)


def test_problems_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: list[Any]) -> None:
    args = ["--table", "fewshot-biomedical", "--out", tmp_path / "out", "--shots", "1", "--most-steps", "1"]
    code, _, wrong = paper("--table", "fewshot")
    assert code == 3 and "there is no table 'fewshot'" in wrong
    code, _, wrong = paper(*args, "--data", tmp_path)
    assert code == 3 and "fedsigma data fetch btmri" in wrong and "no set of this table was found" in wrong
    code, _, wrong = paper(*args, "--data", tmp_path, "--datasets", "eurosat")
    assert code == 3 and "eurosat is not of this table: its sets are btmri" in wrong
    code, _, wrong = paper(*args, "--data", tmp_path, "--shots", "one")
    assert code == 3 and "--shots is 'one', expected comma-separated whole numbers" in wrong
    for shares in ("", "half"):
        code, _, wrong = paper(*args, "--data", tmp_path, "--participation", shares)
        assert code == 3 and f"--participation is '{shares}', expected comma-separated shares" in wrong
    stand_in(card("btmri"), tmp_path / "BTMRI")
    code, _, wrong = paper(*args, "--data", tmp_path)
    assert code == 3 and "btmri: train: 4 images, the card says 2,854" in wrong and fake == []
    # Natural sites are not known, so this setting fails, and the rest of the table does not.
    code, told, _ = paper(
        *args, "--data", tmp_path, "--allow-differences", "--setting", "central,natural", "--seeds", "1"
    )
    text = (tmp_path / "out" / "fewshot-biomedical.md").read_text()
    assert code == 4 and "2 of 3 cells" in told
    assert "Failed: btmri, natural sites: sites_by is 'site', and 4 of 4 records have no site" in text
    assert (
        "btmri differs from its card: train: 4 images" in text and "Missing, so in no average: busi" in text
    )


def test_sites_of_their_own_and_partial_participation(
    fake: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(tmp_path, monkeypatch, ["kvasir"], train=3)
    train = open_source(f"coop:kvasir:{tmp_path / 'Kvasir'}", parts=["train"]).records
    rows = "".join(f"{one.key},{'abc'[place % 3]}\n" for place, one in enumerate(train))
    (tmp_path / "Kvasir" / "sites.csv").write_text("path,site\n" + rows)
    args = ["--table", "fewshot-biomedical", "--data", tmp_path, "--out", tmp_path / "out", "--seeds", "1"]
    args += ["--setting", "natural", "--participation", "1,0.3", "--pooled", "--shots", "2"]
    code, told, wrong = paper(*args, "--most-steps", "4", "--rounds", "4", "--datasets", "kvasir")
    assert code == 0 and "natural sites, 30% a round" in told, wrong
    # All three sites in four rounds, one of them in each of four, and pooled with the steps of each together.
    assert sorted(steps for _, steps in fake) == [1] * 12 + [1] * 4 + [4, 12]


def test_a_set_of_medmnist_joins_a_table(fake: list[tuple[int, int]], tmp_path: Path) -> None:
    pytest.importorskip("medmnist")
    npz(tmp_path, "octmnist", 64, classes=4, colours=False)
    args = ["--table", "base-to-novel-biomedical", "--data", tmp_path, "--out", tmp_path / "out"]
    args += ["--datasets", "medmnist:octmnist:64", "--setting", "central,iid", "--sites", "2", "--seeds", "1"]
    code, told, wrong = paper(*args, "--most-steps", "2", "--rounds", "1")
    assert code == 0 and "3 of 3 cells" in told, wrong
    # Two base classes with three images each, all in one place and then at two sites.
    assert fake[0] == (6, 2) and sum(images for images, _ in fake[1:]) == 6
    text = (tmp_path / "out" / "base-to-novel-biomedical.md").read_text()
    assert "or its commonest where there is none: medmnist:octmnist:64." in text


def test_pictures_are_decoded_ahead_in_order_and_only_on_demand(tmp_path: Path) -> None:
    for place in range(70):
        Image.new("RGB", (4, 4), (place, 0, 0)).save(tmp_path / f"{place:03d}.png")
    (tmp_path / "list.csv").write_text(
        "path,label,split\n" + "".join(f"{place:03d}.png,{'ab'[place % 2]},test\n" for place in range(70))
    )
    source = open_source(f"csv:{tmp_path / 'list.csv'}")
    (tmp_path / "069.png").unlink()
    with lazy_examples(source, source.records, ["a", "b"], side=4) as examples:
        assert [example.label for example in examples] == [position % 2 for position in range(70)]
        assert [int(example.image[0, 0, 0]) for example in examples[:69]] == list(range(69))
        assert int(examples[5].image[0, 0, 0]) == 5
        with pytest.raises(PictureError, match=r"069\.png"):
            _ = examples[69].image


def test_the_real_method_learns_a_published_set_in_one_place_and_among_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes that differ in colour: a tiny random CLIP is at chance, and is not after training."""
    monkeypatch.setenv("FEDSIGMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FEDSIGMA_AUDIT", str(tmp_path / "audit"))
    monkeypatch.setattr(messenger, "time", HurriedTime())
    stand_ins(tmp_path, monkeypatch, ["btmri"], train=4)
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (230, 230, 20)]
    for record in open_source(f"coop:btmri:{tmp_path / 'BTMRI'}").records:
        colour = colours[card("btmri").class_names.index(str(record.label))]
        Image.new("RGB", (40, 40), colour).save(tmp_path / "BTMRI" / "BTMRI" / record.key)
    backbone = save_backbone(tiny_clip(), tmp_path / "tiny", source="tests")
    args = ["--table", "fewshot-biomedical", "--data", tmp_path, "--out", tmp_path / "out", "--sites", "2"]
    args += ["--setting", "central,iid", "--shots", "2", "--seeds", "1", "--rounds", "10"]
    args += ["--most-steps", "30", "--set", "training.learning_rate=0.1", "--set", "training.augment=none"]
    code, _, wrong = paper(*args, "--backbone", f"local-dir:{backbone}", "--json", tmp_path / "f.json")
    assert code == 0, wrong
    means = {e["row"]: e["mean"] for e in json.loads((tmp_path / "f.json").read_text())["entries"]}
    assert means["zero-shot"] <= 0.5
    assert means["central"] >= 0.75 and means["IID, 2 sites"] >= 0.75
    with closing(sqlite3.connect(tmp_path / "out" / "results.sqlite")) as database:
        (text,) = database.execute("SELECT study FROM cells WHERE setting = 'IID, 2 sites'").fetchone()
    study = StudyConfig.from_yaml(text)
    assert study.federation.rounds == 10 and study.training.local_steps == 3


@pytest.mark.usefixtures("fake")
def test_databases_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins(tmp_path, monkeypatch, ["btmri"])
    args = ["--table", "fewshot-biomedical", "--data", tmp_path, "--show", "--datasets", "btmri"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.sqlite").write_text("none of SQLite's" * 99)
    (tmp_path / "file").write_text("")
    for given, says in (
        (["--out", tmp_path / "out"], "results.sqlite cannot be used (file is not a database)"),
        (
            ["--out", tmp_path / "new", "--database", "nonsense"],
            "the results database 'nonsense' cannot be used",
        ),
        (
            ["--out", tmp_path / "new", "--database", "mysql://me:secret@here/x"],
            "mysql://me:***@here/x cannot be",
        ),
        (["--out", tmp_path / "file"], "file cannot be created (File exists): name another folder"),
        (["--out", tmp_path / "new", "--json", tmp_path / "file" / "x.json"], "--json: "),
    ):
        code, _, wrong = paper(*args, *given)
        assert code == 3 and says in wrong and "secret" not in wrong, wrong


@pytest.mark.usefixtures("fake")
def test_a_damaged_set_is_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins(tmp_path, monkeypatch, ["btmri", "busi", "kvasir"])
    (tmp_path / card("btmri").layout.folder / card("btmri").layout.split).write_text("{")
    (tmp_path / card("kvasir").layout.folder / "sites.csv").write_bytes(b"path,site\n\xff,a\n")
    args = [
        "--table",
        "base-to-novel-biomedical",
        "--data",
        tmp_path,
        "--out",
        tmp_path / "out",
        "--seeds",
        "1",
    ]
    code, told, wrong = paper(*args, "--setting", "central", "--most-steps", "1")
    assert code == 0 and "2 of 2 cells" in told, wrong
    assert f"Left out: btmri: {tmp_path / 'BTMRI'} cannot be read" in wrong
    assert "Left out: kvasir" in wrong and "expected a CSV file in UTF-8" in wrong
    # A half of BUSI is one class, and CLIP-SVD publishes nothing of the kind on it.
    text = (tmp_path / "out" / "base-to-novel-biomedical.md").read_text()
    assert "No published configuration of this protocol" in text and "busi" in text


def few_shot_on(root: Path) -> tuple[object, ...]:
    """The arguments of the few-shot table of BTMRI's stand-in below a folder."""
    return "--table", "fewshot-biomedical", "--data", root, "--datasets", "btmri"


def test_a_table_says_what_is_not_its_own(
    fake: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(tmp_path, monkeypatch, ["btmri"])
    args = (*few_shot_on(tmp_path), "--shots", 1, "--seeds", 1, "--setting", "iid", "--sites", 2)
    own = ("--backbone", card("btmri").backbone)
    code, _, wrong = paper(*args, *own, "--out", tmp_path / "plain")
    assert code == 0, wrong
    plain = (tmp_path / "plain" / "fewshot-biomedical.md").read_text()
    assert "Published average" in plain and "not the table's own" not in plain
    changes = ("--most-steps", "2", "--rounds", "1", "--set", "federation.strategy=fedmedian")
    code, _, wrong = paper(*args, *own, *changes, "--out", tmp_path / "changed")
    assert code == 0, wrong
    changed = (tmp_path / "changed" / "fewshot-biomedical.md").read_text()
    settings = "federation.strategy = fedmedian, at most 1 rounds, at most 2 steps a site."
    said = f"With other settings than the table's: {settings}"
    assert said in changed and "Published average" not in changed


def test_invalid_setting_is_reported_before_training(
    fake: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(tmp_path, monkeypatch, ["btmri"])
    args = (*few_shot_on(tmp_path), "--out", tmp_path / "out")
    for given, says in (
        (("--setting", "central,iid", "--set", "federation.codec=bogus"), "federation.codec is 'bogus'"),
        (("--set", "training.learning_rate=abc"), "learning_rate"),
        (("--share", "5/4"), "--share is '5/4'"),
        (("--share", "foo", "--show"), "--share is 'foo'"),
    ):
        code, _, wrong = paper(*args, *given)
        assert code == 3 and says in wrong, wrong
    assert not fake and not (tmp_path / "out").exists()
    code, _, wrong = paper(*args[:2], "--data", tmp_path / "none")
    assert code == 3 and f"there is no folder {tmp_path / 'none'}" in wrong


def test_a_set_without_a_configuration_of_the_protocol_is_in_no_average() -> None:
    table, found = TABLES["base-to-novel-biomedical"], [a_set(), a_set(name="kvasir"), a_set(name="busi")]
    found[2] = replace(found[2], protocols=card("busi").protocols)
    assert TableSets(table=table, found=tuple(found)).averaged == ["btmri", "kvasir"]
    assert TableSets(table=table, found=tuple(found[2:])).averaged == ["busi"]
    assert len(published_on(table)) == 9 and "busi" not in published_on(table)
    assert len(published_on(TABLES["fewshot-biomedical"])) == 10


def test_added_dataset_is_evaluated_with_existing_models(
    fake: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(tmp_path / "sets", monkeypatch, ["imagenet", "dtd", "eurosat"])
    (tmp_path / "sets" / card("eurosat").layout.folder).rename(tmp_path / "elsewhere")
    args = [
        "--table",
        "cross-dataset",
        "--data",
        tmp_path / "sets",
        "--out",
        tmp_path / "out",
        "--seeds",
        "1",
    ]
    args += ["--setting", "central,iid", "--sites", "2", "--rounds", "2", "--most-steps", "2"]
    code, told, wrong = paper(*args)
    assert code == 0 and "3 of 3 cells" in told and "Left out: eurosat" in wrong, wrong
    trained = len(fake)
    (tmp_path / "elsewhere").rename(tmp_path / "sets" / card("eurosat").layout.folder)
    assert "0 of 3 cells" in paper(*args, "--show")[1]
    code, told, wrong = paper(*args, "--json", tmp_path / "f.json")
    assert code == 0 and "3 of 3 cells" in told and len(fake) == trained, wrong
    first = json.loads((tmp_path / "f.json").read_text())["entries"]
    assert {e["column"] for e in first} == {"imagenet", "dtd", "eurosat", "average"}
    # Without what was kept they are trained again, and come out the same.
    for file in (tmp_path / "out").iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    code, _, wrong = paper(*args, "--json", tmp_path / "f.json")
    assert code == 0 and len(fake) == 2 * trained, wrong
    assert json.loads((tmp_path / "f.json").read_text())["entries"] == first
