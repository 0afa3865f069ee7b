"""What Calibrate leaves in memory, and what it sees: {"alive": what still holds each 16-bit model once it is dropped,
"again": the made model made anew, against itself, "seen": Wan's layers that hooks see, with and without fused calls}.
"""

import gc
import json
import tempfile
import weakref
from pathlib import Path

from lora_common import comfy, mm, ours, torch

demo, slim, choose = ours("nodes.bridge.demo"), ours("nodes.bridge.slim"), ours("slim.choose")
calibrate, refine, distill = ours("nodes.bridge.calibrate"), ours("nodes.bridge.refine"), ours("nodes.bridge.distill")
train_model, observe = ours("nodes.bridge.train_model"), ours("quant.calib.observe")
clip = demo.clip()
pairs = calibrate.encode(clip, ["red apple", "blue car"], "")
empty = torch.zeros(1, 4, 16, 16)
settings = calibrate.Settings("fast", "svdquant_w4a4", 16, 0, 2, 1.0, 0)


def calibrated(model):
    with tempfile.TemporaryDirectory() as folder:
        return calibrate.calibrate(model, calibrate.Inputs(pairs, empty), settings, Path(folder))[0]


def slimmed(model):
    wish = choose.Wish(0.5, "skip", 1, "low rank", 1)
    return slim.slim(model, wish, slim.Inputs((pairs[0][0],), empty, 1))[0]


def loftq(model):
    with tempfile.TemporaryDirectory() as folder:
        return refine.loftq(model, refine.LoftQ(4, 16, 1), Path(folder) / "lora.safetensors")[:2]


def refined(teacher):
    """The 4-bit model that is refined goes too."""
    model = demo.model(True)
    watched.append(weakref.ref(model.model))
    wish = refine.Refine(1, 1, 1e-3, 2, 1.0, 0)
    return refine.refine((model, teacher), calibrate.Inputs(pairs, empty), wish)[0]


def answer(model) -> torch.Tensor:
    mm.load_models_gpu([model])
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = model.model_options["transformer_options"]
    return model.model.apply_model(x, torch.tensor([500.0]), c_crossattn=pairs[0][0][0][0],
                                   transformer_options=options)  # fmt: skip


result = {"alive": {}, "again": {}}
for name, make in {
    "calibrate": calibrated, "loftq": loftq, "refine": refined, "slim, then calibrate": lambda m: calibrated(slimmed(m))
}.items():  # fmt: skip
    original = demo.model(False)
    linear = original.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q
    watched = [weakref.ref(x) for x in (original, original.model, linear, linear.weight)]
    made = make(original)
    del original, linear
    mm.unload_all_models()
    gc.collect()
    result["alive"][name] = [type(x()).__name__ for x in watched if x() is not None]
    one = made[0] if isinstance(made, tuple) else made
    anew = one.cached_patcher_init[0](*one.cached_patcher_init[1], disable_dynamic=True)
    expected = answer(one)
    mm.unload_all_models()
    result["again"][name] = bool(torch.equal(answer(anew), expected))

# A Wan model whose feed-forwards are int8: ComfyUI multiplies by them past their layer's forward.
from comfy.ldm.wan.model import WanModel  # noqa: E402

ops = dict(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
wan = WanModel(dim=128, ffn_dim=256, freq_dim=256, text_dim=4096, out_dim=16, num_heads=1, num_layers=2, **ops)
g = torch.Generator().manual_seed(0)
sd = {n: torch.randn(t.shape, generator=g) / max(1, t[0].numel()) ** 0.5 for n, t in wan.state_dict().items()}
core = ours("quant.core_formats"), ours("checkpoints.formats.core_quant")
for i in range(2):
    name = f"blocks.{i}.ffn.2"
    sd |= core[1].write(name, core[0].quantize(sd.pop(f"{name}.weight"), "int8_tensorwise", torch.bfloat16))
model = comfy.sd.load_diffusion_model_state_dict(sd)
text = [[torch.randn(1, 8, 4096, generator=g), {}]]
inputs = calibrate.Inputs(((text, text),), torch.zeros(1, 16, 1, 8, 8))
module = model.model.diffusion_model
widths = {n: m.in_features for n, m in module.named_modules() if hasattr(m, "in_features") and ".ffn." in n}


def seen(run) -> list[str]:
    observer = observe.Observer(widths, 64)
    with observer.watching(module):
        run()
    return sorted(observer.leader)


def plainly():
    comfy.sample.sample(model, inputs.latent.clone(), 2, 1.0, "euler", "simple", text, text, inputs.latent,
                        disable_pbar=True, seed=0)  # fmt: skip


result["seen"] = {
    "plainly": seen(plainly),
    "calibrating": seen(lambda: calibrate._sample(model, inputs, settings, None)),
}
result["layers"], result["left"] = sorted(widths), mm.in_training
print(json.dumps(result))
