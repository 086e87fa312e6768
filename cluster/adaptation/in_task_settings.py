"""The settings of `pluglm in-task`: a fine-tuning, and how its samples become knowledge."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from cluster.adaptation.prompt import check_template
from cluster.adaptation.settings import NO_MEMORY, check_conditions
from cluster.config_sections import sections_to_toml
from memory_server.store.names import check_domain
from trainer.finetune.settings import FinetuneSettings
from trainer.settings_fields import ConfigError, check_section, documented, shown

MEMORY, WITH_SAMPLES, SAMPLES = "memory", "memory+in-task", "in-task"
CONDITIONS: dict[str, str] = {
    NO_MEMORY: "the model of model.path, which reads nothing",
    MEMORY: "the same, with the memory as it is",
    WITH_SAMPLES: "the same, with the training samples in the memory as well",
    SAMPLES: "the same, with the training samples alone",
}
_KINDS = ("classification", "regression")


@dataclass(frozen=True, kw_only=True)
class InTaskSettings:
    """How training samples become entries, and what they are compared with."""

    SECTION: ClassVar[str] = "in_task"

    template: str = documented(
        "{text} It is about {label}.",
        "An entry's text, with the slots {text} and {label}, and {text_pair} for pairs.",
    )
    label_words: tuple[str, ...] = documented(
        (),
        'What an entry says instead of a label, such as ["0=world news", "1=sports"].',
        may_be_empty=True,
    )
    find_own_label: bool = documented(
        False,
        "Let the queries of training rows learn to find samples of their own label, with "
        "memory.retrieval_loss_weight; classification only.",
    )
    domain: str = documented("in-task", "Name of the samples' domain in the copy of the memory.")
    conditions: tuple[str, ...] = documented(
        (MEMORY, WITH_SAMPLES), "Which conditions are fine-tuned, in this order."
    )

    def __post_init__(self) -> None:
        check_section(self)
        check_template("in_task.template", self.template)
        check_conditions("in_task.conditions", self.conditions, CONDITIONS)
        try:
            check_domain(self.domain)
        except ValueError as error:
            raise ConfigError(f"in_task.domain = {shown(self.domain)}: {error}") from error
        self.words()

    def words(self) -> dict[str, str]:
        """Label to what an entry says of it.

        Raises:
            ConfigError: a pair without =, without a side, or of a label that has one.
        """
        found: dict[str, str] = {}
        for pair in self.label_words:
            label, equals, words = pair.partition("=")
            if not (equals and label.strip() and words.strip()) or label.strip() in found:
                raise ConfigError(
                    f"in_task.label_words = {shown(self.label_words)}: {pair!r} must be "
                    '"LABEL=WORDS", once for a label'
                )
            found[label.strip()] = words.strip()
        return found


@dataclass(frozen=True, kw_only=True)
class InTaskConfig(FinetuneSettings):
    """Everything that `pluglm in-task` needs to know."""

    in_task: InTaskSettings = field(default_factory=InTaskSettings)

    def __post_init__(self) -> None:
        if self.task.kind not in _KINDS:
            raise ConfigError(
                f'task.kind = "{self.task.kind}": must be one of "classification", "regression"; '
                "only rows of texts with one label become entries"
            )
        if not self.memory.store.strip():
            raise ConfigError(
                "memory.store is empty: the samples are added to a copy of a memory; give its store"
            )
        if self.memory.exclude_own_samples:
            raise ConfigError(
                "memory.exclude_own_samples = true: leave it out; it is set where samples are read"
            )

        if self.in_task.find_own_label:
            if self.task.kind != "classification":
                raise ConfigError(
                    f"in_task.find_own_label = true: must be false with task.kind = "
                    f'"{self.task.kind}", whose rows have no label'
                )
            # The settings of the conditions that read samples, checked as such.
            replace(self.memory, exclude_own_samples=True, find_own_label=True)

    def to_toml(self) -> str:
        """This configuration as TOML, every key written out; loads back equal."""
        return sections_to_toml(self)
