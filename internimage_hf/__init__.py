# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""InternImage for Hugging Face transformers: importing the package makes the Auto classes know `internimage`."""

import importlib

from .registration import register_auto_classes


__version__ = "0.1.0"

# Imported on first use, as transformers does it: none of them is needed to make the Auto classes work.
_EXPORTS = {
    "InternImageConfig": "configuration_internimage",
    "InternImageImageProcessor": "image_processing_internimage",
    "InternImageBackbone": "modeling_internimage",
    "InternImageForImageClassification": "modeling_internimage",
    "InternImageModel": "modeling_internimage",
    "InternImagePreTrainedModel": "modeling_internimage",
    "dcnv3_backend_report": "dcnv3",
    "use_dcnv3_backend": "dcnv3",
    "save_with_remote_code": "remote_code",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_auto_classes()
