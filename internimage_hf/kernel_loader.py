# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Finds a compiled DCNv3 kernel for a kind of device."""

from types import ModuleType


def get_dcnv3_kernel(device_type: str) -> tuple[ModuleType | None, str]:
    """The kernel module that serves tensors on `device_type`, or None, and the reason."""
    return None, "this version has no compiled DCNv3 kernel; the PyTorch definition is used"
