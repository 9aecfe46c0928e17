"""The comparison with other methods: its loop is the product's, and each method is what it says."""

from __future__ import annotations

import copy
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_grid import FakeGrid
from flwr.app import Context, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_backbones import CLIP_CFG, PREPROCESS
from torch import Tensor, nn
from torch.nn import functional as F

from bench.methods.__main__ import main as show
from bench.methods.catalogue import CANDIDATES, with_setting
from bench.methods.cells import Cell, Cells, Plan
from bench.methods.federation import accuracy, federate, study_sites
from bench.methods.heads import FedClip, LinearProbe, PromptFL, TipAdapter, TipAdapterF
from bench.methods.method import Method, Place, Tuned, values
from bench.methods.sigma import Sigma
from bench.methods.tables import combine, draw, front, markdown, verdicts
from bench.methods.weights import FullTuning, LayerNorms, Lora, LoraProducts
from fedsigma.client import site as client_site
from fedsigma.client.app import app as client
from fedsigma.common.backbones import Backbone, assemble, build_model, load_backbone, save_backbone
from fedsigma.common.backbones.tokens import tokenizer_for
from fedsigma.common.config import ConfigError, StudyConfig, TrainingConfig
from fedsigma.common.data import Example
from fedsigma.common.training import accumulate_gradient, evaluate
from fedsigma.server.app import app as server
from fedsigma.server.store import RunFolder

CLASSES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil")
PROMPTS = tuple(f"a photo of a {name}." for name in CLASSES)
STUDY = """
name: tiny
backbone: local-dir:{backbone}
classes: [neutrophil, lymphocyte, monocyte, eosinophil]
data: {{source: "parquet:{images}"}}
shots: 2
training: {{learning_rate: 0.05, batch_size: 8, local_steps: 2, augment: microscopy, precision: float32}}
federation: {{rounds: 3, min_sites: 4, round_timeout_s: 60, codec: {codec}, strategy: {strategy}}}
baselines: []
"""
RECIPE = TrainingConfig(learning_rate=0.01, batch_size=4, augment="none", precision="float32", local_steps=3)


def backbone(seed: int = 0) -> Backbone:
    """Tiny, with room in its context for sixteen learned words."""
    torch.manual_seed(seed)
    cfg = copy.deepcopy(CLIP_CFG)
    cfg["text_cfg"]["context_length"] = 32
    model = build_model(cfg)
    return assemble("tiny", model, tokenizer_for(cfg, model, "", "tiny"), PREPROCESS, cfg)


def examples(count: int = 6, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (count, 3, 32, 32), generator=generator).to(torch.uint8)
    return [Example(picture, number % len(CLASSES), None) for number, picture in enumerate(pictures)]


def parquet(path: Path) -> Path:
    """Noise of four sites: three training and two test images of each class."""
    rows: dict[str, list[Any]] = {"image": [], "label": [], "site": [], "split": []}
    noise = np.random.default_rng(0)
    places = itertools.product(("north", "east", "south", "west"), CLASSES, ("train", "test"), range(3))
    for site, label, split, number in places:
        if split == "test" and number == 2:
            continue
        file = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(file, "PNG")
        row = {
            "image": {"bytes": file.getvalue(), "path": None},
            "label": label,
            "site": site,
            "split": split,
        }
        for key, value in row.items():
            rows[key].append(value)
    pq.write_table(pa.table(rows), path)
    return path


SITES = {"one": examples(6, seed=1), "two": examples(4, seed=2)}
PLACE = Place(site="one", round=1, first_step=0, steps=3, total_steps=3, seed=5)
BUILD: dict[str, Any] = {
    "full": lambda b: FullTuning(b, PROMPTS),
    "layer-norms": lambda b: LayerNorms(b, PROMPTS),
    "lora": lambda b: Lora(b, PROMPTS, seed=1),
    "lora-products": lambda b: LoraProducts(b, PROMPTS, seed=1),
    "promptfl": lambda b: PromptFL(b, CLASSES, seed=1),
    "fedclip": lambda b: FedClip(b, PROMPTS, seed=1),
    "probe": lambda b: LinearProbe(b, PROMPTS),
    "tip-f": lambda b: TipAdapterF(b, PROMPTS, alpha=1.0, beta=5.5),
}


def mean(start: Any, vectors: Any, weights: Any) -> Any:
    return sum(v * w for v, w in zip(vectors, weights, strict=True)) / sum(weights)


def zero_shot(model: Backbone) -> Tensor:
    with torch.no_grad():
        text = F.normalize(model.model.encode_text(model.tokenizer(list(PROMPTS))), dim=-1)
        pictures = torch.stack([e.image for e in examples()]).float() / 255
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.mean, model.std))
        image = F.normalize(model.model.encode_image((pictures - mean) / std), dim=-1)
        return (model.logit_scale * image @ text.T).softmax(1)


# --- the loop is the product's ---------------------------------------------------------------------------


UNLIKE = "fedadam, schedule: cosine, options: {tau: 1.0e-8, eta: 0.02}"


@pytest.mark.parametrize(
    ("codec", "strategy", "more"),
    [
        ("exact", "fedavgm", ""),
        ("small", "qfedavg", ""),
        ("exact", UNLIKE, ", optimiser: sgd"),
    ],
)
def test_sigma_in_this_loop_is_sigma_in_the_products_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, strategy: str, more: str
) -> None:
    monkeypatch.setenv("FEDSIGMA_AUDIT", str(tmp_path / "audit"))
    monkeypatch.setenv("FEDSIGMA_CACHE", str(tmp_path / "cache"))
    client_site._images.cache_clear()
    where = save_backbone(backbone(), tmp_path / "backbone", source="tests")
    file = tmp_path / "study.yaml"
    images = parquet(tmp_path / "images.parquet")
    text = STUDY.format(backbone=where, images=images, codec=codec, strategy=strategy)
    file.write_text(text.replace("local_steps: 2", f"local_steps: 2{more}"))
    config: dict[str, Any] = {"study": str(file), "out": str(tmp_path / "out"), "resume": False}
    context = Context(1, 1, {}, RecordDict(), config | {"seed": -1, "rounds": 0})
    server(FakeGrid(client, 4), context)
    folder = RunFolder.open(tmp_path / "out")

    study = StudyConfig.from_yaml(file.read_text())
    loaded = load_backbone(study.backbone)
    method = Sigma(loaded, study, codec)
    sites = study_sites(study, loaded.image_size * 3 // 2)
    run = federate(method, {name: data.train for name, data in sites.items()}, study)
    theirs = folder.load_sigma().shift
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(run.state["shift"], theirs, rtol=1e-4, atol=1e-6)
    told = accuracy(method, run.state, {name: data.test for name, data in sites.items()})
    assert told["all"] == pytest.approx(folder.read_summary()["federated"]["accuracy"])


# --- every method ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILD)
def test_a_method_learns_the_same_thing_each_time_and_keeps_its_names_and_shapes(name: str) -> None:
    method: Method = BUILD[name](backbone())
    start = method.initial(SITES)
    before = {key: tensor.clone() for key, tensor in start.items()}
    recipe = replace(RECIPE, schedule="constant")
    one = method.train(start, SITES["one"], recipe, PLACE)
    longer = method.train(start, SITES["one"], recipe, replace(PLACE, steps=12, total_steps=12))
    again = method.train(start, SITES["one"], recipe, PLACE)
    assert longer.loss < one.loss == again.loss
    for key, tensor in before.items():
        assert torch.equal(start[key], tensor), "the state that went in must stay"
        assert torch.equal(one.state[key], again.state[key])
    assert any(not torch.equal(one.state[key], before[key]) for key in before)
    together = method.aggregate(start, [one.state, longer.state], [1, 3], mean)
    assert {k: v.shape for k, v in together.items()} == {k: v.shape for k, v in start.items()}
    assert method.upload(start, one.state, PLACE).bytes == method.bytes_up(start) == 4 * values(start)


@pytest.mark.parametrize("name", ["full", "layer-norms", "lora", "lora-products", "probe"])
def test_before_training_a_method_is_zero_shot(name: str) -> None:
    method = BUILD[name](backbone())
    method._load(method.initial(SITES))
    found = evaluate(method.task, examples(), precision="float32")
    torch.testing.assert_close(found.probabilities, zero_shot(backbone()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "fedclip", "promptfl", "full"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(name: str) -> None:
    method = BUILD[name](backbone())
    state = method.train(method.initial(SITES), SITES["one"], RECIPE, PLACE).state
    method._tuning.load(state)
    images = torch.stack([e.image for e in examples()])
    labels = torch.tensor([e.label for e in examples()])
    gradients = []
    for size in (6, 2):
        method.task.micro_batch = size
        method._tuning.shift.grad = None
        accumulate_gradient(method.task, images, labels, precision="float32")
        gradients.append(method._tuning.shift.grad.clone())
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_full_tuning_is_adamw_on_the_models_own_parameters() -> None:
    tuned, plain = FullTuning(backbone(), PROMPTS), backbone()
    trained = tuned.train(tuned.initial(SITES), SITES["two"], RECIPE, replace(PLACE, steps=2, total_steps=2))
    model = plain.model.requires_grad_(True)
    own = {name: p for name, p in model.named_parameters() if name != "logit_scale"}
    optimiser = torch.optim.AdamW(own.values(), weight_decay=0.0)
    tokens = plain.tokenizer(list(PROMPTS))
    pixels = torch.stack([e.image for e in SITES["two"]]).float() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (plain.mean, plain.std))
    labels = torch.tensor([e.label for e in SITES["two"]])
    for step in range(2):
        optimiser.param_groups[0]["lr"] = RECIPE.rate(step, 2)
        optimiser.zero_grad()
        image = F.normalize(model.encode_image((pixels - mean) / std), dim=-1)
        text = F.normalize(model.encode_text(tokens), dim=-1)
        F.cross_entropy(plain.logit_scale * image @ text.T, labels).backward()
        optimiser.step()
    assert set(trained.state) == set(own)
    # Adam's first steps have the sign of a gradient: where that is rounding alone, they may differ.
    apart = torch.cat([(trained.state[n] - p.detach()).abs().flatten() for n, p in own.items()])
    assert (apart > 1e-4).float().mean() < 0.01


def test_layer_norms_are_all_layer_norms_and_nothing_else() -> None:
    model = backbone()
    norms = [m for m in model.model.modules() if isinstance(m, nn.LayerNorm)]
    method = LayerNorms(model, PROMPTS)
    assert values(method.initial(SITES)) == sum(2 * m.normalized_shape[0] for m in norms)


# --- low rank --------------------------------------------------------------------------------------------


def test_lora_has_a_pair_for_each_of_q_k_and_v() -> None:
    state = Lora(backbone(), PROMPTS, seed=1).initial(SITES)
    # Two layers a tower of widths 32 and 16, each with q, k and v: A and B of rank 2.
    assert values(state) == 2 * 3 * 2 * (32 + 32) + 2 * 3 * 2 * (16 + 16)
    other = Lora(backbone(), PROMPTS, seed=1).initial(SITES)
    assert all(torch.equal(state[name], other[name]) for name in state)


def rank_two(method: Lora, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator) for n, t in method.initial(SITES).items()}


PRODUCTS = LoraProducts(backbone(), PROMPTS, seed=1)


@given(st.integers(0, 2**31))
def test_the_mean_of_equal_products_is_that_product_whatever_its_factors(seed: int) -> None:
    state = rank_two(PRODUCTS, seed)
    # The same product by other factors: A and B scaled against each other.
    other = {n: (3 * t if n.endswith(".A") else t / 3) for n, t in state.items()}
    found = PRODUCTS.aggregate(state, [state, other], [1, 2], mean)
    for name in (n[:-2] for n in state if n.endswith(".A")):
        product = found[f"{name}.B"] @ found[f"{name}.A"]
        expected = state[f"{name}.B"] @ state[f"{name}.A"]
        torch.testing.assert_close(product, expected, rtol=1e-3, atol=1e-4)


def test_the_mean_of_factors_is_not_the_mean_of_products_which_is_cut_as_well_as_it_can_be() -> None:
    factors = Lora(backbone(), PROMPTS, seed=1)
    states = [rank_two(factors, 1), rank_two(factors, 2)]
    cut, naive = (m.aggregate(states[0], states, [1, 1], mean) for m in (PRODUCTS, factors))
    name = next(n[:-2] for n in naive if n.endswith(".A"))

    def product(state: dict[str, Tensor]) -> Tensor:
        return state[f"{name}.B"] @ state[f"{name}.A"]

    exact = (product(states[0]) + product(states[1])) / 2
    singular = torch.linalg.svdvals(exact)
    assert (product(cut) - exact).norm() == pytest.approx(singular[2:].norm().item(), rel=1e-3)
    assert (product(naive) - exact).norm() > (product(cut) - exact).norm()


# --- heads -----------------------------------------------------------------------------------------------


def test_learned_context_stands_where_its_words_were() -> None:
    method = PromptFL(backbone(), CLASSES, seed=1)
    assert values(method.initial(SITES)) == 16 * 16
    table = method.task.backbone.model.token_embedding.weight
    word = int(method.task.backbone.tokenizer(["x"])[0, 1])
    words = [" ".join(["x"] * 16 + [name]) + "." for name in CLASSES]
    plain = backbone()
    with torch.no_grad():
        expected = F.normalize(plain.model.encode_text(plain.tokenizer(words)), dim=-1)
    method._tuning.load({"context": table[word].expand(16, -1).clone()})
    with method._tuning.frozen():
        torch.testing.assert_close(method.task.text_features(), expected, rtol=1e-4, atol=1e-5)
    method._tuning.load({"context": torch.randn(16, 16)})
    with method._tuning.frozen():
        assert (method.task.text_features() - expected).abs().max() > 0.01


def test_a_name_that_does_not_fit_behind_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit behind 16 words"):
        PromptFL(backbone(), (*CLASSES, " ".join(["cell"] * 20)), seed=1)


def test_the_adapter_weighs_features_by_two_layers_of_their_width() -> None:
    method = FedClip(backbone(), PROMPTS, seed=1)
    state = method.initial(SITES)
    assert values(state) == 2 * (16 * 16 + 16)
    one_hot = torch.zeros(16)
    one_hot[3] = 1e4
    method._tuning.load({**state, "second.bias": one_hot})
    with method._tuning.frozen():
        features = method.task.image_features(torch.stack([e.image for e in examples()]))
    assert torch.equal(features.abs().argmax(1), torch.full((6,), 3))


def test_a_joined_cache_knows_its_own_images_and_its_bytes_are_counted() -> None:
    method = TipAdapter(backbone(), PROMPTS, alpha=1000.0, beta=1000.0)
    state = method.initial(SITES)
    both = SITES["one"] + SITES["two"]
    assert state["keys"].shape == (10, 16)
    method._load(state)
    found = evaluate(method.task, both, precision="float32")
    assert torch.equal(found.probabilities.argmax(1), torch.tensor([e.label for e in both]))
    study = StudyConfig.from_yaml(
        STUDY.format(backbone="nowhere", images="nowhere", codec="exact", strategy="fedavg")
    )
    # Once 16 float32 and a label an image; six images at one site, four at the other; nothing afterwards.
    run = federate(method, SITES, study)
    assert (run.upload, run.total) == (0, 4 * 17 * 5)
    run = federate(TipAdapterF(backbone(), PROMPTS, alpha=1.0, beta=1.0), SITES, study)
    assert (run.upload, run.total) == (4 * 160, 4 * 17 * 5 + 3 * 4 * 160)


def test_without_a_cache_tip_adapter_is_zero_shot() -> None:
    method = TipAdapter(backbone(), PROMPTS, alpha=0.0, beta=1.0)
    method.initial(SITES)
    with pytest.raises(ValueError, match="expected \\['keys'\\]"):
        method.evaluate({"shift": torch.zeros(3)}, examples())
    found = evaluate(method.task, examples(), precision="float32")
    torch.testing.assert_close(found.probabilities, zero_shot(backbone()), rtol=1e-3, atol=1e-5)


# --- the search, the database and what is told -------------------------------------------------------------


class Scripted(Plan):
    """A plan whose runs give a made-up accuracy: best at a learning rate of 0.24."""

    ran: list[Cell]

    def _run(self, cell: Cell) -> dict[str, Any]:
        self.ran.append(cell)
        value = 1 - abs(cell.setting.get("learning_rate", 0.24) - 0.24)
        figures = {"bytes_upload": 8.0, "bytes_float32": 8, "bytes_total": 16.0, "seconds": 1.0}
        return {"accuracy": {"all": value, "here": value}, **figures}


def plan(path: Path, **options: bool) -> Scripted:
    made = Scripted(Cells(path / "cells.sqlite"), rounds=4, search_rounds=2, **options)
    made.ran = []
    return made


def test_the_search_goes_on_past_a_best_end_and_no_cell_is_run_twice(tmp_path: Path) -> None:
    first = plan(tmp_path)
    assert first.tested("s", "sigma", 1) is not None
    rates = [cell.setting["learning_rate"] for cell in first.ran if cell.part == "validation"]
    assert rates == [0.02, 0.04, 0.08, 0.16, 0.32]
    assert [c.setting["learning_rate"] for c in first.ran if c.part == "test"] == [0.16] or first.ran[
        -1
    ].rounds == 4
    second = plan(tmp_path)
    assert second.tested("s", "sigma", 1) == first.tested("s", "sigma", 1) and second.ran == []
    # Another strategy takes sigma's rate over; with one setting there is nothing to search.
    second.tested("s", "fedavg", 1)
    (cell,) = second.ran
    assert cell.part == "test" and cell.setting["learning_rate"] == first.ran[-1].setting["learning_rate"]
    third = plan(tmp_path, run_missing=False)
    assert third.tested("s", "full", 1) is None and third.search("s", "full") is None and third.ran == []


def test_every_candidates_settings_are_taken_by_its_study() -> None:
    from bench.methods.cells import grid
    from fedsigma.server.averaging import make_averaging

    study = StudyConfig.from_yaml(
        STUDY.format(backbone="nowhere", images="nowhere", codec="exact", strategy="fedavg")
    )
    for candidate in CANDIDATES.values():
        assert not candidate.after or candidate.after in CANDIDATES
        for setting in grid(candidate, {}, list(candidate.rates)):
            found = with_setting(study, candidate, setting)
            make_averaging(found)
            assert found.training.learning_rate == setting.get("learning_rate", 0.05)
    with pytest.raises(ConfigError, match="not an option"):
        make_averaging(with_setting(study, CANDIDATES["fedadam"], {"options": {"etta": 1}}))


def test_what_was_run_is_shown_without_running_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"accuracy": {"all": 0.5, "here": 0.5}, "bytes_upload": 0, "bytes_float32": 0, "bytes_total": 0}
    place = {"part": "test", "method": "zero-shot", "setting": {}, "rounds": 60, "seed": 2}
    cell = Cell(study="white-cells-four-labs", **place)
    Cells(tmp_path / "cells.sqlite").keep(cell, figures)
    words = ["methods", "--data", str(tmp_path), "--out", str(tmp_path), "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr("sys.argv", [*words, "--show"])
    monkeypatch.setenv("FEDSIGMA_DATA", "")
    show()
    assert "| zero-shot | 50.0 | 50.0 | 0 | 0 | yes |" in capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["white-cells-four-labs"]["rows"]["zero-shot"]["seeds"] == {"2": 0.5}
    assert found["dermoscopy-four-sites"]["rows"] == {}


def row(mean: float, total: float) -> dict[str, Any]:
    accuracy = {"all": mean, "here": mean}
    run = {
        "accuracy": accuracy,
        "bytes_upload": total,
        "bytes_float32": total,
        "bytes_total": total,
        "seed": 1,
    }
    return combine([run])


def test_the_front_and_the_verdicts(tmp_path: Path) -> None:
    rows = {"zero-shot": row(0.3, 0), "sigma": row(0.7, 50), "probe": row(0.6, 60), "full": row(0.704, 5000)}
    assert front(rows) == ["zero-shot", "sigma", "full"]
    (line,) = verdicts("s", rows)
    assert "is on the front" in line and "0.4 points below" in line and line.endswith("the reach is met")
    (line,) = verdicts("s", {**rows, "full": row(0.8, 5000)})
    assert line.endswith("the reach is not met")
    (line,) = verdicts("s", {**rows, "full": row(0.704, 400)})
    assert line.endswith("the reach is not met")
    (line,) = verdicts("s", {**rows, "probe": row(0.71, 40)})
    assert "not on the front" in line
    assert "| full fine-tuning | 70.4 | 70.4 | 5,000 | 5,000 | yes |" in markdown("s", rows)
    draw({"s": rows}, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"


@given(st.dictionaries(st.text(), st.tuples(st.floats(0, 1), st.integers(0, 9)), min_size=1))
def test_nobody_on_the_front_is_beaten_and_everybody_else_is(points: dict[str, tuple[float, int]]) -> None:
    rows = {name: {"mean": height, "bytes_total": cost} for name, (height, cost) in points.items()}
    best = [points[name] for name in front(rows)]
    assert len(set(best)) == len(best)
    for height, cost in points.values():
        beaten = any(h >= height and c <= cost and (h, c) != (height, cost) for h, c in best)
        assert beaten != ((height, cost) in best)


def test_what_is_trained_is_what_is_evaluated() -> None:
    """No tensor of one state stays behind in the model when another is judged."""
    for name, build in BUILD.items():
        method: Tuned = build(backbone())
        start = method.initial(SITES)
        before = method.evaluate(start, examples()).probabilities
        trained = method.train(start, SITES["one"], RECIPE, PLACE).state
        after = method.evaluate(trained, examples()).probabilities
        assert (after - before).abs().max() > 1e-5, name
        assert torch.equal(method.evaluate(start, examples()).probabilities, before), name
        method._tuning.load(trained)
        assert torch.equal(evaluate(method.task, examples()).probabilities, after), name
