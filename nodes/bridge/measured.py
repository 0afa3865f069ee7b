"""Constants from what was measured on this machine: saved runs of self-recording models, and `nibble profile`."""

from __future__ import annotations

from collections import defaultdict

import torch

from ...profiling import calibrate
from ...profiling.calibrate import Constants, Key, Measurement
from ...profiling.report import Sampling
from . import records, simulate

NEWEST = 20  # saved runs that are read
LEAST = 2  # evaluations a sampling must have: the first alone is all warm-up


def rows(key: Key, base) -> list[Constants]:
    """Every known row, best last: shipped ones, then `nibble profile`'s, then one fitted now on saved runs of
    ``key``'s kind on its device. ``base``: ComfyUI's model, to simulate what those runs did.
    """
    known = [*calibrate.shipped(), *records.calibrations()]
    found = measurements(key, base)
    return [*known, calibrate.fit(key, found)] if found else known


def measurements(key: Key, base) -> list[Measurement]:
    """What saved runs say of ``key``. A file that is no run any more is left out, as it would be from the list."""
    if not simulate.knows(base):
        return []
    done: dict[tuple, list[Sampling]] = defaultdict(list)
    size = simulate.parameters(base.diffusion_model)
    for name in records.saved()[:NEWEST]:
        run = records.load(name)
        for s in run.samplings:
            if run.device.name == key.device and s.parameters == size and matches(s, key):
                done[((s.batches[0], *s.shape[1:]), s.tokens)].append(s)
    out = []
    for (shape, tokens), samplings in done.items():
        w = simulate.evaluation(base, shape, getattr(torch, key.dtype), key.attention, tokens)
        for s in samplings:
            seconds = s.seconds - s.load_seconds - s.warm_up + s.steady  # loading and warming up happen once
            pixels = s.shape[0] * s.shape[2] * s.shape[3] * simulate.FACTOR**2
            out.append(Measurement(pixels, w.flops, w.live, s.activation, len(s.evaluations), seconds))
    return out


def matches(s: Sampling, key: Key) -> bool:
    """Whether a sampling is of the key's kind, and has more than its warm-up."""
    if len(s.evaluations) < LEAST or not s.batches[0] or len(s.shape) != 4:
        return False
    stored = "4-bit" if s.weights == "4-bit" else "16-bit"
    return (s.family, s.dtype, s.attention, stored) == (key.family, key.dtype, key.attention, key.weights)
