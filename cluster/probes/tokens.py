"""Objects and masked sentences as a model's tokens."""

from __future__ import annotations

from collections.abc import Collection

from cluster.config import ConfigError
from cluster.memory_tools import MASK
from cluster.trained_model import TrainedModel


def one_token(trained: TrainedModel, answer: str) -> int | None:
    """The token of a word; None: it is several, or none that the tokenizer knows."""
    # With a space before it, as a word in a sentence has one: some tokenizers tell the two apart.
    for text in (f" {answer}", answer):
        ids = trained.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) == 1 and ids[0] != trained.tokenizer.unk_token_id:
            return int(ids[0])
    return None


def answer_token(trained: TrainedModel, answer: str, allowed: Collection[int] | None) -> int:
    """An object's token. Raises ConfigError: it is none, or none of the allowed ones."""
    token = one_token(trained, answer)
    if token is None:
        ids = trained.tokenizer(answer, add_special_tokens=False, verbose=False).input_ids
        if len(ids) == 1:
            raise ConfigError(f"the object {answer!r} is not in the tokenizer's vocabulary")
        raise ConfigError(f"the object {answer!r} is {len(ids)} tokens, and a mask stands for one")
    if allowed is not None and token not in allowed:
        raise ConfigError(f"the object {answer!r} is not among the answers that may be given")
    return token


def sentence_ids(trained: TrainedModel, text: str) -> tuple[int, ...]:
    """A sentence with its one mask, [CLS] and [SEP].

    Raises:
        ConfigError: it is longer than the model reads, which would cut the mask away, or has not
            one mask.
    """
    tokenizer = trained.tokenizer
    given = text.replace(MASK, tokenizer.mask_token)
    ids = tokenizer(given, add_special_tokens=False, verbose=False).input_ids
    if len(ids) + 2 > trained.max_positions:
        raise ConfigError(
            f"{text[:60]!r}... has {len(ids)} tokens, and the model reads "
            f"{trained.max_positions - 2}"
        )
    if ids.count(tokenizer.mask_token_id) != 1:
        raise ConfigError(f"{text[:60]!r}... has {ids.count(tokenizer.mask_token_id)} masks, not 1")
    return (int(tokenizer.cls_token_id), *ids, int(tokenizer.sep_token_id))
