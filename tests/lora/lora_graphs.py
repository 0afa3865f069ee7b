"""Workflows and files for the LoRA tests of tests/comfy: nodes in API format, and a kit around a running server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lora_files
import torch
from safetensors.torch import load_file, save_file

FAMILIES = {
    # family: (latent node, conditioning width, pooled width, cfg, scheduler)
    "sd15": ("EmptyLatentImage", 768, 0, 4.0, "normal"),
    "sdxl": ("EmptyLatentImage", 2048, 1280, 4.0, "normal"),
    "flux": ("EmptySD3LatentImage", 64, 64, 1.0, "simple"),
    "sd3": ("EmptySD3LatentImage", 128, 128, 4.0, "simple"),
}


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def four(name: str) -> dict:
    return node("NibbleLoadModel", model_name=name)


def stock(name: str) -> dict:
    return node("UNETLoader", unet_name=name, weight_dtype="default")


def lora_node(name: str, strength: float = 1.0, model: str = "model") -> dict:
    return node("LoraLoaderModelOnly", model=[model, 0], lora_name=name, strength_model=strength)


def graph(family: str, loader: dict, last: str = "model", steps: int = 2, **more) -> dict:
    """``loader`` and ``more`` nodes, sampled from node ``last`` with random conditions, and saved."""
    latent, width, pooled, cfg, scheduler = FAMILIES[family]
    return {
        "model": loader, **more,
        "pos": node("NibbleTestConditioning", tokens=20, width=width, pooled=pooled, seed=1),
        "neg": node("NibbleTestConditioning", tokens=20, width=width, pooled=pooled, seed=2),
        "latent": node(latent, width=128, height=128, batch_size=1),
        "sample": node("KSampler", model=[last, 0], positive=["pos", 0], negative=["neg", 0],
                       latent_image=["latent", 0], seed=5, steps=steps, cfg=cfg, sampler_name="euler",
                       scheduler=scheduler, denoise=1.0),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="lora/t"),
    }  # fmt: skip


def cosine(a, b) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


@dataclass
class Kit:
    """``server``, ``tiny``, ``tiny_4bit``: the fixtures of tests/comfy."""

    server: Any
    tiny: Any
    tiny_4bit: Any

    def models(self, family: str) -> tuple[str, str, dict[str, tuple[int, int]]]:
        """(float name, 4-bit name, {4-bit layer: (N, K)}), both files in the server's models."""
        names = []
        for path in (self.tiny(family), self.tiny_4bit(family)):
            target = self.server.models("diffusion_models") / path.name
            if not target.exists():
                target.symlink_to(path)
            names.append(path.name)
        file = load_file(self.tiny_4bit(family))
        layers = [k.removesuffix(".comfy_quant") for k in file if k.endswith(".comfy_quant")]
        weights = load_file(self.tiny(family))
        return *names, {n: tuple(weights[f"{n}.weight"].shape) for n in layers}

    def put(self, name: str, tensors: dict, metadata: dict | None = None) -> str:
        """Writes a LoRA into the server's models/loras; returns its name."""
        path = self.server.models("loras") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata)
        return name

    def lora(self, name: str, layers: dict, spelling: str = "kohya", size: float = 0.5, seed: int = 0, **more) -> str:
        """A plain LoRA for ``layers`` in the server's models/loras."""
        parts = lora_files.factors(layers, more.pop("rank", 4), seed, size)
        return self.put(name, lora_files.spell(parts, spelling, **more))

    def kind(self, name: str, layers: dict, kind: str, size: float = 0.5) -> str:
        """A file of another kind of update for every layer, in kohya names."""
        file = {}
        for i, (layer, (n, k)) in enumerate(layers.items()):
            tensors = lora_files.kind(kind, n, k, seed=i, size=size)
            file |= {f"lora_unet_{layer.replace('.', '_')}{end}": t for end, t in tensors.items()}
        return self.put(name, file)

    def latent(self, workflow: dict) -> torch.Tensor:
        return self.server.latent(self.server.done(workflow), "save")
