"""What every job here has in common: the model as it sees it, what it was asked for as the loop's plan, where its
result goes, and what is kept of it until then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor, nn

from ..checkpoints.save import digest, fingerprint, save
from ..writing import unfinished
from ..writing.whole import WriteError
from . import recipes
from .adapters import Adapters, linears
from .denoise import Denoiser
from .loop import Plan, loss_scale

# The linears of attention and feed-forward, in ComfyUI's and in diffusers' names; a model without any trains them all.
USUAL = ("attn", "attention", "ff.", "ffn", "feed_forward", "mlp", "linear1", "linear2")
STATES = 8  # a LoRA's size: value, average and adamw's two moments, twice while one state takes the other's place
Tell = Callable[[str, int, int], None]  # what, done, total; may raise to stop
Write = Callable[[Mapping[str, Tensor], Mapping[str, str], bool], str]  # tensors, metadata, all is kept -> a note


@dataclass(frozen=True)
class Base:
    """A model that is trained on, or asked. ``names``: a layer's name in ``module`` -> its native one, which files
    have. ``dtype``: what it computes in. ``family``: whose few-step presets it takes. ``digest``: of its weights.
    """

    module: nn.Module
    denoiser: Denoiser
    dtype: torch.dtype
    names: Callable[[str], str] = lambda name: name
    family: str | None = None
    digest: str = ""

    @property
    def device(self) -> torch.device | str:
        return self.denoiser.device


@dataclass(frozen=True)
class Place:
    """``root``: where unfinished runs are kept; ``write``: makes the file of the result. ``title``: its name."""

    root: Path
    title: str
    write: Write


@dataclass(frozen=True)
class Made:
    """What a job made: ``tensors`` and ``info`` of its file. ``ended``: all of it is on disk already. ``text`` and
    ``losses``: for people. ``notes``: what else is to be said.
    """

    tensors: dict[str, Tensor]
    info: dict[str, str]
    text: str
    losses: tuple[float, ...]
    ended: bool = False
    notes: tuple[str, ...] = ()


def plan_of(name: str, row: recipes.Lora | recipes.Distill | recipes.Refine, dtype: torch.dtype) -> Plan:
    """``row`` as the loop's plan for a model that computes in ``dtype``."""
    more = {n: getattr(row, n) for n in ("schedule", "accumulate", "optimizer") if hasattr(row, n)}
    warmup = min(row.warmup, row.updates // 10)
    return Plan(name, row.updates, row.batch, row.rate, warmup, row.weight_decay, row.ema, row.seed,
                loss_scale=loss_scale(dtype), **more)  # fmt: skip


def usual(names: list[str]) -> list[str]:
    """The layers of ``names`` that a LoRA is usually made of: attention and feed-forward."""
    return [n for n in names if any(part in n for part in USUAL)] or names


def layers_of(base: Base) -> list[str]:
    """The layers that a LoRA on ``base`` is made of, in the order of their native names: first values are drawn in it.
    Raises ValueError for a model without linears.
    """
    native = {base.names(n): n for n in linears(base.module)}
    if not native:
        raise ValueError("This model has no linear layer, and LoRAs are trained on those")
    return [native[n] for n in usual(sorted(native))]


def adapters_of(base: Base, rank: int, seed: int) -> Adapters:
    return Adapters(base.module, layers_of(base), rank, seed=seed).to(base.device)


def file_bytes(module: nn.Module, rank: int) -> int:
    """Bytes of the LoRA that is trained on ``module``'s usual layers, in float32."""
    found = linears(module)
    shapes = [found[n].weight.shape for n in usual(list(found))]
    return sum(4 * (rank * (n + k) if rank else n * k) for n, k in shapes)


def digest_of(module: nn.Module, patches: Mapping, weight_of: Callable[[str], Tensor] | None = None) -> str:
    """Of a module's linears as they are, codes where they are quantized, and of what ``patches`` them."""
    weights = {}
    for name, layer in linears(module).items():
        coded = isinstance(layer.weight, QuantizedTensor)
        weights[name] = layer.weight._qdata if coded else weight_of(name) if weight_of else layer.weight
    return digest(weights=fingerprint(weights), patches=patches)


def finished(place: Place, signature: str, what: str, need: int, work: Callable[[Path | None], Made]) -> Made:
    """What ``work`` made, written. It is handed the folder of what the run of ``signature`` keeps until then, at most
    ``need`` bytes, or None where nothing can be kept.
    """
    with unfinished.run(place.root, signature, what, need) as kept:
        made = work(kept.folder)
        note = place.write(made.tensors, made.info, made.ended)
        kept.finish()
    return Made(made.tensors, made.info, made.text, made.losses, made.ended, (note, *made.notes, *kept.notes))


def to_file(out: Path) -> Write:
    """Writes ``out``, or says that what was trained is not lost."""

    def write(tensors: Mapping[str, Tensor], info: Mapping[str, str], ended: bool) -> str:
        try:
            save(out, tensors, info)
        except WriteError as e:
            if not ended:
                raise
            raise e.saying(unfinished.ENDED) from e
        return ""

    return write
