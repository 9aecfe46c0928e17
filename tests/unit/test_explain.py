"""Explanations: exact shares of heads, and a planted phrase that must come out first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from fedsigma.cli.main import main
from fedsigma.client.inference.loaded_model import load_model
from fedsigma.common.backbones import load_backbone
from fedsigma.common.config.sigma import SigmaConfig
from fedsigma.common.explain import Explainer, ExplainError, Phrases, rank_heads, report
from fedsigma.common.explain.report import build_explainer
from fedsigma.common.explain.text_directions import joint_space_projection
from fedsigma.common.registry.shift_file import save_shift
from fedsigma.common.sigma import Basis, SigmaModel, find_layout
from fedsigma.common.training.trainer import Trainer

WIDTH, HEADS, JOINT, PHRASES = 32, 4, 16, 40


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    head = WIDTH // HEADS
    vision = open_clip.CLIPVisionCfg(layers=2, width=WIDTH, head_width=head, patch_size=8, image_size=16)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=64, width=WIDTH, heads=HEADS, layers=2)
    model = open_clip.CLIP(embed_dim=JOINT, vision_cfg=vision, text_cfg=text).eval()
    nn.init.normal_(model.visual.proj)
    nn.init.uniform_(model.visual.ln_post.weight, 0.5, 1.5)
    return model.requires_grad_(False)


def basis_of(model: nn.Module, **selection: object) -> Basis:
    return Basis.compute(model, find_layout(model, SigmaConfig(**selection)))  # type: ignore[arg-type]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_the_heads_energies_are_those_of_their_slices_and_sum_to_the_whole(seed: int) -> None:
    model = tiny()
    basis = basis_of(model)
    shift = torch.randn(basis.layout.size, generator=torch.Generator().manual_seed(seed))
    changes = rank_heads(model, basis, shift)
    assert len(changes) == 2 * 2 * HEADS and sum(c.share for c in changes) == pytest.approx(1)
    total = sum(
        shift[e.offset : e.offset + e.size].square().sum().item()
        for e in basis.layout.entries
        if e.part in ("v", "o")
    )
    assert sum(c.value + c.output for c in changes) == pytest.approx(total, rel=1e-5)
    one = next(c for c in changes if (c.tower, c.layer, c.head) == ("image", 1, 2))
    rows = slice(2 * WIDTH // HEADS, 3 * WIDTH // HEADS)
    for entry, svd in zip(basis.layout.entries, basis.svds, strict=True):
        if (entry.tower, entry.layer) == ("image", 1):
            change = svd.u * shift[entry.offset : entry.offset + entry.size] @ svd.vh
            if entry.part == "v":
                assert one.value == pytest.approx(change[rows].square().sum().item(), rel=1e-4)
            if entry.part == "o":
                assert one.output == pytest.approx(change[:, rows].square().sum().item(), rel=1e-4)


def features(seed: int = 1) -> Tensor:
    drawn = torch.randn(PHRASES, JOINT, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(drawn, dim=1)


def planted(head: int, phrase: int) -> tuple[nn.Module, int]:
    """A model in which one column of a head's output matrix writes a phrase; and that column."""
    model, texts = tiny(), features()
    target = (texts - texts.mean(0))[phrase]
    reads = joint_space_projection(model, "image")
    writes = nn.functional.normalize(torch.linalg.pinv(reads) @ target, dim=0)
    others = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2))
    column = head * WIDTH // HEADS
    others[:, 0] = writes
    directions, _ = torch.linalg.qr(others)
    order = torch.tensor([column, *(i for i in range(WIDTH) if i != column)])
    output = torch.zeros(WIDTH, WIDTH)
    output[:, order] = directions * torch.linspace(1.0, 2.0, WIDTH)
    model.visual.transformer.resblocks[1].attn.out_proj.weight.data = output
    return model, column


@pytest.mark.parametrize(("head", "phrase", "amount"), [(0, 3, 4.0), (2, 17, 4.0), (3, 39, -0.9)])
def test_a_planted_phrase_comes_out_first_at_its_head(head: int, phrase: int, amount: float) -> None:
    model, column = planted(head, phrase)
    basis = basis_of(model)
    shift = torch.zeros(basis.layout.size)
    for entry, svd in zip(basis.layout.entries, basis.svds, strict=True):
        if (entry.tower, entry.layer, entry.part) == ("image", 1, "o"):
            shift[entry.offset + int(svd.vh[:, column].abs().argmax())] = amount
    phrases = Phrases(tuple(f"phrase {i}" for i in range(PHRASES)), ("own",) * PHRASES)
    first = Explainer(model, basis, phrases, features()).explain(shift)[0]
    assert (first.head.tower, first.head.layer, first.head.head) == ("image", 1, head)
    assert first.head.share == pytest.approx(1)
    told = first.gained if amount > 0 else first.lost
    assert told[0][0] == f"phrase {phrase}"
    assert (told[0][1] > 0) == (amount > 0)


def test_a_head_writes_what_its_slices_of_the_whole_matrices_do() -> None:
    model, texts = tiny(), features()
    basis = basis_of(model)
    shift = 0.3 * torch.randn(basis.layout.size, generator=torch.Generator().manual_seed(5))
    report = {}
    for entry, svd in zip(basis.layout.entries, basis.svds, strict=True):
        for name, d in (("before", 0.0), ("after", shift[entry.offset : entry.offset + entry.size])):
            place = entry.tower, entry.layer, entry.part, name
            report[place] = ((svd.u * (svd.s + d)) @ svd.vh).double()
    unit = nn.functional.normalize(texts.double() - texts.double().mean(0), dim=1)
    phrases = Phrases(tuple(f"phrase {i}" for i in range(PHRASES)), ("own",) * PHRASES)
    found = Explainer(model, basis, phrases, texts).explain(shift, heads=3, phrases=PHRASES)
    for one in found:
        place, where = (one.head.tower, one.head.layer), one.head.head * WIDTH // HEADS
        cut = slice(where, where + WIDTH // HEADS)
        reads = unit @ joint_space_projection(model, one.head.tower).double()
        before, after = (
            (reads @ report[*place, "o", name][:, cut] @ report[*place, "v", name][cut]).square().sum(1)
            for name in ("before", "after")
        )
        gain = (after - before) / before.mean()
        gain = gain - gain.mean()
        for text, g in one.gained + one.lost:
            assert g == pytest.approx(float(gain[phrases.texts.index(text)]), rel=1e-4, abs=1e-6)
        assert len(one.gained) + len(one.lost) == PHRASES


def test_explaining_one_shift_does_not_change_what_is_said_of_the_next() -> None:
    model = tiny()
    basis = basis_of(model)
    phrases = Phrases(tuple(f"phrase {i}" for i in range(PHRASES)), ("own",) * PHRASES)
    first, second = (
        0.3 * torch.randn(basis.layout.size, generator=torch.Generator().manual_seed(n)) for n in (0, 1)
    )
    one = Explainer(model, basis, phrases, features())
    one.explain(first, heads=16)
    assert one.explain(second) == Explainer(model, basis, phrases, features()).explain(second)


def test_a_trainer_encodes_the_descriptions_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer("starter", SigmaConfig(parts=("v", "o")), ("a", "b"), ("a", "b"))
    shift = np.random.default_rng(0).normal(scale=0.1, size=trainer.layout.size).astype(np.float32)
    rows = trainer.explain(shift, heads=3, phrases=2)
    assert len(rows) == 3 and all(len(row["gained"]) == 2 for row in rows)
    monkeypatch.setattr(report, "_text_features", lambda *a: pytest.fail("read again"))
    assert trainer.explain(-shift, heads=3) != rows and trainer.explain(shift, heads=3, phrases=2) == rows


def test_nothing_changed_is_nothing_gained() -> None:
    model = tiny()
    basis = basis_of(model)
    phrases = Phrases(tuple(f"phrase {i}" for i in range(PHRASES)), ("own",) * PHRASES)
    found = Explainer(model, basis, phrases, features()).explain(torch.zeros(basis.layout.size))
    assert all(one.gained == one.lost == () and one.head.share == 0 for one in found)


def test_unsupported_explanation_gives_a_reason() -> None:
    model = tiny()
    basis = basis_of(model, parts=("q", "mlp"))
    with pytest.raises(ExplainError, match="value and output"):
        rank_heads(model, basis, torch.zeros(basis.layout.size))
    model.visual.ln_post = nn.Identity()
    with pytest.raises(ExplainError, match="image tower does not end in a norm"):
        joint_space_projection(model, "image")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[one", "invalid YAML"),
        ("a text", "must be a YAML list"),
        ("[one]", "fewer than two"),
        ("a: 3", "must be a YAML list"),
    ],
)
def test_invalid_descriptions_are_refused(text: str, message: str) -> None:
    with pytest.raises(ExplainError, match=message):
        Phrases.parse(text)


def test_descriptions_of_ones_own() -> None:
    assert Phrases.parse("[one, two, one]") == Phrases(("one", "two"), ("own", "own"))
    kinds = Phrases.parse("shape: [round]\nborder: [sharp]")
    assert kinds == Phrases(("round", "sharp"), ("shape", "border"))


def test_the_bundled_corpus() -> None:
    found = Phrases.bundled()
    assert len(found.texts) >= 300 and len(set(found.texts)) == len(found.texts)
    assert {"modality", "texture", "shape", "border", "intensity", "location", "artefact"} <= set(found.kinds)


def test_the_command_explains_a_run_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    backbone = load_backbone("starter")
    sigma = SigmaModel.adapt(backbone.model, SigmaConfig(parts=("v", "o")))
    shift = 0.1 * torch.randn(sigma.layout.size, generator=torch.Generator().manual_seed(0))
    save_shift(
        tmp_path / "sigma.safetensors",
        shift,
        layout_json=sigma.layout.to_json(),
        fingerprint_json=sigma.fingerprint.to_json(),
        study_yaml="name: s\nbackbone: starter\nclasses: [a, b]\nsigma: {parts: [v, o]}\n",
        round=1,
    )
    words = ["explain", str(tmp_path), "--heads", "3", "--words", "2"]
    done = CliRunner().invoke(main, [*words, "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.output)
    assert len(rows) == 3 and all(len(row["gained"]) == len(row["lost"]) == 2 for row in rows)
    assert 0 < sum(row["share"] for row in rows) < 1
    own = tmp_path / "own.yaml"
    own.write_text("[a round cell, a long cell, a dark cell]")
    told = CliRunner().invoke(main, [*words, "--phrases", str(own), "--template", "a photo of {}"]).output
    assert "% of the heads' change" in told and "cell" in told
    restored = load_model(tmp_path)
    build_explainer(restored.backbone, restored.sigma, Phrases(("one", "two"), ("own", "own"))).explain(
        2 * shift
    )
    torch.testing.assert_close(restored.sigma.get_shift(), shift)
