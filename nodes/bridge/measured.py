"""Constants from what was measured on this machine: saved runs of self-recording models, and `nibble profile`."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace

import torch

from ...profiling import calibrate
from ...profiling.calibrate import Constants, Key, Measurement
from ...profiling.report import Sampling
from . import records, simulate

log = logging.getLogger(__name__)
NEWEST = 20  # saved runs that are read
LEAST = 2  # evaluations a sampling must have: the first alone is all warm-up
SAME = 0.01  # of the parameters: a 4-bit copy may have gained a few biases


def rows(key: Key, base) -> list[Constants]:
    """Every known row, best last: shipped ones, then `nibble profile`'s, then those fitted now on saved runs of
    ``key``'s kind on its device, one a weight storage. ``base``: ComfyUI's model, to simulate what those runs did.
    """
    out = [*calibrate.shipped(), *records.calibrations()]
    for stored in calibrate.STORAGE:
        of = replace(key, weights=stored)
        found = measurements(of, base)
        out += [calibrate.fit(of, found)] if found else []
    return out


def measurements(key: Key, base) -> list[Measurement]:
    """What saved runs say of ``key``. A damaged file is left out, with a line in the log."""
    if not simulate.knows(base):
        return []
    done: dict[tuple, list[Sampling]] = defaultdict(list)
    size = simulate.parameters(base.diffusion_model)
    for name in records.saved()[:NEWEST]:
        try:
            run = records.load(name)
        except (OSError, ValueError) as e:  # deleted or damaged
            log.warning("Nibble: an estimate leaves out a saved run. %s", e)
            continue
        for s in run.samplings:
            if run.device.name == key.device and abs(s.parameters - size) <= SAME * size and matches(s, key):
                done[((s.batches[0], *s.shape[1:]), s.tokens)].append(s)
    out = []
    for (shape, tokens), samplings in done.items():
        w = simulate.evaluation(base, shape, getattr(torch, key.dtype), key.attention, tokens)
        for s in samplings:
            seconds = s.seconds - s.load_seconds - s.warm_up + s.steady  # loading and warming up happen once
            pixels = s.shape[0] * s.shape[2] * s.shape[3] * simulate.factor(base) ** 2
            out.append(Measurement(pixels, w.flops, w.live, s.activation, len(s.evaluations), seconds))
    return out


def matches(s: Sampling, key: Key) -> bool:
    """Whether a sampling is of the key's kind, and has more than its warm-up."""
    if len(s.evaluations) < LEAST or not s.batches[0] or len(s.shape) != 4:
        return False
    stored = "4-bit" if s.weights == "4-bit" else "16-bit"
    return (s.family, s.dtype, s.attention, stored) == (key.family, key.dtype, key.attention, key.weights)
