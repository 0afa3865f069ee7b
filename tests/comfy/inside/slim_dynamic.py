"""Slimmed models under low VRAM and under ComfyUI's dynamic-VRAM patcher, driven on a CPU as far as that goes.

As in lora_dynamic.py: ModelPatcherDynamic's own load(), clone() and restore are real; comfy-aimdo's host buffers, which
need a GPU, are replaced by empty ones, and there is no reserved VRAM.
"""

import json

from lora_common import comfy, dynamic_of, mm, ours, torch

demo, slim, choose = ours("nodes.bridge.demo"), ours("nodes.bridge.slim"), ours("slim.choose")
cpu = torch.device("cpu")
g = torch.Generator().manual_seed(0)
x, t, context = torch.randn(1, 4, 16, 16, generator=g), torch.tensor([5.0]), torch.randn(1, 16, 128, generator=g)
inputs = slim.Inputs(([[context, {}]],), torch.zeros(1, 4, 16, 16), 1)
# The filters of a separable convolution are so small that dynamic VRAM moves them at once and keeps a backup.
WISH = choose.Wish(0.85, blocks="middle 0: skip, separable\ninput 3: skip, low rank\noutput 2: pool")


def answer(model):
    options = model.model_options["transformer_options"]
    return model.model.apply_model(x, t, c_crossattn=context, transformer_options=options)


def in_turn(models, load, expected) -> list[bool]:
    """Whether each model answers as expected, loaded one after the other."""
    out = []
    for i in (0, 1, 1, 0, 1, 0):
        load(models[i])
        out.append(torch.equal(answer(models[i]), expected[i]))
        models[i].detach(unpatch_all=False)  # what ComfyUI does before it loads another clone
    return out


static = demo.model(True, disable_dynamic=True)
plan = slim.price(static, WISH, inputs).plan
models, names = [static, slim.slimmed(static, plan)], list(static.model.state_dict())
expected = []
for m in models:
    mm.load_models_gpu([m])
    expected.append(answer(m))
mm.unload_all_models()
lowvram, kept = [], []


def load_low(m):
    m.partially_load(cpu, extra_memory=500_000)
    lowvram.append(m.model.model_lowvram)


result = {"low VRAM": in_turn(models, load_low, expected), "partly loaded": all(lowvram)}
base = dynamic_of(static)
comfy.model_patcher.ModelPatcherDynamic.__new__ = staticmethod(lambda cls, *_, **__: object.__new__(cls))
models = [base, slim.slimmed(base, plan)]


def load_dynamic(m):
    m.partially_load(cpu)
    kept.append(sum(".run." in key for key in m.backup))


result["dynamic"] = in_turn(models, load_dynamic, expected)
result["kept"] = [type(models[1]).__name__, max(kept)]
result["names"] = names == list(static.model.state_dict())
result["different"] = not torch.equal(*expected)
print(json.dumps(result))
