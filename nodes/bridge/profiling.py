"""Records prompts inside ComfyUI without touching its code: a progress handler of the prompt's own registry.

A registry lives for one prompt, so the handler must be added after it is made and before the first node runs. The
profiler node's ``fingerprint_inputs`` is called exactly then. The end of a prompt, however it ends, is seen by a task
of the prompt's own event loop: ComfyUI runs each prompt in one `asyncio.run`, which cancels what is left.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from contextlib import contextmanager

import comfy.model_management
from comfy_execution.progress import NodeState, ProgressHandler, add_progress_handler, get_progress_state

import nodes as comfy_nodes

from ...checkpoints.save import version
from ...profiling import memory
from ...profiling.live import About, RunRecorder
from ...profiling.report import Run
from ...reading.names import shown
from . import records

log = logging.getLogger(__name__)
NAME = "nibble.profiler"
REPORTERS = ("NibbleProfiler",)
PREFIX = "nibble/run"
POLL, QUIET = 0.005, 12  # seconds between looks at the other nodes, and how many without a change mean nothing comes
CODED = {"LATENT", "IMAGE", "AUDIO"}
MODELS = {"MODEL", "CLIP", "VAE", "CLIP_VISION", "CONTROL_NET", "STYLE_MODEL", "UPSCALE_MODEL"}


class Handler(ProgressHandler):
    """One prompt's recorder. ``label`` and ``prefix``: what the profiler node calls the run and its files."""

    def __init__(self, registry, label: str, prefix: str):
        super().__init__(NAME)
        self.label, self.prefix = shown(label), prefix
        self.registry = registry
        self.recorder = RunRecorder(memory.probe(comfy.model_management.get_torch_device()))
        self.events = 0
        self._ended = threading.Event()
        self._files: records.Files | None = None
        self._task: asyncio.Task | None = None
        # Added late (ComfyUI asks for no fingerprints when its cache is off), what is over can no longer be timed.
        self.missed = {id for id, entry in registry.nodes.items() if entry["state"] is NodeState.Finished}
        for id, entry in registry.nodes.items():
            if entry["state"] is NodeState.Running:
                self.recorder.start(id)
        threading.Thread(target=self._watch_memory, name=NAME, daemon=True).start()

    def start_handler(self, node_id, state, prompt_id):
        with self._harmless():
            self.events += 1
            self.recorder.start(node_id)

    def update_handler(self, node_id, value, max_value, state, prompt_id, image=None):
        with self._harmless():
            self.recorder.progress(node_id, value)

    def finish_handler(self, node_id, state, prompt_id):
        with self._harmless():
            self.events += 1
            self.recorder.finish(node_id)

    def reset(self):
        """ComfyUI calls this when the next prompt begins: by then this one has ended."""
        self.end()

    @contextmanager
    def _harmless(self):
        """ComfyUI calls handlers where an exception ends the thread that runs the queue; measuring ends instead."""
        try:
            yield
        except Exception as e:  # noqa: BLE001
            self.disable()
            log.warning("Nibble no longer measures this run: %s", e)

    def watch_end(self) -> None:
        """Lets the prompt's event loop tell when it is over."""
        try:
            self._task = asyncio.get_running_loop().create_task(self._until_the_end())
        except RuntimeError:  # no loop runs here: the next prompt's `reset` will end this one
            self._task = None

    async def _until_the_end(self):
        try:
            await asyncio.Event().wait()
        finally:
            self.end()

    def _watch_memory(self) -> None:
        wait = 0.0
        while not self._ended.wait(wait):
            wait = self.recorder.sample()

    def run(self) -> Run:
        """The run so far."""
        return self.recorder.report(self.label, about(self), version(), self.registry.prompt_id)

    def save(self, run: Run) -> records.Files:
        """Writes the run's files, the first time under new names, later over its own."""
        if self._files is None:
            self._files = records.new_files(self.prefix)
        self._files.write(run)
        return self._files

    def end(self) -> None:
        """Stops the clock and writes the files for good: now they hold every node. Once."""
        if self._ended.is_set():
            return
        self._ended.set()
        try:
            self.recorder.stop()
            if any(self.recorder.state(id) != "cached" for id in self.recorder.ids):  # else nothing ran
                self.save(self.run())
        except Exception as e:  # noqa: BLE001 (whatever it is, it must not fail a prompt that is over, or the next)
            log.warning("Nibble could not save the profile of this run: %s", e)


def ensure(label: str = "", prefix: str = PREFIX) -> Handler:
    """This prompt's handler, added now if there is none yet. Cheap enough for every call."""
    registry = get_progress_state()
    handler = registry.handlers.get(NAME)
    if not isinstance(handler, Handler):
        handler = Handler(registry, label, prefix)
        add_progress_handler(handler)
        handler.watch_end()
    if label:
        handler.label = shown(label)
    if prefix != PREFIX:
        handler.prefix = prefix
    return handler


async def report(node_id: str, label: str, prefix: str) -> tuple[Run, records.Files]:
    """The profiler node's work: waits for the nodes that do not depend on it, then reports and saves."""
    handler = ensure(label, prefix)
    await others_done(handler, node_id)
    run = handler.run()
    return run, handler.save(run)


async def others_done(handler: Handler, node_id: str) -> None:
    """Returns when every output node that does not hang on ``node_id`` has finished, or when nothing moves any more.

    ComfyUI may pick the profiler before a Save Image beside it; waiting makes it the last wherever it stands. An
    output node that ComfyUI refused never runs, hence the second condition.
    """
    registry = handler.registry
    waiting = outputs_beside(registry.dynprompt, node_id)
    quiet = 0
    while quiet < QUIET:
        states = {id: entry["state"] for id, entry in registry.nodes.items()}
        if all(states.get(id) in (NodeState.Finished, NodeState.Error) for id in waiting):
            return
        seen = handler.events
        await asyncio.sleep(POLL)
        prompt = registry.dynprompt
        busy = any(s is NodeState.Running and class_of(prompt, id) not in REPORTERS for id, s in states.items())
        quiet = 0 if busy or handler.events != seen else quiet + 1


def outputs_beside(dynprompt, node_id: str) -> set[str]:
    """Ids of the prompt's output nodes that are neither profilers nor fed by ``node_id``."""
    prompt = dynprompt.original_prompt
    fed, grew = {node_id}, True
    while grew:
        more = {id for id in prompt if id not in fed and any(source in fed for source in sources(prompt[id]))}
        fed |= more
        grew = bool(more)
    out = set()
    for id, node in prompt.items():
        kind = comfy_nodes.NODE_CLASS_MAPPINGS.get(node["class_type"])
        if id not in fed and node["class_type"] not in REPORTERS and getattr(kind, "OUTPUT_NODE", False):
            out.add(id)
    return out


def about(handler: Handler) -> dict[str, About]:
    """What to call every node of the prompt: those seen first, in order, then the silent ones."""
    dynprompt, recorder = handler.registry.dynprompt, handler.recorder
    seen = [id for id in recorder.ids if dynprompt.has_node(id)]
    cached = served(dynprompt.original_prompt, [id for id in seen if recorder.state(id) in ("ran", "stopped")])
    out = {}
    for id in [*seen, *(id for id in dynprompt.original_prompt if id not in seen)]:
        node = dynprompt.get_node(id)
        name = title(node)
        display = dynprompt.get_display_node_id(id)
        if display != id and dynprompt.has_node(display):
            name = f"{title(dynprompt.get_node(display))} / {name}"
        silent = "not timed" if id in handler.missed else "cached" if id in cached else "not run"
        out[id] = About(name, kind_of(node["class_type"]), silent, node["class_type"] in REPORTERS)
    return out


def served(prompt: dict, ran: list[str]) -> set[str]:
    """Ids of nodes that gave no sign although one that ran needed them: ComfyUI skips cached nodes in silence.

    Lazy inputs prove nothing: their node may simply not have been asked for.
    """
    found: set[str] = set()
    ahead = [id for id in ran if id in prompt]
    while ahead:
        node = prompt[ahead.pop()]
        lazy = lazy_inputs(node["class_type"])
        for source in sources(node, without=lazy):
            if source in prompt and source not in found:
                found.add(source)
                ahead.append(source)
    return found


def sources(node: dict, without: frozenset[str] = frozenset()) -> list[str]:
    """Ids of the nodes that a node's inputs are linked to."""
    links = ((name, v) for name, v in node.get("inputs", {}).items() if isinstance(v, list) and len(v) == 2)
    return [v[0] for name, v in links if name not in without]


def lazy_inputs(class_type: str) -> frozenset[str]:
    return frozenset(
        name
        for name, spec in _inputs(class_type)
        if len(spec) > 1 and isinstance(spec[1], dict) and spec[1].get("lazy")
    )


def kind_of(class_type: str) -> str:
    """load, text, sample, vae or other, by the types a node takes and gives: no list of names to keep up."""
    takes = {spec[0] for _, spec in _inputs(class_type) if isinstance(spec[0], str)}
    gives = set(map(str, getattr(comfy_nodes.NODE_CLASS_MAPPINGS.get(class_type), "RETURN_TYPES", None) or ()))
    if "CONDITIONING" in gives and "CLIP" in takes:
        return "text"
    if "LATENT" in gives and takes & {"MODEL", "GUIDER"}:
        return "sample"
    if "VAE" in takes and takes & CODED:  # not what only asks about a VAE
        return "vae"
    return "load" if gives & MODELS and not takes & (MODELS | {"LATENT", "IMAGE"}) else "other"


def _inputs(class_type: str) -> list[tuple[str, tuple]]:
    """(name, ComfyUI's spec) of a node class's declared inputs; none for a class that is gone or cannot say."""
    kind = comfy_nodes.NODE_CLASS_MAPPINGS.get(class_type)
    try:
        groups = kind.INPUT_TYPES() if kind is not None else {}
    except Exception:  # noqa: BLE001 (other packs' nodes, and ComfyUI's own once a folder of models was deleted)
        groups = {}
    return [(name, spec) for part in ("required", "optional") for name, spec in groups.get(part, {}).items()]


def title(node: dict) -> str:
    """What the user calls a node: its title in the workflow, else its class's display name."""
    meta, class_type = node.get("_meta"), node["class_type"]
    given = meta.get("title") if isinstance(meta, Mapping) else None
    return shown(given or comfy_nodes.NODE_DISPLAY_NAME_MAPPINGS.get(class_type) or class_type)


def class_of(dynprompt, id: str) -> str:
    return dynprompt.get_node(id)["class_type"] if dynprompt.has_node(id) else ""
