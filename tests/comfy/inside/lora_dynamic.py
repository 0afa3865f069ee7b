"""ARGS: family, 4-bit file. ComfyUI's dynamic-VRAM patcher driven on a CPU, as far as that goes.

What is real: ModelPatcherDynamic's own load(), clone(), delegate and restore, this pack's class over it, and the
gathering of a 4-bit weight into one buffer and out of it. What is not: comfy-aimdo, whose library needs a GPU; its host
buffers are replaced by empty ones and there is no reserved VRAM, so layers are moved the ordinary way.
"""

import json

from lora_common import (
    args,
    comfy,
    cosine,
    dynamic_of,
    kernels,
    layers,
    load,
    lora,
    lora_files,
    now,
    run,
    torch,
    with_lora,
)

family, four_file = args
cpu = torch.device("cpu")

static = load.diffusion_model(four_file)
before = run(static, family)
_, one = lora(static, seed=1)
_, two = lora(static, seed=2, rank=7)
loaded = {name: run(with_lora(static, file), family) for name, file in (("one", one), ("two", two))}
strange = {}
for name, module in layers(static).items():
    dora = lora_files.kind("dora", *module._orig_shape, size=0.3)
    strange |= {f"diffusion_model.{name}{end}": t for end, t in dora.items()}
loaded["dora"] = run(with_lora(static, strange), family)
static.detach()

base = load.diffusion_model(four_file)
dynamic = dynamic_of(base)
result = {"claimed": type(dynamic).__name__}


def clone_of(model):
    """model.clone(), which on a CPU would make a static patcher."""
    comfy.model_patcher.ModelPatcherDynamic.__new__ = staticmethod(lambda cls, *_, **__: object.__new__(cls))
    return model.clone()


def dynamically(model) -> torch.Tensor:
    model.partially_load(cpu)
    return now(model, family)


a, b, d = clone_of(dynamic), clone_of(dynamic), clone_of(dynamic)
for model, file in ((a, one), (b, two), (d, strange)):
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    model.add_patches(comfy.lora.load_lora(file, key_map, log_missing=False), 1.0)
result["clone"] = type(a).__name__
result["no LoRA"] = torch.equal(dynamically(dynamic), before)
result["a"] = torch.equal(dynamically(a), loaded["one"])
result["beside"] = sum(m.lora is not None for m in layers(a).values())
result["lowvram left"] = sum(getattr(m, "weight_lowvram_function", None) is not None for m in layers(a).values())
counted = sum(t.numel() * t.element_size() for m in layers(a).values() if m.lora is not None for t in m.lora)
result["counted bytes"] = [a.model.model_loaded_weight_memory >= counted, counted]
result["b"] = torch.equal(dynamically(b), loaded["two"])
result["a again"] = torch.equal(dynamically(a), loaded["one"])
result["removed"] = torch.equal(dynamically(dynamic), before)
result["nothing beside"] = all(m.lora is None for m in layers(dynamic).values())
result["dora"] = [torch.equal(dynamically(d), loaded["dora"]), cosine(now(d, family), loaded["dora"])]
result["dora functions"] = sum(len(m.weight_function) for m in layers(d).values())
dynamically(a)
a.restore_loaded_backups()
result["after freeing"] = {str(m.lora[0].device) for m in layers(a).values() if m.lora is not None} == {"cpu"}
a.load(cpu)
result["saved"] = sorted({tuple(t.shape)[1] for k, t in a.state_dict_for_saving().items() if k.endswith("proj_down")})
# Layers of at most 16 KiB are put in place at once, with or without a LoRA.
first = next(n for n, m in layers(dynamic).items() if "_proj_down" in kernels.tensors(m.weight))
key = f"diffusion_model.{first}.weight"
forced = []
for model in (dynamic, a):
    model.restore_loaded_backups()
    model.patch_weight_to_device(key, device_to=cpu, force_cast=True)
    weight = comfy.utils.get_attr(model.model, key)
    forced.append([kernels.is_ours(weight), key in model.backup, kernels.tensors(weight)["_proj_down"].shape[1]])
    model.restore_loaded_backups()
result["forced"] = forced
delegate = a.get_non_dynamic_delegate()
result["delegate"] = [type(delegate).__name__, torch.equal(run(delegate, family), loaded["one"])]

# ComfyUI's buffer: the weight and the bias as one run of bytes, and back, with the branch inside.
same, memory = [], comfy.model_patcher.comfy.memory_management
for m in layers(base).values():
    geometry = memory.tensors_to_geometries([m.weight, m.bias])
    buffer = torch.zeros(memory.vram_aligned_size([m.weight, m.bias]), dtype=torch.uint8)
    comfy.model_management.cast_to_gathered([m.weight, m.bias], buffer)
    m._prefetch = dict(
        signature=None,
        resident=False,
        xfer_dest=buffer,
        cast_dest=None,
        cast_geometry=geometry,
        needs_cast=any(t is not None and t.dtype != g.dtype for t, g in zip((m.weight, m.bias), geometry, strict=True)),
    )
    m.seed_key, m.weight_lowvram_function, m.bias_lowvram_function = "", None, None
    weight, _ = comfy.ops.resolve_cast_module_with_vbar(m, m.weight.dtype, cpu, torch.float32, torch.float32, True)
    pairs = zip(kernels.tensors(m.weight).values(), kernels.tensors(weight).values(), strict=True)
    same.append(weight._layout_cls == m.weight._layout_cls and all(torch.equal(x, y) for x, y in pairs))
    del m._prefetch
result["through the buffer"] = all(same)
print(json.dumps(result))
