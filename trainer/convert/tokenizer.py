"""The tokenizer that goes with converted weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BertTokenizer

from model import PlugLMConfig
from trainer.convert.errors import ConversionError
from trainer.corpus.errors import CorpusError
from trainer.corpus.tokenizer import load_tokenizer


def open_tokenizer(path: Path, config: PlugLMConfig) -> Any:
    """Open a tokenizer and check that its ids are the model's.

    Args:
        path: a directory as transformers saves it, or the vocabulary file of a WordPiece tokenizer
            (one token a line), which is taken to fold case if no token of it has a capital letter.

    Raises:
        ConversionError: it cannot be loaded, or is not the model's.
    """
    vocabulary = path / "vocab.txt" if path.is_dir() else path
    bare = not (path / "tokenizer.json").exists() and not (path / "config.json").exists()
    try:
        if path.is_file() or (bare and vocabulary.is_file()):
            tokenizer: Any = _word_piece(vocabulary)
        else:
            tokenizer = load_tokenizer(path)
    except CorpusError as error:
        raise ConversionError(str(error)) from error
    if len(tokenizer) > config.vocab_size:
        raise ConversionError(
            f"the tokenizer {path} has {len(tokenizer)} tokens, but the model has only "
            f"{config.vocab_size} (vocab_size); give the tokenizer that it was trained with"
        )
    if tokenizer.pad_token_id != config.pad_token_id:
        raise ConversionError(
            f"the tokenizer {path} pads with {tokenizer.pad_token_id}, but the model with "
            f"{config.pad_token_id} (pad_token_id); give the tokenizer that it was trained with"
        )
    return tokenizer


def _word_piece(vocabulary: Path) -> Any:
    try:
        words = vocabulary.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{vocabulary} is no vocabulary file ({error})") from error
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    missing = sorted(special - set(words))
    if missing:
        raise ConversionError(
            f"the vocabulary {vocabulary} has no {', '.join(missing)}; give a BERT-like one"
        )
    folds = not any(word != word.lower() for word in words if not word.startswith("["))
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=folds)
