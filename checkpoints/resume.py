"""Keeps solved layers of a calibration on disk, one small safetensors file each, so that an interrupted run goes on.

A folder belongs to one `run_signature` (this pack's version, model, prompts, recipe, seed); layers written under
another are not read. Writes are atomic, and each file holds a digest of all that it says: one that does not read, was
changed, or is another layer's, is treated as absent, and the layer is simply solved again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
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
from ..quant.schemes import AWQ, SVDQUANT
from ..quant.svdquant import SVDQuantWeight
from . import save
from .errors import CheckpointError
from .formats import comfy_quant

ENTRY, RECORD, DIGEST = "layer", "nibble_layer", "nibble_layer_sha256"
KINDS = {SVDQUANT.id: SVDQuantWeight, AWQ.id: AWQWeight}
# What a file that is broken, or another's, may end in: it is no reason to stop a calibration.
UNREADABLE = (SafetensorError, CheckpointError, OSError, LookupError, ValueError, TypeError, AttributeError,
              ArithmeticError, RuntimeError, MemoryError)  # fmt: skip
log = logging.getLogger(__name__)


class Folder:
    """A `quant.calib.engine.Store` in ``root``/``signature``."""

    def __init__(self, root: Path, signature: str):
        self.folder = root / signature
        self._told = False

    def _path(self, name: str) -> Path:
        return self.folder / (hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:24] + ".safetensors")

    def get(self, name: str) -> Layer | None:
        """The layer ``name`` as it was kept, or None."""
        path = self._path(name)
        try:
            if not path.is_file():
                return None
            with safe_open(path, framework="pt") as f:
                info = f.metadata()
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            if info[DIGEST] != _digest(info[RECORD], tensors):
                return None
            values = json.loads(info[RECORD])
            bias = tensors.pop(f"{ENTRY}.bias", None)
            weight = comfy_quant.read(tensors, path.name)[ENTRY].weight
            solved = Solved(weight, bias, **values.pop("solved"))
            plan, shape = LayerPlan(**values.pop("plan")), tuple(values.pop("shape"))
            layer = Layer(plan=plan, shape=shape, solved=solved, **values)
            return layer if layer.name == name and _belongs_together(layer) else None
        except UNREADABLE:
            return None  # broken, or written by another version: solved again

    def put(self, layer: Layer) -> None:
        """Keeps ``layer``. Where that is not possible the log says so, once, and the calibration goes on."""
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
        text = json.dumps(values)
        try:
            save.save(self._path(layer.name), tensors, {RECORD: text, DIGEST: _digest(text, tensors)}, overwrite=True)
        except (OSError, SafetensorError, CheckpointError) as e:
            if not self._told:
                log.warning("Solved layers cannot be kept (%s): if it is interrupted, this calibration starts anew", e)
            self._told = True

    def clear(self) -> None:
        """Forgets the run; called when its result is safe elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another interrupted run is kept there
            self.folder.parent.rmdir()


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """Of a file's record and every bit of its tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _belongs_together(layer: Layer) -> bool:
    weight, (n, _) = layer.solved.weight, layer.shape
    bias = layer.solved.bias
    return (
        type(weight) is KINDS.get(layer.plan.scheme)
        and weight.shape == layer.shape
        and layer.plan.act_unsigned == getattr(weight, "act_unsigned", False)
        and (bias is None or tuple(bias.shape) == (n,))
    )


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


def run_signature(**values) -> str:
    """`signature` of a run by this version of the pack: another's may solve the same layer otherwise."""
    return signature(version=save.version(), **values)
