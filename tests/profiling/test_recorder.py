"""Timers count what they should, with a clock that the test turns."""

import json

import numpy as np
from comfyui_nibble.metrics.images import mean_psnr, psnr
from comfyui_nibble.profiling import chart
from comfyui_nibble.profiling.recorder import Recorder


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def recorded():
    clock = Clock()
    r = Recorder(clock)
    with r.stage("load", "4-bit"):
        clock.now += 2
    with r.stage("sample", "4-bit"):
        for seconds in (1.0, 0.5, 0.25):
            clock.now += seconds
            r.tick()
        clock.now += 1
    return r


def test_stages_and_steps():
    load, sample = recorded().stages
    assert (load.seconds, load.steps) == (2, ())
    assert (sample.seconds, sample.steps) == (2.75, (1.0, 0.5, 0.25))
    assert json.loads(json.dumps(recorded().to_dict()))[1]["steps"] == [1.0, 0.5, 0.25]


def test_a_failed_stage_is_still_counted():
    clock = Clock()
    r = Recorder(clock)
    try:
        with r.stage("breaks"):
            clock.now += 3
            raise KeyError
    except KeyError:
        pass
    assert r.stages[0].seconds == 3


def test_nested_stages_keep_their_own_steps():
    clock = Clock()
    r = Recorder(clock)
    with r.stage("outer"):
        clock.now += 1
        r.tick()
        with r.stage("inner"):
            clock.now += 5
            r.tick()
        clock.now += 1
        r.tick()
    inner, outer = r.stages
    assert inner.steps == (5.0,) and outer.steps == (1.0, 6.0)


def test_chart_is_the_same_every_time_and_shows_the_longest_bar_longest():
    stages = recorded().stages
    parts = [("16-bit", "linears", 2**20), ("4-bit", "linears", 2**18)]
    one, two = (np.asarray(chart.profile("t", stages, parts)) for _ in range(2))
    assert (one == two).all() and one.shape[1] == chart.WIDTH
    blue = (np.asarray(chart.bars("t", [("a", 4, "4", 0), ("b", 1, "1", 0)])) == chart.COLOURS[0]).all(-1)
    lengths = sorted(set(blue.sum(1)) - {0})
    assert lengths[-1] > 3.8 * lengths[0]


def test_psnr_by_its_formula():
    x = np.random.default_rng(0).random((8, 8, 3))
    assert psnr(x, x) == float("inf")
    assert abs(psnr(x, x + 0.1) - 20) < 1e-9
    assert abs(mean_psnr([x, x], [x + 0.1, x + 0.01]) - 30) < 1e-9
