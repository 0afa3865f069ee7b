"""Runs `checkpoints.repack` with ComfyUI's bar, stopping when the user says so."""

from __future__ import annotations

import comfy.model_management
import comfy.utils

from ...checkpoints import repack
from .calibrate import tell


def run(source: str, target: str, requantize: bool, rank: int, node_id: str | None) -> str:
    """Writes ``target`` from ``source``; returns the report. Raises CheckpointError."""
    bar = comfy.utils.ProgressBar(1, node_id=node_id)

    def update(done: int, total: int, name: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        tell(node_id, f"{done} of {total}: {name}")
        bar.update_absolute(done, total)

    device = str(comfy.model_management.get_torch_device())
    options = repack.Options(requantize=requantize, rank=rank, device=device)
    return repack.repack(source, target, options, update).summary()
