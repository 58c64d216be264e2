"""In: the operator. Out: stateless layers that replace a model's layers of these names through `kernels.kernelize`."""

import torch
from torch import nn

from . import dcnv3, dcnv3_softmax


class DCNv3(nn.Module):
    """Deformable sampling with the softmax of the modulation mask; see `dcnv3_softmax`."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(
        self,
        input: torch.Tensor,
        offset: torch.Tensor,
        mask: torch.Tensor,
        groups: int,
        offset_scale: float = 1.0,
        remove_center: bool = False,
    ) -> torch.Tensor:
        return dcnv3_softmax(
            input, offset, mask, groups=groups, offset_scale=offset_scale, remove_center=remove_center
        )


class DCNv4(nn.Module):
    """Deformable sampling with the modulation mask as it is, which DCNv4 uses; see `dcnv3`."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(
        self, input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, groups: int, offset_scale: float = 1.0
    ) -> torch.Tensor:
        return dcnv3(input, offset, mask, groups=groups, offset_scale=offset_scale)


__all__ = ["DCNv3", "DCNv4"]
