"""Calibrate, LoftQ and a refined model's assembly with layers solved on a GPU that is not there (pretended_gpu.py):
{"what": {"where": devices of all that the new MODEL holds, "room": whether ComfyUI was asked for room before each
layer, "mixes": of devices}}.
"""

import json
import sys
import tempfile
from pathlib import Path

from lora_common import mm, ours, torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import pretended_gpu

demo, build, kernels = ours("nodes.bridge.demo"), ours("nodes.bridge.build"), ours("quant.kernels")
calibrate, refine, engine = ours("nodes.bridge.calibrate"), ours("nodes.bridge.refine"), ours("quant.calib.engine")
modules = ours("quant.modules")
pairs = calibrate.encode(demo.clip(), ["red apple", "blue car"], "")
empty = torch.zeros(1, 4, 16, 16)
device, asked = mm.get_torch_device, []


def where(model) -> list[str]:
    module, found = model.model.diffusion_model, set()
    for t in (*module.parameters(), *module.buffers()):
        parts = kernels.tensors(t).values() if isinstance(t, build.QuantizedTensor) else (t,)
        found |= {"gpu" if isinstance(p, pretended_gpu.OnGPU) else p.device.type for p in parts}
    return sorted(found)


def calibrated(model, target="svdquant_w4a4", preset="fast"):
    settings = calibrate.Settings(preset, target, 16, 0, 2, 1.0, 0)
    with tempfile.TemporaryDirectory() as folder:
        return calibrate.calibrate(model, calibrate.Inputs(pairs, empty), settings, Path(folder))[0]


def loftq(model):
    with tempfile.TemporaryDirectory() as folder:
        return refine.loftq(model, refine.LoftQ(4, 16, 1), Path(folder) / "lora.safetensors")[0]


def refined(_):
    """What `refine` does with the trained weights, which are where the model was trained."""
    model = demo.model(True)
    layers = {n: m for n, m in model.model.diffusion_model.named_modules()
              if getattr(m, "weight", None) is not None and kernels.is_ours(m.weight)}  # fmt: skip
    weights = {n: modules.moved(kernels.unwrap(m.weight.detach()), "cuda") for n, m in layers.items()}
    biases = {n: None if m.bias is None else m.bias.detach().to("cuda") for n, m in layers.items()}
    return refine.with_weights(model, weights, biases, torch.bfloat16)


result = {}
for name, make, layers in (
    ("calibrate", calibrated, 70),
    ("without data", lambda m: calibrated(m, "int8_tensorwise", "data_free"), 70),
    ("loftq", loftq, 70),
    ("refine", refined, 0),
):
    model = demo.model(False)
    asked.clear()
    with pretended_gpu.on() as log:
        mm.get_torch_device = lambda: torch.device("cuda", 0)
        free, mm.free_memory = mm.free_memory, lambda need, where, *_, **__: asked.append((need, where.type))
        try:
            made = make(model)
        finally:
            mm.get_torch_device, mm.free_memory = device, free
        mixes = list(log.mixes)
    room = [need for need, kind in asked if kind == "cuda"]
    result[name] = {"where": where(made), "room": len(room) >= layers and all(n > 0 for n in room), "mixes": mixes}
print(json.dumps(result))
