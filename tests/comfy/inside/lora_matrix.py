"""ARGS: family, a JSON file {layout: path}, the float file, a folder. Every way to a LoRA, on every layout of a layer.

Two LoRAs for every linear of the blocks. For each layout and way: the cosine of the change of the model's output to the
float model's change by the same way; and what the report says of the layers against what they hold.
"""

import json
import re
from pathlib import Path

from lora_common import args, comfy, cosine, kernels, load, lora_files, mm, now, ours, run, torch

import folder_paths  # isort: skip  (ComfyUI's own modules are found once lora_common is imported)
import nodes as comfy_nodes  # isort: skip
from comfy_extras.nodes_model_merging import ModelMergeSimple  # isort: skip

family, listed, float_file, folder = args
folder_paths.add_model_folder_path("loras", folder)
lora_nodes = ours("nodes.lora")
SIZE, A, B = 2.0, "a.safetensors", "b.safetensors"


def quantized(model) -> dict:
    """Dotted name -> module of every quantized layer."""
    named = model.model.diffusion_model.named_modules()
    return {n: m for n, m in named if getattr(m, "layout_type", None) is not None}


def block_linears(model) -> dict[str, tuple[int, int]]:
    named = model.model.diffusion_model.named_modules()
    inside = re.compile(r"double_blocks|single_blocks|transformer_blocks")
    return {n: (m.out_features, m.in_features) for n, m in named if hasattr(m, "in_features") and inside.search(n)}


def stock(model, name, strength=1.0):
    return comfy_nodes.LoraLoader().load_lora(model, None, name, strength, 0.0)[0]


def model_only(model, name, strength=1.0):
    return comfy_nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, strength)[0]


def apply(model, name, strength=1.0):
    return lora_nodes.NibbleApplyLora.execute(model, name, strength, 0.0).args[0]


def stack(model, *names):
    chosen = {f"lora{i}": lora_nodes.NibbleChooseLora.execute(n, 1.0, 0.0).args[0] for i, n in enumerate(names)}
    return lora_nodes.NibbleLoraStack.execute(model, chosen).args[0]


def both(model):
    return model_only(model_only(model, A), B)


def hooked(model, name):
    """The output with the LoRA as a hook, and whether the model is as before when it is taken away."""
    file = comfy.utils.load_torch_file(f"{folder}/{name}")
    hook = comfy.hooks.create_hook_lora(lora=file, strength_model=1.0, strength_clip=0.0)
    m = model.clone()
    m.register_all_hook_patches(hook, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    before = run(m, family)
    m.apply_hooks(hook)
    out = now(m, family)
    m.apply_hooks(None)
    clean = torch.equal(now(m, family), before)
    m.detach()
    return out, clean


def merged(model, ratio=0.5):
    return ModelMergeSimple().merge(model_only(model, A), model, ratio)[0]


def ways(model):
    """Way -> output. The order matters: a second LoRA comes after a run with the first."""
    out = {"plain": run(model, family)}
    out["LoraLoader"] = run(stock(model, A), family)
    out["LoraLoaderModelOnly"] = run(model_only(model, A), family)
    out["second"] = run(model_only(model, B), family)
    out["second added"] = run(both(model), family)
    out["Apply LoRA"] = run(apply(model, A), family)
    out["LoRA Stack"] = run(stack(model, A, B), family)
    out["hook"], clean = hooked(model, A)
    out["hook over"], _ = hooked(model_only(model, B), A)
    out["ModelMergeSimple"] = run(merged(model), family)
    out["half"] = run(model_only(model, A, 0.5), family)
    out["negative"] = run(apply(model, A, -1.0), family)
    mm.unload_all_models()
    partly = model_only(model, A)
    partly.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    out["not loaded"] = now(partly, family)
    partly.detach()
    return out, clean


def keys(model) -> int:
    """Quantized layers in ComfyUI's LoRA key map."""
    known = set(map(str, comfy.lora.model_lora_keys_unet(model.model, {}).values()))
    return sum(f"diffusion_model.{n}.weight" in known for n in quantized(model))


def held(model, before: dict[str, int]) -> dict[str, object]:
    """What the layers of a loaded MODEL hold: how many took a branch, how many are dense, MiB more than before."""
    layers = quantized(model)
    grown = [n for n, m in layers.items() if kernels.is_quantized(m.weight) and kernels.nbytes(m.weight) > before[n]]
    dense = [n for n, m in layers.items() if not kernels.is_quantized(m.weight)]
    more = sum(kernels.nbytes(layers[n].weight) - before[n] for n in grown)
    return {"grown": len(grown), "dense": len(dense), "MiB": f"{more / 2**20:.1f}"}


def half_loaded(model) -> list[int]:
    """[bytes that ComfyUI counts, bytes of the layers that are loaded] of a MODEL with room for some of its layers.
    (ComfyUI keeps twice a patched layer's 16-bit size free.)
    """
    mm.unload_all_models()
    model.patch_model(torch.device("cpu"), lowvram_model_memory=2 * mm.module_size(model.model))
    loaded = [m for m in model.model.modules() if getattr(m, "comfy_patched_weights", False) is True]
    out = [model.loaded_size(), sum(mm.module_size(m) for m in loaded)]
    model.detach()
    return out


def said(report: str) -> dict[str, object]:
    found = re.search(r"(\d+) quantized layers take it into their low-rank branch: ([\d.]+) MiB", report)
    dense = re.search(r"(\d+) quantized layers become 16-bit", report)
    return {"grown": int(found[1]) if found else 0, "dense": int(dense[1]) if dense else 0,
            "MiB": found[2] if found else "0.0"}  # fmt: skip


float_model = comfy.sd.load_diffusion_model(float_file)
shapes = block_linears(float_model)
for name, seed in ((A, 1), (B, 2)):
    file = lora_files.spell(lora_files.factors(shapes, 4, seed, SIZE), "kohya")
    comfy.utils.save_torch_file(file, f"{folder}/{name}", metadata={})
dora = {}
for i, (layer, (n, k)) in enumerate(shapes.items()):
    tensors = lora_files.kind("dora", n, k, seed=i, size=0.5)
    dora |= {f"lora_unet_{layer.replace('.', '_')}{end}": t for end, t in tensors.items()}
comfy.utils.save_torch_file(dora, f"{folder}/dora.safetensors", metadata={})

wanted, _ = ways(float_model)
result = {}
for layout, path in json.loads(Path(listed).read_text()).items():
    model = load.diffusion_model(path)
    entry = {"class": type(model).__name__, "layers": len(quantized(model)), "keys before": keys(model)}
    before = {n: kernels.nbytes(m.weight) for n, m in quantized(model).items()}
    got, entry["hook clean"] = ways(model)
    entry["cosine"] = {
        way: cosine(got[way] - got["plain"], wanted[way] - wanted["plain"]) for way in got if way != "plain"
    }
    entry["error"] = (got["plain"] - wanted["plain"]).norm().item() / wanted["plain"].norm().item()
    entry["half loaded"] = half_loaded(model_only(model, A))
    entry["same as loaded"] = torch.equal(got["not loaded"], got["LoraLoaderModelOnly"])
    entry["hook same"] = torch.equal(got["hook"], got["LoraLoaderModelOnly"])
    entry["removed"] = torch.equal(run(model, family), got["plain"])
    for name, key in ((A, "report"), ("dora.safetensors", "report dora")):
        applied = lora_nodes.NibbleApplyLora.execute(model, name, 1.0, 0.0).args
        run(applied[0], family)
        entry[key] = [said(applied[2]), held(applied[0], before)]
        if name == A:
            entry["keys loaded"] = keys(applied[0])
            entry["bytes"] = [applied[0].loaded_size(), applied[0].model_size(), mm.module_size(applied[0].model)]
            comfy.utils.save_torch_file(applied[0].state_dict_for_saving(), f"{folder}/saved.safetensors", metadata={})
            saved = load.diffusion_model(f"{folder}/saved.safetensors")
            entry["saved"] = (run(saved, family) - got["Apply LoRA"]).abs().max().item()
            saved.detach()
    result[layout] = entry
    mm.unload_all_models()
print(json.dumps(result))
