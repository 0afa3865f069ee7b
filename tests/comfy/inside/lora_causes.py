"""ARGS: FLUX in 16 or in 4 bits. Files that are odd in one way each (tests/lora/lora_odd.py) through this pack's nodes'
matching: the status of each key, and whether what is reported is really in the weights.

Also random subsets of such files' keys: each key is accounted for once, nothing raises, and ComfyUI logs no failure.
"""

import json
import logging
import random

from lora_common import args, comfy, effective, load, ours, torch
from lora_common import lora_odd as odd
from lora_matrix import KINDS, kind
from safetensors.torch import save_file

bridge, match = ours("nodes.bridge.lora"), ours("nodes.bridge.lora_match")
model = (load.diffusion_model if "-4bit" in args[0] else comfy.sd.load_diffusion_model)(args[0])
LAYER, TARGET = "diffusion_model.double_blocks.0.img_attn.proj", "lora_unet_double_blocks_0_img_attn_proj"
n, k = comfy.utils.get_attr(model.model, f"{LAYER}.weight").shape
CASES, names = odd.cases(n, k), match.vocabulary(model, None)


class Errors(logging.Handler):
    said: list = []  # noqa: RUF012

    def emit(self, record):
        self.said.append(record.getMessage())


logging.getLogger().addHandler(Errors(logging.ERROR))


before = {part: effective(model, f"{LAYER}.{part}")[0] for part in ("weight", "bias")}


def applied(tensors: dict):
    """(match, by how much each part of the layer changed)"""
    found = match.match(dict(tensors), (), names)
    patched = bridge._patched(model, found, "model", 1.0, {})
    text = match.report("x", tensors, found).text()
    assert text.startswith("**x**: ") and f"{len(tensors)} keys: " in text
    return found, {part: effective(patched, f"{LAYER}.{part}")[0] - was for part, was in before.items()}


result = {"cases": {}, "types": {}, "alone": {}}
for name, (tensors, status, why) in CASES.items():
    found, change = applied({f"{TARGET}{end}": t for end, t in tensors.items()})
    right = found.status == {f"{TARGET}{end}": s for end, s in status.items()}
    reasons = set(found.why.values()) == ({why} if why else set())
    there = any(x.abs().max() > 0 for x in change.values()) == ("model" in status.values())
    result["cases"][name] = [
        right and reasons and there,
        sorted(found.status.values()),
        sorted(set(found.why.values())),
    ]
for key, name in odd.ALONE.items():
    found = match.match({key: torch.ones(4)}, (), names)
    result["alone"][key] = [found.status[key], found.why[key]] == ["unread", name]
save_file({f"{TARGET}.ia3_l": torch.ones(1, k)}, "ia3.safetensors")
try:
    bridge.apply([bridge.Choice("ia3.safetensors", "ia3.safetensors")], model)
except ValueError as e:
    result["of IA3 only"] = str(e)
result["inspected"] = bridge.inspect("ia3.safetensors", "ia3.safetensors", model)[0]

# A weight that ComfyUI does not find in the model's state dict: it drops the patch without a word.
tensors = {
    f"{t}{end}": x for t in (TARGET, TARGET.replace("img_attn", "txt_attn")) for end, x in kind("lora", n, k, n).items()
}
save_file(tensors, "two.safetensors")
save_file({key: t for key, t in tensors.items() if key.startswith(TARGET)}, "one.safetensors")
told, known = type(model.model).state_dict, f"{LAYER}.weight"
type(model.model).state_dict = lambda *a, **k: {n: t for n, t in told(*a, **k).items() if n != known}
result["dropped"] = bridge.apply([bridge.Choice("two.safetensors", "two.safetensors")], model)[2]
try:
    bridge.apply([bridge.Choice("one.safetensors", "one.safetensors")], model)
except ValueError as e:
    result["all dropped"] = str(e)
result["would drop"] = bridge.inspect("two.safetensors", "two.safetensors", model)[0]
type(model.model).state_dict = told

# Through ComfyUI's own loader, on this pack's patcher: what does not fit is refused, not met while sampling.
if "-4bit" in args[0]:
    result["stock"], seen = {}, len(Errors.said)
    odd_files = {name: {f"{TARGET}{end}": t for end, t in kind(name, n // 2, k // 2, n // 2).items()} for name in KINDS}
    lora = {f"{TARGET}{end}": t for end, t in kind("lora", n, k, n).items()}
    for alpha in (float("nan"), float("inf")):
        odd_files[f"alpha {alpha}"] = lora | {f"{TARGET}.alpha": torch.tensor(alpha)}
    up, down = f"{TARGET}.lora_up.weight", f"{TARGET}.lora_down.weight"
    odd_files["two ranks"] = {up: torch.ones(n, 4), down: torch.ones(3, k)}
    for name, tensors in odd_files.items():
        try:
            patched, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
            change = max((effective(patched, f"{LAYER}.{x}")[0] - b).abs().max().item() for x, b in before.items())
            result["stock"][name] = f"changed by {change}"
        except ValueError as e:
            result["stock"][name] = str(e)
    result["stock errors"] = Errors.said[seen:]
for dtype in odd.TYPES:
    for what in ("lora", "lokr"):
        tensors = odd.of_type(dtype, n, k, what)
        _, change = applied({f"{TARGET}{end}": t for end, t in tensors.items()})
        one, two = (t.double() for t in tensors.values())
        expected = two @ one if what == "lora" else torch.kron(one, two)
        result["types"][f"{what}, {dtype}"] = ((change["weight"] - expected).norm() / expected.norm()).item()

targets = (
    TARGET,
    LAYER,
    "transformer.transformer_blocks.0.attn.to_out.0",
    "lora_unet_nowhere",
    "lora_te1_text_model_x",
)
sets = [*(kind(name, n, k, n) for name in KINDS), *(tensors for tensors, _, _ in CASES.values())]
chance, wrong = random.Random(0), []
for _ in range(250):
    tensors = {"note": torch.zeros(1)} if chance.random() < 0.3 else {}
    for _ in range(chance.randint(0, 4)):
        tensors |= {
            f"{target}{end}": t for target in [chance.choice(targets)] for end, t in chance.choice(sets).items()
        }
    if chance.random() < 0.5:
        tensors = {key: t for key, t in tensors.items() if chance.random() < 0.7}
    found, change = applied(tensors)
    mine = {s for key, s in found.status.items() if key.startswith(targets[:3])}
    there = any(x.abs().max() > 0 for x in change.values())
    if set(found.status) != set(tensors) or not set(found.why) <= set(tensors) or there != ("model" in mine):
        wrong.append([sorted(tensors), found.status, there])
for _ in range(250):
    target = chance.choice(targets)
    tensors = {f"{target}{end}": t for end, t in odd.misshapen(chance).items()}
    found, change = applied(tensors)
    if set(found.status) != set(tensors):
        wrong.append([{key: list(t.shape) for key, t in tensors.items()}, found.status, 0])
result["wrong subsets"], result["errors"] = wrong, Errors.said
print(json.dumps(result))
