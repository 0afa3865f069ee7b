"""The diffusers adapter: pipelines whose linears are 4-bit, made in place or read from a 4-bit file."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..checkpoints.errors import CheckpointError
from ..checkpoints.formats.comfy_quant import take_core
from ..checkpoints.formats.core_quant import StoredCore
from ..checkpoints.load import load
from ..families import by_diffusers_class
from ..families.spec import FamilySpec, KeyRule
from ..quant import kernels
from ..quant.modules import install, linear_shapes, quantize_module
from ..quant.parts import dequantize, take_rows
from ..quant.policy import LayerPlan, plan
from ..quant.schemes import KEEP
from . import quiet

FROM_ZERO = ("ZImage", "Krea2")  # pipelines whose guidance_scale is 0 where others' is 1


@dataclass(frozen=True)
class Bytes:
    """Bytes of a denoiser: its 4-bit layers as they are, what those would take in 16 bits, and everything else."""

    quantized: int
    quantized_16bit: int
    other: int
    layers: int


def device_and_dtype(device: str | None = None) -> tuple[str, torch.dtype]:
    """Where to run and in what: fp16 on a GPU, fp32 on a CPU."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, torch.float16 if device.startswith("cuda") else torch.float32


def load_pipeline(folder: str | Path, device: str | None = None, waiting: bool = False):
    """A diffusers pipeline from a local folder, never from a hub. ``waiting``: its denoiser stays on the CPU, so that a
    GPU gets it once it is small. Raises CheckpointError for another folder.
    """
    from diffusers import DiffusionPipeline

    quiet.libraries()  # again: some of their switches exist only now
    folder = Path(folder)
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(
            folder.name, "not a diffusers pipeline folder", "Give a folder that holds model_index.json"
        )
    parts = opened(folder, lambda: json.loads(index.read_bytes()).items())
    absent = {name: None for name, kind in parts if kind == [None, None]}  # SD 3 without its T5
    device, dtype = device_and_dtype(device)
    # Newer versions warn of torch_dtype, older ones pass dtype over without a word
    named = "dtype" if 'kwargs.pop("dtype"' in inspect.getsource(DiffusionPipeline.from_pretrained) else "torch_dtype"
    pipe = opened(folder, lambda: DiffusionPipeline.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, **{named: dtype}, **absent))  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    parts = [p for p in pipe.components.values() if isinstance(p, nn.Module)]
    for part in parts:
        if not waiting or part is not denoiser(pipe):
            part.to(device)
    return pipe


def opened(folder: Path, load: Callable):
    """What ``load`` gives of a folder in diffusers' or transformers' layout. Raises CheckpointError for one that it
    cannot read, whatever the libraries raise.
    """
    try:
        return load()
    except Exception as e:
        why = " ".join(str(e).split())[:160] or type(e).__name__
        raise CheckpointError(folder.name, f"it cannot be loaded ({why})", "Download or save the folder again") from e


def denoiser(pipe) -> nn.Module:
    """The pipeline's UNet or transformer. Raises ValueError for one that has neither."""
    found = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if found is None:
        raise ValueError(f"{type(pipe).__name__} has neither a UNet nor a transformer. Use it in diffusers itself")
    return found


def family_of(module: nn.Module) -> FamilySpec:
    """The family of a diffusers denoiser. Raises ValueError for a class this version does not know."""
    name = type(module).__name__
    family = by_diffusers_class(name, module.config)
    if family is None:
        raise ValueError(f"{name} is not a class whose layers this version knows by name")
    return family


def quantize(pipe, rank: int, progress: Callable[[str], None] | None = None) -> dict[str, float]:
    """Quantizes the pipeline's denoiser in place by its family's policy. Returns each layer's relative weight error."""
    module = denoiser(pipe)
    plans = plan(linear_shapes(module), family_of(module).rules, rank)
    return quantize_module(module, plans, module.dtype, progress=progress)


def install_file(pipe, path: str | Path) -> int:
    """Puts the layers of a quantized file (native names), in whatever formats, into the pipeline's denoiser. Returns
    their number. Raises CheckpointError for a file that is not this pipeline's, and for weights that are codes.
    """
    checkpoint = load(path)
    module, name = denoiser(pipe), checkpoint.name
    prefix = "model.diffusion_model." if any(n.startswith("model.diffusion_model.") for n in checkpoint.dense) else ""
    homes = {r.native: r for r in family_of(module).key_rules(module.config)}
    dense = dict(checkpoint.dense)
    layers = {n: x.weight for n, x in checkpoint.layers.items()} | take_core(dense, name)
    done, left = 0, set(dict(module.named_parameters()))
    for layer, weight in layers.items():
        rule = _rule(homes, f"{layer.removeprefix(prefix)}.weight", name, layer)
        if isinstance(weight, StoredCore):
            weight = _built(module, rule, weight, name)
        if rule.swap_halves:  # codes cannot be cut in half and joined the other way round
            dense[f"{layer}.weight"] = dequantize(weight)
            continue
        done += _install_layer(module, rule, weight, dense.pop(f"{layer}.bias", None), name)
        left -= {s.removesuffix("weight") + end for s in rule.sources for end in ("weight", "bias")}
    parameters = dict(module.named_parameters())
    for key, value in dense.items():
        if not key.startswith(prefix):
            continue  # a text encoder or a VAE beside it
        rule = _rule(homes, key.removeprefix(prefix), name, key)
        if not value.is_floating_point() or value.dtype.itemsize < 2:
            what = f"it holds {value.dtype}, and nothing says what its numbers mean"
            raise CheckpointError(name, what, "Take the model's own file, or write it again", key)
        _copy(parameters, rule, value, name)
        left -= set(rule.sources)
    if left:
        raise CheckpointError(name, "the pipeline has this tensor and the file does not", "Write it again", min(left))
    return done


def _rule(homes: Mapping[str, KeyRule], name: str, file: str, layer: str) -> KeyRule:
    if name not in homes:
        raise CheckpointError(file, "this pipeline has no such layer", "Use the pipeline the file was made from", layer)
    return homes[name]


def _built(module: nn.Module, rule: KeyRule, stored: StoredCore, file: str):
    shapes = [module.get_submodule(s.removesuffix(".weight")).weight.shape for s in rule.sources]
    try:
        return stored.build((sum(s[0] for s in shapes), shapes[0][1]), module.dtype)
    except ValueError as e:
        raise CheckpointError(file, str(e), "Use the pipeline the file was made from", rule.native) from e


def _install_layer(module: nn.Module, rule: KeyRule, weight, bias, file: str) -> int:
    """Puts one layer of a file into those of the pipeline that it fuses; returns their number."""
    start = 0
    for source in rule.sources:
        layer = module.get_submodule(source.removesuffix(".weight"))
        n = layer.out_features
        if start + n > weight.shape[0] or layer.in_features != weight.shape[1]:
            got, want = weight.shape, (layer.out_features, layer.in_features)
            raise CheckpointError(
                file, f"its shape is {got}, the pipeline wants {want}", "Use its own pipeline", rule.native
            )
        part = weight if len(rule.sources) == 1 else take_rows(weight, start, start + n)
        install(layer, part, None if bias is None else bias[start : start + n], module.dtype)
        layer.to(module.device)
        start += n
    return len(rule.sources)


@torch.no_grad()
def _copy(parameters: dict[str, nn.Parameter], rule: KeyRule, value: torch.Tensor, file: str) -> None:
    if rule.swap_halves:
        value = torch.cat(value.chunk(2)[::-1])
    start = 0
    for source in rule.sources:
        target = parameters.get(source)
        if target is None or target.shape[1:] != value.shape[1:] or start + target.shape[0] > value.shape[0]:
            raise CheckpointError(
                file, "it does not fit the pipeline", "Use the pipeline the file was made from", rule.native
            )
        target.copy_(value[start : start + target.shape[0]])
        start += target.shape[0]


def measure(module: nn.Module) -> Bytes:
    """What the denoiser's weights take with everything but the codes in 16 bits, as files and GPUs hold them."""
    ours = [p for p in module.parameters() if kernels.is_ours(p)]
    quantized = sum(kernels.nbytes(p, side=2) for p in ours)
    other = sum(2 * p.numel() for p in module.parameters() if not kernels.is_ours(p))
    return Bytes(quantized, sum(2 * p.numel() for p in ours), other, len(ours))


def use_few_steps(pipe) -> None:
    """Swaps the pipeline's scheduler for LCM's."""
    from diffusers import LCMScheduler

    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)


def sample(
    pipe,
    prompts: Sequence[str],
    steps: int,
    cfg: float,
    seed: int,
    negative: str | Sequence[str] = "",
    width: int | None = None,
    height: int | None = None,
    on_step: Callable[[], None] | None = None,
    guidance: float | None = None,
    more: Mapping | None = None,
) -> list[np.ndarray]:
    """One picture (H, W, 3) in [0, 1] per prompt; picture i starts from the noise of ``seed`` + i.

    ``cfg``: as ComfyUI counts, 1 for none. ``guidance``: what is built into the model (FLUX.1, a full LCM); None: the
    pipeline's own. ``width``, ``height``: pixels, by default the model's. ``more``: further arguments of the pipeline.
    """
    takes = inspect.signature(type(pipe).__call__).parameters

    def after_step(_pipe, _step, _t, values):
        on_step()
        return values

    given = dict(
        prompt=list(prompts),
        num_inference_steps=steps,
        generator=[generator(seed + i) for i in range(len(prompts))],
        output_type="np",
        **guided(pipe, takes, cfg, guidance),
        **(more or {}),
    )
    given |= {"width": width or own_side(pipe), "height": height or own_side(pipe)}
    if "negative_prompt" in takes:
        every = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        given["negative_prompt"] = every if cfg > 1 else None
    if "callback_on_step_end" in takes and on_step is not None:
        given["callback_on_step_end"] = after_step
    if "latents" in takes and "strength" not in takes and (shape := latent_shape(pipe, given)) is not None:
        # Drawn in 32 bits on the CPU, so that every machine and precision starts from the same noise
        noise = [torch.randn(1, *shape, generator=generator(seed + i)) for i in range(len(prompts))]
        given["latents"] = torch.cat(noise).to(pipe.device, denoiser(pipe).dtype)
    return list(pipe(**{k: v for k, v in given.items() if k in takes}).images)


def guided(pipe, takes: Mapping, cfg: float, guidance: float | None) -> dict[str, float]:
    """``cfg`` and ``guidance`` by the names that the pipeline has for them."""
    built_in = {} if guidance is None else {"guidance_scale": guidance}
    if "true_cfg_scale" in takes:
        return {"true_cfg_scale": cfg, **built_in}
    if has_guidance(pipe):
        return built_in
    return {"guidance_scale": cfg - 1 if type(pipe).__name__.startswith(FROM_ZERO) else cfg}


def own_cfg(pipe) -> float:
    """The guidance scale that diffusers gives the pipeline where nobody says one, as ComfyUI counts."""
    takes = inspect.signature(type(pipe).__call__).parameters
    if "true_cfg_scale" not in takes and has_guidance(pipe):
        return 1.0
    value = takes["true_cfg_scale" if "true_cfg_scale" in takes else "guidance_scale"].default
    return float(value) + (1 if type(pipe).__name__.startswith(FROM_ZERO) else 0)


def has_guidance(pipe) -> bool:
    """Whether the denoiser is told a guidance scale, which it was distilled with."""
    config = denoiser(pipe).config
    return bool(config.get("guidance_embeds") or config.get("time_cond_proj_dim"))


def scale_of(pipe) -> int:
    """Pixels of a latent's pixel, on each side."""
    return getattr(pipe, "vae_scale_factor", 8)


def own_side(pipe) -> int:
    """The side in pixels of the square that the model draws by default."""
    config = denoiser(pipe).config
    side = config.get("sample_size") or getattr(pipe, "default_sample_size", None) or 128
    return (side if isinstance(side, int) else max(side)) * scale_of(pipe)


def latent_shape(pipe, given: Mapping) -> tuple[int, int, int] | None:
    """(C, h, w) of a picture's noise for a UNet; None for transformers, which pack theirs each in its own way."""
    module = getattr(pipe, "unet", None)
    if module is None:
        return None
    return module.config.out_channels, given["height"] // scale_of(pipe), given["width"] // scale_of(pipe)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planned(pipe, rank: int) -> dict[str, LayerPlan]:
    """The layers that `quantize` would make 4-bit, and how."""
    module = denoiser(pipe)
    plans = plan(linear_shapes(module), family_of(module).rules, rank)
    return {n: p for n, p in plans.items() if p.scheme != KEEP}
