"""ARGS: family, a folder of files, the float file. What else a MODEL meets: arguments and entries of a newer ComfyUI,
models that ComfyUI's own loader made, layers in formats that it cannot quantize to.
"""

import json

from lora_common import args, comfy, cosine, kernels, load, lora_files, mm, now, ours, run, torch

family, folder, float_file = args
build, operations = ours("nodes.bridge.build"), ours("nodes.bridge.operations")
lora_module, calibrate = ours("nodes.bridge.lora"), ours("nodes.bridge.calibrate")
refine = ours("nodes.bridge.refine")
result = {}


def quantized(model) -> dict:
    named = model.model.diffusion_model.named_modules()
    return {n: m for n, m in named if getattr(m, "layout_type", None) is not None}


def lora_for(model) -> str:
    """A LoRA file for every quantized layer of a MODEL."""
    shapes = {n: (m.out_features, m.in_features) for n, m in quantized(model).items()}
    file = lora_files.spell(lora_files.factors(shapes, 4, 1, 2.0), "kohya")
    comfy.utils.save_torch_file(file, f"{folder}/lora.safetensors", metadata={})
    return f"{folder}/lora.safetensors"


def applied(model, path: str, strength: float = 1.0):
    return lora_module.apply([lora_module.Choice("lora.safetensors", path, strength)], model)


# Arguments that a newer ComfyUI may hand to a layer: known to nobody here.
model = load.diffusion_model(f"{folder}/promoted.safetensors")
layer = next(m for m in quantized(model).values() if kernels.is_ours(m.weight))
theirs = next(m for m in quantized(model).values() if not kernels.is_ours(m.weight))
x = torch.randn(2, layer.in_features)
try:
    layer(x, residual=x)
except TypeError as e:
    result["argument"] = str(e)
seen = {}
mixed = type(theirs).__mro__[2]
original = mixed.forward
mixed.forward = lambda self, input, *a, **k: seen.update(k) or original(self, input)
theirs(torch.randn(2, theirs.in_features), residual="r")
mixed.forward = original
result["passed on"] = seen

# Every layout through ComfyUI's own loader, then Apply LoRA: as if the pack had loaded it.
plain = comfy.sd.load_diffusion_model(float_file)
before = now(plain, family)
path = lora_for(model)
wanted = run(applied(plain, path)[0], family) - before
for name in ("fp8", "int8 rotated", "nvfp4", "convrot"):
    stock = comfy.sd.load_diffusion_model(f"{folder}/{name}.safetensors")
    start = run(stock, family)
    first, _, report = applied(stock, path)
    out = run(first, family)
    again = run(applied(stock, path, 0.5)[0], family)
    mine = run(applied(load.diffusion_model(f"{folder}/{name}.safetensors"), path)[0], family)
    twins = {id(applied(stock, path, s)[0].model) for s in (0.1, 0.2)}
    result[f"stock {name}"] = {
        "class": [type(stock).__name__, type(first).__name__], "cosine": cosine(out - start, wanted),
        "as ours": torch.equal(out, mine), "untouched": torch.equal(run(stock, family), start),
        "half": not torch.equal(again, out), "one twin": len(twins), "report": report.splitlines()[-1],
    }  # fmt: skip
    mm.unload_all_models()

# What cannot be rebuilt: compiled code, and modules that another node has put in.
compiled = comfy.sd.load_diffusion_model(f"{folder}/fp8.safetensors")
compiled.add_wrapper_with_key("apply_model", "torch.compile", lambda executor, *a, **k: executor(*a, **k))
try:
    applied(compiled, path)
except ValueError as e:
    result["compiled"] = str(e)
stock = comfy.sd.load_diffusion_model(f"{folder}/fp8.safetensors")
stock.add_object_patch("diffusion_model.img_in", stock.model.diffusion_model.img_in)
left = applied(stock, path)
result["other modules"] = [type(left[0]).__name__, left[2].splitlines()[-1]]
mm.unload_all_models()

# AWQ as a newer ComfyUI loads it: its own layer class, its own name of the format, no way to quantize.
awq = load.diffusion_model(f"{folder}/awq.safetensors")
stock = comfy.sd.load_diffusion_model(f"{folder}/fp8.safetensors")
for name, module in quantized(stock).items():
    weight = comfy.utils.get_attr(awq.model.diffusion_model, f"{name}.weight")
    module.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    module.layout_type, module.quant_format = weight._layout_cls, "awq_w4a16"
start = run(awq, family)
out = run(applied(stock, path)[0], family)
result["awq of ComfyUI"] = [cosine(out - start, wanted), torch.equal(out, run(applied(awq, path)[0], family))]
mm.unload_all_models()


# Entries of a state dict that are no weights: an attention's settings, which the module keeps as a dict.
class Settings(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"attention": "int8"}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}config"] = torch.tensor(list(b'{"attention": "int8"}'), dtype=torch.uint8)


def with_settings(path: str):
    model = load.diffusion_model(path)
    block = model.model.diffusion_model.double_blocks[0].img_attn
    block.comfy_attention = Settings()
    block.register_buffer("steps", torch.tensor([1, 2, 3]))
    return model


KEY = "double_blocks.0.img_attn.comfy_attention.config"
opaque = with_settings(float_file)
patched = comfy.sd.load_lora_for_models(opaque, None, comfy.utils.load_torch_file(path), 1.0, 0)[0]
patched.add_patches({f"diffusion_model.{KEY}": ("config", {"attention": "other"})})
settings = calibrate.Settings("data_free", "svdquant_w4a4", 16, 0, 2, 1.0, 0)
inputs = calibrate.Inputs((), torch.zeros(1, 16, 16, 16))
from pathlib import Path  # noqa: E402

four, *_ = calibrate.calibrate(patched, inputs, settings, Path(folder) / "resume")
state = build.dense_state(patched, set())
result["opaque"] = {
    "calibrated": type(four).__name__,
    "kept": [bytes(state[KEY].tolist()).decode(), str(state["double_blocks.0.img_attn.steps"].dtype)],
    "LoRA in it": cosine(run(four, family) - before, wanted),
}
four = with_settings(f"{folder}/svdquant.safetensors")
reference = run(four, family)
four = comfy.sd.load_lora_for_models(four, None, comfy.utils.load_torch_file(path), 1.0, 0)[0]
four.add_patches({f"diffusion_model.{KEY}": ("config", {"attention": "other"})})
result["opaque"]["LoRA on 4 bits"] = cosine(run(four, family) - reference, wanted)
result["opaque"]["merge"] = KEY not in str(list(four.get_key_patches("diffusion_model.")))
bare = with_settings(f"{folder}/svdquant.safetensors")
refined = refine.with_weights(bare, {}, {}, torch.bfloat16)
result["opaque"]["rebuilt"] = cosine(run(refined, family), run(bare, family))

# A layer of dynamic VRAM that is run on the CPU: ComfyUI hands over a dense weight, without branch, shift or LoRA.
down, up = torch.randn(4, 256) / 16, torch.randn(256, 4) / 16
for name in ("svdquant", "promoted", "nvfp4"):
    model = load.diffusion_model(f"{folder}/{name}.safetensors")
    for module in quantized(model).values():
        if (module.out_features, module.in_features) != (256, 256):
            continue
        x = torch.randn(3, 256)
        plain, module.lora = module(x), (down.t().contiguous(), up)
        with_lora, module._v, module._v_signature = module(x), object(), None
        same, module.lora = torch.equal(module(x), with_lora), None
        apart = (module(x) - plain).abs().max().item() if kernels.is_ours(module.weight) else 0  # else ComfyUI's own
        result.setdefault("_v", []).append([same, apart, torch.equal(plain, with_lora), module.layout_type])
        del module._v

# A file in bfloat16 whose model computes in float16: scales and branch are cast once, not on every forward.
cast, count = kernels.cast, []
kernels.cast = lambda weight, dtype: count.append(dtype) or cast(weight, dtype)
made = operations.operations(torch.float16).Linear(256, 256, bias=False)
wrapped = load.wrapped(load.read(f"{folder}/svdquant.safetensors").layers)
name = next(n for n, w in wrapped.items() if n.endswith(".weight") and tuple(w.shape) == (256, 256))
made.load_state_dict({"weight": wrapped[name], "comfy_quant": wrapped[name.replace("weight", "comfy_quant")]})
result["cast at load"], x = len(count), torch.randn(2, 256, dtype=torch.float16)
count.clear()
y = made(x)
result["cast on forward"] = len(count)
wanted = operations.linear(x, wrapped[name], None)
result["as before"] = torch.equal(y, wanted)
kernels.cast = cast

# A LoRA on a partially loaded model: its factors are padded and moved once.
patches = ours("nodes.bridge.patches")
model = load.diffusion_model(f"{folder}/svdquant.safetensors")
patched = applied(model, path)[0]
key = next(k for k in patched.patches if tuple(comfy.utils.get_attr(model.model, k).shape) == (256, 256))
weight = comfy.utils.get_attr(model.model, key)
from comfy.model_patcher import LowVramPatch  # noqa: E402

function, factors, made = LowVramPatch(key, patched.patches), patches.factors, []
patches.factors = lambda *a: made.append(1) or factors(*a)
outs = [patches.on_the_fly(weight, [function]) for _ in range(3)]
patches.factors = factors
full = patches.patched(weight, patched.patches[key], key)
result["factors"] = [
    len(made),
    all(torch.equal(getattr(o._params, n), getattr(full._params, n)) for o in outs for n in ("proj_up", "proj_down")),
]
print(json.dumps(result))
