"""For `kernels benchmark`. In: a kernel. Out: times of InternImage-T's calls for images of 224 x 224, beside `grid_sample` of all points.

pip install 'kernels[benchmark]'
kernels benchmark ./dcnv3_kernel        # or a repository on the Hub, with --version 1
"""

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


POINTS = 9
SHAPES = ((56, 64), (28, 128), (14, 256), (7, 512))  # height and width, channels; by stage


def reference(input, offset, mask_logits, groups):
    """DCNv3 with 3 x 3 points, stride 1 and padding 1, by one `grid_sample`. Computes in float32."""
    dtype = input.dtype
    input, offset, mask_logits = (t.float() for t in (input, offset, mask_logits))
    batch, height, width, channels = input.shape
    offset = offset.unflatten(-1, (groups, POINTS, 2))
    cells = torch.arange(3, device=input.device) - 1
    x = torch.arange(width, device=input.device).view(-1, 1, 1) + cells.repeat_interleave(3) + offset[..., 0]
    y = torch.arange(height, device=input.device).view(-1, 1, 1, 1) + cells.repeat(3) + offset[..., 1]
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1)  # (N, H, W, G, P, 2)
    grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(batch * groups, height * width, POINTS, 2)
    value = input.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    samples = F.grid_sample(value, grid, align_corners=False)  # (N*G, D, H*W, P)
    mask = mask_logits.unflatten(-1, (groups, POINTS)).softmax(-1)
    mask = mask.permute(0, 3, 1, 2, 4).reshape(batch * groups, 1, height * width, POINTS)
    output = (samples * mask).sum(-1)
    return output.reshape(batch, channels, height, width).permute(0, 2, 3, 1).to(dtype)


class DCNv3Benchmark(Benchmark):
    """Forward passes, in bfloat16 on a GPU and float32 elsewhere."""

    seed = 0

    def prepare(self, stage):
        size, channels = SHAPES[stage - 1]
        self.groups = channels // 16
        batch, dtype = (1, torch.float32) if self.device == "cpu" else (32, torch.bfloat16)
        widths = (channels, self.groups * POINTS * 2, self.groups * POINTS)
        # small values, because the comparison uses an absolute tolerance
        self.tensors = [(torch.randn(batch, size, size, w) / 4).to(self.device, dtype) for w in widths]

    def compute(self, operator):
        with torch.no_grad():
            return operator(*self.tensors, groups=self.groups)

    def run(self):
        self.out = self.compute(self.kernel.dcnv3_softmax)

    def verify(self):
        return self.compute(reference)

    def setup_stage1(self):
        self.prepare(1)

    def setup_stage2(self):
        self.prepare(2)

    def setup_stage3(self):
        self.prepare(3)

    def setup_stage4(self):
        self.prepare(4)

    benchmark_stage1 = benchmark_stage2 = benchmark_stage3 = benchmark_stage4 = run
    verify_stage1 = verify_stage2 = verify_stage3 = verify_stage4 = verify


class DCNv3BackwardBenchmark(DCNv3Benchmark):
    """Forward and backward passes. The comparison covers the gradient of the input."""

    def compute(self, operator):
        leaves = [t.detach().requires_grad_() for t in self.tensors]
        output = operator(*leaves, groups=self.groups)
        return torch.autograd.grad(output, leaves, torch.full_like(output, 0.25))[0]
