"""Slims a MODEL's UNet: a clone with cheaper self-attentions and 3x3 convolutions, and a report of what each costs.

skip, factored convolutions    object patches: stand-ins that ComfyUI loads and takes out with the clone
pool                           an attn1_patch, after those that are there
relu                           an attn1 replacer; what an earlier one adds to the attention stays
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

import comfy.model_management as mm
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import PatcherInjection, WrappersMP

from ...slim.choose import Key, Slimming, Wish, choose
from ...slim.operations import CONVOLUTIONS, POOL, RELU, Stage, pool_area, pooled, relu_attention
from . import selfcheck
from . import slim_blocks as places
from .build import PREFIX
from .calibrate import tell
from .slim_price import Change, Inputs, Plan, Price, Switch, measure
from .slim_report import Facts, report

KEY = "nibble.slim"
ATTENTION, CONVOLUTION = "attention", "convolutions"
NOMINAL = (64, 64)  # map that ranks are chosen for: only its proportions to the next one count


def slim(model, wish: Wish, inputs: Inputs, node_id: str | None = None):
    """(slimmed clone, markdown report). Strength 0 gives a clone without a change.

    Raises ValueError in a sentence for a model that is no UNet, or a block or an operation that is not there.
    """
    selfcheck.require()
    facts = price(model, wish, inputs, node_id)
    if not facts.plan.changes:
        return model.clone(), "Nothing was changed: strength is 0, or no block was chosen."
    return slimmed(model, facts.plan), report(facts)


def price(model, wish: Wish, inputs: Inputs, node_id: str | None = None) -> Facts:
    """What is to be changed, made and measured; ``model`` stays as it is. Raises as `slim`."""
    found = places.blocks(model)
    chosen = choose([b.place for b in found], wish)
    changes = tuple(c for b in found for c in _changes(b, chosen.get(b.place.key, Slimming())))
    groups = _groups(changes)
    layers = [name for c in changes if c.kind == CONVOLUTION for name in c.layers]
    progress = _Progress(node_id, len(layers) + len(groups) * inputs.levels * len(inputs.prompts))
    plan = Plan(changes, _factored(model, changes, wish.strength, progress), wish.strength)
    prices = _priced(model, plan, groups, inputs, progress) if changes else Price({}, {})
    return Facts(model, plan, inputs, prices)


def _changes(block: places.Block, choice: Slimming) -> list[Change]:
    out = []
    if choice.attention:
        out.append(Change(block.place.key, ATTENTION, choice.attention, block.attentions))
    if choice.convolutions:
        out.append(Change(block.place.key, CONVOLUTION, choice.convolutions, block.convolutions))
    return out


def _groups(changes: tuple[Change, ...]) -> list[tuple[Change, ...]]:
    """Each change alone, each kind, all: without repeats."""
    kinds = [tuple(c for c in changes if c.kind == kind) for kind in (ATTENTION, CONVOLUTION)]
    return list(dict.fromkeys(filter(None, [*((c,) for c in changes), *kinds, changes])))


def _factored(model, changes, strength: float, progress: _Progress) -> dict[str, torch.nn.Module]:
    out = {}
    device = mm.get_torch_device()
    for change in (c for c in changes if c.kind == CONVOLUTION):
        op = CONVOLUTIONS[change.op]
        for name in change.layers:
            conv = places.parent(model, name)
            weight, bias = (places.weight(model, f"{name}.{part}") for part in ("weight", "bias"))
            shape = places.shape(conv, NOMINAL)
            stages = op.factor(weight.to(device), op.rank(shape, strength), shape.stride, 0)
            out[name] = _module(stages, bias, _dtype(conv.weight.dtype)).to(model.offload_device)
            progress.step(f"factored {name}")
    return out


def _dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a factored weight: the original's, or 16 bits where that was less."""
    return dtype if dtype.itemsize > 1 else torch.bfloat16


def _module(stages: tuple[Stage, ...], bias: torch.Tensor | None, dtype: torch.dtype) -> torch.nn.Sequential:
    """ComfyUI's own convolutions, so that they are moved, offloaded and cast as any layer of the model."""
    made = []
    for i, stage in enumerate(stages):
        o, per_group, *kernel = stage.weight.shape
        last = bias is not None and i == len(stages) - 1
        conv = comfy.ops.manual_cast.Conv2d(
            per_group * stage.groups, o, tuple(kernel), stage.stride, stage.padding, groups=stage.groups, bias=last,
            dtype=dtype, device="meta",
        )  # fmt: skip
        conv.weight = torch.nn.Parameter(stage.weight.to(dtype), requires_grad=False)
        if last:
            conv.bias = torch.nn.Parameter(bias.detach().to(stage.weight.device, dtype, copy=True), requires_grad=False)
        made.append(conv)
    return torch.nn.Sequential(*made)


def _priced(model, plan: Plan, groups, inputs: Inputs, progress: _Progress) -> Price:
    """The price of each group, on a clone whose changes are switched."""
    switch = Switch()
    probe = model.clone()
    _patch_attention(probe, plan, lambda change: change in switch.on)
    modules = {name: m.to(model.load_device) for name, m in plan.factored.items()}

    def hooks(change: Change, name: str):
        stand_in = modules.get(name, places.Nothing() if change.op == "skip" else None)
        if stand_in is None:
            return None
        of_args = change.kind == CONVOLUTION
        return lambda module, args, out: stand_in(args[0] if of_args else out) if change in switch.on else None

    try:
        return measure(probe, groups, switch, hooks, inputs, lambda: progress.step("measuring"))
    finally:
        for m in modules.values():
            m.to(model.offload_device)


def slimmed(model, plan: Plan):
    """A clone of ``model`` with the plan's changes. The one that came in stays as it is."""
    m = model.clone()
    _patch_attention(m, plan, lambda change: True)
    gone = [name for c in plan.changes if c.op == "skip" for name in c.layers]
    for name in gone:
        m.add_object_patch(PREFIX + name, places.NoAttention(places.parent(model, name)))
    for name, module in plan.factored.items():
        m.add_object_patch(PREFIX + name, places.StandIn(places.parent(model, name), module))
    m.patches_uuid = uuid.uuid4()  # the model is loaded anew: the stand-ins must get where the other weights are
    baked = dict(m.get_attachment(KEY) or {})
    for name in plan.factored:
        for part in ("weight", "bias"):
            baked[f"{PREFIX}{name}.{part}"] = len(model.patches.get(f"{PREFIX}{name}.{part}", ()))
    m.set_attachments(KEY, baked)
    m.set_injections(KEY, [PatcherInjection(inject=lambda patcher: None, eject=_give_back)])
    m.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    m.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _guard)
    return m


def _give_back(patcher) -> None:
    """Puts the stand-ins' own weights back, which dynamic VRAM moved, before the stand-ins are taken out: ComfyUI does
    it after, when there is no such name any more.
    """
    for key in [k for k in patcher.backup if any(k.startswith(f"{name}.") for name in patcher.object_patches)]:
        comfy.utils.set_attr_param(patcher.model, key, patcher.backup.pop(key).weight)


def _guard(executor, *args, **kwargs):
    """Refuses what would silently do nothing: a LoRA or merge that came after its convolution was factored."""
    patcher = executor.class_obj.model_patcher
    baked = patcher.get_attachment(KEY) or {}
    hooked = {key for patches in patcher.hook_patches.values() for key in patches}
    late = [key for key, n in baked.items() if len(patcher.patches.get(key, ())) > n or key in hooked]
    if late:
        raise ValueError(
            f"A LoRA after Slim UNet changes factored convolutions ({len(late)} weights), where it cannot act. Put it "
            "before Slim UNet, or take those blocks out"
        )
    return executor(*args, **kwargs)


def _patch_attention(m, plan: Plan, on: Callable[[Change], bool]) -> None:
    """The patches of pool and relu on ``m``, each asking ``on`` whether it acts."""
    fewer = {c.key: c for c in plan.changes if c.op == POOL.id}
    if fewer:
        m.set_model_attn1_patch(_Pool(fewer, pool_area(plan.strength), on))
    there = m.model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn1", {})
    for change in (c for c in plan.changes if c.op == RELU.id):
        for i in range(len(change.layers)):
            before = there.get((*change.key, i), there.get(change.key))
            m.set_model_attn1_replace(_Relu(change, before, on), *change.key, i)


class _Pool:
    """An attn1_patch that averages what keys and values are made of."""

    def __init__(self, changes: dict[Key, Change], area: tuple[int, int], on: Callable[[Change], bool]):
        self.changes, self.area, self.on = changes, area, on

    def __call__(self, n, context, value, extra_options):
        change = self.changes.get(extra_options.get("block"))
        size = tuple(extra_options.get("activations_shape", ())[2:])
        # Tokens that an earlier patch merged or added are no map of this size: they stay.
        if change is None or not self.on(change) or len(size) != 2 or context.shape[1] != size[0] * size[1]:
            return n, context, value
        fewer = pooled(context, size, self.area)
        return n, fewer, fewer if value is context else pooled(value, size, self.area)


class _Relu:
    """An attn1 replacer without softmax. ``before``: the replacer that was there."""

    def __init__(self, change: Change, before: Callable | None, on: Callable[[Change], bool]):
        self.change, self.before, self.on = change, before, on

    def __call__(self, q, k, v, extra_options):
        heads = extra_options["n_heads"]
        before = None if self.before is None else self.before(q, k, v, extra_options)
        if not self.on(self.change):
            return optimized_attention(q, k, v, heads) if before is None else before
        out = relu_attention(q, k, v, heads)
        return out if before is None else out + before - optimized_attention(q, k, v, heads)


class _Progress:
    """The node's bar and line of text; stops when a person interrupts."""

    def __init__(self, node_id: str | None, total: int):
        self.node_id, self.done, self.total = node_id, 0, total
        self.bar = comfy.utils.ProgressBar(total, node_id=node_id)

    def step(self, text: str) -> None:
        mm.throw_exception_if_processing_interrupted()
        self.done += 1
        self.bar.update_absolute(self.done, self.total)
        tell(self.node_id, f"{self.done} of {self.total}: {text}")


__all__ = ["Inputs", "Wish", "price", "slim", "slimmed"]
