"""Tokenizers: open_clip's own, or a Hugging Face one from files on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from torch import nn

from fedsigma.common.backbones.build import Tokenizer
from fedsigma.common.backbones.spec import BackboneError

# Without any of these, transformers silently builds a tokenizer with an empty vocabulary.
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
    """Load the tokenizer of a configuration.

    Args:
        model_cfg: open_clip's configuration of the model.
        model: the model, whose vocabulary must fit.
        source: a folder, or a name on the hub.
        where: the backbone's name, for messages.

    Raises:
        BackboneError: its files are missing or do not fit the text tower.
    """
    text = model_cfg["text_cfg"]
    length = int(text.get("context_length") or DEFAULT_CONTEXT_LENGTH)
    tower: Any = getattr(model, "text", model)
    vocabulary = int(tower.vocab_size)
    options = dict(text.get("tokenizer_kwargs") or {})
    if not text.get("hf_tokenizer_name"):
        simple = SimpleTokenizer(context_length=length, **options)
        if simple.vocab_size != vocabulary:
            raise BackboneError(
                f"{where}: the text tower has {vocabulary} tokens, but its configuration names "
                f"no tokenizer, and open_clip's own has {simple.vocab_size}: set text_cfg.hf_tokenizer_name "
                "and add its files"
            )
        own: Tokenizer = simple
        return own
    if isinstance(source, Path):
        _check_files(source, where)
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
    inner = tokenizer.tokenizer
    # Added tokens may be beyond the tower's table if they are never produced.
    produced = min(len(inner), inner.vocab_size)
    if produced > vocabulary:
        raise BackboneError(
            f"{where}: the tokenizer has {produced} tokens, the text tower {vocabulary}: "
            "it belongs to another model"
        )
    tokens = inner(PROBE, add_special_tokens=False)["input_ids"]
    if not tokens or all(token == inner.unk_token_id for token in tokens):
        raise BackboneError(f"{where}: the tokenizer knows no word of {PROBE!r}: its vocabulary is missing")
    loaded: Tokenizer = tokenizer
    return loaded


def _check_files(folder: Path, where: str) -> None:
    """Refuse a folder without a vocabulary, or whose settings ask to run code that comes with it."""
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
