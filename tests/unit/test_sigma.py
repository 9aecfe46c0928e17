"""The method: layouts, exactness at zero, gradients, merging."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from torch.nn import functional as F

from fedsigma.common.config.schema import ConfigError
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.sigma import Basis, Layout, LayoutError, SigmaModel, find_layout
from fedsigma.common.sigma.autograd import Block, DenseShift, FactoredLinear, PerSampleLinear
from fedsigma.common.sigma.parametrization import SigmaParametrization
from tests.helpers.tiny import outputs, pictures, timm_clip, tiny_clip, words


def adapted(tmp_path: Path, seed: int = 0, **selection: object) -> SigmaModel:
    return SigmaModel.adapt(tiny_clip(seed), SigmaConfig(**selection), cache_dir=tmp_path)


def shifted(model: SigmaModel, size: float = 0.1) -> torch.Tensor:
    shift = size * torch.randn(model.layout.size, generator=torch.Generator().manual_seed(7))
    model.set_shift(shift)
    return shift


# counts ---------------------------------------------------------------------------------------------


def meta_clip(image: dict[str, object], text: dict[str, object]) -> torch.nn.Module:
    with torch.device("meta"):
        return CLIP(embed_dim=512, vision_cfg=CLIPVisionCfg(**image), text_cfg=CLIPTextCfg(**text))


def test_clip_vit_b_16_has_92160_values() -> None:
    model = meta_clip({"layers": 12, "width": 768, "patch_size": 16}, {})
    assert find_layout(model).size == 12 * 6 * 768 + 12 * 6 * 512 == 92_160
    assert sum(p.numel() for p in model.parameters()) == 149_620_737


def test_biomedclip_shape_has_110592_values(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="BiomedCLIP needs the extra 'biomedclip'")
    transformers.BertConfig(num_hidden_layers=12, hidden_size=768, vocab_size=50).save_pretrained(tmp_path)
    vision = CLIPVisionCfg(timm_model_name="vit_base_patch16_224", timm_pool="", timm_proj="linear")
    text = CLIPTextCfg(
        hf_model_name=str(tmp_path),
        hf_model_pretrained=False,
        hf_proj_type="mlp",
        hf_pooler_type="cls_last_hidden_state_pooler",
    )
    model = CustomTextCLIP(embed_dim=512, vision_cfg=vision, text_cfg=text)
    layout = find_layout(model)
    assert layout.size == 110_592
    assert {e.tower: sum(f.size for f in layout.entries if f.tower == e.tower) for e in layout.entries} == {
        "image": 55_296,
        "text": 55_296,
    }


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("ViT-B-16-SigLIP", {"image": 72, "text": 72}),
        ("EVA02-B-16", {"image": 84, "text": 72}),
        ("MobileCLIP-S1", {"image": 16, "text": 72}),
        ("RN50", {"image": 4, "text": 72}),
    ],
)
def test_families_of_open_clip(name: str, parts: dict[str, int]) -> None:
    import open_clip

    config = open_clip.get_model_config(name)
    config["text_cfg"].pop("hf_tokenizer_name", None)
    kind = (
        CustomTextCLIP
        if config.pop("custom_text", False) or "timm_model_name" in config["vision_cfg"]
        else CLIP
    )
    for unused in ("init_logit_scale", "init_logit_bias"):
        config.pop(unused, None)
    with torch.device("meta"):
        model = kind(**config)
    layout = find_layout(model)
    found = {tower: sum(e.tower == tower for e in layout.entries) for tower in ("image", "text")}
    assert found == parts
    for entry in layout.entries:
        weight = model.get_parameter(entry.weight)
        assert entry.rows[1] <= weight.shape[0]
        assert entry.size == min(entry.rows[1] - entry.rows[0], weight.shape[1])


def test_xcit_blocks_and_class_attention_are_layers() -> None:
    with torch.device("meta"):
        layout = find_layout(timm_clip("xcit_nano_12_p16_224"), SigmaConfig(towers=("image",)))
    assert len(layout.entries) == (12 + 2) * 6
    assert [e.part for e in layout.entries if e.layer == 13] == ["q", "k", "v", "o", "mlp", "mlp"]
    assert layout.size == 14 * 6 * 128


def test_packed_thirds_are_q_k_v() -> None:
    layout = find_layout(tiny_clip(), SigmaConfig(towers=("image",), parts=("q", "k", "v")))
    first = layout.entries[:3]
    assert [(e.part, e.rows) for e in first] == [("q", (0, 48)), ("k", (48, 96)), ("v", (96, 144))]


# selection ------------------------------------------------------------------------------------------


@given(st.integers(1, 40))
def test_thirds_divide_a_tower(depth: int) -> None:
    for layer in range(depth):
        hits = [
            third for third in ("bottom", "middle", "top") if SigmaConfig(layers=third).picks(layer, depth)
        ]
        assert len(hits) == 1


def test_selection_limits_the_layout() -> None:
    model = tiny_clip()
    whole = find_layout(model)
    text = find_layout(model, SigmaConfig(towers=("text",), layers=(0, 2), parts=("o",)))
    assert [(e.tower, e.layer, e.part) for e in text.entries] == [("text", 0, "o"), ("text", 2, "o")]
    assert text.size < whole.size and text.digest != whole.digest


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"towers": ("image", "sound")}, "sigma.towers is 'sound', which is not known"),
        ({"parts": ()}, "sigma.parts is empty"),
        ({"parts": ("q", "q")}, "twice"),
        ({"layers": "upper"}, "sigma.layers is 'upper', which is not known"),
        ({"layers": (-1,)}, "layer numbers from 0"),
        ({"layers": (1, 1)}, "different layer numbers"),
    ],
)
def test_bad_selection_says_what_to_do(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SigmaConfig(**wrong)


def test_layer_beyond_the_model_is_refused() -> None:
    with pytest.raises(LayoutError, match="layer 9 is selected, but the deepest tower has 3 layers"):
        find_layout(tiny_clip(), SigmaConfig(layers=(9,)))


def test_model_of_no_family_is_refused() -> None:
    with pytest.raises(LayoutError, match="no layer of a supported type"):
        find_layout(torch.nn.Linear(2, 2))


def test_layout_round_trip_and_gap() -> None:
    layout = find_layout(tiny_clip())
    assert Layout.from_json(layout.to_json()) == layout
    with pytest.raises(LayoutError, match="expected"):
        Layout(layout.entries[1:])
    with pytest.raises(LayoutError, match="not a layout"):
        Layout.from_json('[{"weight": 1}]')


# exactness ------------------------------------------------------------------------------------------


def test_zero_shift_changes_no_bit(tmp_path: Path) -> None:
    model = tiny_clip()
    with torch.no_grad():
        before = outputs(model)
    sigma = SigmaModel.adapt(model, cache_dir=tmp_path)
    with torch.no_grad():
        after = outputs(model)
    with sigma.inference_mode():
        frozen = outputs(model)
    for a, b, c in zip(before, after, frozen, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_zero_shift_changes_no_bit_under_autocast(tmp_path: Path) -> None:
    model = tiny_clip()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = outputs(model)
        SigmaModel.adapt(model, cache_dir=tmp_path)
        after = outputs(model)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_shift_is_added_to_the_singular_values(tmp_path: Path) -> None:
    model = tiny_clip()
    weight = model.visual.transformer.resblocks[1].mlp.c_fc.weight.clone()
    sigma = SigmaModel.adapt(model, cache_dir=tmp_path)
    shift = shifted(sigma)
    (entry,) = [
        e for e in sigma.layout.entries if e.weight.endswith("visual.transformer.resblocks.1.mlp.c_fc.weight")
    ]
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    want = u @ torch.diag(s + shift[entry.offset : entry.offset + entry.size].double()) @ vh
    have = model.visual.transformer.resblocks[1].mlp.c_fc.weight
    torch.testing.assert_close(have.double(), want, atol=1e-6, rtol=1e-6)


def test_gradient_equals_that_of_the_explicit_form(tmp_path: Path) -> None:
    model = tiny_clip().double()
    basis = Basis.compute(model, find_layout(model))
    plain = {e.weight: model.get_parameter(e.weight).clone() for e in basis.layout.entries}
    sigma = SigmaModel(model, basis)
    sigma.shift.data = 0.1 * torch.randn(sigma.layout.size, dtype=torch.float64)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.startswith(("u", "s", "vh")):
                setattr(module, name, buffer.double())
    tokens, images = words(), pictures().double()

    def loss() -> torch.Tensor:
        return (
            model.encode_image(images).sum(1).sin().sum() + model.encode_text(tokens).cos().sum()
        ).square()

    (gradient,) = torch.autograd.grad(loss(), sigma.shift)
    with sigma.accumulate_gradients():
        loss().backward()

    other, shift = tiny_clip().double(), sigma.shift.detach().clone().requires_grad_()
    weights = {}
    for name, weight in plain.items():
        blocks = []
        for entry, svd in zip(basis.layout.entries, basis.svds, strict=True):
            if entry.weight == name:
                d = shift[entry.offset : entry.offset + entry.size]
                update = svd.u.double() @ torch.diag(d) @ svd.vh.double()
                blocks.append(weight[slice(*entry.rows)] + update)
        weights[name] = torch.cat(blocks)

    def call(method: str, argument: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(
            Method(other, method), {f"model.{k}": v for k, v in weights.items()}, argument
        )

    explicit = (
        call("encode_image", images).sum(1).sin().sum() + call("encode_text", tokens).cos().sum()
    ).square()
    (want,) = torch.autograd.grad(explicit, shift)
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(gradient, want, atol=1e-9, rtol=1e-8)
    # The mlp is factored there, and W0 is U diag(s0) V^T only to the basis's float32.
    torch.testing.assert_close(sigma.shift.grad, want, atol=1e-5 * float(want.abs().max()), rtol=1e-5)


def test_accumulating_over_parts_gives_the_gradient_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sigma = SigmaModel.adapt(tiny_clip(), cache_dir=tmp_path)
    shifted(sigma)
    images, tokens = torch.cat([pictures(), pictures().flip(0)]), words()
    loss = sigma.model.encode_image(images).cos().sum() + sigma.model.encode_text(tokens).sin().sum()
    (want,) = torch.autograd.grad(loss, sigma.shift)

    built = []
    adapted = SigmaParametrization._adapted
    monkeypatch.setattr(
        SigmaParametrization, "_adapted", lambda self, weight: built.append(self) or adapted(self, weight)
    )
    sigma.shift.grad = torch.ones_like(sigma.shift)
    with sigma.accumulate_gradients() as model:
        for part in images.split(1):
            model.encode_image(part).cos().sum().backward()
        model.encode_text(tokens).sin().sum().backward()
    torch.testing.assert_close(sigma.shift.grad - 1, want, atol=1e-5, rtol=1e-4)
    dense = {entry.weight for entry in sigma.layout.entries if entry.part != "mlp"}
    dense.add("transformer.resblocks.0.mlp.c_fc.weight")  # open_clip asks it for its dtype
    assert sorted(p.entries[0].weight for p in built) == sorted(dense)
    assert torch.equal(sigma.model.encode_image(images), sigma.model.encode_image(images))
    assert len(built) > len(set(built))  # outside of the block, anew at each use


def test_accumulating_leaves_the_gradient_alone_if_it_fails(tmp_path: Path) -> None:
    sigma = SigmaModel.adapt(tiny_clip(), cache_dir=tmp_path)
    with pytest.raises(ZeroDivisionError), sigma.accumulate_gradients() as model:
        model.encode_image(pictures()).sum().backward()
        _ = 1 / 0
    assert sigma.shift.grad is None
    before = outputs(sigma.model)
    shifted(sigma)  # and nothing computed in the block is used again
    assert not torch.equal(before[0], outputs(sigma.model)[0])


@pytest.mark.parametrize(
    ("selection", "factored"),
    [(SigmaConfig(), True), (SigmaConfig(parts=("q",)), False), (SigmaConfig(parts=("o",)), False)],
)
def test_accumulating_computes_what_the_model_does(
    selection: SigmaConfig, factored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a part of a packed weight alone is adapted, which has the shape of an mlp's."""
    sigma = SigmaModel.adapt(timm_clip(), selection, cache_dir=tmp_path)
    shifted(sigma)
    calls = []
    linear = SigmaParametrization._linear
    monkeypatch.setattr(
        SigmaParametrization, "_linear", lambda self, *a: calls.append(self) or linear(self, *a)
    )
    want = sigma.model.encode_image(pictures())
    assert not calls
    with sigma.accumulate_gradients() as model:
        torch.testing.assert_close(model.encode_image(pictures()), want, atol=1e-5, rtol=1e-4)
    assert bool(calls) == factored
    assert torch.equal(sigma.model.encode_image(pictures()), want)


class Method(torch.nn.Module):
    """Calls a named method of a model, for `functional_call`."""

    def __init__(self, model: torch.nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, argument: torch.Tensor) -> torch.Tensor:
        return getattr(self.model, self.method)(argument)


@pytest.mark.parametrize("build", [tiny_clip, timm_clip, partial(timm_clip, "xcit_nano_12_p16_224")])
def test_merged_model_agrees_and_is_plain_open_clip(build: object, tmp_path: Path) -> None:
    model, fresh = build(), build(seed=1)
    names = set(model.state_dict())
    sigma = SigmaModel.adapt(model, cache_dir=tmp_path)
    with torch.no_grad():
        untouched = outputs(model)
        shifted(sigma)
        before = outputs(model)
    merged = sigma.merge()
    assert set(merged.state_dict()) == names
    fresh.load_state_dict(merged.state_dict(), strict=True)
    with torch.no_grad():
        after = outputs(fresh)
    for a, b, c in zip(before, after, untouched, strict=True):
        assert (a - b).abs().max() < 1e-5
        assert (a - c).abs().max() > 1e-3


def test_detach_gives_the_pretrained_weights_back(tmp_path: Path) -> None:
    model = tiny_clip()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sigma = SigmaModel.adapt(model, cache_dir=tmp_path)
    shifted(sigma)
    assert all(torch.equal(v, before[k]) for k, v in sigma.unload().state_dict().items())


def test_only_the_shift_is_trainable(tmp_path: Path) -> None:
    sigma = adapted(tmp_path)
    assert not [p for p in sigma.model.parameters() if p.requires_grad]
    assert [name for name, p in sigma.named_parameters() if p.requires_grad] == ["shift"]
    assert next(sigma.parameters()) is sigma.shift
    sigma.model.encode_image(pictures()).sum().backward()
    assert all(p.grad is None for p in sigma.model.parameters())
    assert sigma.shift.grad is not None and sigma.shift.grad.abs().sum() > 0


def test_any_trainer_takes_an_adapted_model(tmp_path: Path) -> None:
    sigma = adapted(tmp_path)
    assert not sigma.training and sigma.train().model.training and not sigma.eval().model.training
    weights = {name: value.clone() for name, value in sigma.state_dict().items()}
    optimiser = torch.optim.AdamW(sigma.parameters(), lr=0.1)
    sigma(pictures(), words())[0].sum().backward()
    optimiser.step()
    moved = [name for name, value in sigma.state_dict().items() if not torch.equal(value, weights[name])]
    assert moved == ["shift"]
    before = outputs(sigma.model)
    other = adapted(tmp_path)
    other.load_state_dict(sigma.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(other.model), strict=True))


def test_mean_of_shifts_is_the_mean_of_models(tmp_path: Path) -> None:
    sigma = adapted(tmp_path)
    first, second = shifted(sigma), -0.3 * shifted(sigma).flip(0)

    def weights(shift: torch.Tensor) -> dict[str, torch.Tensor]:
        sigma.set_shift(shift)
        return {
            e.weight: sigma.model.get_submodule(e.weight.rpartition(".")[0]) for e in sigma.layout.entries
        } | {}

    def tensors(shift: torch.Tensor) -> list[torch.Tensor]:
        owners = weights(shift)
        return [getattr(m, name.rpartition(".")[2]).detach().clone() for name, m in owners.items()]

    for a, b, c in zip(tensors(first), tensors(second), tensors(0.25 * first + 0.75 * second), strict=True):
        torch.testing.assert_close(0.25 * a + 0.75 * b, c, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.full((1,), math.nan)])
def test_wrong_shift_is_refused(wrong: torch.Tensor, tmp_path: Path) -> None:
    sigma = adapted(tmp_path)
    if wrong.numel() == 1:
        wrong = wrong.expand(sigma.layout.size)
    with pytest.raises(LayoutError, match=r"expected \(1152,\)|not finite"):
        sigma.set_shift(wrong)


def test_adapting_twice_is_refused(tmp_path: Path) -> None:
    sigma = adapted(tmp_path)
    with pytest.raises(LayoutError, match="adapted already"):
        SigmaModel.adapt(sigma.model, cache_dir=tmp_path)


# the functions of a layer ----------------------------------------------------------------------------


def reference_weight(weight: torch.Tensor, shift: torch.Tensor, blocks: list[Block]) -> torch.Tensor:
    """W0 + U diag(d) V^T in each block's rows, in plain torch operations."""
    out = weight.clone()
    for (low, high), (start, stop), u, vh in blocks:
        out[low:high] += u @ torch.diag(shift[start:stop]) @ vh
    return out


@pytest.mark.parametrize("rows", [(9,), (4, 4, 4)])
def test_layer_functions_agree_with_the_reference(rows: tuple[int, ...]) -> None:
    """The dense, the factored and the per-sample layer, against the formula and torch's own gradients."""
    random = torch.Generator().manual_seed(0)
    blocks, singular, offset = [], [], 0
    for i, height in enumerate(rows):
        u, s, vh = torch.linalg.svd(torch.randn(height, 5, generator=random).double(), full_matrices=False)
        blocks.append(((i * height, (i + 1) * height), (offset, offset + len(s)), u, vh))
        singular.append(s)
        offset += len(s)
    weight = torch.cat([(u * s) @ vh for (_, _, u, vh), s in zip(blocks, singular, strict=True)])
    shift = torch.randn(offset, generator=random).double().requires_grad_()
    x = torch.randn(2, 3, 5, generator=random).double()
    bias = torch.randn(sum(rows), generator=random).double()

    def loss(out: torch.Tensor) -> torch.Tensor:
        return out.sin().flatten(1).sum(1)

    expected = F.linear(x, reference_weight(weight, shift, blocks), bias)
    each = [torch.autograd.grad(part, shift, retain_graph=True)[0] for part in loss(expected)]
    dense = F.linear(x, DenseShift.apply(weight, shift, blocks), bias)
    torch.testing.assert_close(dense, expected)
    torch.testing.assert_close(torch.autograd.grad(loss(dense).sum(), shift)[0], sum(each))
    stacked = torch.cat([vh for _, _, _, vh in blocks])
    adapted = reference_weight(weight, shift, blocks).detach()
    samples = torch.zeros(2, offset, requires_grad=True)
    by_sample = PerSampleLinear.apply(x, adapted, samples, blocks, stacked, bias)
    torch.testing.assert_close(by_sample, expected)
    (found,) = torch.autograd.grad(loss(by_sample).sum(), samples)
    torch.testing.assert_close(found, torch.stack(each).float(), atol=1e-5, rtol=1e-5)
    if len(rows) == 1:
        _, _, u, vh = blocks[0]
        factored = FactoredLinear.apply(x, singular[0] + shift, u, vh, bias)
        torch.testing.assert_close(factored, expected)
        torch.testing.assert_close(torch.autograd.grad(loss(factored).sum(), shift)[0], sum(each))
