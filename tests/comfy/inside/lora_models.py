"""ARGS: family, float file, 4-bit file, a folder to write into. Whole tiny models through ComfyUI's own LoRA loader."""

import json

from lora_common import (
    args,
    codes_hash,
    comfy,
    cosine,
    kernels,
    layers,
    load,
    lora,
    mm,
    now,
    patches,
    relative,
    run,
    torch,
    with_lora,
)

family, float_file, four_file, out = args
cpu = torch.device("cpu")
four, plain = load.diffusion_model(four_file), comfy.sd.load_diffusion_model(float_file)
_, one = lora(four, seed=1)
_, two = lora(four, seed=2, rank=7, size=0.2)
result = {"class": type(four).__name__, "layers": len(layers(four))}

before, float_before, codes = run(four, family), run(plain, family), codes_hash(four)
a, b = with_lora(four, one), with_lora(four, two)
with_a, float_a = run(a, family), run(with_lora(plain, one), family)
result["clone class"] = type(a).__name__
result["ranks"] = sorted({m.weight._params.proj_down.shape[1] for m in layers(a).values()})
result["still 4-bit"] = all(kernels.is_ours(m.weight) for m in layers(a).values())
result["delta cosine"] = cosine(with_a - before, float_a - float_before)
result["error before, after"] = [relative(before, float_before), relative(with_a, float_a)]
result["same codes"] = codes_hash(a) == codes

with_b = run(b, family)
result["a/b/a"] = [torch.equal(run(a, family), with_a), torch.equal(run(b, family), with_b)]
result["removed"] = torch.equal(run(four, family), before)
result["strength 0"] = torch.equal(run(with_lora(four, one, 0.0), family), before)
ab, ba = with_lora(a, two), with_lora(b, one)
result["order"] = torch.equal(run(ab, family), run(ba, family))
minus = with_lora(a, one, -1.0)
result["plus and minus"] = relative(run(minus, family), before)
result["strengths"] = [relative(run(with_lora(four, one, s), family), before) for s in (0.25, 0.5, 1.0)]
result["same codes at the end"] = codes_hash(with_lora(four, one, 0.5)) == codes

# Partially loaded: every layer's LoRA is applied on the fly.
mm.unload_all_models()
a.patch_model(cpu, lowvram_model_memory=1)
waiting = [m for m in layers(a).values() if len(m.weight_function) > 0]
result["low-VRAM layers"] = len(waiting)
result["low-VRAM equal"] = torch.equal(now(a, family), with_a)
comfy.utils.save_torch_file(a.state_dict_for_saving(), f"{out}/partly.safetensors", metadata={})
a.partially_load(cpu, 1e12)
result["then loaded"] = torch.equal(now(a, family), with_a)
a.partially_unload(cpu, 1e12)
result["then unloaded"] = torch.equal(now(a, family), with_a)
a.detach()
run(a, family)
comfy.utils.save_torch_file(a.state_dict_for_saving(), f"{out}/whole.safetensors", metadata={})
result["saved"] = [torch.equal(run(load.diffusion_model(f"{out}/{n}.safetensors"), family), with_a)
                   for n in ("partly", "whole")]  # fmt: skip


# Merges: this pack's weights as source and as target, with and without LoRA; the exact dense way.
def merged(m1, m2, ratio):
    m = m1.clone()
    for k, v in m2.get_key_patches("diffusion_model.").items():
        m.add_patches({k: v}, 1.0 - ratio, ratio)
    return m


other = load.diffusion_model(four_file)
expected = {n: patches.dense(m.weight) for n, m in layers(other).items()}
mix = merged(four, with_lora(other, one), 0.25)
run(mix, family)
scale = 0.75 * 0.5  # of the LoRA: the other model's share, alpha / rank
errors = []
for n, m in layers(mix).items():
    down, up = one[f"diffusion_model.{n}.lora_down.weight"], one[f"diffusion_model.{n}.lora_up.weight"]
    errors.append(relative(m.weight.float(), expected[n] + scale * up @ down))
result["merge error"] = max(errors)
result["merge dtype"] = sorted({str(m.weight.dtype) for m in layers(mix).values()})
result["merge of equals"] = relative(run(merged(four, other, 0.5), family), before)
mix_out = run(mix, family)
mm.unload_all_models()
mix.patch_model(cpu, lowvram_model_memory=1)
result["merge low-VRAM"] = relative(now(mix, family), mix_out)
comfy.utils.save_torch_file(mix.state_dict_for_saving(), f"{out}/merged.safetensors", metadata={})
mix.detach()
result["merge saved"] = relative(run(load.diffusion_model(f"{out}/merged.safetensors"), family), mix_out)
result["merge removed"] = torch.equal(run(four, family), before)
print(json.dumps(result))
