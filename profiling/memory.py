"""How much memory is in use, and what it has peaked at: torch's allocator, the GPU driver, and this process.

Three numbers on a GPU, because none tells all: torch's allocator does not see weights that ComfyUI keeps outside it
(dynamic VRAM), the driver's process count does, and the process's resident memory holds what was offloaded.
Without a GPU only the last one exists. Every number is in bytes; 0 means this machine cannot tell.
"""

from __future__ import annotations

import mmap
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

PAGES, PAGE = Path("/proc/self/statm"), mmap.PAGESIZE


@dataclass(frozen=True)
class Peaks:
    """Bytes at their highest. ``allocated``, ``reserved``: torch's GPU allocator, live tensors and what it holds;
    ``process``: what the GPU's driver counts for this process; ``host``: resident memory of this process.
    """

    allocated: int = 0
    reserved: int = 0
    process: int = 0
    host: int = 0

    def over(self, other: Peaks) -> Peaks:
        """The higher of each."""
        mine, theirs = asdict(self), asdict(other)
        return Peaks(**{name: max(mine[name], theirs[name]) for name in mine})

    @property
    def device(self) -> int:
        """The best single number for the card: the driver's where there is one, else the allocator's."""
        return self.process or self.reserved or self.allocated


@dataclass(frozen=True)
class Device:
    """Where a run happened. ``limit``: bytes of the card, or of this machine's RAM when there is no card."""

    name: str
    kind: str  # cuda or cpu
    limit: int


class HostProbe:
    """Memory of a machine without a GPU that torch can ask: this process's resident bytes."""

    def __init__(self):
        self.device = Device(cpu_name(), "cpu", host_total())

    def wait(self) -> None:
        """Waits for work that was queued. A CPU has none."""

    def restart(self) -> None:
        """Forgets the peaks so far. The resident size has none to forget: whoever samples it keeps the highest."""

    def read(self) -> Peaks:
        """The peaks since `restart`, and what is in use now."""
        return Peaks(host=host_used())

    def used(self) -> tuple[int, Peaks]:
        """(bytes in use on the device, what this process holds of them) now; on a CPU both are its resident bytes."""
        host = host_used()
        return host, Peaks(host=host)


class CudaProbe:
    """Memory of an NVIDIA or AMD card, through torch, and through NVML where its Python package is installed."""

    def __init__(self, index: int):
        self._index = index
        properties = torch.cuda.get_device_properties(index)
        self.device = Device(properties.name, "cuda", properties.total_memory)
        self._process = process_counter(index)

    def wait(self) -> None:
        """Waits for the card, so that what was queued counts to the node that queued it."""
        torch.cuda.synchronize(self._index)

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._index)

    def read(self) -> Peaks:
        allocated = torch.cuda.max_memory_allocated(self._index)
        return Peaks(allocated, torch.cuda.max_memory_reserved(self._index), self._process(), host_used())

    def used(self) -> tuple[int, Peaks]:
        """Without NVML the first number counts every program on the card, and the second none of it."""
        free, total = torch.cuda.mem_get_info(self._index)
        now = Peaks(process=self._process(), host=host_used())
        return now.process or total - free, now


def probe(device: str | torch.device | None = None) -> HostProbe | CudaProbe:
    """The probe for ``device`` (default: a CUDA device if torch has one)."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return HostProbe()
    return CudaProbe(torch.cuda.current_device() if device.index is None else device.index)


def process_counter(index: int):
    """A function that returns the bytes the driver counts for this process on card ``index``, or 0 without NVML."""
    try:
        import pynvml
    except ImportError:
        return lambda: 0
    import os

    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(index).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except (pynvml.NVMLError, AttributeError):
        return lambda: 0

    def used() -> int:
        try:
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except pynvml.NVMLError:
            return 0
        return sum(p.usedGpuMemory or 0 for p in running if p.pid == os.getpid())

    return used


def host_used() -> int:
    """Resident bytes of this process: Linux's own count, else psutil's where it is installed (ComfyUI has it)."""
    if PAGES.exists():
        return int(PAGES.read_text().split()[1]) * PAGE
    try:
        import psutil
    except ImportError:
        return 0
    return psutil.Process().memory_info().rss


def host_total() -> int:
    """Bytes of RAM in this machine, or 0 where neither psutil nor Linux can say."""
    try:
        import psutil
    except ImportError:
        info = Path("/proc/meminfo")
        return int(info.read_text().split()[1]) * 1024 if info.exists() else 0
    return psutil.virtual_memory().total


def cpu_name() -> str:
    """What the CPU calls itself, or its architecture."""
    import platform

    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "CPU"
