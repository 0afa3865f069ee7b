"""The optimizers by table, and what they keep per parameter as plain tensors.

    id          state of an (m, n) matrix, m <= n   source
    adamw       2 m n                               torch
    adafactor   m + n                               torch (arXiv 1804.04235); scales its rate by the weights' size
    galore      r (m + 2 n)                         pytorch-optimizer (arXiv 2403.03507): Adam in an r-dimensional
                                                    space of the gradient, chosen anew every 200 steps

A galore of full rank has nothing to leave out: such matrices, and everything that is no matrix, get plain Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.99)
GALORE_RANK, GALORE_GAP, GALORE_SCALE = 128, 200, 0.25
PROJECTION, STEP = "projection", "step"


def _adamw(params, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, betas=BETAS)


def _adafactor(params, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(params, lr=lr, weight_decay=weight_decay)


def _galore(params, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return galore(params, lr, weight_decay)


def galore(params: Sequence[Tensor], lr: float, weight_decay: float, rank: int = GALORE_RANK) -> torch.optim.Optimizer:
    """GaLore over ``params``; see the file header. Raises ValueError when pytorch-optimizer is not installed."""
    try:
        from pytorch_optimizer import GaLore
    except ImportError as e:
        raise ValueError("Optimizer galore needs a library: pip install pytorch-optimizer, or choose adamw") from e
    low = [p for p in params if _projected(p, rank)]
    rest = [p for p in params if not _projected(p, rank)]
    settings = dict(rank=rank, update_proj_gap=GALORE_GAP, scale=GALORE_SCALE, projection_type="std")
    groups = ([{"params": low, **settings}] if low else []) + ([{"params": rest}] if rest else [])
    return GaLore(groups, lr=lr, betas=BETAS, weight_decay=weight_decay, eps=1e-8)


def _projected(p: Tensor, rank: int) -> bool:
    return p.dim() == 2 and rank < min(p.shape)


MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {  # of `recipes.OPTIMIZERS`
    "adamw": _adamw,
    "adafactor": _adafactor,
    "galore": _galore,
}


def make(plan, params: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of ``plan`` over ``params``."""
    return MAKERS[plan.optimizer](list(params), plan.lr, plan.weight_decay)


def state_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """What ``optimizer`` keeps of ``p``; galore's step, which it counts per group, among it."""
    out = {k: v for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor)}
    projector = optimizer.state.get(p, {}).get("projector")
    if projector is not None:
        out[PROJECTION] = projector.ortho_matrix
    step = _group(optimizer, p).get(STEP)
    return out if step is None else out | {STEP: torch.tensor(step)}


def restore(optimizer: torch.optim.Optimizer, p: Tensor, kept: dict[str, Tensor]) -> None:
    """The inverse of `state_of`."""
    group, kept = _group(optimizer, p), dict(kept)
    if kept and "rank" in group:
        from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

        names = ("rank", "update_proj_gap", "scale", "projection_type")
        projector = GaLoreProjector(**{n: group[n] for n in names})
        projector.ortho_matrix = kept.pop(PROJECTION).to(p.device)
        optimizer.state[p] = {"projector": projector}
    if kept and type(optimizer).__name__ == "GaLore":
        group[STEP] = int(kept.pop(STEP))
    optimizer.state[p] = {**optimizer.state.get(p, {}), **{n: _placed(n, v, p) for n, v in kept.items()}}


def _placed(name: str, value: Tensor, p: Tensor) -> Tensor:
    """torch keeps step counts on the CPU."""
    return value if name == STEP else value.to(p.device)


def _group(optimizer: torch.optim.Optimizer, p: Tensor) -> dict:
    return next(g for g in optimizer.param_groups if any(q is p for q in g["params"]))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of everything kept per parameter, step counts left out."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    kept = (v for p in params for n, v in state_of(optimizer, p).items() if n != STEP)
    return sum(v.numel() * v.element_size() for v in kept)
