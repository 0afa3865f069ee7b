"""Layers to calibrate on: synthetic ones with what makes real ones hard, and the real MiniLM."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from comfyui_nibble.quant.calib import presets
from comfyui_nibble.quant.calib.solve import Sample, Solved, output_error, solve
from comfyui_nibble.quant.policy import LayerPlan

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))

import published

CAPTIONS = Path(__file__).resolve().parents[2] / "data" / "captions.txt"


def synthetic(n: int, k: int, tokens: int, gelu: bool = False, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight (n, k), inputs (tokens, k)): power-law spectrum, 3 % of channels 6 to 40 times louder, heavy-tailed
    weights.

    Trained layers look away from the channels that shout: those columns of the weight are small.
    """
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(k, k, generator=g)).Q
    spectrum = torch.arange(1, k + 1).float() ** -0.5
    x = (torch.randn(tokens, k, generator=g) * spectrum / spectrum.square().mean().sqrt()) @ basis.t()
    loud = torch.randperm(k, generator=g)[: max(1, int(0.03 * k))]
    x[:, loud] *= 6 + 34 * torch.rand(len(loud), generator=g)
    tails = torch.randn(n, k, 4, generator=g).square().mean(-1).sqrt()
    w = torch.randn(n, k, generator=g) / tails / k**0.5
    w[:, loud] /= 8
    return w, torch.nn.functional.gelu(x) if gelu else x


def sample(x: torch.Tensor, seed: int = 0) -> Sample:
    """``x`` as a reservoir would hand it over: in random order."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return Sample(x[order], x.abs().amax(0))


def run(preset: str, w, x, rank: int = 32, unsigned: bool = False, bias=None, seed: int = 0) -> Solved:
    plan = LayerPlan("svdquant_w4a4", "", rank, unsigned)
    return solve(
        w,
        bias,
        None if x is None else sample(x),
        plan,
        (presets.PRESETS | published.ROWS)[preset],
        torch.bfloat16,
        seed,
    )


class MiniLM:
    """all-MiniLM-L6-v2's encoder linears, 6 in each of ``blocks``, with the inputs that texts give them.

    160 captions to calibrate, 256 others to test, and lines of its model card as text of another domain.
    """

    def __init__(self, folder: Path, blocks: Sequence[int] = range(6)):
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        self.model = AutoModel.from_pretrained(str(folder)).float().eval()
        captions = CAPTIONS.read_text(encoding="utf-8").splitlines()
        card = (folder / "README.md").read_text(encoding="utf-8")
        other = [line.strip() for line in re.split(r"[\n.]", card) if len(line.strip()) > 20]
        self.texts = {"calibration": captions[:160], "in domain": captions[160:416], "out of domain": other}
        inside = {f"layer.{i}" for i in blocks}
        self.linears = {
            n: m
            for n, m in self.model.encoder.named_modules()
            if isinstance(m, torch.nn.Linear) and ".".join(n.split(".")[:2]) in inside
        }
        self.inputs = {name: self.collect(texts) for name, texts in self.texts.items()}

    def collect(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Layer -> every token of its input."""
        seen: dict[str, list[torch.Tensor]] = {n: [] for n in self.linears}
        hooks = [
            m.register_forward_pre_hook(lambda _m, a, n=n: seen[n].append(a[0].reshape(-1, a[0].shape[-1])))
            for n, m in self.linears.items()
        ]
        with torch.no_grad():
            for text in texts:
                self.model(**self.tokenizer(text, return_tensors="pt", truncation=True, max_length=64))
        for h in hooks:
            h.remove()
        return {n: torch.cat(v) for n, v in seen.items()}

    @lru_cache(maxsize=32)  # noqa: B019  one instance a session
    def errors(self, preset: str, rank: int) -> dict[str, float]:
        """Geometric means over layers of the relative output error: {"in domain": ., "out of domain": .}."""
        logs = {"in domain": [], "out of domain": []}
        for name, layer in self.linears.items():
            w, unsigned = layer.weight.detach(), name.endswith("output.dense") and "attention" not in name
            solved = run(preset, w, self.inputs["calibration"][name], rank, unsigned)
            for where, values in logs.items():
                values.append(math.log(output_error(self.inputs[where][name], w, solved.weight)))
        return {where: math.exp(sum(v) / len(v)) for where, v in logs.items()}
