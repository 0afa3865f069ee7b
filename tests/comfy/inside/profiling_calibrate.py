"""Measures a model in ComfyUI's own sampler and fits the estimate's constants on it.

ARGS: model file, family, latent channels, context width, pooled width, cfg, rounds. Fits on 2 and 6 steps at two sizes,
then predicts 4 and 10 steps, and the memory of a size between. Seconds are CPU seconds of this process, one thread, the
least of all rounds: other programs on the machine cannot stretch them much. Peaks are of every tensor alive during one
real evaluation.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import args, torch

sys.path.insert(0, sys.path[1])
import comfy.sample
import comfy.samplers
from comfy.patcher_extension import WrappersMP
from nibble_pack.nodes.bridge import load, model_profile, simulate
from nibble_pack.profiling import calibrate, memory, work

path, family, channels, width, pooled, cfg, rounds = args
BETWEEN = 20
channels, width, pooled, cfg, rounds = int(channels), int(width), int(pooled), float(cfg), int(rounds)
FITTED, UNSEEN, SIZES, TOKENS = (2, 6), (4, 10), (16, 24), 77 if int(width) >= 768 else 20

model = load.diffusion_model(path)
base = model.model
dtype = base.get_dtype_inference()
kind = model_profile.attention_kind()
g = torch.Generator().manual_seed(0)


def conditioning():
    extra = {"pooled_output": torch.randn(1, pooled, generator=g)} if pooled else {}
    return [[torch.randn(1, TOKENS, width, generator=g), extra]]


positive, negative = conditioning(), conditioning()


def sample(m, size, steps):
    latent = torch.zeros(1, channels, size, size)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    return comfy.sample.sample(m, noise, steps, cfg, "euler", "simple", positive, negative, latent, disable_pbar=True,
                               seed=1)  # fmt: skip


def peak(size):
    """Bytes of every tensor that one real evaluation of the diffusion model makes and holds at once."""
    found = []

    def wrapper(executor, *a, **k):
        with work.LiveBytes() as live:
            out = executor(*a, **k)
        found.append(live.peak)
        return out

    m = model.clone()
    m.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", wrapper)
    sample(m, size, 1)
    return max(found)


rows = 2 if cfg > 1 else 1
measured, peaks = {}, {}
for size in (*SIZES, BETWEEN):
    w = simulate.evaluation(base, (rows, channels, size, size), dtype, kind, TOKENS)
    fused = simulate.evaluation(base, (rows, channels, size, size), dtype, work.FUSED, TOKENS)
    peaks[size] = {"simulated": w.live, "fused": fused.live, "measured": peak(size), "flops": w.flops}
    if size == BETWEEN:
        continue
    taken = {n: [] for n in FITTED + UNSEEN}
    sample(model, size, 2)
    for _ in range(rounds):
        for n in taken:
            start = time.process_time()
            sample(model, size, n)
            taken[n].append(time.process_time() - start)
    for n, seconds in taken.items():
        measured[size, n] = calibrate.Measurement(
            (8 * size) ** 2, w.flops, w.live, peaks[size]["measured"], n, min(seconds)
        )
stored = "4-bit" if model_profile.storage(base.diffusion_model) == "4-bit" else "16-bit"
key = calibrate.Key("comfyui", family, str(dtype).removeprefix("torch."), kind, stored, memory.probe("cpu").device.name)
row = calibrate.fit(key, [m for (_, n), m in measured.items() if n in FITTED])
for p in peaks.values():
    p["predicted"] = row.activation(p["simulated"])
checks = []
for (size, n), m in measured.items():
    if n in UNSEEN:
        own = calibrate.fit(key, [measured[size, steps] for steps in FITTED])
        both = row.seconds(m.pixels, m.flops, n)
        checks.append({"size": size, "steps": n, "predicted": own.seconds(m.pixels, m.flops, n), "measured": m.seconds,
                       "predicted_by_both_sizes": both})  # fmt: skip
print(json.dumps({"row": asdict(row), "checks": checks, "peaks": peaks}))
