"""Tokenizers: load one, and tell two apart.

A corpus needs a fast tokenizer (one of the `tokenizers` library), because entries keep the exact
text between their tokens' offsets. `transformers` is imported when a tokenizer is loaded, not
before: the processes that encode do without it.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.corpus.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FINGERPRINTED = ("normalizer", "pre_tokenizer", "model")
SPECIAL_ROLES = ("pad", "unk", "cls", "sep", "mask")


def load_tokenizer(name_or_path: str | Path) -> "PreTrainedTokenizerBase":
    """Load a fast tokenizer with [PAD], [UNK], [CLS], [SEP] and [MASK], or tokens in their roles.

    Args:
        name_or_path: a directory with tokenizer.json or vocab.txt, or a Hugging Face name.

    Raises:
        CorpusError: it cannot be loaded, is not a fast one, or lacks a special token.
    """
    name = str(name_or_path)
    if _is_path(name) and not Path(name).expanduser().exists():
        raise CorpusError(f"there is no tokenizer at {name}; correct the path, or use train:SIZE")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    place = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
    # Beside a model it looks at its config.json, and warns of every model that is not its own.
    told = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CorpusError(
            f"transformers cannot load a tokenizer from {name!r} ({reason[0]}). Give a directory "
            "with tokenizer.json, a model's name that this machine can fetch or has cached, or "
            "train:SIZE to train one on the corpus."
        ) from error
    finally:
        logging.set_verbosity(told)
    if not tokenizer.is_fast:
        raise CorpusError(
            f"the tokenizer {name!r} is not a fast one (it has no tokenizer.json), so text "
            "cannot be cut by its offsets; convert it, or use train:SIZE"
        )
    missing = [role for role in SPECIAL_ROLES if getattr(tokenizer, f"{role}_token_id") is None]
    if missing:
        raise CorpusError(
            f"the tokenizer {name!r} has no {', '.join(missing)} token; masked-language modelling "
            "needs pad, unk, cls, sep and mask: use a BERT-like tokenizer, or train:SIZE"
        )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # some are published with a fixed length, which would lose text
    backend.no_padding()
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash what decides a text's ids: vocabulary, added tokens, normaliser, word splitting.

    Padding, truncation and the template of special tokens do not count; saving and loading again
    changes nothing.

    Args:
        tokenizer: a fast `transformers` tokenizer or a `tokenizers.Tokenizer`.

    Returns:
        32 hexadecimal digits.

    Raises:
        CorpusError: it is neither.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise CorpusError(
            f"{type(tokenizer).__name__} is no fast tokenizer; load one with "
            "AutoTokenizer.from_pretrained"
        )
    whole = json.loads(backend.to_str())
    parts = {name: whole.get(name) for name in FINGERPRINTED}
    parts["added_tokens"] = sorted(
        (token["id"], token["content"]) for token in whole.get("added_tokens") or ()
    )
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:32]


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1
