"""A byte budget: never over it, never worse than one rank for all, and honest when it cannot be met."""

import pytest
import torch
from comfyui_nibble.calibration import report
from comfyui_nibble.quant.calib import allocate, engine, presets
from comfyui_nibble.quant.calib.allocate import Option
from comfyui_nibble.quant.calib.solve import Sample
from comfyui_nibble.quant.policy import LayerPlan
from torch import nn

from .layers import synthetic


def option(nbytes: int, error: float, rank: int = 16) -> Option:
    return Option(LayerPlan("svdquant_w4a4", "", rank), nbytes, error)


def test_hull_drops_what_a_mix_of_others_beats():
    options = [option(10, 1.0), option(20, 0.9), option(30, 0.2), option(40, 0.25), option(50, 0.1)]
    assert [o.nbytes for o in allocate.hull(options)] == [10, 30, 50]


def test_greedy_equals_brute_force_on_separable_costs():
    from itertools import product

    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        errors = torch.rand(4, generator=g).tolist()
        options = {str(i): [option(10 * r, e / r, r) for r in (1, 2, 4, 8)] for i, e in enumerate(errors)}
        budget = int(torch.randint(40, 320, (), generator=g))
        chosen = allocate.fit(options, budget)
        by_rank = {n: {o.plan.rank: o for o in o_list} for n, o_list in options.items()}
        spent = sum(by_rank[n][p.rank].nbytes for n, p in chosen.items())
        error = sum(by_rank[n][p.rank].error for n, p in chosen.items())
        best = min(
            sum(o.error for o in pick) for pick in product(*options.values()) if sum(o.nbytes for o in pick) <= budget
        )
        assert spent <= budget
        assert error <= best + max(o.error for o_list in options.values() for o in o_list) * 0.6


def test_a_budget_below_the_smallest_choice_says_what_it_takes():
    with pytest.raises(ValueError, match=r"budget of 1\.5 MiB is less than the 2\.0 MiB"):
        allocate.fit({"a": [option(2**20, 1.0)], "b": [option(2**20, 1.0)]}, 3 * 2**19)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_layer_that_cannot_be_measured_keeps_its_plan(tokens):
    """With an error of NaN it would stand anywhere in the order, and others with it."""
    w, x = synthetic(128, 128, 64)
    plan = LayerPlan("svdquant_w4a4", "", 32)
    sample = Sample(x[:tokens], x.abs().amax(0)) if tokens else None
    found = allocate.measure(w, sample, plan, presets.preset("fast"), 0)
    assert found == [Option(plan, allocate.stored_bytes(plan, (128, 128)), 0.0)]
    assert len(allocate.measure(w, Sample(x, x.abs().amax(0)), plan, presets.preset("fast"), 0)) > 3


class Uneven(nn.Module):
    """One layer that 4 bits hurt much and three that they do not: what an even rank cannot know."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(4))
        g = torch.Generator().manual_seed(0)
        for i, layer in enumerate(self.layers):
            hard, _ = synthetic(256, 256, 8, seed=i)
            easy = torch.randn(256, 256, generator=g) / 16
            layer.weight.data = hard if i == 0 else easy

    def forward(self, x):
        return [layer(x[int(i == 0)]) for i, layer in enumerate(self.layers)]


@pytest.fixture(scope="module")
def uneven():
    module = Uneven()
    g = torch.Generator().manual_seed(5)
    _, loud = synthetic(8, 256, 1200)
    quiet = torch.randn(1200, 256, generator=g) * torch.linspace(0.2, 2, 256)
    return module, (quiet, loud)


def solved(uneven, rank: int = 32, fit: int | None = None):
    module, x = uneven
    plans = {f"layers.{i}": LayerPlan("svdquant_w4a4", "", rank) for i in range(4)}
    job = engine.Job(
        plans=plans, preset=presets.preset("fast"), dtype=torch.bfloat16, run=lambda: module(x), fit=fit, promote=None,
        weight=lambda n: (module.get_submodule(n).weight.detach(), None),
    )  # fmt: skip
    return engine.calibrate(module, job)


def test_the_same_bytes_spent_where_they_help(uneven):
    even = solved(uneven, 32)
    budget = report.totals(even)["bytes"]
    fitted = solved(uneven, 32, budget)
    assert report.totals(fitted)["bytes"] <= budget
    assert sum(x.solved.error for x in fitted.values()) < sum(x.solved.error for x in even.values())
    assert fitted["layers.0"].plan.rank > 32 or fitted["layers.0"].plan.scheme != "svdquant_w4a4"


def test_more_bytes_less_error(uneven):
    least = 4 * allocate.stored_bytes(LayerPlan("svdquant_w4a4", "", 16), (256, 256))
    runs = [solved(uneven, 32, round(least * x)) for x in (1.0, 1.3, 2.0)]
    errors = [sum(x.solved.error for x in r.values()) for r in runs]
    assert errors[0] > errors[1] > errors[2]
    kept = [x for x in runs[2].values() if x.plan.scheme == "keep"]
    assert kept and all(isinstance(x.solved.weight, torch.Tensor) and x.solved.error == 0 for x in kept)


class TestReport:
    def test_tables_and_pictures_say_what_happened(self, uneven):
        layers = solved(uneven)
        text = report.table(layers, "fast")
        assert text.startswith("4 layers by preset fast in ")
        assert "4 are calibrated, 0 kept the data-free weight" in text
        rows = [line for line in text.splitlines() if line.startswith("| layers.")]
        errors = [float(r.split("|")[4]) for r in rows]
        assert len(rows) == 4 and errors == sorted(errors, reverse=True)
        page = report.page(layers, "fast", "<model>")
        assert "&lt;model&gt;" in page and "<model>" not in page and page.count("<tr>") == 5

    def test_the_chart_has_a_bar_for_each_layer_and_one_colour_for_each_outcome(self, uneven):
        image = report.chart(solved(uneven), "errors")
        colours = {c for _, c in image.getcolors(100_000)}
        assert report.COLOURS["calibrated"] in colours

    def test_nothing_measured_is_said(self):
        assert report.summary({}, "fast") == "Nothing was quantized."
        assert report.chart({}, "none").size == (report.WIDTH, report.HEIGHT)
