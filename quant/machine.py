"""What this machine really runs. Kitchen's own checks ask the first GPU only, and its svdquant layout asks nothing.

svdquant_w4a4   m16n8k64 int4 products: NVIDIA sm 80 and newer. Below, the kernel has no body and returns zeros
                (comfy-kitchen svdquant_utils.cuh). Its rows are read 16 bytes at a time: N % 8 == 0.
"""

from __future__ import annotations

from functools import lru_cache

import torch

INT4_SM = 80
ALIGNED_ROWS = 8


def is_amd() -> bool:
    """Whether "cuda" means an AMD GPU here."""
    return torch.version.hip is not None


@lru_cache
def capability(device: torch.device) -> int | None:
    """The compute capability of an NVIDIA GPU, 89 for sm_89; None where there is no such GPU."""
    if device.type != "cuda" or is_amd() or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def int4_kernels(device: torch.device):
    """Kitchen's CUDA functions where ``device`` has the products they are written for, else None."""
    from comfy_kitchen.backends import cuda

    sm = capability(device)
    return cuda if sm is not None and sm >= INT4_SM and getattr(cuda, "_EXT_AVAILABLE", False) else None


def free_workspaces() -> None:
    """Lets go of the buffers that kitchen's svdquant keeps on the GPU for each shape it has met."""
    from comfy_kitchen.backends import cuda

    getattr(cuda, "_SVDQUANT_WORKSPACE_CACHE", {}).clear()
