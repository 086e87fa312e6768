"""The settings of `pluglm adapt compare`: a fine-tuning, and what it is compared under."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cluster.config_sections import sections_to_toml
from trainer.finetune.settings import FinetuneSettings
from trainer.settings_fields import ConfigError, check_section, described, documented, shown

NO_MEMORY, GENERAL, BOTH, DOMAIN = "no-memory", "general", "general+domain", "domain"
BASELINE, DAPT = "baseline", "dapt"
CONDITIONS: dict[str, str] = {
    NO_MEMORY: "the model of model.path, which reads nothing",
    GENERAL: "the same, with the general memory",
    BOTH: "the same, with the general memory and the domain's: the paper's adaptation",
    DOMAIN: "the same, with the domain's memory alone",
    BASELINE: "plain BERT of the same size and training",
    DAPT: "the baseline, pre-trained further on the domain's text",
}


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What is compared."""

    SECTION: ClassVar[str] = "compare"

    domain: tuple[str, ...] = field(
        metadata=described("Domains of memory.store that hold the domain's text.")
    )
    general: tuple[str, ...] = documented(
        ("default",), "Domains of memory.store that are the general memory."
    )
    baseline: str = documented(
        "", "Directory of plain BERT of the same size and training as model.path."
    )
    dapt: str = documented(
        "", "Directory of the baseline after further pre-training on the domain's text."
    )
    conditions: tuple[str, ...] = documented(
        tuple(CONDITIONS), "Which conditions are fine-tuned, in this order."
    )

    def __post_init__(self) -> None:
        check_section(self)
        check_conditions("compare.conditions", self.conditions, CONDITIONS)
        for key, path in (("baseline", self.baseline), ("dapt", self.dapt)):
            if key in self.conditions and not path.strip():
                raise ConfigError(
                    f'compare.{key} is empty: give the directory of a model, or leave "{key}" out '
                    "of compare.conditions"
                )
        both = set(self.general) & set(self.domain)
        if both:
            raise ConfigError(
                f"compare.domain = {shown(self.domain)}: {', '.join(sorted(both))} is in "
                "compare.general already, so there would be nothing to compare"
            )


@dataclass(frozen=True, kw_only=True)
class AdaptationConfig(FinetuneSettings):
    """Everything that `pluglm adapt compare` needs to know."""

    compare: CompareSettings

    def __post_init__(self) -> None:
        if self.memory.domains:
            raise ConfigError(
                f"memory.domains = {shown(self.memory.domains)}: must be empty; compare.general "
                "and compare.domain say which domains each condition reads"
            )
        reading = {GENERAL, BOTH, DOMAIN} & set(self.compare.conditions)
        if reading and not self.memory.store.strip():
            raise ConfigError(
                "memory.store is empty: give the store of the memory that "
                f"{', '.join(sorted(reading))} read"
            )

    def to_toml(self) -> str:
        """This configuration as TOML, every key written out; loads back equal."""
        return sections_to_toml(self)


def check_conditions(key: str, given: tuple[str, ...], known: dict[str, str]) -> None:
    """Refuse conditions that there are not, and one that is named twice.

    Raises:
        ConfigError: names those that there are.
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        allowed = ", ".join(f'"{name}"' for name in known)
        raise ConfigError(f"{key} = {shown(given)}: {unknown[0]!r} must be one of {allowed}")
    if len(set(given)) < len(given):
        raise ConfigError(f"{key} = {shown(given)}: one is given twice")
