# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""What the configurations of this package have in common: labels, checks of fields, loading without saved code."""

import math
from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class InternImageBaseConfig(PreTrainedConfig):
    """Base class of the configurations. `label2id` follows from `id2label` if it is not given."""

    def __post_init__(self, **kwargs):
        if self.id2label is not None and self.label2id is None:
            self.label2id = {name: int(index) for index, name in self.id2label.items()}
        super().__post_init__(**kwargs)

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"`{name}` must be {expected}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers. `auto_map` is left out where this class is saved without its code."""
        if cls._auto_class is None:
            config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().from_dict(config_dict, **kwargs)


def is_int(value: Any, minimum: int) -> bool:
    """Whether a value is an integer, not a bool, of at least `minimum`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


__all__ = ["InternImageBaseConfig", "is_int", "is_number"]
