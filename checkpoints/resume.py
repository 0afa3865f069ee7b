"""Keeps solved layers of a calibration on disk, one small safetensors file each, so that an interrupted run goes on.

A folder belongs to one signature (model, prompts, recipe, seed); layers written under another are not read. Writes are
atomic, and a file that does not read is treated as absent: the layer is simply solved again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..quant.awq import AWQWeight
from ..quant.calib.engine import Layer
from ..quant.calib.solve import Solved
from ..quant.policy import LayerPlan
from ..quant.svdquant import SVDQuantWeight
from . import save
from .errors import CheckpointError
from .formats import comfy_quant

ENTRY, RECORD = "layer", "nibble_layer"


class Folder:
    """A `quant.calib.engine.Store` in ``root``/``signature``."""

    def __init__(self, root: Path, signature: str):
        self.folder = root / signature

    def _path(self, name: str) -> Path:
        return self.folder / (hashlib.sha256(name.encode()).hexdigest()[:24] + ".safetensors")

    def get(self, name: str) -> Layer | None:
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as f:
                values = json.loads(f.metadata()[RECORD])
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            bias = tensors.pop(f"{ENTRY}.bias", None)
            weight = comfy_quant.read(tensors, path.name)[ENTRY].weight
            solved = Solved(weight, bias, **values.pop("solved"))
            plan, shape = LayerPlan(**values.pop("plan")), tuple(values.pop("shape"))
            return Layer(plan=plan, shape=shape, solved=solved, **values)
        except (SafetensorError, CheckpointError, OSError, KeyError, ValueError, TypeError, AttributeError):
            return None  # broken, or written by another version: solved again

    def put(self, layer: Layer) -> None:
        s = layer.solved
        if not isinstance(s.weight, SVDQuantWeight | AWQWeight):
            return  # made in a moment, and ComfyUI's formats are not ours to read
        values = {
            "name": layer.name,
            "plan": asdict(layer.plan),
            "shape": list(layer.shape),
            "solved": {"error": s.error, "data_free": s.data_free, "calibrated": s.calibrated},
            "tokens": layer.tokens,
            "seconds": layer.seconds,
        }
        tensors = comfy_quant.write(ENTRY, s.weight)
        if s.bias is not None:
            tensors[f"{ENTRY}.bias"] = s.bias
        save.save(self._path(layer.name), tensors, {RECORD: json.dumps(values)}, overwrite=True)

    def clear(self) -> None:
        """Forgets the run; called when its result is safe elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another interrupted run is kept there
            self.folder.parent.rmdir()


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A short digest of names, shapes and contents. Contents by sums in float64 and a few values: fast, and any
    retrained or patched weight changes it.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach()
        flat = t.flatten()
        step = max(1, flat.numel() // 64)
        few = flat[::step][:64].to("cpu", torch.float64)
        values = [float(flat.sum(dtype=torch.float64)), float(flat.abs().sum(dtype=torch.float64)), *few.tolist()]
        digest.update(json.dumps([name, list(t.shape), str(t.dtype), values]).encode())
    return digest.hexdigest()[:32]


def signature(**values) -> str:
    """A digest of everything that a calibration depends on; ``values`` are JSON-able."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
