"""GaLore: with nothing left out it is Adam, and what it keeps is what its paper says."""

import pytest
import torch
from comfyui_nibble.training import optimizers
from comfyui_nibble.training.loop import Plan

pytest.importorskip("pytorch_optimizer", reason="GaLore needs pip install pytorch-optimizer")


def fit(make, steps: int = 60) -> tuple[list[float], torch.optim.Optimizer]:
    """Losses of a linear toy, weights (24, 40)."""
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(64, 40, generator=g), torch.randn(24, 40, generator=g)
    w = torch.nn.Parameter(torch.zeros(24, 40))
    optimizer, losses = make([w]), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((x @ (w - target).T) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


def test_full_rank_follows_adam():
    adam, _ = fit(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0, betas=optimizers.BETAS))
    full, _ = fit(lambda p: optimizers.galore(p, 0.01, 0.0, rank=24))
    low, _ = fit(lambda p: optimizers.galore(p, 0.01, 0.0, rank=4))
    assert max(abs(a - b) / a for a, b in zip(adam, full, strict=True)) < 1e-5
    assert low[-1] < low[0] and max(abs(a - b) / a for a, b in zip(adam, low, strict=True)) > 1e-2


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_state_bytes_are_the_formula(rank):
    """r (m + 2 n) floats for (m, n), m <= n, against Adam's 2 m n."""
    m, n = 24, 40
    _, optimizer = fit(lambda p: optimizers.galore(p, 0.01, 0.0, rank=rank), steps=3)
    assert optimizers.state_bytes(optimizer) == 4 * rank * (m + 2 * n)
    _, adam = fit(lambda p: torch.optim.AdamW(p, lr=0.01, betas=optimizers.BETAS), steps=3)
    assert optimizers.state_bytes(adam) == 4 * 2 * m * n


def test_every_row_makes_an_optimizer_that_learns():
    for name in optimizers.OPTIMIZERS:
        losses, _ = fit(lambda p, name=name: optimizers.make(Plan("x", 1, 1, 0.02, optimizer=name), p))
        assert losses[-1] < losses[0], name
