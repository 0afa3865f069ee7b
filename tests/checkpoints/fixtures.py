"""Files packed by the engines' own code, each with its expected values (tests/data/nunchaku)."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from comfyui_nibble.quant import gguf_blocks
from safetensors.torch import load_file

DATA = Path(__file__).resolve().parent.parent / "data" / "nunchaku"
ALONE = "layer"  # what a fixture of one layer, whose tensors have no prefix, is called here


@lru_cache(maxsize=1)
def files() -> tuple[Path, ...]:
    return tuple(sorted(p for p in DATA.rglob("*.safetensors") if "expected" not in p.name))


@lru_cache(maxsize=32)
def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {(n if "." in n else f"{ALONE}.{n}"): t for n, t in load_file(path).items()}


def raw(path: Path) -> dict[str, torch.Tensor]:
    return dict(_tensors(path))


def expected(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Layer -> {name: tensor}."""
    out: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in _tensors(path.with_name(path.name.replace(".safetensors", ".expected.safetensors"))).items():
        layer, _, last = name.rpartition(".")
        out.setdefault(layer, {})[last] = value
    return out


@dataclass(frozen=True)
class Case:
    path: Path
    layer: str

    def __str__(self):
        return f"{self.path.parent.name}-{self.path.stem}-{self.layer}"


def cases() -> list[Case]:
    return [Case(p, layer) for p in files() for layer in expected(p)]


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def blocks(codec: str, n: int, k: int, seed: int = 0) -> np.ndarray:
    """Random blocks with scales that are numbers."""
    block = gguf_blocks.BLOCKS[codec]
    data = np.random.default_rng(seed).integers(0, 256, (n, k // block.weights, block.nbytes), dtype=np.uint8)
    for start in {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,), "q8_0": (0,), "q4_0": (0,), "q5_0": (0,)}.get(
        codec, (0, 2)
    ):
        data[..., start : start + 2] = np.array([0.01 * (seed + 1)], np.float16).view(np.uint8)
    return data.reshape(n, -1)
