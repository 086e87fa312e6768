"""Whether DeepSpeed takes a user's values, asked of DeepSpeed's own models before any work."""

from __future__ import annotations

import json
from typing import Any

from trainer.settings import ConfigError


def check_values(merged: dict[str, Any], file: str) -> None:
    """Refuse values of sections that DeepSpeed would refuse on the ranks.

    Args:
        merged: the whole configuration. file: what a person calls the user's part of it.

    Raises:
        ConfigError: names the first keys, what was given and what DeepSpeed says.
    """
    # Takes seconds to import, and is needed only where a user brings JSON.
    from deepspeed.runtime.precision_config import (  # noqa: TID251
        DeepSpeedBF16Config,
        DeepSpeedFP16Config,
    )
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: TID251
    from pydantic import ValidationError

    sections = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    wrong = []
    for name, model in sections.items():
        try:
            model(**merged.get(name, {}))
        except ValidationError as error:
            for one in error.errors():
                keys = ".".join([name, *map(str, one["loc"])])
                wrong.append(f"{keys} = {json.dumps(one['input'], default=str)}: {one['msg']}")
    if wrong:
        raise ConfigError(f"{file}: DeepSpeed refuses {'; '.join(wrong)}; correct it there")
