"""A MODEL that records its own sampling: wrappers of ComfyUI's ModelPatcher around what it already calls.

    OUTER_SAMPLE       the whole sampler call, model load included
    PREPARE_SAMPLING   moving the model to the device
    PREDICT_NOISE      one evaluation of the sampler, guidance batch included
    APPLY_MODEL        what really ran: its rows and text tokens

A MODEL is cached between prompts, so the wrappers keep nothing: one call's numbers live in a context variable.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from comfy.ldm.modules import attention
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context

from ... import families
from ...profiling.report import Sampling
from ...profiling.weights import DESCRIPTION
from ...profiling.work import FUSED, MATRIX
from ...quant import kernels
from ...reading.names import shown
from . import profiling, simulate

KEY = "nibble.profile"
STORES_SCORES = ("attention_basic", "attention_split", "attention_sub_quad")
PEAKS = 2  # evaluations whose memory peak is read; the others need the same


@dataclass
class _Call:
    """Numbers of one sampler call while it runs. ``marks``: start and end of each evaluation."""

    cuda: bool
    load: float = 0.0
    marks: list[tuple] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    now: int = 0  # rows of the evaluation that runs
    tokens: int = 0
    activation: int = 0

    def mark(self):
        """A moment: a clock reading, or an event in the card's own queue, which costs the CPU no wait."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def evaluations(self) -> tuple[float, ...]:
        """Seconds of each evaluation; waits for the card once."""
        if not self.cuda:
            return tuple(end - start for start, end in self.marks)
        torch.cuda.synchronize()
        return tuple(start.elapsed_time(end) / 1000 for start, end in self.marks)


_running: ContextVar[_Call | None] = ContextVar("nibble_sampling", default=None)


def recording(model, label: str):
    """A clone of ``model`` that records every sampler call under ``label`` (default: its weights)."""
    model, label = model.clone(), shown(label)

    def outer(executor, noise, *args, **kwargs):
        return _outer(executor, label, noise, *args, **kwargs)

    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, outer), (WrappersMP.PREPARE_SAMPLING, _prepare),
        (WrappersMP.PREDICT_NOISE, _predict), (WrappersMP.APPLY_MODEL, _apply),
    ):  # fmt: skip
        model.remove_wrappers_with_key(kind, KEY)  # recorded already: the later label counts, and nothing twice
        model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


def _outer(executor, label: str, noise, *args, **kwargs):
    patcher = executor.class_obj.model_patcher
    call = _Call(cuda=patcher.load_device.type == "cuda")
    handler = profiling.ensure()
    token = _running.set(call)
    start = time.perf_counter()
    try:
        return executor(noise, *args, **kwargs)
    finally:
        _running.reset(token)
        each = call.evaluations()
        seconds = time.perf_counter() - start
        handler.recorder.add(_sampling(patcher, label, tuple(noise.shape), call, each, seconds))


def _prepare(executor, *args, **kwargs):
    call = _running.get()
    start = time.perf_counter()
    out = executor(*args, **kwargs)
    if call is not None:
        call.load += time.perf_counter() - start
    return out


def _predict(executor, *args, **kwargs):
    call = _running.get()
    if call is None:
        return executor(*args, **kwargs)
    peak = call.cuda and len(call.marks) < PEAKS
    before = _restart_peak() if peak else 0
    call.now = 0
    start = call.mark()
    out = executor(*args, **kwargs)
    call.marks.append((start, call.mark()))
    call.rows.append(call.now)
    if peak:
        call.activation = max(call.activation, torch.cuda.max_memory_allocated() - before)
    return out


def _apply(executor, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
    call = _running.get()
    if call is not None:
        call.now += x.shape[0]
        if c_crossattn is not None:
            call.tokens = max(call.tokens, c_crossattn.shape[1])
    return executor(x, t, c_concat, c_crossattn, *args, **kwargs)


def _restart_peak() -> int:
    """Forgets torch's peak, after the prompt's recorder has taken it for the nodes that run; returns bytes in use."""
    profiling.ensure().recorder.take_peaks()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _sampling(patcher, label: str, shape, call: _Call, each: tuple[float, ...], seconds: float) -> Sampling:
    module = patcher.model.diffusion_model
    context = get_executing_context()
    weights = storage(module)
    return Sampling(
        node=context.node_id if context is not None else "", label=label or weights, family=family(module).id,
        dtype=str(patcher.model.get_dtype_inference()).removeprefix("torch."), attention=attention_kind(),
        weights=weights, weight_bytes=module_bytes(module),
        parameters=simulate.parameters(module), shape=shape, tokens=call.tokens, load_seconds=call.load,
        seconds=seconds, evaluations=each, batches=tuple(call.rows), activation=call.activation,
    )  # fmt: skip


def attention_kind() -> str:
    """fused or matrix: whether the attention that this ComfyUI chose ever stores its scores."""
    return MATRIX if attention.optimized_attention.__name__ in STORES_SCORES else FUSED


def family(module):
    """The family of a ComfyUI diffusion model, by its logical tensor shapes."""
    return families.detect({name: tuple(p.shape) for name, p in module.named_parameters()})[0]


def storage(module) -> str:
    """4-bit when any weight is; else the dtype most bytes are in."""
    count: dict[str, int] = {}
    for p in module.parameters():
        if kernels.is_ours(p):
            return "4-bit"
        name = str(getattr(p, "_layout_cls", None) or p.dtype).removeprefix("torch.")
        count[name] = count.get(name, 0) + p.numel()
    return max(count, key=count.get) if count else ""


def module_bytes(module) -> int:
    """Bytes of every tensor of a module, 4-bit ones with all their parts; not the layers' descriptions."""
    sd = module.state_dict()
    return sum(t.numel() * t.element_size() for name, t in sd.items() if not name.endswith(DESCRIPTION))
