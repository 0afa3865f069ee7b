"""Keeps what a calibration has done on disk, so that an interrupted run goes on: a `quant.calib.engine.Store`.

    <digest of the name>.safetensors    a solved layer
    seen-<run>.safetensors              who shared an input in an observation, written when all that it saw is there:
    seen-<run>-<i>.safetensors          the sample of the i-th input
    plans.safetensors                   the plans that fit a budget, in its values

A folder belongs to one signature (model, prompts, recipe, seed, version of this pack). A file that does not read is
treated as absent: that part is simply done again. So is what cannot be written; `notes` say it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import Tensor

from ..checkpoints.formats import comfy_quant, core_quant
from ..quant.awq import AWQWeight
from ..quant.calib import recall
from ..quant.calib.engine import Layer
from ..quant.calib.observe import Observer
from ..quant.calib.solve import Solved
from ..quant.policy import LayerPlan
from ..quant.schemes import AWQ, SVDQUANT
from ..quant.svdquant import SVDQuantWeight
from ..writing import kept, room
from ..writing.whole import WriteError

ENTRY, PROMOTED = "layer", "promoted"
KINDS = {SVDQUANT.id: SVDQuantWeight, AWQ.id: AWQWeight}
# What a whole file of another version, or of another's making, may end in: it is no reason to stop a calibration.
FOREIGN = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError)
SEEN_BYTES, SPARE_BYTES = 2**32, 2**30  # of all observations that are kept, and what these leave free


class Folder:
    """A `quant.calib.engine.Store` in ``folder``. ``found``, ``recalled``: layers and observations that were there."""

    def __init__(self, folder: Path):
        self.folder, self.found, self.recalled, self._notes, self._seen = folder, 0, 0, [], 0

    def notes(self) -> list[str]:
        """For the run's report: whether it went on with an earlier one, what could not be kept or read again."""
        seen = ", and its prompts were not sampled again" if self.recalled else ""
        went_on = f"Went on with a run that was stopped: {self.found} layers were solved already{seen}"
        return [went_on, *self._notes] if self.found or self.recalled else self._notes

    def get(self, name: str) -> Layer | None:
        layer = self.read(name)
        self.found += layer is not None
        return layer

    def read(self, name: str) -> Layer | None:
        """As `get`, for a layer that this run has put there."""
        read = self._load(_file(name))
        if read is None:
            return None
        tensors, values = read
        try:
            layer = _layer(tensors, values)
        except FOREIGN:
            layer = None
        if layer is None or layer.name != name:
            self._note("A layer that was kept could not be read and is solved again")
            return None
        return layer

    def put(self, layer: Layer) -> bool:
        weight = layer.solved.weight
        ours = isinstance(weight, SVDQuantWeight | AWQWeight)
        if not ours and not layer.plan.reason.startswith(PROMOTED):
            return False  # made in a moment
        values = {k: v for k, v in vars(layer).items() if k not in ("plan", "solved")} | {"plan": asdict(layer.plan)}
        values["solved"] = {k: v for k, v in vars(layer.solved).items() if k not in ("weight", "bias")}
        if ours:
            tensors = comfy_quant.write(ENTRY, weight)
        elif isinstance(weight, QuantizedTensor):
            tensors = core_quant.write(ENTRY, weight)
            values["core"] = [core_quant.config_of(weight), str(weight._params.orig_dtype).removeprefix("torch.")]
        else:
            tensors, values["dense"] = {f"{ENTRY}.weight": weight}, True
        if layer.solved.bias is not None:
            tensors[f"{ENTRY}.bias"] = layer.solved.bias
        return self._save(_file(layer.name), tensors, values)

    def recall(self, run: int, observer: Observer) -> bool:
        read = self._load(f"seen-{run}.safetensors")
        if read is None:
            return False
        try:
            reservoirs = {}
            for i, lead in enumerate(read[1]["leads"]):
                observer.on_forward()
                reservoirs[lead] = recall.unpacked(*kept.load(self.folder / f"seen-{run}-{i}.safetensors"))
            recall.restore(observer, reservoirs, read[1])
        except FOREIGN:
            self._note("What was seen of the prompts could not be read, and they are watched again")
            return False
        self.recalled += 1
        return True

    def remember(self, run: int, observer: Observer) -> None:
        self._seen += observer.nbytes
        have = room.free(self.folder)
        if self._seen > SEEN_BYTES or (have is not None and have < observer.nbytes + SPARE_BYTES):
            return
        for i, reservoir in enumerate(observer.reservoirs.values()):
            observer.on_forward()
            if not self._save(f"seen-{run}-{i}.safetensors", *recall.packed(reservoir)):
                return
        self._save(f"seen-{run}.safetensors", {}, {"leads": list(observer.reservoirs), **recall.groups(observer)})

    def plans(self) -> dict[str, LayerPlan] | None:
        read = self._load("plans.safetensors")
        try:
            return None if read is None else {name: LayerPlan(**plan) for name, plan in read[1]["plans"].items()}
        except FOREIGN:
            return None

    def put_plans(self, plans: Mapping[str, LayerPlan]) -> None:
        self._save("plans.safetensors", {}, {"plans": {name: asdict(plan) for name, plan in plans.items()}})

    def _load(self, name: str) -> tuple[dict[str, Tensor], dict] | None:
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            return kept.load(path)
        except kept.Damaged:
            self._note("A file that was kept is damaged, and that part is done again")
            return None

    def _save(self, name: str, tensors: Mapping[str, Tensor], values: Mapping) -> bool:
        """Whether it is kept. Not waited for until the disk has it: the checksum tells after a power cut."""
        try:
            kept.save(self.folder / name, tensors, values, durable=False)
        except WriteError as e:
            self._note(f"What this run has done cannot be kept, and if it is stopped it is done again: {e}")
            return False
        return True

    def _note(self, sentence: str) -> None:
        if sentence.partition(": ")[0] not in [n.partition(": ")[0] for n in self._notes]:
            self._notes.append(sentence)


def _file(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:24] + ".safetensors"


def _layer(tensors: dict[str, Tensor], values: dict) -> Layer:
    """A layer from what `Folder.put` wrote. Raises one of `FOREIGN` for anything else."""
    values, shape = dict(values), tuple(values["shape"])
    bias, core = tensors.pop(f"{ENTRY}.bias", None), values.pop("core", None)
    if core is not None:
        parts = {n.removeprefix(f"{ENTRY}."): t for n, t in tensors.items()}
        weight = core_quant.build(core[0], parts, shape, getattr(torch, core[1]))
    elif values.pop("dense", False):
        weight = tensors[f"{ENTRY}.weight"]
    else:
        weight = comfy_quant.read(tensors, ENTRY)[ENTRY].weight
    solved = Solved(weight, bias, **values.pop("solved"))
    layer = Layer(**{**values, "plan": LayerPlan(**values["plan"]), "shape": shape, "solved": solved})
    if not _belongs_together(layer):
        raise ValueError("its parts are not of one layer")
    return layer


def _belongs_together(layer: Layer) -> bool:
    weight, bias, kind = layer.solved.weight, layer.solved.bias, KINDS.get(layer.plan.scheme)
    return (
        (type(weight) is kind if kind else isinstance(weight, Tensor))
        and tuple(weight.shape) == layer.shape
        and layer.plan.act_unsigned == getattr(weight, "act_unsigned", False)
        and (bias is None or tuple(bias.shape) == layer.shape[:1])
    )
