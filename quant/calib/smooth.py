"""The smoothing factor s (K,): activations are divided by it, weights multiplied.

Both quantizers rescale every group of 64, so only ratios within a group matter. With round-off noise scale^2 / 12,

    J(s) = 1/12 sum_g { E_t[max_k |x_tk / s_k|^2] / qmax^2 * sum_k s_k^2 |w_k|^2       activation rounding
                      + sum_n [max_k |w_nk s_k|^2] / 7.5^2 * sum_k E[x_k^2] / s_k^2 }  weight rounding

is the expected output error: no forward pass is needed to rank candidates, and its gradient in log s is two scatters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..schemes import GROUP

# Noise of a weight group is (its largest / steps)^2 / 12. J knows the largest and the search: half of 15 steps, -8..7.
# `low_rank.noise_weights` comes before it: absmax / 7, and the largest of 64 normal weights, in standard deviations.
WEIGHT_MAX, WEIGHT_STEPS, PEAK = 7.5, 7, 2.5
POWERS = (0.25, 0.5, 0.75)  # amax^a
BALANCED = (0.2, 0.35, 0.5, 0.65, 0.8)  # amax^a / wmax^(1-a)
LOW, HIGH = 1e-4, 1e4
TOKENS, ROWS = 256, 512  # what the surrogate looks at
RATE = 0.03


class Surrogate:
    """J and its gradient for one layer. ``x`` (T, K) raw tokens, ``w`` (N, K); ``shift`` and ``qmax`` of the
    activation.
    """

    def __init__(self, x: Tensor, w: Tensor, shift: float, qmax: int):
        t, k = x.shape
        self.x = (x + shift).abs().reshape(t, k // GROUP, GROUP)
        self.w = w.abs().reshape(w.shape[0], k // GROUP, GROUP)
        self.ww = w.square().sum(0).reshape(k // GROUP, GROUP)
        self.xx = x.square().mean(0).reshape(k // GROUP, GROUP)
        self.qmax = qmax

    def value(self, s: Tensor) -> float:
        return float(self._parts(s.reshape(-1, GROUP))[0])

    def gradient(self, s: Tensor) -> tuple[float, Tensor]:
        """(J, d log J / d log s (K,))."""
        s = s.reshape(-1, GROUP)
        j, (am, at), (wm, wt), a_side, w_side, sww, xxs = self._parts(s)
        # d max_k(x/s)^2 / d log s falls on the largest element alone, times -2; likewise +2 for the weights.
        grad_a = -2 * _at_largest(am.square(), at) / am.shape[0] * a_side.unsqueeze(-1)
        grad_a += 2 * sww * (am.square().mean(0)).unsqueeze(-1)
        grad_w = 2 * _at_largest(wm.square(), wt) * w_side.unsqueeze(-1)
        grad_w -= 2 * xxs * (wm.square().sum(0)).unsqueeze(-1)
        total = (grad_a / self.qmax**2 + grad_w / WEIGHT_MAX**2) / 12
        return float(j), (total / j).flatten()

    def _parts(self, s: Tensor):
        a, w = (self.x / s).max(-1), (self.w * s).max(-1)
        sww, xxs = s.square() * self.ww, self.xx / s.square()
        a_side, w_side = sww.sum(-1), xxs.sum(-1)
        j = (a.values.square().mean(0) * a_side).sum() / self.qmax**2
        j = (j + (w.values.square().sum(0) * w_side).sum() / WEIGHT_MAX**2) / 12
        return j, a, w, a_side, w_side, sww, xxs


def _at_largest(values: Tensor, where: Tensor) -> Tensor:
    """(B, G) values summed over B onto the element each came from: (G, 64)."""
    out = torch.zeros(values.shape[1], GROUP, device=values.device)
    return out.scatter_add_(1, where.t(), values.t())


def normalised(s: Tensor) -> Tensor:
    """``s`` clamped, with geometric mean 1 in every group: the same rounding, and safe in fp16."""
    logs = s.clamp(LOW, HIGH).log().reshape(-1, GROUP)
    return (logs - logs.mean(-1, keepdim=True)).exp().flatten()


def candidates(amax: Tensor, wmax: Tensor) -> list[Tensor]:
    """Nine starting points from channel maxima (K,) of activations and weights."""
    amax, wmax = amax.clamp(min=1e-5), wmax.clamp(min=1e-5)
    out = [torch.ones_like(amax)]
    out += [amax**a for a in POWERS]
    out += [amax**a / wmax ** (1 - a) for a in BALANCED]
    return [normalised(s) for s in out]


def search(x: Tensor, w: Tensor, amax: Tensor, shift: float, qmax: int) -> Tensor:
    """The best candidate by J: s (K,). ``x`` (T, K) and ``amax`` (K,) are raw; dead channels keep s = 1."""
    surrogate = Surrogate(x, w, shift, qmax)
    found = min(candidates(amax, w.abs().amax(0)), key=surrogate.value)
    return torch.where(amax > 0, found, 1.0)


def learn(s: Tensor, x: Tensor, w: Tensor, shift: float, qmax: int, steps: int) -> Tensor:
    """``steps`` of Adam on log J from ``s``, the rate falling to 0; returns the best s seen."""
    surrogate = Surrogate(x, w, shift, qmax)
    logs, m, v = s.log(), torch.zeros_like(s), torch.zeros_like(s)
    best, lowest = s, surrogate.value(s)
    for i in range(steps):
        j, g = surrogate.gradient(logs.exp())
        if j < lowest:
            best, lowest = logs.exp(), j
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        step = (m / (1 - 0.9 ** (i + 1))) / ((v / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
        logs = logs - RATE * (1 - i / steps) * step
    last = logs.exp()
    return normalised(last if surrogate.value(last) < lowest else best)
