"""Fixtures and paths that several test files use."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


# No test may use the network by accident; the ones that talk to a server on this machine say so themselves.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parent.parent
# Golden outputs that are too large for this repository lie beside it, where they are.
SHARED_PARITY = ROOT.parent / "shared" / "parity"

MODEL_CASES = ("t_like", "s_like", "l_like", "g_like_no_clip", "h_like")


def case_folder(case: str) -> Path:
    """The folder of a parity case; skips the test if it is not on this machine."""
    for folder in (FIXTURES / case, SHARED_PARITY / case):
        if folder.is_dir():
            return folder
    pytest.skip(f"the parity case {case} is not part of this repository, and ../shared/parity is absent")


def load_case(case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The official state dict of a parity case, in float32, and what the official model computed with it."""
    folder = case_folder(case)
    state_dict = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
    state_dict = {name: t.float() if t.is_floating_point() else t for name, t in state_dict.items()}
    return state_dict, load_file(folder / "expected.safetensors")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# The architectures of the tests: every switch of the official model is on in one of them and off in another.
TINY = {"channels": 8, "depths": [1, 1, 3, 1], "groups": [2, 4, 4, 8], "mlp_ratio": 2.0, "num_labels": 5}
TINY_VARIANTS = {
    "pre_norm": {},
    "post_norm": {"post_norm": True, "layer_scale_init_value": 0.1, "offset_scale": 2.0},
    "layer_scale_pre_norm": {"layer_scale_init_value": 0.5, "hidden_act": "relu"},
    "res_post_norm": {
        "res_post_norm": True,
        "level2_post_norm_block_ids": [0, 2],
        "dw_kernel_size": 5,
        "center_feature_scale": True,
    },
    "batch_norm": {"norm_layer": "BN", "hidden_act": "silu", "remove_center": True},
    "clip": {"post_norm": True, "center_feature_scale": True, "use_clip_projector": True, "remove_center": True},
}
