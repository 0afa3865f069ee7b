"""The profiler under ComfyUI's real executor, with nodes that wait, expand, are lazy, are async, fail, or are cut off.

ARGS: a folder for the output. Prints what each prompt's saved report says.
"""

import asyncio
import copy
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import args, comfy_nodes, pack

sys.path.insert(0, sys.path[1])
import comfy.model_management
import execution
import folder_paths
from comfy_execution.graph_utils import GraphBuilder
from comfy_execution.progress import get_progress_state

out = Path(args[0])
folder_paths.set_output_directory(str(out))
ANY = "*"


class Base:
    CATEGORY, FUNCTION, RETURN_TYPES = "t", "run", (ANY,)


class Sleep(Base):
    """Sleeps, then hands its seconds on."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seconds": ("FLOAT",)}, "optional": {"after": (ANY,)}, "hidden": {"id": "UNIQUE_ID"}}

    def run(self, seconds, id, after=None):
        time.sleep(seconds)
        return (seconds,)


class Steps(Sleep):
    """Four steps of progress."""

    def run(self, seconds, id, after=None):
        for i in range(4):
            time.sleep(seconds / 4)
            get_progress_state().update_progress(id, i + 1, 4)
        return (seconds,)


class AsyncSleep(Sleep):
    async def run(self, seconds, id, after=None):
        await asyncio.sleep(seconds)
        return (seconds,)


class Expand(Sleep):
    """Becomes two Sleeps in a row."""

    def run(self, seconds, id, after=None):
        graph = GraphBuilder()
        first = graph.node("Sleep", seconds=seconds)
        second = graph.node("Sleep", seconds=seconds, after=first.out(0))
        return {"result": (second.out(0),), "expand": graph.finalize()}


class Lazy(Base):
    """Needs ``wanted`` and never ``other``."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"wanted": (ANY, {"lazy": True}), "other": (ANY, {"lazy": True})}}

    def check_lazy_status(self, wanted=None, other=None):
        return ["wanted"] if wanted is None else []

    def run(self, wanted, other=None):
        time.sleep(0.05)
        return (wanted,)


class Fail(Sleep):
    def run(self, seconds, id, after=None):
        time.sleep(seconds)
        raise ValueError("this node always fails")


class Interrupt(Sleep):
    def run(self, seconds, id, after=None):
        time.sleep(seconds)
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()


class Keep(Sleep):
    """An output node beside the profiler."""

    OUTPUT_NODE = True


class Broken(Sleep):
    """From its first run on it cannot say any more which inputs it has, like a loader whose folder was deleted."""

    broken = False

    @classmethod
    def INPUT_TYPES(cls):
        if cls.broken:
            raise FileNotFoundError("gone")
        return super().INPUT_TYPES()

    def run(self, **inputs):
        Broken.broken = True
        return super().run(**inputs)


class Sabotage(Sleep):
    """Spoils the recorder, which ComfyUI calls outside of every `try` when a node ends."""

    def run(self, **inputs):
        get_progress_state().handlers["nibble.profiler"].recorder.finish = None
        return super().run(**inputs)


class Server:
    client_id = last_node_id = None

    def send_sync(self, *_):
        pass


for kind in (Sleep, Steps, AsyncSleep, Expand, Lazy, Fail, Interrupt, Keep, Broken, Sabotage):
    comfy_nodes.NODE_CLASS_MAPPINGS[kind.__name__] = kind
for node in asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list()):
    node.GET_SCHEMA()
    comfy_nodes.NODE_CLASS_MAPPINGS[node.__name__] = node


def n(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def profiler(label, source="a"):
    return n("NibbleProfiler", anything=[source, 0], label=label, filename_prefix="nibble/run")


def executor(cache=execution.CacheType.CLASSIC):
    return execution.PromptExecutor(Server(), cache_type=cache, cache_args={"ram": 0, "ram_inactive": 0, "lru": 0})


def run(name, prompt, ends, on=None):
    """Runs a prompt; returns its saved report, the messages' kinds, and the wall time ComfyUI itself counted."""
    known = set(out.glob("nibble/*.json"))
    on = on or executor()
    on.execute(copy.deepcopy(prompt), name, {}, ends)  # ComfyUI notes fingerprints in the prompt it is given
    messages = dict(on.status_messages)
    last = max(m["timestamp"] for m in messages.values())
    new = sorted(set(out.glob("nibble/*.json")) - known)
    reports = [json.loads(p.read_text()) for p in new]
    wall = (last - messages["execution_start"]["timestamp"]) / 1000
    return {"reports": reports, "messages": sorted(messages), "wall": wall, "files": [p.name for p in new]}


chain = {"a": n("Sleep", seconds=0.2), "b": n("Steps", seconds=0.4, after=["a", 0]), "p": profiler("chain", "b")}
same = executor()
results = {
    "chain": run("chain", chain, ["p"], same),
    "again": run("again", chain, ["p"], same),
    "async": run("async", {
        "a": n("AsyncSleep", seconds=0.4), "b": n("AsyncSleep", seconds=0.4),
        "c": n("Sleep", seconds=0.1, after=["a", 0]), "d": n("Sleep", seconds=0.1, after=["b", 0]),
        "k": n("Keep", seconds=0.0, after=["d", 0]),
        "p": profiler("a", "c"),
    }, ["p", "k"]),
    "expand": run("expand", {"a": n("Expand", seconds=0.2), "p": profiler("expand")}, ["p"]),
    "lazy": run("lazy", {"x": n("Sleep", seconds=0.2), "y": n("Sleep", seconds=0.1), "a": n("Lazy", wanted=["x", 0],
                other=["y", 0]), "p": profiler("lazy")}, ["p"]),
    "beside": run("beside", {"a": n("Sleep", seconds=0.1), "s": n("Sleep", seconds=0.3, after=["a", 0]),
                  "k": n("Keep", seconds=0.1, after=["s", 0]), "p": profiler("beside")}, ["p", "k"]),
    "refused": run("refused", {"a": n("Sleep", seconds=0.1), "k": n("Keep", seconds=0.1), "p": profiler("r")}, ["p"]),
    "fails": run("fails", {"a": n("Sleep", seconds=0.1), "f": n("Fail", seconds=0.2, after=["a", 0]),
                 "z": n("Sleep", seconds=0.1, after=["f", 0]), "p": profiler("fails", "z")}, ["p"]),
    "fails_beside": run("fails_beside", {"a": n("Sleep", seconds=0.1), "f": n("Fail", seconds=0.2, after=["a", 0]),
                        "k": n("Keep", seconds=0.1, after=["f", 0]), "p": profiler("fb")}, ["p", "k"]),
    "interrupt": run("interrupt", {"a": n("Sleep", seconds=0.1), "i": n("Interrupt", seconds=0.2, after=["a", 0]),
                     "p": profiler("interrupt", "i")}, ["p"]),
    "after": run("after", chain, ["p"]),
    "no_cache": run("no_cache", {"a": n("Sleep", seconds=0.1), "p": profiler("none")}, ["p"],
                    executor(execution.CacheType.NONE)),
    "two": run("two", {"a": n("Sleep", seconds=0.1), "p": profiler("one"), "q": profiler("one")}, ["p", "q"]),
    "without": run("without", {"a": n("Sleep", seconds=0.1), "k": n("Keep", seconds=0.1, after=["a", 0])}, ["k"]),
    "broken": run("broken", {"a": n("Broken", seconds=0.1), "p": profiler("broken")}, ["p"]),
    "sabotage": run("sabotage", {"a": n("Sabotage", seconds=0.1), "p": profiler("s")}, ["p"]),
}  # fmt: skip
print(json.dumps(results))
