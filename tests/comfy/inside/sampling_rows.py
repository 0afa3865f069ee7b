"""Every preset on ComfyUI's own model classes, without weights: what MODEL, SAMPLER, SIGMAS and cfg come out.

Prints {preset: {sigmas, sampler, cfg, shift, prediction, text}} and ComfyUI's own names.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import pack, torch  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models as supported
from nibble_pack.families import PRESETS
from nibble_pack.nodes.bridge import sampling
from nibble_pack.sampling.schedules import plan

# family -> (ComfyUI class, what its constructor reads)
CLASSES = {
    "sd15": ("SD15", {"in_channels": 4}),
    "sd2": ("SD20", {"in_channels": 4}),
    "sdxl": ("SDXL", {"in_channels": 4, "adm_in_channels": 2816}),
    "sd3": ("SD3", {}),
    "flux": ("Flux", {}),
    "flux_schnell": ("FluxSchnell", {}),
    "flux2": ("Flux2", {"hidden_size": 3072}),
    "qwen_image": ("QwenImage", {}),
    "z_image": ("ZImage", {}),
    "krea2": ("Krea2", {}),
    "lens": ("Lens", {}),
    "ernie": ("ErnieImage", {}),
    "mage_flow": ("MageFlow", {}),
    "boogu": ("Boogu", {}),
}


def bare(family: str):
    """A real ModelPatcher of the family's class, whose network is left out."""
    name, extra = CLASSES[family]
    config = getattr(supported, name)({"disable_unet_model_creation": True, **extra})
    base = config.get_model({}, "")
    base.diffusion_model = torch.nn.Module()
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)


def row(preset) -> dict:
    model = bare(preset.family)
    if preset.omega is not None:  # the embedding is a file's; here only the schedule is looked at
        model.set_attachments("nibble.lcm_guidance", preset.omega)
    run = sampling.Run(preset.id, 0, 0, 1.0)
    ready = sampling.prepare(model, run, (1024, 1024), sampling.Graph(None, None))
    own = ready.model.get_model_object("model_sampling")
    steps = ready.sigmas[:-1]
    return {
        "sigmas": ready.sigmas.tolist(),
        "timesteps": [float(t) for t in own.timestep(steps)],
        "sampler": getattr(ready.sampler.sampler_function, "__name__", ""),
        "scheduler": plan(preset).scheduler,
        "cfg": ready.cfg,
        "bases": [c.__name__ for c in type(own).__mro__],
        "text": ready.text,
    }


out = {p.id: row(p) for p in PRESETS.values()}
print(json.dumps({"rows": out, "samplers": comfy.samplers.SAMPLER_NAMES, "schedulers": comfy.samplers.SCHEDULER_NAMES}))
