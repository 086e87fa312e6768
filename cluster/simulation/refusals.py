"""How a scenario that cannot be simulated is refused, in the words of a program or of a command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


class BadScenario(ValueError):
    """Some fields of a scenario cannot be simulated, alone or together.

    Its message names them as fields (`steps=10`), `as_options` as the command's options
    (`--steps 10`).
    """

    def __init__(self, text: str, values: Mapping[str, object]) -> None:
        """
        Args:
            text: what was given, what is allowed and what to do; `{steps}` stands for the field
                and its value, `{steps:name}` for its name alone.
            values: of the fields that it names, by name.
        """
        # SimPy makes an error that ends a simulation anew, from these.
        super().__init__(text, values)
        self._text, self._values = text, dict(values)

    def __str__(self) -> str:
        return self._in_words(as_options=False)

    def as_options(self) -> str:
        """The message for those who gave options of `pluglm simulate`."""
        return self._in_words(as_options=True)

    def _in_words(self, *, as_options: bool) -> str:
        fields = {name: _Field(name, value, as_options) for name, value in self._values.items()}
        return self._text.format(**fields)


@dataclass(frozen=True)
class _Field:
    name: str
    value: object
    as_option: bool

    def __format__(self, wanted: str) -> str:
        option = f"--{self.name.replace('_', '-')}"
        if wanted == "name":
            return option if self.as_option else self.name
        return f"{option} {self.value}" if self.as_option else f"{self.name}={self.value!r}"
