"""ARGS: family, 4-bit file. LoRAs as hooks on a condition: patched in and out while sampling, cached, and cleaned."""

import json

from lora_common import (
    args,
    codes_hash,
    comfy,
    kernels,
    layers,
    load,
    lora,
    lora_files,
    now,
    relative,
    run,
    torch,
    with_lora,
)

family, four_file = args
model = load.diffusion_model(four_file)
before, codes = run(model, family), codes_hash(model)
files = [lora(model, seed=s)[1] for s in (1, 2)]
strange = {}
for name, module in layers(model).items():
    strange |= {f"diffusion_model.{name}{e}": t for e, t in lora_files.kind("dora", *module._orig_shape).items()}
files.append(strange)
expected = [run(with_lora(model, f), family) for f in files]
under = with_lora(model, files[0])
both = with_lora(under, files[1])
run(both, family)
weights = {n: kernels.dense(m.weight) for n, m in layers(both).items()}
target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
result = {}
for mode in comfy.hooks.EnumHookMode:
    hooked = model.clone()
    hooked.set_hook_mode(mode)
    groups = [comfy.hooks.create_hook_lora(lora=f, strength_model=1.0, strength_clip=0.0) for f in files]
    hooked.register_all_hook_patches(comfy.hooks.HookGroup.combine_all_hooks(groups), target)
    run(hooked, family)
    seen = []
    for i in (0, 1, 2, 0, 2, 1, 0):  # every change of kind, the second time from ComfyUI's cache
        hooked.apply_hooks(groups[i])
        seen.append(torch.equal(now(hooked, family), expected[i]))
    result[f"{mode.name}: groups"] = seen
    result[f"{mode.name}: cached"] = len(hooked.cached_hook_patches)
    hooked.apply_hooks(None)
    result[f"{mode.name}: none"] = torch.equal(now(hooked, family), before)
    hooked.apply_hooks(groups[0])
    hooked.clean_hooks()
    result[f"{mode.name}: cleaned"] = [torch.equal(now(hooked, family), before), len(hooked.hook_backup)]

half = comfy.hooks.create_hook_lora(lora=files[0], strength_model=0.5, strength_clip=0.0)
hooked = model.clone()
hooked.register_all_hook_patches(half, target)
run(hooked, family)
hooked.apply_hooks(half)
result["strength"] = torch.equal(now(hooked, family), run_half := run(with_lora(model, files[0], 0.5), family))
hooked.detach()

# A hook over a model that has a LoRA already.
over = under.clone()
group = comfy.hooks.create_hook_lora(lora=files[1], strength_model=1.0, strength_clip=0.0)
over.register_all_hook_patches(group, target)
run(over, family)
over.apply_hooks(group)
# Weights, not outputs: the two branches stand in another order, and 4-bit activations show a sum's last bit.
result["over a LoRA"] = max(relative(kernels.dense(m.weight), weights[n]) for n, m in layers(over).items())
over.clean_hooks()
result["under it"] = torch.equal(now(over, family), expected[0])
over.detach()
result["same codes"] = [torch.equal(run(model, family), before), codes_hash(model) == codes]
print(json.dumps(result))
