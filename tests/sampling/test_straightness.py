"""S(Z): 0 for a straight flow, the analytic value for a rotating one, the same in either noise scale."""

import math

import pytest
import torch
from comfyui_nibble.sampling.straightness import flow_velocity, measure


def rotation(angle: float) -> torch.Tensor:
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)


def rotating(omega: float, n: int, points: torch.Tensor) -> tuple[list, list]:
    """Velocities of dz/dt = omega J z at the middle of n equal intervals of its exact trajectories, and their times."""
    turn = omega * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    times = [1 - i / n for i in range(n + 1)]
    states = [points @ rotation(-omega * (1 - t + 0.5 / n)).T for t in times[:-1]]
    return [z @ turn.T for z in states], times


def test_constant_field_is_straight():
    v = torch.randn(3, 4, 8, 8)
    found = measure([v] * 5, [1.0, 0.9, 0.5, 0.2, 0.1, 0.0])
    assert found.value == pytest.approx(0.0, abs=1e-12)
    assert found.share == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("omega", [0.5, 2.0, math.pi])
def test_rotating_field_has_the_analytic_value(omega):
    """S = E|v|^2 - |Z1 - Z0|^2 = |z|^2 (omega^2 - 4 sin^2(omega / 2)), here per element of two."""
    points = torch.randn(64, 2, dtype=torch.float64)
    analytic = float(points.square().sum(1).mean()) * (omega**2 - 4 * math.sin(omega / 2) ** 2) / 2
    velocities, times = rotating(omega, 400, points)
    found = measure(velocities, times, displacement=points - points @ rotation(-omega).T)
    assert found.value == pytest.approx(analytic, rel=1e-4)
    assert measure(velocities, times).value == pytest.approx(analytic, rel=1e-4)
    assert measure(velocities, times).speed == pytest.approx(omega**2 * float(points.square().mean()), rel=1e-9)


def test_where_it_bends_is_told():
    """A path that is straight until t = 0.5 and then stands still."""
    v = torch.ones(1, 4)
    found = measure([v, 0 * v], [1.0, 0.5, 0.0])
    assert found.steps == ((1.0, 0.25), (0.5, 0.25))
    assert (found.value, found.speed, found.share) == (0.25, 0.5, 0.5)
    assert "| 0.5000 | 0.25 |" in found.table()


@pytest.mark.parametrize("start, end", [(1.0, 0.0), (0.8, 0.2), (0.5, 0.4), (3.0, 1.0)])
def test_it_is_of_a_unit_of_time(start, end):
    """Part of a path: velocities 1 and 3, a third and two thirds of the time. Mean 7/3, so 1/3 (4/3)^2 + 2/3 (2/3)^2,
    whatever the span is.
    """
    middle = start - (start - end) / 3
    found = measure([torch.ones(2, 4), torch.full((2, 4), 3.0)], [start, middle, end])
    assert found.value == pytest.approx((16 / 9) / 3 + 2 / 3 * 4 / 9)
    assert found.speed == pytest.approx(1 / 3 + 6) and found.share == pytest.approx(8 / 9 / (19 / 3))
    end_given = measure([torch.ones(2, 4)] * 2, [start, middle, end], torch.full((2, 4), 2 * (start - end)))
    assert end_given.value == pytest.approx(1)


def test_both_noise_scales_measure_the_same_path():
    """x = data + sigma noise and z = (1 - t) data + t noise of the same model, step for step."""
    data, noise = torch.randn(2, 4), torch.randn(2, 4)
    guess = data + 0.1 * torch.randn(2, 4)
    for sigma in (14.6, 1.0, 0.03):
        t = sigma / (1 + sigma)
        x = data + sigma * noise
        v_ve, t_ve = flow_velocity(x, guess, sigma, flow=False)
        v_flow, t_flow = flow_velocity(x / (1 + sigma), guess, t, flow=True)
        assert t_ve == t_flow == t
        torch.testing.assert_close(v_ve, v_flow, rtol=1e-4, atol=1e-5)


def test_a_chart_of_many_steps_averages_neighbours():
    v = [torch.full((1, 1), float(i)) for i in range(90)]
    found = measure(v, [1 - i / 90 for i in range(91)])
    bins = found.bins(40)
    assert len(bins) == 30 and bins[0][0] == 1.0
    assert bins[0][1] == pytest.approx(sum(d for _, d in found.steps[:3]) / 3)
    assert found.bins(90) == found.steps


def test_counts_must_fit():
    with pytest.raises(ValueError, match="2 velocities need 3 times, got 2"):
        measure([torch.zeros(1)] * 2, [1.0, 0.0])
