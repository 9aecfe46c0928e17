"""Tokenizers: open_clip's own, or a Hugging Face one from files on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from torch import Tensor, nn

from fedsigma.common.backbones.build import Tokenizer
from fedsigma.common.backbones.spec import BackboneError

# One of these holds the words; without any, transformers quietly builds a tokenizer that knows no word.
VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
PROBE = "a photo of a cell"


def load_tokenizer(
    model_cfg: Mapping[str, Any], model: nn.Module, source: Path | str, where: str
) -> Tokenizer:
    """The tokenizer of a configuration; `source` is a folder, or a hub name on a connected machine.

    Raises:
        BackboneError: its files are missing or do not fit the text tower.
    """
    text = model_cfg["text_cfg"]
    length = int(text.get("context_length") or DEFAULT_CONTEXT_LENGTH)
    options = dict(text.get("tokenizer_kwargs") or {})
    if not text.get("hf_tokenizer_name"):
        simple = SimpleTokenizer(context_length=length, **options)
        if simple.vocab_size != vocabulary_size(model):
            raise BackboneError(
                f"{where}: the text tower has {vocabulary_size(model)} tokens, but its configuration names "
                f"no tokenizer, and open_clip's own has {simple.vocab_size}: set text_cfg.hf_tokenizer_name "
                "and add its files"
            )
        return simple
    if isinstance(source, Path):
        check_tokenizer_files(source, where)
        options["local_files_only"] = True
    try:
        tokenizer = HFTokenizer(
            str(source), context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **options
        )
    except ImportError as error:
        raise BackboneError(
            f"{where}: its tokenizer needs `pip install 'fedsigma[biomedclip]'` ({error})"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not isinstance(source, Path):
            raise
        raise BackboneError(f"{where}: the tokenizer files in {source} cannot be read ({error})") from error
    _probe(tokenizer, model, where)
    return tokenizer


def check_tokenizer_files(folder: Path, where: str) -> None:
    """Refuse a folder without a vocabulary, or whose settings ask to run code that comes with it.

    Raises:
        BackboneError: either of these.
    """
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise BackboneError(
            f"{where}: the tokenizer is missing in {folder} (none of {', '.join(VOCABULARIES)}): "
            "fetch the backbone again with `fedsigma backbone fetch`"
        )
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            settings = json.loads(path.read_text("utf-8"))
        except (ValueError, OSError) as error:
            raise BackboneError(f"{where}: {path} is not valid JSON ({error})") from error
        if not isinstance(settings, dict) or "auto_map" in settings:
            raise BackboneError(
                f"{where}: {path} asks to run code that comes with the files (auto_map); refused"
            )


def vocabulary_size(model: nn.Module) -> int:
    """How many tokens the text tower knows."""
    text: Any = getattr(model, "text", model)
    return int(text.vocab_size)


def _probe(tokenizer: HFTokenizer, model: nn.Module, where: str) -> None:
    inner = tokenizer.tokenizer
    # Added tokens may lie beyond the tower's table without ever being produced.
    own = min(len(inner), inner.vocab_size)
    if own > vocabulary_size(model):
        raise BackboneError(
            f"{where}: the tokenizer has {own} tokens, the text tower {vocabulary_size(model)}: "
            "it belongs to another model"
        )
    words = inner(PROBE, add_special_tokens=False)["input_ids"]
    if not words or all(token == inner.unk_token_id for token in words):
        raise BackboneError(f"{where}: the tokenizer knows no word of {PROBE!r}: its vocabulary is missing")


class LazyTokenizer:
    """Stands in for a tokenizer where only the architecture was asked for; loads it when first used."""

    def __init__(self, load: Any) -> None:
        self._load = load

    def __call__(self, texts: list[str]) -> Tensor:
        """Token numbers, (len(texts), context length)."""
        return self._load()(texts)
