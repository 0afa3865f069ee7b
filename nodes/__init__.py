"""The ComfyUI side: thin V3 nodes, one file a topic. The only folder that imports ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    calibrate,
    convert,
    distill,
    image_prompt,
    logs,
    lora,
    metrics,
    models,
    profiling,
    prompt_set,
    prompts,
    sampling,
    slim,
    training,
)
from .bridge import history, outputs
from .checked import checked

TOPICS = (
    models,
    convert,
    calibrate,
    sampling,
    lora,
    image_prompt,
    profiling,
    metrics,
    prompts,
    prompt_set,
    training,
    distill,
    slim,
)


class NibbleExtension(ComfyExtension):
    """Every node of the pack, gathered from the topics' ``NODES`` and put behind the checks."""

    async def on_load(self) -> None:
        logs.tell(__package__.rpartition(".")[0])
        history.add_routes()
        outputs.sweep()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [checked(node) for topic in TOPICS for node in topic.NODES]
