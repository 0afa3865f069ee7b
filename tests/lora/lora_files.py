"""LoRA files as people have them, made from seeds: one set of factors in every spelling. Used here and in tests/comfy.

A *spelling* turns a layer's path into a target and names the two halves; a *kind* makes the tensors of one layer.
"""

from __future__ import annotations

import torch

A_B = (".lora_A.weight", ".lora_B.weight")
DOWN_UP = (".lora_down.weight", ".lora_up.weight")
# spelling -> (target of a path, (down suffix, up suffix)); paths are dotted, native or diffusers
SPELLINGS = {
    "kohya": (lambda path: "lora_unet_" + path.replace(".", "_"), DOWN_UP),
    "onetrainer": (lambda path: "lora_transformer_" + path.replace(".", "_"), DOWN_UP),
    "comfyui": (lambda path: "diffusion_model." + path, DOWN_UP),
    "bfl": (lambda path: path, A_B),
    "peft": (lambda path: "base_model.model." + path, A_B),
    "peft named": (lambda path: "base_model.model." + path, (".lora_A.style.weight", ".lora_B.style.weight")),
    "diffusers unet": (lambda path: "unet." + path, A_B),
    "diffusers transformer": (lambda path: "transformer." + path, A_B),
    "old diffusers": (lambda path: "unet." + path, (".lora.down.weight", ".lora.up.weight")),
    "processor": (lambda path: _processor(path), ("_lora.down.weight", "_lora.up.weight")),
    "onetrainer dotted": (lambda path: "unet." + path, DOWN_UP),
    "lycoris": (lambda path: "lycoris_" + path.replace(".", "_"), DOWN_UP),
}


def _processor(path: str) -> str:
    """2023's diffusers: attention layers hang below ``processor``, and to_out has no number."""
    head, _, last = path.removesuffix(".0").rpartition(".")
    return f"unet.{head}.processor.{last}" if last.startswith("to_") else f"unet.{path}"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def factors(shapes: dict[str, tuple[int, int]], rank: int = 4, seed: int = 0, size: float = 0.1) -> dict:
    """Layer -> (down (r, K), up (N, r)); the product is about ``size`` times as large as a weight of unit gain."""
    g = generator(seed)
    out = {}
    for layer, (n, k) in shapes.items():
        down = torch.randn(rank, k, generator=g) / k**0.5
        out[layer] = (down, size * torch.randn(n, rank, generator=g) / rank**0.5)
    return out


def spell(parts: dict, spelling: str, alpha: float | None = None, names: dict[str, str] | None = None) -> dict:
    """The tensors of a plain LoRA file. ``names``: layer -> the path to write instead."""
    target, (down, up) = SPELLINGS[spelling]
    out = {}
    for layer, (a, b) in parts.items():
        name = target((names or {}).get(layer, layer))
        out[name + down], out[name + up] = a.clone(), b.clone()
        if alpha is not None:
            out[name + ".alpha"] = torch.tensor(alpha)
    return out


def delta(parts: dict, layer: str, scale: float = 1.0) -> torch.Tensor:
    down, up = parts[layer]
    return scale * up @ down


def kind(name: str, n: int, k: int, rank: int = 4, seed: int = 0, size: float = 0.1) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of one layer's update of another kind than a plain LoRA."""
    g = generator(seed)
    noise = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    a, b = 8, 8  # LoKr's small side
    lora = {".lora_down.weight": noise(rank, k) / k**0.5, ".lora_up.weight": size * noise(n, rank) / rank**0.5}
    alpha = {".alpha": torch.tensor(rank / 2)}
    kinds = {
        "lora": lambda: lora | alpha,
        "dora": lambda: lora | alpha | {".dora_scale": 1 + 0.1 * noise(n, 1)},
        "dora columns": lambda: lora | alpha | {".dora_scale": (1 + 0.1 * noise(1, k)) * (n / k) ** 0.5},
        "loha": lambda: {
            ".hada_w1_a": size * noise(n, rank), ".hada_w1_b": noise(rank, k) / k**0.5,
            ".hada_w2_a": noise(n, rank) / rank, ".hada_w2_b": noise(rank, k),
        } | alpha,
        "lokr": lambda: {".lokr_w1": noise(a, b) / 8, ".lokr_w2": size * noise(n // a, k // b) / (k // b) ** 0.5},
        "lokr low": lambda: {
            ".lokr_w1": noise(a, b) / 8, ".lokr_w2_a": size * noise(n // a, rank),
            ".lokr_w2_b": noise(rank, k // b) / (k // b) ** 0.5,
        } | alpha,
        "oft": lambda: {".oft_blocks": 0.02 * noise(4, n // 4, n // 4)},
        "glora": lambda: {
            ".a1.weight": 0.1 * noise(rank, k) / k**0.5, ".a2.weight": noise(k, rank) / rank**0.5,
            ".b1.weight": noise(rank, k) / k**0.5, ".b2.weight": size * noise(n, rank) / rank**0.5,
        } | alpha,
        "diff": lambda: {".diff": size * noise(n, k) / k**0.5},
    }  # fmt: skip
    return kinds[name]()


KINDS = ("lora", "dora", "dora columns", "loha", "lokr", "lokr low", "oft", "glora", "diff")
