"""Splits, few-shot draws and partitions: groups stay whole, seeds decide, order does not."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsigma.common.data.partition import partition
from fedsigma.common.data.records import DataError, Record, site_table
from fedsigma.common.data.sampling import few_shot, group_of, split_groups

CLASSES = ["a", "b", "c"]


@st.composite
def record_lists(draw: st.DrawFn, splits: bool = True) -> list[Record]:
    size = draw(st.integers(1, 40))
    choices = st.tuples(
        st.sampled_from(CLASSES),
        st.sampled_from(["n", "s", None]),
        st.sampled_from([None, "p1", "p2", "p3", "p4", "k3"]),
        st.sampled_from([None, None, "train", "test", "val"] if splits else [None]),
    )
    rows = draw(st.lists(choices, min_size=size, max_size=size))
    return [Record(key=f"k{i}", label=a, site=b, group=c, split=d) for i, (a, b, c, d) in enumerate(rows)]


def by_group(records: list[Record]) -> dict[tuple[str, str], set[str | None]]:
    found: dict[tuple[str, str], set[str | None]] = defaultdict(set)
    for record in records:
        found[group_of(record)].add(record.split)
    return found


@given(record_lists(), st.floats(0.05, 0.95), st.integers(0, 5), st.randoms())
def test_split_never_divides_a_group(records: list[Record], share: float, seed: int, random: object) -> None:
    done = split_groups(records, test_share=share, seed=seed)
    assert [replace(r, split=None) for r in done] == [replace(r, split=None) for r in records]
    assert all(new.split == old.split for new, old in zip(done, records, strict=True) if old.split)
    before = by_group(records)
    for name, splits in by_group(done).items():
        given_splits = before[name] - {None}
        assert splits == given_splits if given_splits else len(splits) == 1
        assert splits <= {"train", "test", "val"}
    shuffled = sorted(records, key=lambda _: random.random())  # type: ignore[attr-defined]
    again = {r.key: r.split for r in split_groups(shuffled, test_share=share, seed=seed)}
    assert again == {r.key: r.split for r in done}


@given(st.integers(2, 30), st.floats(0.05, 0.95), st.integers(0, 9), st.integers(1, 4))
def test_heads_are_grouped_by_side(groups: int, share: float, seed: int, size: int) -> None:
    records = [Record(key=f"{g}-{i}", label="a", group=str(g)) for g in range(groups) for i in range(size)]
    counts = Counter(r.split for r in split_groups(records, test_share=share, seed=seed))
    assert counts["train"] >= size and counts["test"] >= size
    assert abs(counts["test"] - share * len(records)) <= size


def test_split_follows_site_and_class() -> None:
    records = [Record(key=f"{s}{c}{i}", label=c, site=s) for s in "xy" for c in "ab" for i in range(10)]
    done = split_groups(records, test_share=0.3, seed=1)
    assert {(row.train, row.test) for row in site_table(done)} == {(7, 3)}
    assert split_groups(records, test_share=0.3, seed=2) != done
    alone = split_groups([Record(key="k", label="a")], test_share=0.9, seed=1)
    assert alone[0].split == "train"
    with pytest.raises(DataError, match="test_share is 1"):
        split_groups(records, test_share=1, seed=1)


def test_a_new_picture_moves_few_others() -> None:
    records = [Record(key=f"k{i}", label="a") for i in range(200)]
    before = {r.key: r.split for r in split_groups(records, test_share=0.5, seed=1)}
    after = split_groups([*records, Record(key="new", label="a")], test_share=0.5, seed=1)
    assert sum(before[r.key] != r.split for r in after if r.key in before) <= 2


@given(record_lists(), st.integers(1, 8), st.integers(0, 5), st.randoms())
def test_few_shot(records: list[Record], shots: int, seed: int, random: object) -> None:
    drawn = few_shot(records, shots=shots, classes=CLASSES, seed=seed)
    assert len({r.key for r in drawn}) == len(drawn) and set(drawn) <= set(records)
    for label in CLASSES:
        pool = [r for r in records if r.label == label and r.split == "train"]
        mine = [r for r in drawn if r.label == label]
        assert len(mine) == min(shots, len(pool)) and set(mine) <= set(pool)
        assert len({group_of(r) for r in mine}) == min(len(mine), len({group_of(r) for r in pool}))
    shuffled = sorted(records, key=lambda _: random.random())  # type: ignore[attr-defined]
    assert few_shot(shuffled, shots=shots, classes=CLASSES, seed=seed) == drawn
    assert set(few_shot(records, shots=shots + 1, classes=CLASSES, seed=seed)) >= set(drawn)


def test_few_shot_seed_matters() -> None:
    records = [Record(key=f"k{i}", label="a", split="train") for i in range(50)]
    assert few_shot(records, shots=5, classes=["a"], seed=1) != few_shot(
        records, shots=5, classes=["a"], seed=2
    )
    with pytest.raises(DataError, match="shots is 0"):
        few_shot(records, shots=0, classes=["a"], seed=1)


WAYS = [
    {"iid": {"sites": 3}},
    {"dirichlet": {"sites": 3, "alpha": 0.5}},
    {"pathological": {"sites": 3, "classes_per_site": 2}},
    {"disjoint": {"sites": 3}},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: next(iter(way)))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(record_lists(splits=False), st.integers(0, 3))
def test_partition_keeps_every_record_and_group(way: dict, records: list[Record], seed: int) -> None:
    pytest.importorskip("flwr_datasets")
    try:
        sites = partition(records, way, seed)
    except DataError as error:  # too few groups for this way: said so, nothing lost in silence
        assert "groups" in str(error) or "at no site" in str(error)
        return
    assert list(sites) == ["site-1", "site-2", "site-3"]
    placed = [r.key for part in sites.values() for r in part]
    assert sorted(placed) == sorted(r.key for r in records)
    homes = defaultdict(set)
    for name, part in sites.items():
        for record in part:
            assert record.site == name
            homes[group_of(record)].add(name)
    assert all(len(names) == 1 for names in homes.values())
    assert partition(records[::-1], way, seed) == sites


def many(count: int = 120) -> list[Record]:
    return [
        Record(key=f"k{i:03d}", label="abcd"[i % 4], site="ns"[i % 2], group=f"p{i // 2}")
        for i in range(count)
    ]


def test_partition_shapes() -> None:
    pytest.importorskip("flwr_datasets")
    records = [replace(r, group=None) for r in many()]
    even = partition(records, {"iid": {"sites": 4}}, 1)
    assert {len(part) for part in even.values()} == {30}
    assert partition(records, {"iid": {"sites": 4}}, 2) != even
    few = partition(records, {"pathological": {"sites": 4, "classes_per_site": 2}}, 1)
    assert all(len({r.label for r in part}) <= 2 for part in few.values())
    for seed in range(8):  # as many sites as classes: every class has a home
        homes = partition(records, {"pathological": {"sites": 4, "classes_per_site": 1}}, seed).values()
        assert sorted(r.label for part in homes for r in part[:1]) == list("abcd")
    apart = partition(records, {"disjoint": {"sites": 3}}, 1).values()
    assert sorted(label for part in apart for label in {r.label for r in part}) == list("abcd")
    assert sorted(len({r.label for r in part}) for part in apart) == [1, 1, 2]
    skewed = partition(records, {"dirichlet": {"sites": 4, "alpha": 0.1}}, 1)
    assert max(map(len, skewed.values())) > 40


@pytest.mark.parametrize("least", [1, 2])
def test_no_made_up_site_is_empty_however_many_there_are(least: int) -> None:
    """Ten draws of sixty sites by alpha 0.1 do not give each of them one of 120 groups."""
    pytest.importorskip("flwr_datasets")
    records = [replace(r, group=None) for r in many()]
    way = {"dirichlet": {"sites": 60, "alpha": 0.1, "min_groups": least}}
    sites = partition(records, way, 1)
    assert min(map(len, sites.values())) == least and sum(map(len, sites.values())) == 120
    assert {r.key for part in sites.values() for r in part} == {r.key for r in records}
    assert partition(records[::-1], way, 1) == sites
    assert least == 2 or max(map(len, sites.values())) > 4, "still uneven: alike would be two each"
    with pytest.raises(DataError, match="cannot divide 120 groups"):
        partition(records, {"dirichlet": {"sites": 60, "alpha": 0.1, "min_groups": 3}}, 1)


def test_own_sites_are_those_of_the_natural_partitioner() -> None:
    mine = partition(many(), "site", 1)
    assert list(mine) == ["n", "s"] and {r.site for r in mine["n"]} == {"n"}
    partitioner = pytest.importorskip("flwr_datasets").partitioner.NaturalIdPartitioner(partition_by="site")
    from datasets import Dataset

    partitioner.dataset = Dataset.from_list([{"key": r.key, "site": r.site} for r in many()])
    theirs = [list(partitioner.load_partition(i)["key"]) for i in range(partitioner.num_partitions)]
    assert sorted([r.key for r in part] for part in mine.values()) == sorted(theirs)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("hospital", "expected 'site' or one of iid, dirichlet, pathological"),
        ({"random": {}}, "names 'random': known are site, iid"),
        ({"iid": {}}, r"needs 'sites': write \{iid: \{sites: 4\}\}"),
        ({"iid": {"sites": 4, "alpha": 1}}, "no setting 'alpha': known are sites"),
        ({"iid": {"sites": 0}}, "sites 0, expected a whole number"),
        ({"dirichlet": {"sites": 2, "alpha": -1}}, "alpha -1, expected a number above 0"),
        ({"iid": {"sites": 500}}, "needs at least 500 groups for its sites, the data have only 60"),
        ({"pathological": {"sites": 1, "classes_per_site": 2}}, "at no site: raise sites"),
        ({"pathological": {"sites": 2, "classes_per_site": 9}}, "cannot divide"),
        ({"disjoint": {"sites": 5}}, "only 4 classes for 5 sites"),
    ],
)
def test_partition_refusals(way: object, message: str) -> None:
    records = [replace(r, label="abcd"[i // 2 % 4]) for i, r in enumerate(many())]
    with pytest.raises(DataError, match=message):
        partition(records, way, 1)  # type: ignore[arg-type]


def test_partition_needs_sites() -> None:
    with pytest.raises(DataError, match="1 of 2 records have no site"):
        partition([Record(key="1", site="n"), Record(key="2")], "site", 1)


def test_site_table_shows_empty_classes() -> None:
    rows = site_table([Record(key="1", label="a", site="n", split="train")], ["a", "b"])
    assert [(r.site, r.label, r.train, r.test) for r in rows] == [("n", "a", 1, 0), ("n", "b", 0, 0)]
