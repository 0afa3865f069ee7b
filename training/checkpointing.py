"""Gradient checkpointing for any torch module: of its blocks only the inputs are kept, and the rest is computed again.

A block is an outermost module below the root that is no mere container (ComfyUI iterates over its Sequentials without
calling them) and no single layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of ``module``, which is none itself."""
    for child in module.children():
        if isinstance(child, CONTAINERS):
            yield from blocks(child)
        elif next(child.children(), None) is not None:
            yield child


@contextmanager
def checkpointed(module: nn.Module) -> Iterator[None]:
    """While it is entered, ``module``'s blocks keep nothing but their inputs for the backward pass."""
    changed = [(b, b.__dict__.get("forward")) for b in blocks(module)]
    try:
        for block, _ in changed:
            again = partial(_on_copies, block.forward)
            block.forward = partial(checkpoint, again, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block, before in changed:
            block.__dict__.pop("forward", None)
            if before is not None:
                block.forward = before


def _on_copies(forward, *args, **kwargs):
    """A block may add to its inputs in place, and they must be the same when it is computed again."""
    args = [_copy(a) for a in args]
    return forward(*args, **{k: _copy(v) for k, v in kwargs.items()})


def _copy(value):
    return value.clone() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
