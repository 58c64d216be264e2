"""A few calls of the CUDA kernel, small and awkward, to run under `compute-sanitizer`: see gpu_check.sh."""

from pathlib import Path

import torch

from internimage_hf import kernel_loader


def main() -> None:
    folder = next(
        f
        for f in kernel_loader.find_variants(Path(__file__).resolve().parents[1] / "dcnv3_kernel", "cuda")
        if "stable-abi" in f.name
    )
    kernel = kernel_loader.load_variant(folder, "cuda")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        # the second makes tiles of the backward pass large
        for group_channels, size in ((5, (2, 9, 7)), (16, (40, 13, 17)), (32, (2, 9, 7))):
            tensors = [torch.randn(*size, c, device="cuda", dtype=dtype) for c in (3 * group_channels, 3 * 18, 3 * 9)]
            tensors[1].mul_(5)[..., 0] = torch.inf
            for deterministic in (False, True):
                torch.use_deterministic_algorithms(deterministic)
                leaves = [t.detach().requires_grad_() for t in tensors]
                kernel.dcnv3_softmax(*leaves, groups=3).sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
