"""A few small calls of the CUDA kernel with shapes that are easy to get wrong, to run under `compute-sanitizer`."""

import harness
import torch


def main() -> None:
    kernel = harness.built_kernels("cuda")["CUDA kernel"]
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        # The second makes tiles of the backward pass large.
        for group_channels, size in ((5, (2, 9, 7)), (16, (40, 13, 17)), (32, (2, 9, 7))):
            tensors = [torch.randn(*size, c, device="cuda", dtype=dtype) for c in (3 * group_channels, 3 * 18, 3 * 9)]
            tensors[1].mul_(5)[..., 0] = torch.inf
            for deterministic in (False, True):
                torch.use_deterministic_algorithms(deterministic)
                leaves = [tensor.detach().requires_grad_() for tensor in tensors]
                kernel.dcnv3_softmax(*leaves, groups=3).sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
