"""Measures models in ComfyUI's own sampler against what the simulation and the fitted constants say of them.

ARGS: JSON of a list of {path, family, channels, width, pooled, cfg}. Fitted on two sizes, asked for one between them.
Memory: peaks are of every tensor alive during one real evaluation. Time: fitted on 2 and 6 steps, asked for 4 and 10,
by a clock that counts the work really done, because seconds on a shared machine differ by a third from run to run
(`nibble profile` measures those).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import args, torch

sys.path.insert(0, sys.path[1])
import comfy.sample
import comfy.samplers
from comfy.patcher_extension import WrappersMP
from nibble_pack.nodes.bridge import load, model_profile, simulate
from nibble_pack.profiling import calibrate, memory, work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FITTED, UNSEEN = (2, 6), (4, 10)
SIZES, BETWEEN = (8, 16), 12  # latent pixels a side
DEVICE = memory.probe("cpu").device.name


class WorkClock(TorchDispatchMode):
    """A processor that is never disturbed: 5 us an operation, and 1 ns a value that it writes."""

    def __init__(self):
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seconds += 5e-6 + 1e-9 * sum(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


class Bench:
    """One model and the conditioning it samples with."""

    def __init__(self, path, family, channels, width, pooled, cfg):
        self.model = load.diffusion_model(path)
        self.base = self.model.model
        self.family, self.channels, self.cfg = family, channels, cfg
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

    def seconds(self, size, steps):
        with WorkClock() as clock:
            self.sample(self.model, size, steps)
        return clock.seconds

    def fit(self, measured):
        stored = "4-bit" if model_profile.storage(self.base.diffusion_model) == "4-bit" else "16-bit"
        dtype = str(self.dtype).removeprefix("torch.")
        return calibrate.fit(calibrate.Key("comfyui", self.family, dtype, self.kind, stored, DEVICE), measured)


def run(about):
    bench = Bench(**about)
    works = {size: bench.simulated(size) for size in (*SIZES, BETWEEN)}
    peaks = {size: bench.peak(size) for size in works}

    def measurement(size, steps):
        w = works[size]
        return calibrate.Measurement((8 * size) ** 2, w.flops, w.live, peaks[size], steps, bench.seconds(size, steps))

    row = bench.fit([measurement(size, n) for size in SIZES for n in FITTED])
    seen = [
        {"size": size, "simulated": w.live, "measured": peaks[size], "predicted": row.activation(w.live)}
        for size, w in works.items()
    ]
    w = works[BETWEEN]
    checks = [
        {"steps": n, "predicted": row.seconds((8 * BETWEEN) ** 2, w.flops, n), "measured": bench.seconds(BETWEEN, n)}
        for n in UNSEEN
    ]
    return {"peaks": seen, "checks": checks}


print(json.dumps([run(about) for about in json.loads(args[0])]))
