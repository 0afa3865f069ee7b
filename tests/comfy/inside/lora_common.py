"""What the lora_*.py scripts share: this pack's modules, the two models of a family, a LoRA for them, one forward."""

import hashlib
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "lora"))
from _start import args, torch  # first: it puts ComfyUI where the imports below find it

torch.set_grad_enabled(False)
import comfy.hooks  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import comfy.weight_adapter  # noqa: E402
import lora_files  # noqa: E402
import lora_matrix  # noqa: E402
import lora_odd  # noqa: E402


def ours(name: str):
    """A module of this pack, as ComfyUI loaded it."""
    return importlib.import_module(f"nibble_pack.{name}")


kernels, load, patches = ours("quant.kernels"), ours("nodes.bridge.load"), ours("nodes.bridge.patches")
# family: (latent channels, text width, vector width, time)
FORWARD = {
    "sd15": (4, 768, 0, 5.0),
    "sdxl": (4, 2048, 2816, 5.0),
    "flux": (16, 64, 64, 0.5),
    "sd3": (16, 128, 128, 0.5),
}


class HostBuffer:
    """Stands in for aimdo's pinned memory."""

    size = 0

    def __init__(self, *_):
        pass

    def truncate(self, *_, **__):
        pass


def dynamic_of(static):
    """The same model in ComfyUI's dynamic patcher as this pack claims it; on a CPU, ComfyUI makes a static one."""
    comfy.model_patcher.comfy_aimdo.host_buffer.HostBuffer = HostBuffer
    made, cpu = object.__new__(comfy.model_patcher.ModelPatcherDynamic), torch.device("cpu")
    made.__init__(static.model, cpu, cpu)
    made.cached_patcher_init = static.cached_patcher_init
    return ours("nodes.bridge.patcher").claim(made)


def layers(model) -> dict:
    """Dotted name -> module of every 4-bit layer."""
    named = model.model.diffusion_model.named_modules()
    return {n: m for n, m in named if getattr(m, "layout_type", None) in kernels.OURS}


def shapes(model) -> dict[str, tuple[int, int]]:
    return {n: tuple(m._orig_shape) for n, m in layers(model).items()}


def lora(model, seed: int = 0, rank: int = 4, size: float = 0.3) -> tuple[dict, dict]:
    """(factors, ComfyUI-named file) for every 4-bit layer; alpha is half the rank."""
    parts = lora_files.factors(shapes(model), rank, seed, size)
    return parts, lora_files.spell(parts, "comfyui", alpha=rank / 2)


def with_lora(model, file: dict, strength: float = 1.0):
    return comfy.sd.load_lora_for_models(model, None, file, strength, 0)[0]


def effective(model, key: str) -> tuple[torch.Tensor, bool]:
    """(the tensor at ``key`` with the model's patches, in float64; whether it is still in 4 bits). The side tensors of
    a 4-bit weight are float32 here: what is compared is the patch, not the rounding of its sum to 16 bits.
    """
    weight, _, convert = comfy.model_patcher.get_key_weight(model.model, key)
    pending = model.patches.get(key, ())
    if kernels.is_ours(weight):
        out = patches.patched(kernels.cast(weight, torch.float32), pending, key)
        return (patches.dense(out) if kernels.is_ours(out) else out).double(), kernels.is_ours(out)
    weight = weight.float() if convert is None else convert(weight.float())
    return comfy.lora.calculate_weight(pending, weight.clone(), key).double(), False


def inputs(family: str):
    channels, width, vector, time = FORWARD[family]
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, channels, 16, 16, generator=g), torch.randn(1, 20, width, generator=g)
    extra = {"y": torch.randn(1, vector, generator=g)} if vector else {}
    if family == "flux":
        extra["guidance"] = torch.tensor([3.5])
    return x, torch.tensor([time]), dict(c_crossattn=text, **extra)


def run(model, family: str) -> torch.Tensor:
    """One forward of a MODEL, loaded as ComfyUI's samplers load it."""
    mm.load_models_gpu([model])
    return now(model, family)


def now(model, family: str) -> torch.Tensor:
    """One forward of a MODEL as it is."""
    x, t, kwargs = inputs(family)
    return model.model.apply_model(x, t, **kwargs)


def codes_hash(model) -> str:
    """Of the 4-bit codes in use, layer by layer."""
    digest = hashlib.sha256()
    for module in layers(model).values():
        digest.update(module.weight._qdata.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cosine(a, b) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()


def relative(a, b) -> float:
    """||a - b|| / ||b||"""
    return ((a - b).double().norm() / b.double().norm()).item()


__all__ = ["args", "comfy", "lora_files", "lora_matrix", "lora_odd", "mm", "torch"]
