"""A training sample and its label as one text, through a template, cut so that the label stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from trainer.settings_fields import ConfigError, shown

TEXT, TEXT_PAIR, LABEL = "text", "text_pair", "label"
SLOTS = (TEXT, TEXT_PAIR, LABEL)


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """A sample as it goes into a memory; `cut`: its text was shortened to make room."""

    text: str
    cut: bool


def check_template(key: str, template: str) -> tuple[str, ...]:
    """The slots of a template, in order.

    Raises:
        ConfigError: no text or no label in it, an unknown slot, or braces that do not match.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"{key} = {shown(template)}: its braces do not match ({error}); write a brace that is "
            "meant as one twice"
        ) from error
    slots = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if name not in SLOTS or form or conversion:
            raise ConfigError(
                f"{key} = {shown(template)}: {{{name}}} must be one of {{text}}, {{text_pair}} and "
                "{label}, as they stand here"
            )
        slots.append(name)
    missing = [name for name in (TEXT, LABEL) if name not in slots]
    if missing:
        raise ConfigError(
            f"{key} = {shown(template)}: has no slot {{{missing[0]}}}; an entry needs the "
            'sample\'s text and its label, such as "{text} It is about {label}."'
        )
    return tuple(slots)


def prompted(
    template: str,
    samples: Sequence[Mapping[str, str]],
    backend: Any,
    *,
    room: int,
) -> list[Prompted]:
    """Samples through a template, each of at most `room` tokens.

    Of a sample that is too long the longest text loses tokens at its end; the template's own words
    and the label stay, which are what the entry is for.

    Args:
        template: was checked with `check_template`.
        samples: slot to text; every slot of the template.
        backend: a `tokenizers.Tokenizer` that neither truncates nor pads.
        room: tokens, without special ones.

    Raises:
        ConfigError: template and label alone take more; names the sample.
    """
    texts = [template.format(**sample) for sample in samples]
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    found = []
    for number, (text, encoding) in enumerate(zip(texts, encodings, strict=True), start=1):
        if len(encoding.ids) <= room:
            found.append(Prompted(text=text, cut=False))
            continue
        shorter = _shortened(template, samples[number - 1], backend, room)
        if shorter is None:
            raise ConfigError(
                f"training row {number}: the template and the label "
                f"{samples[number - 1][LABEL]!r:.60} alone take more than the {room} tokens of an "
                "entry; use a shorter template or label words, or a memory of longer entries"
            )
        found.append(Prompted(text=shorter, cut=True))
    return found


def _shortened(template: str, sample: Mapping[str, str], backend: Any, room: int) -> str | None:
    left = dict(sample)
    while True:
        text = template.format(**left)
        over = len(backend.encode(text, add_special_tokens=False).ids) - room
        if over <= 0:
            return text
        # What is left of a text may be tokenised otherwise, so that one cut need not be enough.
        spans = {
            name: backend.encode(left[name], add_special_tokens=False).offsets
            for name in (TEXT, TEXT_PAIR)
            if name in left
        }
        longest = max(spans, key=lambda name: len(spans[name]))
        offsets = spans[longest]
        if not offsets:
            return None
        keep = max(0, len(offsets) - over)
        left[longest] = left[longest][: offsets[keep - 1][1]] if keep else ""
