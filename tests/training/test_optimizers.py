"""GaLore: with nothing left out it is Adam, and what it keeps is what its paper says."""

import pytest
import torch
from comfyui_nibble.training import optimizers, recipes
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


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_first_steps_are_their_formula(shape):
    """W - lr s P adam(P^T G): P the first left (of a wide matrix) or right singular vectors of the first gradient, kept
    for 200 steps, and s = .25, which the paper calls alpha. Adam's own sign does not depend on P's.
    """
    g = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(shape))
    optimizer = optimizers.galore([w], 0.01, 0.0, rank=4)
    grads = [torch.randn(shape, generator=g).double() for _ in range(3)]
    u, _, vh = torch.linalg.svd(grads[0], full_matrices=False)
    wide = shape[0] < shape[1]
    project = (lambda x: u[:, :4].T @ x) if wide else (lambda x: x @ vh[:4].T)
    back = (lambda x: u[:, :4] @ x) if wide else (lambda x: x @ vh[:4])
    expected, m, v = torch.zeros(shape).double(), 0.0, 0.0
    for i, grad in enumerate(grads, 1):
        w.grad = grad.float()
        optimizer.step()
        low = project(grad)
        m, v = 0.9 * m + 0.1 * low, 0.99 * v + 0.01 * low**2
        step = (m / (1 - 0.9**i)) / ((v / (1 - 0.99**i)).sqrt() + 1e-8)
        expected -= 0.01 * 0.25 * back(step)
        assert float((w.detach() - expected).norm() / expected.norm()) < 1e-3


def test_every_row_makes_an_optimizer_that_learns():
    assert tuple(optimizers.MAKERS) == recipes.OPTIMIZERS
    for name in optimizers.MAKERS:
        losses, _ = fit(lambda p, name=name: optimizers.make(Plan("x", 1, 1, 0.02, optimizer=name), p))
        assert losses[-1] < losses[0], name
