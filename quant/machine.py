"""What this machine really runs: which products its GPU has, and which of comfy-kitchen's kernels are there for them.

Kitchen's own checks ask the first GPU only, and its svdquant layout asks nothing: below sm 80 that kernel has no body,
and zeros come out (comfy-kitchen svdquant_utils.cuh). So everything that runs, recommends or explains a format asks
here. Sources: kitchen's constraints (backends/*/__init__.py), which tests/quant/test_machine.py holds this table to;
its hip/architectures.json; ComfyUI's comfy/quant_ops.py, which turns kitchen's CUDA backend off below CUDA 13.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

ALIGNED_ROWS = 8  # kitchen's svdquant kernel reads rows 16 bytes at a time: N % 8 == 0
NVIDIA, AMD, APPLE, INTEL, CPU = "NVIDIA", "AMD", "Apple", "Intel", "CPU"
KITCHENS_CUDA = 13  # what ComfyUI wants of PyTorch before it uses kitchen's CUDA backend
# AMD's architectures in kitchen's list, by prefix: with matrix cores, and without
WMMA, ELEMENTWISE = ("gfx110", "gfx115", "gfx117", "gfx120"), ("gfx103",)


@dataclass(frozen=True)
class Kernel:
    """A product of a layer's input and its stored codes.

    ``function``: kitchen's name of it, "" for PyTorch's own. ``cards``: who has it, in words. ``native``: the compute
    capabilities whose tensor cores have it; ``floor``: the least that the kernel takes. ``direct``: called past
    kitchen's registry, on any CUDA. ``amd``: kitchen has it for AMD's matrix cores; ``elementwise``: for AMD's GPUs
    without, too.
    """

    function: str
    cards: str
    native: tuple[tuple[int, int], ...]
    floor: int
    direct: bool = False
    amd: bool = True
    elementwise: bool = False


KERNELS = {
    "int4": Kernel("scaled_mm_svdquant_w4a4", "NVIDIA Ampere, Ada, Blackwell", ((80, 89), (100, 129)), 80, direct=True),
    "rotated int4": Kernel("convrot_w4a4_linear", "NVIDIA Turing, Ampere, Ada, Blackwell", ((75, 89), (100, 129)), 75),
    "4-bit weights": Kernel("gemv_awq_w4a16", "NVIDIA Ampere and newer", ((80, 129),), 80, elementwise=True),
    "4-bit weights, int8": Kernel("w4a8_int8_linear", "NVIDIA Ampere and newer", ((80, 129),), 80),
    "int8": Kernel("int8_linear", "NVIDIA Turing and newer", ((75, 129),), 75),
    "fp8": Kernel("", "NVIDIA Ada, Hopper, Blackwell", ((89, 129),), 89, amd=False),
    "fp4": Kernel("scaled_mm_nvfp4", "NVIDIA Blackwell", ((100, 129),), 100, amd=False),
}


@dataclass(frozen=True)
class Machine:
    """``sm``: an NVIDIA GPU's compute capability, 89 for sm_89; ``arch``: an AMD GPU's, gfx1100. ``cuda``: what PyTorch
    was built for. ``missing``: why kitchen's kernels for this GPU are not there, "" where they are.
    """

    kind: str
    name: str = ""
    sm: int | None = None
    arch: str = ""
    cuda: tuple[int, ...] = ()
    missing: str = ""

    @property
    def title(self) -> str:
        """The machine in a few words."""
        detail = {NVIDIA: f"sm_{self.sm}", AMD: self.arch}.get(self.kind, "")
        return " ".join(part for part in (self.name or self.kind, f"({detail})" if detail else "") if part)

    def lacks(self, kernel: str) -> str:
        """Why this machine has no ``kernel`` of `KERNELS`; "" where it has it."""
        row = KERNELS[kernel]
        if self.kind == AMD:
            return self._amd_lacks(row)
        if self.kind != NVIDIA:
            return f"comfy-kitchen has no kernels for {'a CPU' if self.kind == CPU else f'{self.kind} GPUs'}"
        if self.sm < row.floor:
            return f"the kernel needs sm_{row.floor}"
        if not any(low <= self.sm <= high for low, high in row.native):
            return f"sm_{self.sm} has no such tensor cores"
        if row.function and self.missing:
            return self.missing
        if row.function and not row.direct and self.cuda[:1] < (KITCHENS_CUDA,):
            built = ".".join(map(str, self.cuda)) or "none"
            return f"ComfyUI uses the kernel with CUDA {KITCHENS_CUDA}, and PyTorch here is built for CUDA {built}"
        return ""

    def _amd_lacks(self, row: Kernel) -> str:
        if self.missing:
            return self.missing
        if not row.amd:
            return "comfy-kitchen has no such kernel for AMD"
        if self.arch.startswith(WMMA) or (row.elementwise and self.arch.startswith(ELEMENTWISE)):
            return ""
        if self.arch.startswith(ELEMENTWISE):
            return f"{self.arch} has no matrix cores"
        return f"comfy-kitchen has no kernels for {self.arch}"


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


def here() -> Machine:
    """The machine this runs on, by its first GPU."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        if is_amd():
            arch = str(getattr(properties, "gcnArchName", "")).split(":")[0]
            return Machine(AMD, properties.name, arch=arch, missing=_missing("hip"))
        cuda = tuple(int(part) for part in str(torch.version.cuda or "").split(".") if part.isdigit())
        return Machine(
            NVIDIA, properties.name, capability(torch.device("cuda", 0)), cuda=cuda, missing=_missing("cuda")
        )
    if torch.backends.mps.is_available():
        return Machine(APPLE)
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return Machine(INTEL, torch.xpu.get_device_name(0))
    return Machine(CPU)


def _missing(backend: str) -> str:
    """Why kitchen could not load its kernels for ``backend``. (That ComfyUI turned them off is another matter.)"""
    from comfy_kitchen import registry

    reason = registry.list_backends().get(backend, {}).get("unavailable_reason")
    return f"comfy-kitchen could not load its kernels ({str(reason).strip().splitlines()[0][:120]})" if reason else ""


def int4_kernels(device: torch.device):
    """Kitchen's CUDA functions where ``device`` has the products they are written for, else None."""
    from comfy_kitchen.backends import cuda

    sm = capability(device)
    enough = sm is not None and sm >= KERNELS["int4"].floor
    return cuda if enough and getattr(cuda, "_EXT_AVAILABLE", False) else None


def free_workspaces() -> None:
    """Lets go of the buffers that kitchen's svdquant keeps on the GPU for each shape it has met."""
    from comfy_kitchen.backends import cuda

    getattr(cuda, "_SVDQUANT_WORKSPACE_CACHE", {}).clear()
