"""ARGS: tiny_4bit or tiny files of sd15, flux and sd3. Every kind of update at every place, through this pack's nodes'
matching and ComfyUI's own patches, against the float64 reference of tests/lora/lora_matrix.py.

Prints {"kind | place": {"status": ..., "why": ..., "error": worst relative error of a layer's change}}. Weights are
compared, with the side tensors of 4-bit ones in float32, never products of 4-bit activations.
"""

import json

from lora_common import args, comfy, effective, load, lora_files, mm, ours, torch, with_lora
from lora_common import lora_matrix as m

bridge, match = ours("nodes.bridge.lora"), ours("nodes.bridge.lora_match")
four_bit = "-4bit" in args[0]
models = dict(zip(("sd15", "flux", "sd3"), args, strict=True))
models = {n: (load.diffusion_model if four_bit else comfy.sd.load_diffusion_model)(path) for n, path in models.items()}
block = "input_blocks.1.1.transformer_blocks.0"
# place -> (model, target, its layers, rows of the one layer that it is or None)
SPOTS = {
    "same": ("flux", "lora_unet_double_blocks_0_img_mlp_0", ("double_blocks.0.img_mlp.0",), None),
    "fused on split": ("sd15", f"diffusion_model.{block}.attn1.to_qkv",
                       tuple(f"{block}.attn1.to_{x}" for x in "qkv"), None),
    "split on fused": ("flux", "transformer.transformer_blocks.0.attn.to_k",
                       ("double_blocks.0.img_attn.qkv",), (256, 256)),
    "rows of linear1": ("flux", "diffusion_model.single_blocks.0.linear1_qkv", ("single_blocks.0.linear1",), (0, 768)),
    "swapped": ("sd3", "transformer.transformer_blocks.1.norm1_context.linear",
                ("joint_blocks.1.context_block.adaLN_modulation.1",), None),
    "swapped, other names": ("flux", "base_model.model.norm_out.linear", ("final_layer.adaLN_modulation.1",), None),
    "convolution": ("sd15", "lora_unet_input_blocks_1_0_in_layers_2", ("input_blocks.1.0.in_layers.2",), None),
}  # fmt: skip


def run(name: str, place: str, tensors: dict, model, target: str, layers, rows) -> dict:
    keys = [f"diffusion_model.{layer}" for layer in layers]
    there = [f"{key}.{part}" for key in keys for part in ("weight", "bias")]
    there = [key for key in there if comfy.utils.get_attr(model.model, key) is not None]
    before = {key: effective(model, key)[0] for key in there}
    w = torch.cat([before[f"{key}.weight"] for key in keys])
    b = torch.cat([before.get(f"{key}.bias", w.new_zeros(len(w) // len(keys))) for key in keys])
    if rows is not None:
        w, b = w.narrow(0, *rows), b.narrow(0, *rows)
    turned = m.halves_swapped if "swapped" in place else lambda x: x
    found = match.match({f"{target}{end}": t for end, t in tensors.items()}, (), match.vocabulary(model, None))
    status, why = sorted(set(found.status.values())), sorted(set(found.why.values()))
    out = {"status": status, "why": why, "keys": len(found.status) == len(tensors)}
    if "model" not in status:
        return {**out, "patches": sum(map(len, found.patches["model"]))}
    at = m.strength(name)
    patched = bridge._patched(model, found, "model", at, {})
    new = [turned(x) for x in m.changed(tensors, turned(w), turned(b), at, comfyui=True)]
    errors, four = [0.0], []
    for i, key in enumerate(keys):
        for part, some in zip(("weight", "bias"), new, strict=True):
            was = before.get(f"{key}.{part}")
            if was is None:
                continue
            want = some.chunk(len(layers))[i] if rows is None else was.clone()
            if rows is not None:
                want.narrow(0, *rows).copy_(some)
            got, is_four = effective(patched, f"{key}.{part}")
            four += [is_four] if part == "weight" else []
            if torch.equal(want, was):
                assert torch.equal(got, was), (key, part)
            else:
                errors.append(((got - want).norm() / (want - was).norm()).item())
    return {**out, "error": max(errors), "others": sorted(set(patched.patches) - set(before)), "4-bit": four}


result = {}
for place, (family, target, layers, rows) in SPOTS.items():
    model = models[family]
    shapes = [tuple(comfy.utils.get_attr(model.model, f"diffusion_model.{layer}.weight").shape) for layer in layers]
    n, k = sum(s[0] for s in shapes) if rows is None else rows[1], shapes[0][1]
    piece = shapes[0][0] if len(layers) > 1 else n // 2 if "swapped" in place else n
    for name in m.CONVOLUTIONS if place == "convolution" else m.KINDS:
        tensors = m.convolution(name, n, k) if place == "convolution" else m.kind(name, n, k, piece)
        result[f"{name} | {place}"] = run(name, place, tensors, model, target, layers, rows)

# The shares of DoRA per input are those of the unpatched model, whatever is loaded into it at the moment.
model, (_, target, layers, _) = models["sd15"], SPOTS["fused on split"]
file = {f"{target}{end}": t for end, t in m.kind("dora of inputs", 960, 320, 320).items()}


def shares() -> list:
    found = match.match(file, (), match.vocabulary(model, None)).patches["model"][0]
    return [found[f"diffusion_model.{layer}.weight"].weights[4].flatten().tolist() for layer in layers]


before, other = shares(), lora_files.factors(dict.fromkeys(layers, (320, 320)), size=2.0)
mm.load_models_gpu([with_lora(model, lora_files.spell(other, "comfyui"))])
print(json.dumps(result | {"shares": shares() == before}))
