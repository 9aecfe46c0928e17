"""Backbones: names, folders, their checks, conversion, export; all without the network."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedsigma.common import backbones
from fedsigma.common.backbones import (
    BackboneError,
    build_meta_model,
    convert,
    export_merged,
    fetch,
    load_backbone,
    load_folder,
    parse_name,
    save_backbone,
)
from fedsigma.common.backbones import download as hub_module
from fedsigma.common.backbones import load as load_module
from fedsigma.common.backbones.bundle import CONFIG, MANIFEST, WEIGHTS, sha256
from tests.helpers.tiny_backbones import bert_folder, features, tiny_biomed, tiny_clip


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test may reach the network, nor find something in the user's cache."""

    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(hub_module.urllib.request, "getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tiny_clip(), tmp_path_factory.mktemp("clip") / "b", source="tests")


@pytest.fixture(scope="module")
def biomed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("biomed")
    return save_backbone(tiny_biomed(bert_folder(root / "bert")), root / "b", source="tests")


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder, so that a test may damage it."""

    def copy(folder: Path) -> Path:
        target = tmp_path / "copy"
        target.mkdir()
        for path in folder.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return target

    return copy


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file and set its digest in the manifest, as someone who knows the form would."""
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    resign(folder)


def resign(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        manifest["files"][name] = sha256(folder / name)
    (folder / MANIFEST).write_text(json.dumps(manifest))


# Names


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("starter", "starter"),
        ("ViT-B-16/openai", "tag"),
        ("ViT-B-16", "tag"),
        ("hf-hub:org/model.v1", "hub"),
        ("local-dir:/a/b", "folder"),
        ("checkpoint:ViT-B-16:/a/b.safetensors", "checkpoint"),
        ("checkpoint:ViT-B-16/openai:/a/b.safetensors", "checkpoint"),
    ],
)
def test_names(text: str, kind: str) -> None:
    assert parse_name(text).kind == kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("startr", "did you mean starter"),
        ("ViT-B/16", "did you mean ViT-B-16"),
        ("vit-b-16", "did you mean ViT-B-16"),
        ("ViT-B-16/opnai", "did you mean openai"),
        ("ViT-B-16/opnai", "laion2b_s34b_b88k"),
        ("hf_hub:org/name", "did you mean hf-hub"),
        ("hf-hub:name", "org/name"),
        ("local-dir:", "local-dir:PATH"),
        ("checkpoint:ViT-B-16:w.pt", "fedsigma backbone convert w.pt ViT-B-16 DIR"),
        ("checkpoint:ViT-B-99:w.safetensors", "unknown backbone"),
        ("checkpoint:w.safetensors", "checkpoint:ARCH:PATH"),
        ("", "names are starter"),
    ],
)
def test_wrong_names_get_a_suggestion(text: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message.replace(".", r"\.")):
        parse_name(text)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_name_or_a_clear_error(text: str) -> None:
    try:
        parse_name(text)
    except BackboneError as error:
        assert "\n" not in str(error) or "\n" in text


def test_architecture_without_weights_names_the_tags() -> None:
    with pytest.raises(BackboneError, match="ViT-B-16/openai"):
        load_backbone("ViT-B-16")


# Architectures


def test_random_weights_on_request() -> None:
    backbone = load_backbone("ViT-S-32-alt", weights=False)
    assert backbone.image_size == 224
    assert backbone.tokenizer(["a cell"]).shape == (1, 77)
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_counting_takes_no_memory() -> None:
    model = build_meta_model(open_clip.get_model_config("ViT-B-16"))
    assert sum(p.numel() for p in model.parameters()) == 149_620_737
    assert all(p.is_meta for p in model.parameters())


def test_a_tag_brings_its_activation() -> None:
    """open_clip only warns there, and the features of OpenAI's weights come out wrong."""
    made = hub_module.resolve_settings(parse_name("ViT-B-16/openai"))
    assert made.model_cfg["quick_gelu"] is True
    assert not hub_module.resolve_settings(parse_name("ViT-B-16/laion2b_s34b_b88k")).model_cfg.get(
        "quick_gelu"
    )


def test_every_tag_has_a_recipe() -> None:
    for architecture, tag in open_clip.list_pretrained():
        made = hub_module.resolve_settings(parse_name(f"{architecture}/{tag}"))
        assert {"mean", "std", "interpolation", "resize_mode"} <= made.preprocess.keys()
        assert hub_module.find_weights_file(parse_name(f"{architecture}/{tag}"))[1].endswith(".safetensors")


# Offline


@pytest.mark.parametrize("name", ["ViT-B-16/openai", "hf-hub:acme/model"])
def test_offline_says_how_to_bring_a_folder(name: str) -> None:
    with pytest.raises(BackboneError, match=f"fedsigma backbone fetch {name} DIR.*local-dir:DIR"):
        load_backbone(name)


def test_offline_fetch_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="connected machine"):
        fetch("ViT-B-16/openai", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def hub_of(monkeypatch: pytest.MonkeyPatch, files: dict[str, Path]) -> list[str]:
    """A hub that holds `files` by "org/name/file"; returns the list of what is asked for."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    asked: list[str] = []

    def download(hub: str, file: str, *, local_files_only: bool = False, **_: object) -> str:
        asked.append(f"{hub}/{file}")
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        if f"{hub}/{file}" not in files:
            raise EntryNotFoundError("no such file")
        return str(files[f"{hub}/{file}"])

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(hub_module, "_reachable", lambda: None)
    return asked


def test_fetch_from_a_hub_then_load_at_a_site(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip_folder: Path
) -> None:
    config = json.loads((clip_folder / CONFIG).read_text())
    del config["preprocess_cfg"]["interpolation"], config["preprocess_cfg"]["size"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    hub_of(monkeypatch, {f"o/m/{CONFIG}": tmp_path / CONFIG, f"o/m/{WEIGHTS}": clip_folder / WEIGHTS})
    fetched = fetch("hf-hub:o/m", tmp_path / "site")
    assert fetched.interpolation == "bicubic"
    manifest = json.loads((tmp_path / "site" / MANIFEST).read_text())
    assert manifest["source"] == "hf-hub:o/m"
    assert any("interpolation: bicubic, open_clip's default" in note for note in manifest["notes"])
    for ours, theirs in zip(features(fetched), features(tiny_clip()), strict=True):
        assert torch.equal(ours, theirs)


def test_a_hub_with_a_torch_file_only_is_never_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip_folder: Path
) -> None:
    files = {f"o/m/{CONFIG}": clip_folder / CONFIG, "o/m/open_clip_pytorch_model.bin": tmp_path / "bin"}
    asked = hub_of(monkeypatch, files)
    with pytest.raises(BackboneError, match="fedsigma backbone convert FILE hf-hub:o/m DIR"):
        load_backbone("hf-hub:o/m")
    assert not any(name.endswith(".bin") for name in asked)


def test_a_hub_without_mean_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip_folder: Path
) -> None:
    config = json.loads((clip_folder / CONFIG).read_text())
    del config["preprocess_cfg"]["mean"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    hub_of(monkeypatch, {f"o/m/{CONFIG}": tmp_path / CONFIG, f"o/m/{WEIGHTS}": clip_folder / WEIGHTS})
    with pytest.raises(BackboneError, match="gives no mean"):
        fetch("hf-hub:o/m", tmp_path / "site")


# Folders


def test_folder_round_trip(clip_folder: Path) -> None:
    backbone, original = load_backbone(f"local-dir:{clip_folder}"), tiny_clip()
    for ours, theirs in zip(features(backbone), features(original), strict=True):
        assert torch.equal(ours, theirs)
    assert backbone.preprocessing == original.preprocessing
    assert backbone.logit_scale == pytest.approx(1 / 0.07)
    assert backbone.digest == sha256(clip_folder / WEIGHTS)
    assert not backbone.model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in backbone.model.parameters())


def test_half_precision_folder_loads_as_float32(tmp_path: Path) -> None:
    save_backbone(tiny_clip(), tmp_path / "half", source="tests", dtype=torch.float16)
    assert load_file(tmp_path / "half" / WEIGHTS)["visual.proj"].dtype == torch.float16
    backbone = load_backbone(f"local-dir:{tmp_path / 'half'}")
    assert all(p.dtype == torch.float32 for p in backbone.model.parameters())


def test_loading_leaves_running_statistics_alone() -> None:
    """The starter's image tower has batch norms, and its picture size is tried out on loading."""
    loaded = load_backbone("starter").model.state_dict()
    written = load_file(Path(load_module.__file__).parent / "starter" / WEIGHTS)
    assert any(name.endswith("running_var") for name in written)
    for name, tensor in written.items():
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), name


def test_biomed_folder_works_in_any_location(biomed_folder: Path, copied: Callable[[Path], Path]) -> None:
    moved = copied(biomed_folder)
    backbone = load_backbone(f"local-dir:{moved}")
    assert backbone.tokenizer(["a cell zzz"])[0, :5].tolist() == [2, 5, 8, 1, 3]
    original = tiny_biomed(biomed_folder.parent / "bert")
    for ours, theirs in zip(features(backbone), features(original), strict=True):
        assert torch.equal(ours, theirs)
    config = (biomed_folder / CONFIG).read_text()
    assert str(biomed_folder) not in config
    assert "acme" not in config


def test_tokenizer_of_a_native_text_tower(tmp_path: Path) -> None:
    """A Hugging Face tokenizer on open_clip's own text tower, as SigLIP and CLIPA have it."""
    from fedsigma.common.backbones.tokenizer import load_tokenizer

    plain = tiny_clip()
    cfg = {**plain.model_cfg, "text_cfg": {**plain.model_cfg["text_cfg"], "hf_tokenizer_name": "x/y"}}
    tokenizer = load_tokenizer(cfg, plain.model, bert_folder(tmp_path / "bert"), "t")
    both = dataclasses.replace(plain, tokenizer=tokenizer, model_cfg=cfg)
    loaded = load_folder(save_backbone(both, tmp_path / "b", source="tests"))
    assert not (tmp_path / "b" / "config.json").exists()
    assert torch.equal(loaded.tokenizer(["a round cell"]), tokenizer(["a round cell"]))


def test_size_that_timm_does_not_take(biomed_folder: Path, copied: Callable[[Path], Path]) -> None:
    """open_clip would build this, and fail (or worse, resize to the wrong size) later."""
    folder = copied(biomed_folder)

    def change(config: dict[str, Any]) -> None:
        config["model_cfg"]["vision_cfg"]["image_size"] = config["preprocess_cfg"]["size"] = 224

    edit(folder, CONFIG, change)
    with pytest.raises(BackboneError, match="takes 160 pixels"):
        load_folder(folder)


def test_folder_in_use_is_not_overwritten(clip_folder: Path) -> None:
    before = sha256(clip_folder / WEIGHTS)
    with pytest.raises(BackboneError, match="not an empty folder"):
        save_backbone(tiny_clip(1), clip_folder, source="tests")
    assert sha256(clip_folder / WEIGHTS) == before


# What a folder may lack


@pytest.mark.parametrize("key", ["mean", "std", "size", "interpolation"])
def test_partial_preprocessing_is_refused(
    clip_folder: Path, copied: Callable[[Path], Path], key: str
) -> None:
    folder = copied(clip_folder)
    edit(folder, CONFIG, lambda c: c["preprocess_cfg"].pop(key))
    with pytest.raises(BackboneError, match=f"lacks {key}"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("preprocess_cfg"), "no preprocess_cfg"),
        (lambda c: c["preprocess_cfg"].update(size=64), "takes 32 pixels"),
        (lambda c: c["preprocess_cfg"].update(size=[32, 64]), "square"),
        (lambda c: c["preprocess_cfg"].update(interpolation="random"), "bicubic or bilinear"),
        (lambda c: c["preprocess_cfg"].update(std=[0.2, 0, 0.2]), "above 0"),
        (lambda c: c["preprocess_cfg"].update(mean=[0.2, 0.2]), "three numbers"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(image_size=64), "another picture size"),
        (lambda c: c["model_cfg"]["text_cfg"].update(context_length=20), "context length"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(layers=3), "lack visual.transformer"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(layers=1), "hold unknown visual.transformer"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(frobs=1), "cannot build"),
        (lambda c: c["model_cfg"].pop("text_cfg"), "must hold embed_dim"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(timm_model_name="hf-hub:a/b"), "would be fetched"),
        (
            lambda c: c["model_cfg"]["text_cfg"].update(tokenizer_kwargs={"trust_remote_code": True}),
            "run code",
        ),
        (lambda c: c["model_cfg"]["text_cfg"].update(hf_tokenizer_name="a/b"), "tokenizer is missing"),
        (lambda c: c["model_cfg"]["text_cfg"].update(hf_model_name="a/b"), "no hf_tokenizer_name"),
    ],
)
def test_wrong_configuration_is_refused(
    clip_folder: Path,
    copied: Callable[[Path], Path],
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    folder = copied(clip_folder)
    edit(folder, CONFIG, change)
    with pytest.raises(BackboneError, match=message):
        load_folder(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_every_changed_or_missing_file_is_noticed(
    biomed_folder: Path, copied: Callable[[Path], Path], name: str
) -> None:
    folder = copied(biomed_folder)
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(BackboneError, match=f"{name} was changed"):
        load_folder(folder)
    (folder / name).unlink()
    with pytest.raises(BackboneError, match=f"{name} is missing"):
        load_folder(folder)


def test_added_file_is_noticed_and_a_note_is_not(clip_folder: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(clip_folder)
    (folder / "NOTES.md").write_text("ours")
    load_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"tokenizer.json is not in"):
        load_folder(folder)


def test_interrupted_copy_and_foreign_folder(
    clip_folder: Path, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = copied(clip_folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(BackboneError, match=f"fetch local-dir:{folder} NEW_DIR"):
        load_folder(folder)
    adopted = fetch(f"local-dir:{folder}", tmp_path / "adopted")
    assert torch.equal(features(adopted)[0], features(tiny_clip())[0])
    (folder / WEIGHTS).rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(BackboneError, match="fedsigma backbone convert"):
        fetch(f"local-dir:{folder}", tmp_path / "again")
    with pytest.raises(BackboneError, match="there is no folder"):
        load_backbone(f"local-dir:{tmp_path / 'none'}")


def test_missing_vocabulary_is_not_replaced_by_an_empty_one(
    biomed_folder: Path, copied: Callable[[Path], Path]
) -> None:
    """transformers builds a tokenizer of five special tokens then, and every word becomes [UNK]."""
    folder = copied(biomed_folder)
    (folder / "tokenizer.json").unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]["tokenizer.json"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BackboneError, match="the tokenizer is missing"):
        load_folder(folder)


def test_tokenizer_without_words_or_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="knows no word"):
        tiny_biomed(bert_folder(tmp_path / "a", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    with pytest.raises(BackboneError, match="belongs to another model"):
        tiny_biomed(
            bert_folder(tmp_path / "b", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", *map(str, range(60))])
        )


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_in_a_folder_is_refused(biomed_folder: Path, copied: Callable[[Path], Path], name: str) -> None:
    folder = copied(biomed_folder)
    edit(folder, name, lambda c: c.update(auto_map={"AutoConfig": "evil.Config"}))
    with pytest.raises(BackboneError, match="run code"):
        load_folder(folder)


def test_manifest_cannot_point_outside(clip_folder: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(clip_folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../x"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BackboneError, match="is missing"):
        load_folder(folder)


def test_weights_that_are_not_finite(clip_folder: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(clip_folder)
    state = load_file(folder / WEIGHTS)
    state["visual.proj"][0, 0] = float("nan")
    save_file(state, folder / WEIGHTS)
    resign(folder)
    with pytest.raises(BackboneError, match="not finite"):
        load_folder(folder)


# Checkpoints and conversion


@pytest.fixture
def tiny_architecture(monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the tiny model one of open_clip's architectures, with one tag."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", tiny_clip().model_cfg)
    tag = {**open_clip.get_pretrained_cfg("ViT-B-16", "laion2b_s34b_b88k"), "hf_hub": "o/m/"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"ours": tag})
    return "tiny-clip"


def test_checkpoint_file(tiny_architecture: str, clip_folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(f"checkpoint:{tiny_architecture}:{clip_folder / WEIGHTS}")
    assert torch.equal(features(backbone)[1], features(tiny_clip())[1])
    assert backbone.mean == open_clip.OPENAI_DATASET_MEAN
    with pytest.raises(BackboneError, match="there is no file"):
        load_backbone(f"checkpoint:{tiny_architecture}:{tmp_path / 'no.safetensors'}")
    (tmp_path / "bad.safetensors").write_bytes(b"PK\x03\x04pickle")
    with pytest.raises(BackboneError, match="cannot be read as safetensors"):
        load_backbone(f"checkpoint:{tiny_architecture}:{tmp_path / 'bad.safetensors'}")


def test_checkpoint_whose_preprocessing_is_not_certain(clip_folder: Path) -> None:
    with pytest.raises(BackboneError, match="depends on how it was trained"):
        load_backbone(f"checkpoint:ViT-L-14:{clip_folder / WEIGHTS}")


def test_tag_from_a_hub(monkeypatch: pytest.MonkeyPatch, tiny_architecture: str, clip_folder: Path) -> None:
    hub_of(monkeypatch, {f"o/m/{WEIGHTS}": clip_folder / WEIGHTS})
    assert torch.equal(features(load_backbone("tiny-clip/ours"))[0], features(tiny_clip())[0])


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "module"])
def test_convert(tiny_architecture: str, tmp_path: Path, wrap: str) -> None:
    state: dict[str, Any] = tiny_clip().model.state_dict()
    if wrap == "state_dict":
        state = {"epoch": 3, "state_dict": state}
    elif wrap == "module":
        state = {f"module.{k}": v for k, v in state.items()}
    torch.save(state, tmp_path / "w.pt")
    backbone = convert(tmp_path / "w.pt", tiny_architecture, tmp_path / "out")
    for ours, theirs in zip(features(backbone), features(tiny_clip()), strict=True):
        assert torch.equal(ours, theirs)


class Trap:
    """Its unpickling would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_convert_runs_no_code(tiny_architecture: str, tmp_path: Path) -> None:
    torch.save({"state_dict": Trap(tmp_path / "trapped")}, tmp_path / "evil.pt")
    with pytest.raises(BackboneError, match="refused"):
        convert(tmp_path / "evil.pt", tiny_architecture, tmp_path / "out")
    assert not (tmp_path / "trapped").exists()
    assert not (tmp_path / "out").exists()


def test_convert_refuses_what_it_cannot_use(
    tiny_architecture: str, tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(BackboneError, match="no state dict"):
        convert(tmp_path / "list.pt", tiny_architecture, tmp_path / "out")
    torch.save(tiny_clip().model.visual.state_dict(), tmp_path / "half.pt")
    with pytest.raises(BackboneError, match="another architecture"):
        convert(tmp_path / "half.pt", tiny_architecture, tmp_path / "out")
    with pytest.raises(BackboneError, match="safetensors file already"):
        convert(clip_folder / WEIGHTS, tiny_architecture, tmp_path / "out")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(BackboneError, match=r"torch 2\.6"):
        convert(tmp_path / "half.pt", tiny_architecture, tmp_path / "out")


def test_convert_with_the_text_files_of_a_folder(tmp_path: Path) -> None:
    """BiomedCLIP published as a torch file, beside its configuration and tokenizer."""
    bert = bert_folder(tmp_path / "upstream")
    original = tiny_biomed(bert)
    config = {
        "model_cfg": {
            **original.model_cfg,
            "text_cfg": {
                **original.model_cfg["text_cfg"],
                "hf_model_name": "a/b",
                "hf_tokenizer_name": "a/b",
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]},
    }
    (bert / CONFIG).write_text(json.dumps(config))
    torch.save(original.model.state_dict(), tmp_path / "w.bin")
    backbone = convert(tmp_path / "w.bin", f"local-dir:{bert}", tmp_path / "out")
    for ours, theirs in zip(features(backbone), features(original), strict=True):
        assert torch.equal(ours, theirs)


# Export


@pytest.mark.parametrize("kind", ["clip", "biomed"])
def test_open_clip_itself_loads_an_export(kind: str, tmp_path: Path) -> None:
    from PIL import Image

    backbone = tiny_clip(3) if kind == "clip" else tiny_biomed(bert_folder(tmp_path / "bert"), 3)
    folder = export_merged(backbone, tmp_path / "merged")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", pretrained_text=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    texts = ["a photo of a cell."]
    assert torch.equal(tokenizer(texts), backbone.tokenizer(texts))
    ours = dataclasses.replace(backbone, model=model.eval(), tokenizer=tokenizer)
    assert all(torch.equal(v, backbone.model.state_dict()[k]) for k, v in model.state_dict().items())
    for a, b in zip(features(ours), features(backbone), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    picture = transform(Image.new("RGB", (40, 50), (255, 255, 255)))
    assert picture.shape == (3, backbone.image_size, backbone.image_size)
    expected = torch.tensor([(1 - m) / s for m, s in zip(backbone.mean, backbone.std, strict=True)])
    assert torch.allclose(picture.mean((1, 2)), expected, atol=1e-5)
    assert torch.equal(features(load_backbone(f"local-dir:{folder}"))[0], features(backbone)[0])


def test_a_model_with_a_shift_is_not_exported(tmp_path: Path) -> None:
    backbone = tiny_clip()
    torch.nn.utils.parametrize.register_parametrization(backbone.model.visual, "proj", torch.nn.Identity())
    with pytest.raises(BackboneError, match="merge it before saving"):
        export_merged(backbone, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# The starter


def test_starter_is_found_beside_the_code_or_in_the_installed_package(
    clip_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Flower's app bundle shadows the installed package but carries no weights."""
    monkeypatch.setattr(
        load_module, "__file__", str(tmp_path / "bundle" / "common" / "backbones" / "load.py")
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path / "bundle")])
    with pytest.raises(BackboneError, match="not installed"):
        load_backbone("starter")
    installed = tmp_path / "site-packages" / "fedsigma" / "common" / "backbones" / "starter"
    installed.mkdir(parents=True)
    for path in clip_folder.iterdir():
        (installed / path.name).write_bytes(path.read_bytes())
    sys.path.append(str(tmp_path / "site-packages"))
    assert load_backbone("starter").name == "starter"


def test_face() -> None:
    assert all(hasattr(backbones, name) for name in backbones.__all__)
