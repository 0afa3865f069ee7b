"""Measures models in ComfyUI's own sampler against what the simulation and the fitted constants say of them.

ARGS: JSON of a list of {path, family, channels, width, pooled, cfg, rounds}. Memory: of three sizes, the last one
unseen by the fit; peaks are of every tensor alive during one real evaluation. Seconds, where rounds > 0: fitted on 2
and 6 steps, predicted for 4 and 10; CPU seconds of this process, one thread, the least of all rounds, so that other
programs on the machine cannot stretch them much.
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

FITTED, UNSEEN = (2, 6), (4, 10)
SIZES, BETWEEN = (8, 16), 12  # latent pixels a side
DEVICE = memory.probe("cpu").device.name


class Bench:
    """One model and the conditioning it samples with."""

    def __init__(self, path, family, channels, width, pooled, cfg, rounds):
        self.model = load.diffusion_model(path)
        self.base = self.model.model
        self.family, self.channels, self.cfg, self.rounds = family, channels, cfg, rounds
        self.dtype, self.kind = self.base.get_dtype_inference(), model_profile.attention_kind()
        self.tokens = 77 if width >= 768 else 20
        g = torch.Generator().manual_seed(0)
        extra = {"pooled_output": torch.randn(1, pooled, generator=g)} if pooled else {}
        self.positive, self.negative = (
            [[torch.randn(1, self.tokens, width, generator=g), dict(extra)]] for _ in range(2)
        )

    def sample(self, model, size, steps):
        latent = torch.zeros(1, self.channels, size, size)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
        return comfy.sample.sample(model, noise, steps, self.cfg, "euler", "simple", self.positive, self.negative,
                                   latent, disable_pbar=True, seed=1)  # fmt: skip

    def simulated(self, size):
        rows = 2 if self.cfg > 1 else 1
        return simulate.evaluation(self.base, (rows, self.channels, size, size), self.dtype, self.kind, self.tokens)

    def peak(self, size):
        """Bytes of every tensor that one real evaluation of the diffusion model makes and holds at once."""
        found = []

        def wrapper(executor, *a, **k):
            with work.LiveBytes() as live:
                out = executor(*a, **k)
            found.append(live.peak)
            return out

        m = self.model.clone()
        m.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", wrapper)
        self.sample(m, size, 1)
        return max(found)

    def times(self, size):
        """steps -> CPU seconds of a run, after one that warms up."""
        taken = {n: [] for n in FITTED + UNSEEN}
        self.sample(self.model, size, 2)
        for _ in range(self.rounds):
            for n in taken:
                start = time.process_time()
                self.sample(self.model, size, n)
                taken[n].append(time.process_time() - start)
        return {n: min(t) for n, t in taken.items()}

    def fit(self, measured):
        stored = "4-bit" if model_profile.storage(self.base.diffusion_model) == "4-bit" else "16-bit"
        dtype = str(self.dtype).removeprefix("torch.")
        return calibrate.fit(calibrate.Key("comfyui", self.family, dtype, self.kind, stored, DEVICE), measured)


def run(about):
    bench = Bench(**about)
    works = {size: bench.simulated(size) for size in (*SIZES, BETWEEN)}
    peaks = {size: bench.peak(size) for size in works}
    seconds = bench.times(SIZES[-1]) if bench.rounds else dict.fromkeys(FITTED, 1.0)

    def measurement(size, steps):
        w = works[size]
        return calibrate.Measurement((8 * size) ** 2, w.flops, w.live, peaks[size], steps, seconds[steps])

    memory_row = bench.fit([measurement(size, 2) for size in SIZES])
    time_row = bench.fit([measurement(SIZES[-1], n) for n in FITTED])
    seen = [
        {"size": size, "simulated": w.live, "measured": peaks[size], "predicted": memory_row.activation(w.live)}
        for size, w in works.items()
    ]
    w = works[SIZES[-1]]
    checks = [
        {"steps": n, "predicted": time_row.seconds((8 * SIZES[-1]) ** 2, w.flops, n), "measured": seconds[n]}
        for n in UNSEEN if n in seconds
    ]  # fmt: skip
    return {"peaks": seen, "checks": checks, "row": asdict(time_row if checks else memory_row)}


print(json.dumps([run(about) for about in json.loads(args[0])]))
