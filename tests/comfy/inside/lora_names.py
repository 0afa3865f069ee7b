"""ARGS: family, 4-bit file, a folder to write into. The same LoRA in every spelling through this pack's nodes'
function.

For each spelling: what the report counts, how far what it adds is from what ComfyUI's own loader adds with ComfyUI's
own names, and how many targets ComfyUI's own loader finds in it.
"""

import json
from pathlib import Path

from lora_common import (
    args,
    comfy,
    kernels,
    layers,
    load,
    lora,
    lora_files,
    mm,
    ours,
    patches,
    relative,
    torch,
    with_lora,
)
from safetensors.torch import save_file

bridge, match = ours("nodes.bridge.lora"), ours("nodes.bridge.lora_match")
family, four_file, out = args
four = load.diffusion_model(four_file)
parts, file = lora(four)


def weights(model) -> dict:
    """The effective weight of every 4-bit layer of a loaded MODEL."""
    mm.load_models_gpu([model])
    assert all(kernels.is_ours(m.weight) for m in layers(model).values())
    return {n: patches.dense(m.weight) for n, m in layers(model).items()}


def apply(name: str, tensors: dict, metadata: dict | None = None):
    save_file(tensors, Path(out) / name, metadata)
    model, _, text = bridge.apply([bridge.Choice(name, f"{out}/{name}")], four)
    return model, text


def diffusers_parts() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The same update in diffusers names: q, k and v of a fused layer share its down half."""
    found = {}
    for rule in match.rules_of(four):
        native = rule.native.removesuffix(".weight")
        if rule.native.endswith(".weight") and native in parts:
            down, up = parts[native]
            n, k = up.shape[0], down.shape[1]
            if rule.swap_halves:
                up = torch.cat(up.chunk(2)[::-1])
            rows = [n] if len(rule.sources) == 1 else [k] * (len(rule.sources) - 1)
            rows += [n - sum(rows)] * (len(rule.sources) - len(rows))
            for source, some in zip(rule.sources, up.split(rows), strict=True):
                found[source.removesuffix(".weight")] = (down, some)
    return found


before, expected = weights(four), weights(with_lora(four, file))
theirs = diffusers_parts()
own = {"kohya", "comfyui", "bfl", "peft", "peft named"}
more = {"kohya", "peft", "diffusers unet", "old diffusers", "processor", "onetrainer dotted"}
if family in ("flux", "sd3"):
    more = {"onetrainer", "lycoris", "peft", "diffusers transformer", "bfl"}
result = {"layers": len(parts), "reports": {}, "error": {}, "stock takes": {}}
for kind, names, spellings in (("native", parts, own), ("diffusers", theirs, more)):
    for spelling in sorted(spellings):
        tensors = lora_files.spell(names, spelling, alpha=2.0)
        model, text = apply("lora.safetensors", tensors)
        got = weights(model)
        key = f"{kind}, {spelling}"
        result["reports"][key] = text.splitlines()[1]
        change = {n: got[n] - before[n] for n in got}
        result["error"][key] = max(relative(change[n], expected[n] - before[n]) for n in got)
        key_map = comfy.lora.model_lora_keys_unet(four.model, {})
        taken = comfy.lora.load_lora(comfy.lora_convert.convert_lora(tensors), key_map, log_missing=False)
        result["stock takes"][key] = len(taken)
if family in ("sd15", "sdxl"):  # q, k and v in one update, as diffusers' fuse_qkv_projections trains them
    blocks = sorted({n.rpartition(".")[0] for n in theirs if n.endswith("attn1.to_q")})
    blocks = [b for b in blocks if f"{b}.to_k" in theirs]
    fused = {
        f"{b}.to_qkv": (theirs[f"{b}.to_q"][0], torch.cat([theirs[f"{b}.to_{x}"][1] for x in "qkv"])) for b in blocks
    }
    model, text = apply("fused.safetensors", lora_files.spell(fused, "diffusers unet", alpha=2.0))
    got, split = (
        weights(model),
        {f"{b}.to_{x}": (theirs[f"{b}.to_q"][0], theirs[f"{b}.to_{x}"][1]) for b in blocks for x in "qkv"},
    )
    same = weights(apply("split.safetensors", lora_files.spell(split, "kohya", alpha=2.0))[0])
    result["fused"] = [text.splitlines()[1], all(torch.equal(got[n], same[n]) for n in got), len(blocks)]
print(json.dumps(result))
