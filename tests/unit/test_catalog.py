"""Cards of published data sets, and stand-ins of each: read, checked, and refused where they differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedsigma.cli.main import main
from fedsigma.common.config.schema import ConfigError, build, read_yaml
from fedsigma.common.config.study import DataConfig, StudyConfig, load_study
from fedsigma.common.data.catalog.card import (
    Archive,
    CardError,
    DatasetCard,
    Protocol,
    card,
    card_text,
    cards,
    prompt_of,
    same_name,
)
from fedsigma.common.data.records import DataError, Record
from fedsigma.common.data.sampling import base_and_novel, few_shot
from fedsigma.common.data.sources.official_splits import read_split_file
from fedsigma.common.data.sources.published import open_card
from fedsigma.common.data.sources.registry import open_source
from fedsigma.common.data.sources.site_data import simulated_sites
from fedsigma.common.data.sources.verify import compare_with_card
from fedsigma.common.data.validation import check_source
from fedsigma.common.utils.files import UnsafePath, safe_join
from tests.helpers.published import class_names_file, names_of, stand_in, wordnet_ids, write

NAMES = list(cards())
runner = CliRunner()


def run(*args: object) -> tuple[int, str, str]:
    result = runner.invoke(main, [str(arg) for arg in args])
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def small(tmp_path: Path, name: str = "kvasir") -> tuple[DatasetCard, Path]:
    folder = tmp_path / card(name).layout.folder
    return stand_in(card(name), folder), folder


def test_every_set_of_the_paper_has_a_card() -> None:
    by_domain = {domain: [c.name for c in cards().values() if c.domain == domain] for domain in
                 ("biomedical", "natural", "shift")}  # fmt: skip
    assert {domain: len(names) for domain, names in by_domain.items()} == {
        "biomedical": 11,
        "natural": 11,
        "shift": 4,
    }
    with pytest.raises(CardError, match="no card 'kvasr': did you mean 'kvasir'"):
        card("kvasr")


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="iterations_per_shot is -3"):
        Protocol(learning_rate=0.1, weight_decay=0, epochs=1, iterations_per_shot=-3)


def test_a_card_is_read_strictly() -> None:
    values = read_yaml(card_text("btmri"), where="btmri")
    for change, says in (
        ({"licens": "MIT"}, "'licens' is not known: did you mean 'licence'"),
        ({"class_count": 5}, "classes has 4 names, expected 5"),
        ({"template": "a photo"}, "expected one {}"),
        ({"layout": {"kind": "split", "folder": "x"}}, "layout.split is ''"),
        ({"archives": [{"url": "ftp://x/y"}]}, "expected http"),
        ({"archives": [{"url": "http://x/y", "md5": "12"}]}, "expected 32 digits"),
        ({"archives": [{"url": "http://x/y", "md5": "0" * 32}]}, "needs both a checksum and stated_by"),
    ):
        with pytest.raises(ConfigError, match=says):
            build(DatasetCard, values | change, where="btmri")


@pytest.mark.parametrize("name", NAMES)
def test_card_states_where_a_dataset_is_available(name: str) -> None:
    one = card(name)
    assert one.page.startswith("https://")
    assert one.archives or one.by_hand
    # Where the split file is in no archive, it is said how to get it.
    if one.domain == "natural" and one.layout.split:
        assert any(one.layout.split in line for line in one.by_hand)


@pytest.mark.parametrize("name", NAMES)
def test_a_stand_in_of_each_set(name: str, tmp_path: Path) -> None:
    chosen, folder = small(tmp_path, name)
    source = open_source(f"coop:{name}:{folder}")
    classes = source.classes  # type: ignore[attr-defined]
    assert len(classes) == chosen.class_count == len({record.label for record in source.records})
    if chosen.class_names:
        assert classes == chosen.class_names
    assert not any("_" in label for label in classes)
    for part in ("train", "val", "test"):
        assert sum(r.split == part for r in source.records) == getattr(chosen.images, part)
    assert source.image(source.records[-1]).size == (3, 2)
    # Its class names and template are a study's.
    StudyConfig(name=name, backbone=chosen.backbone, classes=classes, template=chosen.template)

    assert compare_with_card(chosen, folder) == []
    of_real = compare_with_card(card(name), folder)
    assert len(of_real) == sum(1 for part in ("train", "val", "test") if getattr(chosen.images, part))
    assert f"test: {chosen.class_count:,} images, the card says {card(name).images.test:,}" in of_real


def test_differences_are_named(tmp_path: Path) -> None:
    chosen, folder = small(tmp_path)
    pictures = sorted((folder / "Kvasir").rglob("*.jpg"))
    pictures[0].unlink()
    pictures[1].write_bytes(b"")
    lines = compare_with_card(chosen, folder)
    assert lines == [
        f"1 image is not there: {pictures[0].relative_to(folder / 'Kvasir').as_posix()}",
        f"1 image is empty: {pictures[1].relative_to(folder / 'Kvasir').as_posix()}",
    ]
    write(pictures[0])
    write(pictures[1])
    file = folder / "split_Kvasir.json"
    content = json.loads(file.read_text())
    content["train"].reverse()
    for rows in content.values():
        for row in rows:
            row[2] = row[2].replace("polyps", "warts")
    file.write_text(json.dumps(content))
    lines = compare_with_card(chosen, folder)
    assert any(line.startswith("first training path: 'ulcerative_colitis") for line in lines)
    assert "class 'polyps': on the card, not in the split" in lines
    assert "class 'dyed_lifted_warts': in the split, not on the card" not in lines
    assert "class 'dyed lifted warts': in the split, not on the card" in lines
    file.unlink()
    assert "split_Kvasir.json is not in" in compare_with_card(chosen, folder)[0]
    with pytest.raises(FileNotFoundError, match="expected that of Kvasir"):
        compare_with_card(chosen, tmp_path / "none")


def test_folders_may_be_written_otherwise(tmp_path: Path) -> None:
    chosen, folder = small(tmp_path, "busi")
    (folder / "BUSI" / "benign_tumor").rename(folder / "BUSI" / "Benign Tumor")
    assert compare_with_card(chosen, folder) == []
    source = open_card(chosen, folder)
    assert source.records[0].key == "Benign Tumor/benign (1).png"
    assert source.image(source.records[0]).mode == "RGB"
    # Two that are alike: none is guessed.
    write(folder / "BUSI" / "BENIGN-tumor" / "x.png")
    assert "not there" in compare_with_card(chosen, folder)[0]


def test_images_in_the_outer_folder(tmp_path: Path) -> None:
    chosen, folder = small(tmp_path, "dtd")
    for one in (folder / "images").iterdir():
        one.rename(folder / one.name)
    (folder / "images").rmdir()
    assert compare_with_card(chosen, folder) == []


def write_split(folder: Path, content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "split.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ([], "is not a split file"),
        ({"train": [], "val": []}, "is not a split file"),
        ({"train": [], "test": [], "extra": []}, "is not a split file"),
        ({"test": {}}, "test is dict, expected a list"),
        ({"test": [["a.png", 0]]}, r"test\[0\] is .* expected \[relative path"),
        ({"test": [["a.png", True, "cat"]]}, r"test\[0\]"),
        ({"test": [["a.png", -1, "cat"]]}, r"test\[0\]"),
        ({"test": [["a.png", 0, " "]]}, r"test\[0\]"),
        ({"test": [["a.png", 0, "cat"], ["../a.png", 0, "cat"]]}, r"test\[1\]: .*refused"),
    ],
)  # fmt: skip
def test_a_damaged_split_file_is_refused(content: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        read_split_file(write_split(tmp_path, content))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
)
ROWS = st.lists(st.tuples(st.text(max_size=12), st.integers(-2, 5), st.text(max_size=4)) | JSON, max_size=4)


@given(JSON | st.fixed_dictionaries({"train": ROWS, "val": ROWS, "test": ROWS}))
def test_any_split_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    try:
        rows = read_split_file(write_split(folder, content))
    except DataError:
        return
    for row in rows:
        assert (folder / row.path).resolve().is_relative_to(folder.resolve())
        assert row.number >= 0


@given(
    st.lists(st.sampled_from(["..", ".", "a", "b c", "", "C:", "~", "\\", "\n", "é"]), max_size=6),
    st.booleans(),
)
def test_no_path_leads_out(parts: list[str], absolute: bool) -> None:
    text = ("/" if absolute else "") + "/".join(parts)
    top = Path("/top/of/all")
    empty = not any(part not in ("", ".") for part in parts)
    wrong = bool({"..", "\\", "\n"} & set(parts)) or text.startswith(("/", "C:")) or empty
    try:
        path = safe_join(text)
    except UnsafePath:
        assert wrong, "a harmless path was refused"
        return
    assert not wrong
    assert (top / path).is_relative_to(top) and ".." not in path.parts


@given(st.lists(st.integers(0, 200), unique=True, min_size=2, max_size=40))
def test_halves_by_the_field_s_rule(numbers: list[int]) -> None:
    names = [f"c{number}" for number in sorted(numbers)]
    base, novel = base_and_novel(names)
    assert [*base, *novel] == names
    assert len(base) - len(novel) in (0, 1)


def test_base_and_novel_follow_label_numbers_not_names(tmp_path: Path) -> None:
    chosen, folder = small(tmp_path, "kneexray")
    base = open_source(f"coop:kneexray:{folder}", half="base")
    novel = open_source(f"coop:kneexray:{folder}", half="novel")
    assert base.classes == chosen.class_names[:3] and novel.classes == chosen.class_names[3:]  # type: ignore[attr-defined]
    assert {r.label for r in base.records} == set(chosen.class_names[:3])
    assert len(base.records) + len(novel.records) == 15
    with pytest.raises(DataError, match="half is 'old', expected base or novel"):
        open_source(f"coop:kneexray:{folder}", half="old")


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["train", "val", "test"])), max_size=60),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.integers(1, 3),
)
@example([(0, "val")] * 9 + [(1, "train")] * 20, 16, 1)
def test_sample_has_shots_per_class_and_no_duplicates(
    rows: list[tuple[int, str]], shots: int, seed: int
) -> None:
    records = [Record(key=f"k{i}", label=f"c{n}", split=part) for i, (n, part) in enumerate(rows)]
    classes = ["c0", "c1", "c2"]
    for part in ("train", "val"):
        drawn = few_shot(records, shots=shots, classes=classes, seed=seed, split=part)
        assert drawn == few_shot(records[::-1], shots=shots, classes=classes, seed=seed, split=part)
        assert len(set(drawn)) == len(drawn) and {r.split for r in drawn} <= {part}
        for label in (*classes, "c3"):
            there = sum(r.label == label and r.split == part for r in records)
            assert sum(r.label == label for r in drawn) == (min(shots, there) if label in classes else 0)
        assert set(few_shot(records, shots=1, classes=classes, seed=seed, split=part)) <= set(drawn)


def test_names_of_labels(tmp_path: Path) -> None:
    chosen = card("dtd")
    rows = [["a/1.jpg", 3, "polka_dotted"], ["b/2.jpg", 1, "Zig Zag"], ["a/3.jpg", 3, "Polka-dotted"]]
    (tmp_path / chosen.layout.split).write_text(json.dumps({"train": [], "val": [], "test": rows}))
    assert open_card(chosen, tmp_path).classes == ("Zig Zag", "polka dotted")
    rows.append(["a/4.jpg", 3, "striped"])
    (tmp_path / chosen.layout.split).write_text(json.dumps({"train": [], "val": [], "test": rows}))
    with pytest.raises(DataError, match="label 3 is called 'polka_dotted' and 'striped'"):
        open_card(chosen, tmp_path)
    assert prompt_of("a__b_c ") == "a b c"
    assert same_name("COVID-19_lungs") == same_name("covid 19 Lungs")


def test_imagenet_s_names_without_its_file(tmp_path: Path) -> None:
    _, folder = small(tmp_path, "imagenet")
    (folder / "classnames.txt").unlink()
    classes = open_card(card("imagenet"), folder).classes
    # Two of its classes share a name; a study needs them apart.
    assert classes[0] == "tench" and len(set(classes)) == 1000
    assert classes[657] == "missile" and classes[744] == f"missile ({wordnet_ids()[744]})"


def test_domain_shift_has_imagenet_s_classes(tmp_path: Path) -> None:
    _, folder = small(tmp_path, "imagenet_r")
    classes = open_card(card("imagenet_r"), folder).classes
    assert classes[:3] == ("word 0", "word 5", "word 10")
    # The names may lie beside ImageNet.
    (folder / "classnames.txt").unlink()
    with pytest.raises(DataError, match=r"no classnames\.txt, and only 200"):
        open_card(card("imagenet_r"), folder)
    class_names_file(tmp_path / "imagenet")
    assert open_card(card("imagenet_r"), folder).classes == classes
    (tmp_path / "imagenet" / "classnames.txt").write_text("n01440764 word 0\nn0144 x\n")
    with pytest.raises(DataError, match="line 2"):
        open_card(card("imagenet_r"), folder)
    write(folder / "imagenet-r" / "n99999999" / "1.jpg")
    class_names_file(tmp_path / "imagenet")
    with pytest.raises(DataError, match="no name for the folder n99999999"):
        open_card(card("imagenet_r"), folder)

    _, folder = small(tmp_path / "v2", "imagenet_v2")
    source = open_card(card("imagenet_v2"), folder)
    assert [r.label for r in source.records if r.key.startswith("10/")] == ["word 10"]
    assert source.classes[:3] == ("word 0", "word 1", "word 2")


def test_path_after_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(tmp_path)
    assert len(open_source("coop:kvasir:Kvasir", base=tmp_path).records) == 24
    for spec, says in (
        ("coop:kvasir", "write coop:NAME:PATH"),
        ("coop", "write coop:NAME:PATH"),
        ("coop:kvasir:", "write coop:NAME:PATH"),
        ("coop:kvasir:none", "does not exist"),
    ):
        with pytest.raises(DataError, match=says):
            open_source(spec, base=tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'kvasir'"):
        open_source("coop:kvasr:Kvasir", base=tmp_path)
    study = tmp_path / "study.yaml"
    study.write_text("name: s\nbackbone: starter\nclasses: [a, b]\ndata: {source: 'coop:kvasir:Kvasir'}\n")
    monkeypatch.delenv("FEDSIGMA_DATA", raising=False)
    data = load_study(study).data
    assert data is not None and data.source == f"coop:kvasir:{tmp_path.resolve() / 'Kvasir'}"


def test_a_simulation_divides_a_published_set(tmp_path: Path) -> None:
    chosen, folder = small(tmp_path, "eurosat")
    classes = base_and_novel(open_card(chosen, folder).classes)[1]
    data = {
        "source": f"coop:eurosat:{folder}",
        "options": {"half": "novel"},
        "sites_by": {"iid": {"sites": 2}},
    }
    _, sites = simulated_sites(DataConfig(**data), classes, seed=1)
    records = [record for one in sites.values() for record in one]
    assert len(sites) == 2 and len(records) == 15
    # The official split stays as it is; no part of it is made anew.
    assert sorted(str(record.split) for record in records) == ["test"] * 5 + ["train"] * 5 + ["val"] * 5


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("data", "cards")
    assert code == 0 and all(name in out for name in ("btmri", "imagenet_v2"))
    code, out, _ = run("data", "cards", "--json")
    assert [one["name"] for one in json.loads(out)] == NAMES
    code, out, _ = run("data", "cards", "dtd")
    assert code == 0 and "licence: for research purposes" in out
    assert run("data", "cards", "dtf")[0] == 3

    chosen, folder = small(tmp_path)
    code, out, _ = run("data", "check", f"kvasir:{folder}")
    assert code == 4 and "train: 8 images, the card says 2,000" in out
    code, out, _ = run("data", "check", f"kvasir:{folder}", "--json")
    assert code == 4 and len(json.loads(out)["differences"]) == 3
    monkeypatch.setitem(cards(), "kvasir", chosen)
    code, out, _ = run("data", "check", f"kvasir:{folder}")
    assert code == 0 and "8 / 8 / 8 images, 8 classes" in " ".join(out.split())
    assert run("data", "check", f"kvasir:{tmp_path / 'none'}")[0] == 3
    for spec, says in (
        ("kvasir", "write kvasir:PATH"),
        ("kvasir:", "write kvasir:PATH"),
        ("KVASIR:x", "did you mean 'kvasir'"),
        ("kvasr:x", "did you mean 'kvasir'"),
    ):
        code, _, wrong = run("data", "check", spec)
        assert code == 3 and says in " ".join(wrong.split()), wrong
    code, _, wrong = run("data", "check", f"kvasir:{folder}", "--classes", "a,b")
    assert code == 3 and "write coop:kvasir:" in " ".join(wrong.split())
    assert "did you mean 'kvasir'" in run("data", "cards", "Kvasir")[2]
    # The same folder as a source: every image is decoded.
    code, out, _ = run("data", "check", f"coop:kvasir:{folder}")
    assert code == 4 and "identical pictures" in out


def test_an_archive_s_name() -> None:
    assert Archive(url="https://x.org/a/b.zip?download=1").name == "b.zip"
    with pytest.raises(CardError):
        Archive(url="https://x.org/a/")
    assert replace(card("btmri"), note="x").class_names == tuple(names_of(card("btmri")))


def test_the_page_has_the_cards_of_today() -> None:
    from tools.dataset_cards import table

    page = Path(__file__).parents[2] / "docs" / "datasets.md"
    assert table() in page.read_text("utf-8"), "run tools/dataset_cards.py and put its table into the page"


def test_own_cards_stand_beside_those_that_come_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = card_text("kvasir").replace("name: kvasir", "name: our_endoscopy")
    (tmp_path / "our_endoscopy.yaml").write_text(own)
    monkeypatch.setenv("FEDSIGMA_CARDS", str(tmp_path))
    assert card("our_endoscopy").class_names == card("kvasir").class_names
    assert card_text("our_endoscopy") == own
    assert len(cards()) == len(NAMES) + 1
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "kvasir.yaml").write_text(card_text("kvasir"))
    monkeypatch.setenv("FEDSIGMA_CARDS", str(tmp_path / "again"))
    with pytest.raises(CardError, match="FedSigma has a card of this name"):
        cards()
    monkeypatch.setenv("FEDSIGMA_CARDS", str(tmp_path / "nowhere"))
    with pytest.raises(CardError, match="which is not a folder"):
        cards()


def test_parts_and_sites_of_a_published_set(tmp_path: Path) -> None:
    chosen, folder = small(tmp_path)
    train = open_source(f"coop:kvasir:{folder}", parts=["train"]).records
    assert {record.split for record in train} == {"train"}
    assert all(record.site is None for record in train)
    classes = chosen.class_names
    assert check_source(
        open_source(f"coop:kvasir:{folder}", parts=["train"]), classes=classes, pictures=False
    ).ok
    assert not check_source(
        open_source(f"coop:kvasir:{folder}", parts=["test"]), classes=classes, pictures=False
    ).ok
    rows = "".join(
        f"{record.key},{'north' if place % 2 else 'south'}\n" for place, record in enumerate(train)
    )
    (folder / "sites.csv").write_text("path,site\n" + rows)
    found = open_card(chosen, folder).records
    assert {record.site for record in found if record.split == "train"} == {"north", "south"}
    assert {record.site for record in found if record.split == "test"} == {None}
    with pytest.raises(DataError, match="option parts is 'train', expected a list of train, val, test"):
        open_source(f"coop:kvasir:{folder}", parts="train")
    with pytest.raises(DataError, match="half needs an order of classes, and demo has none"):
        open_source("demo", half="base")
    (folder / "sites.csv").write_text("file,site\n")
    with pytest.raises(DataError, match="expected path and site"):
        open_card(chosen, folder)
