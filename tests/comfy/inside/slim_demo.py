"""The demo model, 16- and 4-bit, slimmed: FLOPs counted, errors compared, clones kept apart, LoRAs refused or
merged. And a small SDXL.
"""

import gc
import importlib
import json

from _start import torch
from torch.utils.flop_counter import FlopCounterMode

import comfy.model_management as mm  # isort: skip
import comfy.hooks
import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.supported_models
from comfy.ldm.modules.attention import optimized_attention

torch.set_grad_enabled(False)


def ours(name: str):
    return importlib.import_module(f"nibble_pack.{name}")


demo, slim, blocks = ours("nodes.bridge.demo"), ours("nodes.bridge.slim"), ours("nodes.bridge.slim_blocks")
saving, choose = ours("nodes.bridge.slim_report").saving, ours("slim.choose")
clip = demo.clip()
prompt = clip.encode_from_tokens_scheduled(clip.tokenize("red apple"))
empty = torch.zeros(1, 4, 16, 16)
inputs = slim.Inputs((prompt,), empty, 1)
models = {16: demo.model(False), 4: demo.model(True)}
# input 2 and 4 halve the map, output 3 doubles it
CONVS = "\n".join(f"{block}: {{op}}" for block in ("input 2", "input 4", "output 1", "output 3"))
WISHES = {
    "pool": choose.Wish(0.5, attention="pool", attention_levels=2),
    "pool more": choose.Wish(0.9, attention="pool", attention_levels=2),
    "skip": choose.Wish(0.5, attention="skip", attention_levels=2),
    "relu": choose.Wish(0.5, attention="relu", attention_levels=2),
    "low rank": choose.Wish(0.3, blocks=CONVS.format(op="low rank")),
    "separable": choose.Wish(0.5, blocks=CONVS.format(op="separable")),
    "both": choose.Wish(0.5, "pool", 1, "low rank", 1, "middle 0: skip, separable\noutput 0: as it is"),
}


def sample(model, steps: int = 2, positive=None):
    noise, positive = comfy.sample.prepare_noise(empty, 0), positive or prompt
    return comfy.sample.sample(model, noise, steps, 1.0, "euler", "normal", positive, prompt, empty,
                               disable_pbar=True, seed=0)  # fmt: skip


def counted(model) -> int:
    """FLOPs of one evaluation, loading and everything else that ComfyUI does included."""
    with FlopCounterMode(display=False) as counter:
        sample(model, 1)
    return counter.get_total_flops()


def error(model, reference) -> float:
    return ((model - reference).norm() / reference.norm()).item()


def slimmed(model, wish):
    facts = slim.price(model, wish, inputs)
    return slim.slimmed(model, facts.plan), facts


made, result = {}, {"flops": {}, "errors": {}}
whole, answer = counted(models[16]), sample(models[16], 1)
answer4 = sample(models[4], 1)
for name, wish in WISHES.items():
    made[16, name] = out, facts = slimmed(models[16], wish)
    saved = [saving(facts, c) for c in facts.plan.changes]
    result["flops"][name] = [whole - counted(out), sum(s.flops_saved for s in saved), sum(s.flops for s in saved)]
    result["errors"][name] = [error(sample(out, 1), answer), facts.price.errors[facts.plan.changes]]
made[4, "both"] = out, facts = slimmed(models[4], WISHES["both"])
result["errors"]["4-bit"] = [error(sample(out, 1), answer4), facts.price.errors[facts.plan.changes]]

# Clones and unloading.
before = {bits: sample(m) for bits, m in models.items()}
state = {bits: list(m.model.state_dict()) for bits, m in models.items()}
variants = {16: [made[16, "both"][0], made[16, "skip"][0]], 4: [made[4, "both"][0]]}
first = {bits: [sample(v) for v in found] for bits, found in variants.items()}
named = {bits: list(m.model.state_dict()) == state[bits] for bits, m in models.items()}  # a slimmed one is loaded
result["same names"] = all(named.values())
result["originals"] = all(torch.equal(sample(m), before[bits]) for bits, m in models.items())
again = {bits: [sample(v) for v in reversed(found)][::-1] for bits, found in variants.items()}
mm.unload_all_models()
gc.collect()
reloaded = {bits: [sample(v.clone()) for v in found] for bits, found in variants.items()}
result["variants"] = all(
    torch.equal(a, b) and torch.equal(a, c)
    for bits in models for a, b, c in zip(first[bits], again[bits], reloaded[bits], strict=True)
)  # fmt: skip
result["originals after"] = all(torch.equal(sample(m), before[bits]) for bits, m in models.items())
zero, text = slim.slim(models[4], choose.Wish(0.0, "skip", 9, "separable", 9), inputs)
result["zero"] = torch.equal(sample(zero), before[4]) and not zero.object_patches and "Nothing" in text
result["stand-ins left"] = sum(isinstance(m, blocks.StandIn) for m in zero.model.modules())
twice = slimmed(variants[16][0], choose.Wish(0.5, convolutions="low rank", blocks="output 3: skip, separable"))[0]
result["twice"] = [len(variants[16][0].object_patches), len(twice.object_patches)]
result["twice"] += [error(sample(twice), before[16]), error(first[16][0], before[16])]

# LoRAs: linear layers take them after slimming, factored convolutions only before it.
conv = "input_blocks.5.0.in_layers.2"
linear = next(n for n, _ in models[4].model.diffusion_model.named_modules() if n.endswith("attn2.to_q"))


def lora(*names: str) -> dict:
    g, out = torch.Generator().manual_seed(0), {}
    for name in names:
        m = blocks.parent(models[4], name)
        o, i = (m.out_channels, (m.in_channels, 3, 3)) if name == conv else (m.out_features, (m.in_features,))
        out[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(o, 4, *[1 for _ in i[1:]], generator=g) * 0.3
        out[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(4, *i, generator=g) * 0.3
    return out


def with_lora(model, *names: str):
    return comfy.sd.load_lora_for_models(model, None, lora(*names), 1.0, 0.0)[0]


sample(variants[4][0])  # loaded, so that ComfyUI reads the names of LoRA keys from a slimmed model
result["linear lora"] = error(sample(with_lora(variants[4][0], linear)), first[4][0])


def hooked(name: str):
    """The prompt with a LoRA as a hook on it."""
    hook = comfy.hooks.create_hook_lora(lora=lora(name), strength_model=1.0, strength_clip=0.0)
    return comfy.hooks.set_hooks_for_conditioning(prompt, hook)


def refused(model, positive=None) -> str:
    try:
        sample(model, 1, positive)
    except ValueError as e:
        return str(e)
    return ""


as_patch, as_hook = sample(with_lora(variants[4][0], linear), 1), sample(variants[4][0], 1, hooked(linear))
result["linear hook"] = error(as_hook, as_patch)
result["conv lora"] = [refused(with_lora(variants[4][0], conv)), refused(variants[4][0], hooked(conv))]
result["conv lora"].append(refused(variants[4][0], prompt))
merged = with_lora(models[4], conv)
out = sample(slimmed(merged, choose.Wish(0.1, blocks="input 5: separable"))[0], 1)
result["merged first"] = [error(out, sample(merged, 1)), error(out, answer4)]
result["still the same"] = torch.equal(sample(models[4]), before[4])

# Replacers and patches that are there already.
calls = []


def replacer(q, k, v, extra):
    calls.append(extra["block"])
    return optimized_attention(q, k, v, extra["n_heads"]) + 0.1 * q


def patch(n, context, value, extra):
    calls.append("patch")
    return n, context, value


other = models[16].clone()
block = next(b.place.key for b in blocks.blocks(other) if b.attentions)
other.set_model_attn1_replace(replacer, *block)
other.set_model_attn1_patch(patch)
base = sample(other, 1)
result["chained"] = {}
for op in ("pool", "skip", "relu"):
    found, facts = slimmed(other, choose.Wish(0.5, blocks=f"{block[0]} {block[1]}: {op}"))
    alone = slimmed(models[16], choose.Wish(0.5, blocks=f"{block[0]} {block[1]}: {op}"))[0]
    calls.clear()
    got = sample(found, 1)
    result["chained"][op] = [block in calls and "patch" in calls, error(got, base), error(got, sample(alone, 1)),
                             facts.price.errors[facts.plan.changes]]  # fmt: skip

# A small SDXL: linear projections, two transformers in a block, a vector beside the text.
config = comfy.supported_models.SDXL({
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "num_heads": -1, "num_head_channels": 32, "use_spatial_transformer": True,
    "context_dim": 64, "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2],
    "transformer_depth_middle": 2, "use_linear_in_transformer": True, "legacy": False, "adm_in_channels": 2816,
    "num_classes": "sequential", "use_temporal_attention": False,
})  # fmt: skip
config.set_inference_dtype(torch.float32, None)
base = config.get_model({}, "")
g = torch.Generator().manual_seed(0)
for p in base.diffusion_model.parameters():
    p.data = torch.randn(p.shape, generator=g) / max(1, p[0].numel()) ** 0.5 if p.dim() > 1 else torch.ones(p.shape)
cpu = torch.device("cpu")
xl = comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)
prompt = [[torch.randn(1, 77, 64, generator=g), {"pooled_output": torch.randn(1, 1280, generator=g)}]]
inputs, answer, whole = slim.Inputs((prompt,), empty, 1), sample(xl, 1), counted(xl)
out, facts = slimmed(xl, choose.Wish(0.5, "skip", 1, "low rank", 2, "middle 0: relu\noutput 0: pool, low rank"))
saved = sum(saving(facts, c).flops_saved for c in facts.plan.changes)
result["sdxl"] = [whole - counted(out), saved, error(sample(out, 1), answer), facts.price.errors[facts.plan.changes]]
result["sdxl layers"] = {f"{c.block}: {c.op}": len(c.layers) for c in facts.plan.changes}

# A transformer has no blocks of this kind.
config = comfy.supported_models.Flux({
    "image_model": "flux", "in_channels": 16, "patch_size": 2, "out_channels": 16, "vec_in_dim": 64,
    "context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 1,
    "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
})  # fmt: skip
config.set_inference_dtype(torch.float32, None)
flux = comfy.model_patcher.ModelPatcher(config.get_model({}, ""), load_device=cpu, offload_device=cpu)
try:
    slim.slim(flux, WISHES["pool"], inputs)
except ValueError as e:
    result["flux"] = str(e)
print(json.dumps(result))
