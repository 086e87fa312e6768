"""What a conversion did with every tensor and row, as JSON beside its result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.export import write_json

REPORT = "conversion.json"


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What became of everything.

    Attributes:
        source: what was converted.
        out: where the result is.
        taken: the result's name of a tensor to the source's.
        left: tensors of the source that the result has no place for.
        made: tensors of the result that the source does not have.
        disagreeing: names of the source whose tensor another name of the same tensor overrides.
        defaults: settings that the source's configuration does not name, with the published
            code's own value, which was taken.
        memory: facts about the memory; empty without one.
        notes: what else a person should know, one sentence each.
    """

    source: str
    out: str
    taken: dict[str, str]
    left: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    disagreeing: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def write(self, directory: Path) -> None:
        """Write it as JSON into a directory."""
        write_json(directory / REPORT, asdict(self))
