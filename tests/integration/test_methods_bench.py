"""The comparison with other methods: its loop equals the product's, and each method follows its paper."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from flwr.app import Context, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cell_store import CellStore, recipe_digest
from bench.methods import cells, frozen, studies
from bench.methods.__main__ import collect
from bench.methods.__main__ import main as show
from bench.methods.catalogue import CANDIDATES, with_setting
from bench.methods.cells import Cell, Plan, _equal_images, grid
from bench.methods.federation import accuracy, federate
from bench.methods.figure import draw
from bench.methods.heads import FedClip, LinearProbe, PromptFL, TipAdapter, TipAdapterF
from bench.methods.method import Method, Turn, count_values
from bench.methods.sigma import Sigma
from bench.methods.studies import SETS, find_study
from bench.methods.tables import combine, front, markdown, verdicts
from bench.methods.weights import FullTuning, LayerNorms, Lora, LoraProducts
from bench.tune import validation_sites
from fedsigma.client.app import app as client
from fedsigma.common.backbones import Backbone, assemble, build_model, load_backbone, save_backbone
from fedsigma.common.backbones.tokenizer import load_tokenizer
from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.study import StudyConfig
from fedsigma.common.config.training import LocalTrainingConfig
from fedsigma.common.data.loading import Example
from fedsigma.common.data.sources.site_data import load_sites
from fedsigma.common.training.classifier import TrainingError
from fedsigma.common.training.loop import accumulate_gradient, evaluate
from fedsigma.server.app import app as server
from fedsigma.server.federation.aggregation import Aggregator
from fedsigma.server.runs.run_dir import RunDir
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.tiny_backbones import CLIP_CFG, PREPROCESS

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
RECIPE = LocalTrainingConfig(
    learning_rate=0.01, batch_size=4, augment="none", precision="float32", local_steps=3
)


@pytest.fixture(autouse=True, scope="module")
def _no_search_through_imports() -> Iterator[None]:
    """Flower's QFedAvg collects garbage for each reply: not through all that was imported each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@cache
def tiny_backbone() -> Backbone:
    """Tiny, with room in its context for sixteen learned tokens."""
    torch.manual_seed(0)
    cfg = copy.deepcopy(CLIP_CFG)
    cfg["text_cfg"]["context_length"] = 32
    model = build_model(cfg)
    return assemble("tiny", model, load_tokenizer(cfg, model, "", "tiny"), PREPROCESS, cfg)


def backbone() -> Backbone:
    """A copy of it, for a method to change."""
    return replace(tiny_backbone(), model=copy.deepcopy(tiny_backbone().model))


def examples(count: int = 6, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (count, 3, 32, 32), generator=generator).to(torch.uint8)
    return [Example(picture, number % len(CLASSES), None) for number, picture in enumerate(pictures)]


def parquet(path: Path, classes: tuple[str, ...] = CLASSES, *, sited: bool = True) -> Path:
    """Noise of four sites, or as many in one place: three training and two test images of each class."""
    rows: dict[str, list[Any]] = {"image": [], "label": [], "site": [], "split": []}
    noise = np.random.default_rng(0)
    combinations = itertools.product(("north", "east", "south", "west"), classes, ("train", "test"), range(3))
    for site, label, split, number in combinations:
        if split == "test" and number == 2:
            continue
        file = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(file, "PNG")
        row = {
            "image": {"bytes": file.getvalue(), "path": None},
            "label": label,
            "site": site if sited else None,
            "split": split,
        }
        for key, value in row.items():
            rows[key].append(value)
    pq.write_table(pa.table(rows), path)
    return path


SITES = {"one": examples(6, seed=1), "two": examples(4, seed=2)}
TURN = Turn(site="one", round=1, first_step=0, steps=3, total_steps=3, seed=5)
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
    where = save_backbone(backbone(), tmp_path / "backbone", source="tests")
    file = tmp_path / "study.yaml"
    images = parquet(tmp_path / "images.parquet")
    text = STUDY.format(backbone=where, images=images, codec=codec, strategy=strategy)
    file.write_text(text.replace("local_steps: 2", f"local_steps: 2{more}"))
    config: dict[str, Any] = {"study": str(file), "out": str(tmp_path / "out"), "resume": False}
    context = Context(1, 1, {}, RecordDict(), config | {"seed": -1, "rounds": 0})
    server(FakeGrid(client, 4), context)
    folder = RunDir.open(tmp_path / "out")

    study = StudyConfig.from_yaml(file.read_text())
    loaded = load_backbone(study.backbone)
    method = Sigma(loaded, study, codec)
    sites = load_sites(study, side=loaded.image_size * 3 // 2)
    run = federate(method, {name: data.train for name, data in sites.items()}, study)
    product_shift = folder.load_shift().shift
    assert product_shift.abs().max() > 0.01
    torch.testing.assert_close(run.state["shift"], product_shift, rtol=1e-4, atol=1e-6)
    accuracies = accuracy(method, run.state, {name: data.test for name, data in sites.items()})
    assert accuracies["all"] == pytest.approx(folder.read_summary()["federated"]["accuracy"])


# --- every method ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILD)
def test_a_method_learns_the_same_thing_each_time_and_keeps_its_names_and_shapes(name: str) -> None:
    method: Method = BUILD[name](backbone())
    start = method.initial(SITES)
    before = {key: tensor.clone() for key, tensor in start.items()}
    recipe = replace(RECIPE, schedule="constant")
    state, loss = method.train(start, SITES["one"], recipe, TURN)
    longer_state, longer_loss = method.train(
        start, SITES["one"], recipe, replace(TURN, steps=12, total_steps=12)
    )
    repeated_state, repeated_loss = method.train(start, SITES["one"], recipe, TURN)
    assert longer_loss < loss == repeated_loss
    for key, tensor in before.items():
        assert torch.equal(start[key], tensor), "the state that went in must stay"
        assert torch.equal(state[key], repeated_state[key])
    assert any(not torch.equal(state[key], before[key]) for key in before)
    together = method.aggregate(start, [state, longer_state], [1, 3], mean)
    assert {k: v.shape for k, v in together.items()} == {k: v.shape for k, v in start.items()}
    assert method.upload(start, state, TURN)[1] == method.bytes_up(start) == 4 * count_values(start)


@pytest.mark.parametrize("name", ["full", "layer-norms", "lora", "lora-products", "probe"])
def test_before_training_a_method_is_zero_shot(name: str) -> None:
    method = BUILD[name](backbone())
    method._load(method.initial(SITES))
    predictions = evaluate(method.task, examples(), precision="float32")
    torch.testing.assert_close(predictions.probabilities, zero_shot(backbone()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "fedclip", "promptfl", "full"])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(name: str) -> None:
    method = BUILD[name](backbone())
    state, _ = method.train(method.initial(SITES), SITES["one"], RECIPE, TURN)
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
    turn = replace(TURN, steps=2, total_steps=2)
    trained, _ = tuned.train(tuned.initial(SITES), SITES["two"], RECIPE, turn)
    model = plain.model.requires_grad_(True)
    parameters = {name: p for name, p in model.named_parameters() if name != "logit_scale"}
    optimiser = torch.optim.AdamW(parameters.values(), weight_decay=0.0)
    tokens = plain.tokenizer(list(PROMPTS))
    pixels = torch.stack([e.image for e in SITES["two"]]).float() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (plain.mean, plain.std))
    labels = torch.tensor([e.label for e in SITES["two"]])
    for step in range(2):
        optimiser.param_groups[0]["lr"] = RECIPE.learning_rate_at(step, 2)
        optimiser.zero_grad()
        image = F.normalize(model.encode_image((pixels - mean) / std), dim=-1)
        text = F.normalize(model.encode_text(tokens), dim=-1)
        F.cross_entropy(plain.logit_scale * image @ text.T, labels).backward()
        optimiser.step()
    assert set(trained) == set(parameters)
    # Adam's first steps have the sign of a gradient: where that is rounding alone, they may differ.
    differences = torch.cat([(trained[n] - p.detach()).abs().flatten() for n, p in parameters.items()])
    assert (differences > 1e-4).float().mean() < 0.01


def test_layer_norms_are_all_layer_norms_and_nothing_else() -> None:
    model = backbone()
    norms = [m for m in model.model.modules() if isinstance(m, nn.LayerNorm)]
    method = LayerNorms(model, PROMPTS)
    assert count_values(method.initial(SITES)) == sum(2 * m.normalized_shape[0] for m in norms)


# --- low rank --------------------------------------------------------------------------------------------


def test_lora_has_a_pair_for_each_of_q_k_and_v() -> None:
    state = Lora(backbone(), PROMPTS, seed=1).initial(SITES)
    # Two layers a tower of widths 32 and 16, each with q, k and v: A and B of rank 2.
    assert count_values(state) == 2 * 3 * 2 * (32 + 32) + 2 * 3 * 2 * (16 + 16)
    other = Lora(backbone(), PROMPTS, seed=1).initial(SITES)
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_lora_adds_its_products_to_q_k_and_v_over_the_root_of_the_rank() -> None:
    method, plain = Lora(backbone(), PROMPTS, seed=1), backbone()
    state = rank_two(method, 3)
    method._tuning.load(state)
    name = "transformer.resblocks.1.attn.in_proj_weight"
    before = dict(plain.model.named_parameters())[name]
    with method._tuning.inference_mode() as model:
        after = model.get_submodule("transformer.resblocks.1.attn").in_proj_weight
    keys = [f"{name}[{low}:{low + 16}]" for low in (0, 16, 32)]
    products = [state[f"{key}.B"] @ state[f"{key}.A"] / 2**0.5 for key in keys]
    torch.testing.assert_close(after, before + torch.cat(products))


def rank_two(method: Lora, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator) for n, t in method.initial(SITES).items()}


PRODUCTS = LoraProducts(backbone(), PROMPTS, seed=1)


@given(st.integers(0, 2**31))
@settings(max_examples=25)
def test_the_mean_of_equal_products_is_that_product_whatever_its_factors(seed: int) -> None:
    state = rank_two(PRODUCTS, seed)
    # The same product by other factors: A and B scaled against each other.
    other = {n: (3 * t if n.endswith(".A") else t / 3) for n, t in state.items()}
    factors = PRODUCTS.aggregate(state, [state, other], [1, 2], mean)
    for name in (n[:-2] for n in state if n.endswith(".A")):
        product = factors[f"{name}.B"] @ factors[f"{name}.A"]
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
    assert count_values(method.initial(SITES)) == 16 * 16
    table = method.task.backbone.model.token_embedding.weight
    word = int(method.task.backbone.tokenizer(["x"])[0, 1])
    prompts = [" ".join(["x"] * 16 + [name]) + "." for name in CLASSES]
    plain = backbone()
    with torch.no_grad():
        expected = F.normalize(plain.model.encode_text(plain.tokenizer(prompts)), dim=-1)
    method._tuning.load({"context": table[word].expand(16, -1).clone()})
    with method._tuning.inference_mode():
        torch.testing.assert_close(method.task.text_features(), expected, rtol=1e-4, atol=1e-5)
    method._tuning.load({"context": torch.randn(16, 16)})
    with method._tuning.inference_mode():
        assert (method.task.text_features() - expected).abs().max() > 0.01


def test_a_name_that_does_not_fit_behind_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit behind 16 words"):
        PromptFL(backbone(), (*CLASSES, " ".join(["cell"] * 20)), seed=1)


def test_the_adapter_weighs_features_by_two_layers_of_their_width() -> None:
    method = FedClip(backbone(), PROMPTS, seed=1)
    state = method.initial(SITES)
    assert count_values(state) == 2 * (16 * 16 + 16)
    method._load(state)
    plain = backbone()
    images = torch.stack([e.image for e in examples()])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (plain.mean, plain.std))
    with torch.no_grad():
        # The weights are made of what the tower gives, before it is brought to length one.
        x = plain.model.encode_image((images.float() / 255 - mean) / std)
        hidden = torch.tanh(x @ state["first.weight"].T + state["first.bias"])
        weights = (hidden @ state["second.weight"].T + state["second.bias"]).softmax(1)
    with method._tuning.inference_mode():
        features = method.task.image_features(images)
    torch.testing.assert_close(features, F.normalize(weights * x, dim=-1), rtol=1e-4, atol=1e-6)


def test_a_frozen_towers_features_of_a_batch_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "_features", frozen.OrderedDict())
    images = torch.stack([e.image for e in examples()])
    for digest, passes in (("a", 2), ("", 4)):
        calls = 0
        for _ in range(2):
            model = replace(backbone(), digest=digest)
            task = LinearProbe(model, PROMPTS).task
            encode = model.model.encode_image

            def counted(x: Tensor, encode: Any = encode) -> Tensor:
                nonlocal calls
                calls += 1
                return encode(x)

            monkeypatch.setattr(model.model, "encode_image", counted)
            both = [task.image_features(images), task.image_features(images.flip(0))]
            torch.testing.assert_close(both[0], both[1].flip(0))
        assert calls == passes
    assert len(frozen._features) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        LinearProbe(replace(backbone(), digest="a"), PROMPTS).task.image_features(images)
    assert len(frozen._features) == 3


def test_a_joined_cache_recognises_its_images_and_its_bytes_are_counted() -> None:
    method = TipAdapter(backbone(), PROMPTS, alpha=1000.0, beta=1000.0)
    state = method.initial(SITES)
    both = SITES["one"] + SITES["two"]
    assert state["keys"].shape == (10, 16)
    method._load(state)
    predictions = evaluate(method.task, both, precision="float32")
    assert torch.equal(predictions.probabilities.argmax(1), torch.tensor([e.label for e in both]))
    study = StudyConfig.from_yaml(
        STUDY.format(backbone="nowhere", images="nowhere", codec="exact", strategy="fedavg")
    )
    # Once 16 float32 and a label an image; six images at one site, four at the other; nothing afterwards.
    run = federate(method, SITES, study)
    assert (run.upload, run.total) == (0, 4 * 17 * 5)
    run = federate(TipAdapterF(backbone(), PROMPTS, alpha=1.0, beta=1.0), SITES, study)
    assert (run.upload, run.total) == (4 * 160, 4 * 17 * 5 + 3 * 4 * 160)


def test_a_cache_follows_the_papers_formula() -> None:
    method, plain = TipAdapter(backbone(), PROMPTS, alpha=2.0, beta=3.0), backbone()
    method._load(method.initial(SITES))
    probabilities = evaluate(method.task, examples(), precision="float32").probabilities
    cached = SITES["one"] + SITES["two"]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (plain.mean, plain.std))

    def encoded(of: list[Example]) -> Tensor:
        pixels = torch.stack([e.image for e in of]).float() / 255
        return F.normalize(plain.model.encode_image((pixels - mean) / std), dim=-1)

    with torch.no_grad():
        text = F.normalize(plain.model.encode_text(plain.tokenizer(list(PROMPTS))), dim=-1)
        f, keys = encoded(examples()), encoded(cached)
        values = F.one_hot(torch.tensor([e.label for e in cached])).float()
        logits = plain.logit_scale * f @ text.T + 2.0 * torch.exp(-3.0 * (1 - f @ keys.T)) @ values
    torch.testing.assert_close(probabilities, logits.softmax(1), rtol=2e-2, atol=1e-3)


def test_without_a_cache_tip_adapter_is_zero_shot() -> None:
    method = TipAdapter(backbone(), PROMPTS, alpha=0.0, beta=1.0)
    method.initial(SITES)
    with pytest.raises(ValueError, match="expected \\['keys'\\]"):
        method.evaluate({"shift": torch.zeros(3)}, examples())
    predictions = evaluate(method.task, examples(), precision="float32")
    torch.testing.assert_close(predictions.probabilities, zero_shot(backbone()), rtol=1e-3, atol=1e-5)


# --- the search, the stored cells and the tables ---------------------------------------------------------


BARE = StudyConfig.from_yaml("{name: s, backbone: b, classes: [a, b], training: {learning_rate: 0.04}}")


class Scripted(Plan):
    """A plan whose runs give a made-up accuracy: best at a learning rate of 0.1; 0.2 and more diverge."""

    ran: list[Cell]

    def _study(self, cell: Cell) -> StudyConfig:
        return with_setting(BARE, CANDIDATES[cell.method], cell.setting)

    def _run(self, cell: Cell, study: StudyConfig) -> dict[str, dict[str, Any]]:
        self.ran.append(cell)
        rate = cell.setting.get("learning_rate", 0.1)
        if rate > 0.2:
            raise TrainingError("the loss is nan")
        figures = {"bytes_upload": 8.0, "bytes_float32": 8, "bytes_total": 16.0, "seconds": 1.0}
        parts = (cell.part,) if CANDIDATES[cell.method].quick else ("validation", "test")
        return {part: {"accuracy": {"all": 1 - abs(rate - 0.1), "here": 0.5}, **figures} for part in parts}

    def finished(self) -> list[tuple[str, str, float | None, int]]:
        """Part, study, learning rate and seed of what was run."""
        return [(c.part, c.study, c.setting.get("learning_rate"), c.seed) for c in self.ran]


def plan(path: Path, **options: Any) -> Scripted:
    scripted = Scripted(CellStore(path / "cells.jsonl"), rounds=4, **options)
    scripted.ran = []
    return scripted


def test_the_search_extends_beyond_a_best_end_and_no_cell_is_run_twice(tmp_path: Path) -> None:
    first = plan(tmp_path)
    assert first.tested("s", "probe", 1) is not None
    # The last diverged, so the search ends.
    trials = [("validation", "s", rate, 11) for rate in (0.003, 0.009, 0.027, 0.081, 0.243)]
    assert first.finished() == [*trials, ("test", "s", 0.081, 1)]
    second = plan(tmp_path)
    assert second.tested("s", "probe", 1) == first.tested("s", "probe", 1) and second.ran == []
    third = plan(tmp_path, run_missing=False)
    assert third.tested("s", "lora", 1) is None and third.search("s", "lora") is None and third.ran == []


def test_a_trained_tower_is_searched_by_the_runs_of_the_first_seed(tmp_path: Path) -> None:
    first = plan(tmp_path, max_rates=3)
    assert first.tested("s", "lora", 1) is not None and first.tested("s", "lora", 2) is not None
    trials = [("validation", "s", rate, 1) for rate in (0.001, 0.003, 0.009)]
    assert first.finished() == [*trials, ("test", "s", 0.009, 2)]
    shown = plan(tmp_path, run_missing=False)
    assert shown.search("s", "lora") == first.search("s", "lora"), "the fourth rate was not run"
    # Averaged products start from the factors' rate; with one setting nothing is searched.
    second = plan(tmp_path, max_rates=3)
    second.tested("s", "lora-products", 1)
    assert second.finished() == [("test", "s", 0.009, 1)]


def test_a_search_in_another_study_serves_for_rates_and_not_for_caches(tmp_path: Path) -> None:
    scripted = plan(tmp_path, search_study="other")
    scripted.tested("s", "lora", 1)
    scripted.tested("s", "tip", 1)
    studies = {(CANDIDATES[c.method].quick, c.part, c.study) for c in scripted.ran}
    assert studies == {
        (False, "validation", "other"),
        (False, "test", "s"),
        (True, "validation", "s"),
        (True, "test", "s"),
    }


def test_selected_setting_that_diverges_on_the_test_split_is_an_error(tmp_path: Path) -> None:
    class Diverges(Scripted):
        def _run(self, cell: Cell, study: StudyConfig) -> dict[str, dict[str, Any]]:
            if cell.part == "test":
                raise TrainingError("the loss is nan")
            return super()._run(cell, study)

    scripted = Diverges(CellStore(tmp_path / "cells.jsonl"), rounds=4)
    scripted.ran = []
    with pytest.raises(TrainingError):
        scripted.tested("s", "probe", 1)


def test_a_run_is_evaluated_on_images_that_the_draw_left_over_and_on_the_test_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = parquet(tmp_path / "images.parquet")
    study = StudyConfig.from_yaml(
        STUDY.format(backbone="nowhere", images=images, codec="exact", strategy="fedavg")
    )
    monkeypatch.setattr(cells, "find_study", lambda name: study)
    monkeypatch.setattr(cells, "load_backbone", lambda name: backbone())
    built = Plan(CellStore(tmp_path / "cells.jsonl"), rounds=1)
    rate = {"learning_rate": 0.003}
    cell = Cell(part="validation", study="s", method="layer-norms", setting=rate, rounds=1, seed=1)
    judged = built._run(cell, study)
    assert list(judged) == ["validation", "test"]
    held = {part: built._images(replace(cell, part=part), study, 48) for part in judged}
    train, left = held["validation"]["north"]
    assert len(train) == 8 and len(left) == 4
    assert not any(torch.equal(a.image, b.image) for a in left for b in train)
    assert not any(torch.equal(a.image, b.image) for a in left for b in held["test"]["north"][1])
    assert list(built._run(replace(cell, method="probe"), study)) == ["validation"]
    built._sites["s", 1, "test"] = {**held["test"], "north": (train[1:] + train[:1], left)}
    with pytest.raises(RuntimeError, match="other training images"):
        built._run(cell, study)


def test_a_set_of_one_place_is_divided_into_four_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIGMA_DATA", str(tmp_path))
    monkeypatch.setattr(studies, "ALPHA", 100.0)  # Nearly even, for there are few images.
    parquet(tmp_path / "chest_xray.parquet", SETS["chest_xray"], sited=False)
    study = find_study("chest_xray")
    assert study.classes == SETS["chest_xray"] and study.federation.rounds == 60
    sites = load_sites(study, side=32)
    assert len(sites) == 4
    assert sum(len(data.train) for data in sites.values()) == 4 * 2 * 3
    assert sum(len(data.test) for data in sites.values()) == 4 * 2 * 2
    # Its validation images are left over at the same sites, so one model is evaluated on both parts.
    held = validation_sites(study, 32, 1)
    for name, (train, left) in held.items():
        assert _equal_images({name: train}, {name: sites[name].train})
        assert not any(torch.equal(a.image, b.image) for a in left for b in sites[name].test)


def test_every_candidates_settings_are_valid_for_its_study() -> None:
    study = StudyConfig.from_yaml(
        STUDY.format(backbone="nowhere", images="nowhere", codec="exact", strategy="fedavg")
    )
    for candidate in CANDIDATES.values():
        assert not candidate.after or candidate.after in CANDIDATES
        for setting in grid(candidate, {}, list(candidate.rates)):
            changed = with_setting(study, candidate, setting)
            Aggregator(changed)
            assert changed.training.learning_rate == setting.get("learning_rate", 0.05)
            lowest = study.training.final_learning_rate / study.training.learning_rate
            assert changed.training.learning_rate_at(99, 99) == pytest.approx(
                changed.training.learning_rate * lowest
            )
    with pytest.raises(ConfigError, match="not an option"):
        Aggregator(with_setting(study, CANDIDATES["fedadam"], {"options": {"etta": 1}}))


def test_finished_cells_are_shown_without_running_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"accuracy": {"all": 0.5, "here": 0.5}, "bytes_upload": 0, "bytes_float32": 0, "bytes_total": 0}
    fields = {"part": "test", "method": "zero-shot", "setting": {}, "rounds": 60, "seed": 2}
    cell = Cell(study="white-cells-four-labs", **fields)
    store = CellStore(tmp_path / "cells.jsonl")
    store.save(cell, figures, recipe_digest(Plan(store, rounds=60)._study(cell)))
    store.save(replace(cell, seed=3), figures, "of another recipe")
    written_file = tmp_path / "figures.json"
    arguments = ["methods", "--data", str(tmp_path), "--out", str(tmp_path), "--json", str(written_file)]
    monkeypatch.setattr("sys.argv", [*arguments, "--show"])
    monkeypatch.setenv("FEDSIGMA_DATA", "")
    show()
    assert "| zero-shot | 50.0 | 50.0 | 0 | 0 | 0 | yes |" in capsys.readouterr().out
    written = json.loads(written_file.read_text())
    assert written["white-cells-four-labs"]["rows"]["zero-shot"]["seeds"] == {"2": 0.5}
    assert written["dermoscopy-four-sites"]["rows"] == {}


class Listed:
    """Results by method and seed, in place of a plan that runs."""

    def __init__(self, **accuracies: dict[int, float]) -> None:
        self._accuracies = accuracies

    def tested(self, study: str, method: str, seed: int) -> dict[str, Any] | None:
        if seed not in self._accuracies[method]:
            return None
        no_bytes = dict.fromkeys(("bytes_upload", "bytes_float32", "bytes_total"), 0.0)
        by_site = {} if seed == 2 else {"here": 0.5}  # a partition may leave a site without a test image
        return {"accuracy": {"all": self._accuracies[method][seed], **by_site}, **no_bytes}


def test_rows_are_compared_over_the_seeds_that_all_have(capsys: pytest.CaptureFixture[str]) -> None:
    listed: Any = Listed(sigma={1: 0.9, 2: 0.5, 3: 0.4}, full={2: 0.6, 3: 0.6})
    rows = collect(listed, "s", ["sigma", "full"], [1, 2, 3])
    assert rows["sigma"]["mean"] == pytest.approx(0.45) and rows["full"]["mean"] == pytest.approx(0.6)
    assert rows["sigma"]["per_site"] == {"here": 0.5}
    assert "seeds [1] of sigma are left out" in capsys.readouterr().out
    disjoint: Any = Listed(sigma={1: 0.9}, full={2: 0.6})
    with pytest.raises(SystemExit, match="no seed has been run with all methods"):
        collect(disjoint, "s", ["sigma", "full"], [1, 2])


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
    assert "is on the front" in line and "0.4 points below" in line and line.endswith("the aim is met")
    (line,) = verdicts("s", {**rows, "full": row(0.8, 5000)})
    assert line.endswith("the aim is not met")
    (line,) = verdicts("s", {**rows, "full": row(0.704, 400)})
    assert line.endswith("the aim is not met")
    (line,) = verdicts("s", {**rows, "probe": row(0.71, 40)})
    assert "not on the front" in line and line.endswith("the aim is not met")
    # Above all others: whatever they send. Sigma's own other rows are no others.
    (line,) = verdicts("s", {**rows, "full": row(0.69, 51), "fedprox": row(0.9, 50)})
    assert "not on the front" in line and "1.0 points above" in line
    (line,) = verdicts("s", {**rows, "full": row(0.69, 51)})
    assert line.endswith("the aim is met")
    assert "| full fine-tuning | 70.4 | 70.4 | 5,000 | 5,000 | 5,000 | yes |" in markdown("s", rows)
    draw(
        {"s": rows, "none is better": {"zero-shot": row(0.9, 0), "full": row(0.4, 9)}}, tmp_path / "front.png"
    )
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9)), min_size=1))
def test_no_method_on_the_front_is_beaten_and_all_others_are(points: list[tuple[float, int]]) -> None:
    rows = {str(i): {"mean": height, "bytes_total": cost} for i, (height, cost) in enumerate(points)}
    best = [points[int(name)] for name in front(rows)]
    for height, cost in points:
        beaten = any(h >= height and c <= cost and (h, c) != (height, cost) for h, c in best)
        assert beaten != ((height, cost) in best)


def test_what_is_trained_is_what_is_evaluated() -> None:
    """No tensor of one state stays behind in the model when another is evaluated."""
    for name, build in BUILD.items():
        method: Method = build(backbone())
        start = method.initial(SITES)
        before = method.evaluate(start, examples()).probabilities
        trained, _ = method.train(start, SITES["one"], RECIPE, TURN)
        after = method.evaluate(trained, examples()).probabilities
        assert (after - before).abs().max() > 1e-5, name
        assert torch.equal(method.evaluate(start, examples()).probabilities, before), name
        method._tuning.load(trained)
        assert torch.equal(evaluate(method.task, examples()).probabilities, after), name
