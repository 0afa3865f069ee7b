"""Unsigned activations are a fact of the data: where it was seen it decides; without it only a known GELU counts."""

import dataclasses

import pytest
import torch
from comfyui_nibble.calibration import report, resume
from comfyui_nibble.calibration import run as runs
from comfyui_nibble.checkpoints import convert
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.checkpoints.source import open_source
from comfyui_nibble.families import FAMILIES, by_id
from comfyui_nibble.families.spec import Rule
from comfyui_nibble.quant import awq, svdquant
from comfyui_nibble.quant.calib import allocate, engine, presets
from comfyui_nibble.quant.calib.observe import Reservoir
from comfyui_nibble.quant.calib.solve import Sample, candidates, output_error, solve, solve_best
from comfyui_nibble.quant.modules import quantize_weight
from comfyui_nibble.quant.policy import LayerPlan, plan
from comfyui_nibble.quant.svdquant import SHIFT
from comfyui_nibble.writing import kept
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import gelu, silu

D, H, TOKENS = 128, 384, 3000
FAST = presets.preset("fast")


def halves(x):
    return x.chunk(2, -1)


# name -> (rows of the first layer per column of the second, activation)
ACTIVATIONS = {
    "gelu": (1, lambda x: gelu(x, approximate="tanh")),
    "exact gelu": (1, gelu),
    "quick gelu": (1, lambda x: x * torch.sigmoid(1.702 * x)),
    "relu": (1, torch.relu),
    "squared relu": (1, lambda x: torch.relu(x).square()),
    "sigmoid": (1, torch.sigmoid),
    "softmax": (1, lambda x: x.softmax(-1)),
    "silu": (1, silu),
    "swiglu": (2, lambda x: silu(halves(x)[0]) * halves(x)[1]),
    "geglu": (2, lambda x: halves(x)[0] * gelu(halves(x)[1])),
    "none": (1, lambda x: x),
    "none, and small": (1, lambda x: 0.03 * x),
}
UNSIGNED = {"gelu", "exact gelu", "quick gelu", "relu", "squared relu", "sigmoid"}


class Block(nn.Module):
    """A feed-forward of FLUX.1's and FLUX.2's names."""

    def __init__(self, kind: str):
        super().__init__()
        gates, self.act = ACTIVATIONS[kind]
        g = torch.Generator().manual_seed(0)
        self.img_mlp = nn.ModuleList([nn.Linear(D, gates * H, bias=False), nn.Identity(), nn.Linear(H, D, bias=False)])
        for layer in (self.img_mlp[0], self.img_mlp[2]):
            layer.weight.data = torch.randn(layer.weight.shape, generator=g) / layer.in_features**0.5

    def inner(self, x):
        return self.act(self.img_mlp[0](x))

    def forward(self, x):
        return self.img_mlp[2](self.inner(x))


@torch.no_grad()
def fed(kind: str, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight of img_mlp.2, its input)."""
    block = Block(kind)
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(seed))
    return block.img_mlp[2].weight.data, block.inner(x)


def shapes(kind: str) -> dict:
    return {n: tuple(m.weight.shape) for n, m in Block(kind).named_modules() if isinstance(m, nn.Linear)}


def by_family(kind: str, family: str) -> LayerPlan:
    return plan(shapes(kind), by_id(family).rules, 16)["img_mlp.2"]


class TestWithoutData:
    @pytest.mark.parametrize("family", ["flux", "flux2", "generic"])
    @pytest.mark.parametrize("kind", ["gelu", "swiglu"])
    def test_only_a_known_gelu_is_unsigned_and_the_error_is_small(self, kind, family):
        """FLUX.2's gated layer by FLUX.1's rule was 0.34 of its output off."""
        w, x = fed(kind)
        chosen = by_family(kind, family)
        assert chosen.act_unsigned is (kind == "gelu" and family == "flux")
        q = quantize_weight(w, None, chosen, torch.bfloat16)
        assert output_error(x, w, q.weight) < 0.06
        assert output_error(x, w, quantize_weight(w, None, forced(chosen), torch.bfloat16).weight) < (
            0.02 if kind == "gelu" else 1
        )

    def test_the_wrong_one_is_what_it_was(self):
        w, x = fed("swiglu")
        assert output_error(x, w, quantize_weight(w, None, forced(LayerPlan("svdquant_w4a4", "", 16)),
                                                  torch.bfloat16).weight) > 0.2  # fmt: skip

    def test_a_gate_is_seen_in_the_shapes_too(self):
        """Any model of these names, whatever it is called: the layer before has twice the rows."""
        chosen = by_family("swiglu", "flux")
        assert not chosen.act_unsigned and chosen.reason == "reads a gated product, not a GELU alone"

    def test_every_claim_names_the_layer_before(self):
        for family in FAMILIES:
            for rule in family.rules:
                assert not rule.act_unsigned or rule.after, f"{family.id}: {rule.pattern}"
                assert not (rule.act_unsigned and "GLU" in rule.reason)
        assert not any(r.act_unsigned for r in by_id("flux2").rules)

    def test_the_layer_before_is_found_in_both_spellings(self):
        cases = {
            "flux": ("double_blocks.3.txt_mlp.2", "double_blocks.3.txt_mlp.0"),
            "sd3": ("joint_blocks.1.x_block.mlp.fc2", "joint_blocks.1.x_block.mlp.fc1"),
            "pixart": ("blocks.12.mlp.fc2", "blocks.12.mlp.fc1"),
            "qwen_image": ("transformer_blocks.4.txt_mlp.net.2", "transformer_blocks.4.txt_mlp.net.0.proj"),
        }
        other = ("transformer_blocks.0.ff_context.net.2", "transformer_blocks.0.ff_context.net.0.proj")
        diffusers = dict.fromkeys(("flux", "sd3"), other)
        for table in (cases, diffusers):
            for family, (layer, before) in table.items():
                for rows, unsigned in ((256, True), (512, False)):
                    found = plan({layer: (64, 256), before: (rows, 64)}, by_id(family).rules, 16)
                    assert found[layer].act_unsigned is unsigned, (family, layer)
                assert plan({layer: (64, 256)}, by_id(family).rules, 16)[layer].act_unsigned

    def test_a_rule_that_names_none_stands(self):
        rules = (Rule(r"fc2$", "svdquant_w4a4", "reads a GELU", act_unsigned=True),)
        assert plan({"fc1": (512, 64), "fc2": (64, 256)}, rules, 16)["fc2"].act_unsigned


def forced(p: LayerPlan) -> LayerPlan:
    return dataclasses.replace(p, act_unsigned=True)


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("kind", ACTIVATIONS)
class TestOneLayer:
    def test_the_data_decides_whatever_was_said(self, kind, said):
        w, x = fed(kind)
        given = LayerPlan("svdquant_w4a4", "said", 16, said)
        sample, held = Sample(x[:2500], x.abs().amax(0), float(x.min())), x[2500:]
        chosen, solved = solve_best(w, None, sample, given, FAST, torch.bfloat16)
        assert chosen.act_unsigned is solved.weight.act_unsigned is (kind in UNSIGNED), solved.error
        assert (solved.bias is not None) is chosen.act_unsigned
        assert (chosen.reason == "said") is (chosen.act_unsigned is said)
        if chosen.act_unsigned is not said:
            word = "unsigned" if chosen.act_unsigned else "signed"
            assert chosen.reason == f"said; {word}: its input begins at {float(x.min()):.2f}"
        other = solve(w, None, sample, dataclasses.replace(given, act_unsigned=not chosen.act_unsigned), FAST,
                      torch.bfloat16)  # fmt: skip
        here, there = (output_error(held, w, s.weight) for s in (solved, other))
        assert here < (0.02 if kind in UNSIGNED else 0.06)
        print(f"{kind}: {here:.4f} as chosen, {there:.4f} otherwise")
        if kind != "silu":  # its dip below the shift is shallow: clipped it would err less here, and nobody says where
            assert here < 0.9 * there

    def test_a_budget_measures_the_same(self, kind, said):
        w, x = fed(kind)
        sample = Sample(x, x.abs().amax(0), float(x.min()))
        options = allocate.measure(w, sample, LayerPlan("svdquant_w4a4", "said", 16, said), FAST, 0)
        four = [o for o in options if o.plan.scheme == "svdquant_w4a4"]
        assert four and all(o.plan.act_unsigned is (kind in UNSIGNED) and o.error < 0.06 for o in four)


def test_only_doubtful_layers_are_solved_twice():
    ways = {kind: len(candidates(LayerPlan("svdquant_w4a4", "", 16, said), Sample(x, x.abs().amax(0)), FAST))
            for kind, said in (("gelu", True), ("swiglu", True), ("swiglu", False), ("none", False), ("softmax", True))
            for _, x in [fed(kind)]}  # fmt: skip
    assert ways == {"gelu": 1, "swiglu": 1, "none": 1, "softmax": 2}
    x = fed("gelu")[1]
    assert len(candidates(LayerPlan("svdquant_w4a4", "", 16), Sample(x, x.abs().amax(0)), FAST)) == 2
    for other in (LayerPlan("awq_w4a16", ""), LayerPlan("nvfp4", "")):
        assert candidates(other, Sample(x, x.abs().amax(0)), FAST) == (other,)
    free = LayerPlan("svdquant_w4a4", "", 16, True)
    assert (
        candidates(free, None, FAST) == candidates(free, Sample(-x, x.amax(0)), presets.preset("data_free")) == (free,)
    )


class TestReservoir:
    def test_the_lowest_value_is_of_all_that_passed(self):
        r, x = Reservoir(4, 8, 0), torch.rand(500, 4)
        assert r.lowest == torch.inf
        for part in x.split(7):
            r.add(part)
        assert r.lowest == float(x.min()) and len(r.tokens()) == 8
        r.add(torch.tensor([[1.0, -3.0, 2.0, float("nan")]]))
        assert r.lowest == float(x.min()), "a broken token is left out"
        r.add(torch.tensor([[1.0, -3.0, 2.0, 0.0]]))
        assert r.lowest == -3 and r.maxima[1] == 3
        r.add(torch.empty(0, 4))
        assert r.lowest == -3

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_a_gelu_stays_above_the_shift_in_every_dtype(self, dtype):
        r = Reservoir(64, 8, 0)
        r.add(gelu(torch.linspace(-6, 6, 64 * 4096).reshape(-1, 64).to(dtype), approximate="tanh"))
        assert -SHIFT < r.lowest < -0.169


def run(kind: str, said: bool, x: torch.Tensor, **options) -> engine.Layer:
    module = Block(kind)
    job = engine.Job(
        plans={"img_mlp.2": LayerPlan("svdquant_w4a4", "said", 16, said)}, preset=FAST, dtype=torch.bfloat16,
        run=lambda: module(x), weight=lambda n: (module.get_submodule(n).weight.detach(), None), **options,
    )  # fmt: skip
    return engine.calibrate(module, job)["img_mlp.2"]


class TestCalibration:
    @pytest.mark.parametrize("fit", [None, 45_000])
    @pytest.mark.parametrize("kind", ["gelu", "swiglu", "geglu"])
    def test_the_result_says_what_was_used(self, kind, fit):
        x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(2))
        for said in (True, False):
            layer = run(kind, said, x, fit=fit, promote=None)
            assert layer.plan.act_unsigned is layer.solved.weight.act_unsigned is (kind == "gelu")
            assert layer.solved.error < 0.06

    def test_one_token_that_the_sample_does_not_hold_is_enough(self):
        """4,000 tokens pass and 1,024 are kept; one that is not kept falls below."""
        g = torch.Generator().manual_seed(3)
        clean = torch.randn(4000, D, generator=g)
        block = Block("none")
        block.act = lambda x: torch.where(x.abs().amax(-1, keepdim=True) > 100, -5.0, gelu(x))
        for at in range(4000):
            x = clean.clone()
            x[at] *= 1e4
            watched = Reservoir(H, 1024, engine_seed())
            watched.add(block.inner(x).detach())
            if float(watched.tokens().min()) > -SHIFT:
                break
        assert watched.lowest == -5 and float(watched.tokens().min()) > -SHIFT
        job = engine.Job(
            plans={"img_mlp.2": LayerPlan("svdquant_w4a4", "said", 16, True)}, preset=FAST, dtype=torch.bfloat16,
            run=lambda: block(x), weight=lambda n: (block.get_submodule(n).weight.detach(), None),
        )  # fmt: skip
        layer = engine.calibrate(block, job)["img_mlp.2"]
        assert not layer.plan.act_unsigned and layer.tokens == 1024

    def test_layers_that_no_data_reached_keep_their_familys_word(self):
        module = Block("swiglu")
        job = engine.Job(
            plans={"img_mlp.2": LayerPlan("svdquant_w4a4", "said", 16, True)}, preset=FAST, dtype=torch.bfloat16,
            run=lambda: None, weight=lambda n: (module.get_submodule(n).weight.detach(), None),
        )  # fmt: skip
        assert engine.calibrate(module, job)["img_mlp.2"].plan.act_unsigned

    def test_the_report_counts_them(self):
        x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(2))
        layers = {"a": run("gelu", False, x), "b": run("swiglu", True, x, promote=None)}
        assert report.totals(layers)["unsigned"] == 1
        text = report.table({"a": layers["a"], "b": dataclasses.replace(layers["b"], name="b")}, "fast")
        assert "1 have unsigned activations" in text and text.count("| unsigned |") == 1
        assert "unsigned" not in report.summary({"b": layers["b"]}, "fast")

    def test_the_file_follows(self, tmp_path):
        """Plans of a family that is wrong about it, solved, written and read."""
        x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(2))
        names = [f"blocks.{i}.img_mlp.2" for i in range(2)]
        made = {n: dataclasses.replace(run(k, k != "gelu", x, promote=None), name=n)
                for n, k in zip(names, ("swiglu", "gelu"), strict=True)}  # fmt: skip
        weights = {
            f"{n}.weight": Block(k).img_mlp[2].weight.data for n, k in zip(names, ("swiglu", "gelu"), strict=True)
        }
        save_file(weights, tmp_path / "x.safetensors")
        plans = {n: LayerPlan("svdquant_w4a4", "said", 16, n == names[0]) for n in names}
        with open_source(tmp_path / "x.safetensors") as source:
            convert.quantize(source, tmp_path / "y.safetensors", convert.Options(plans=plans, solved=made))
        layers = load(tmp_path / "y.safetensors").layers
        assert [layers[n].weight.act_unsigned for n in names] == [False, True]


def engine_seed() -> int:
    """What the engine seeds the layer's reservoir with."""
    import zlib

    return zlib.crc32(b"0/img_mlp.2")


class TestResuming:
    def test_what_another_version_solved_is_solved_again(self, monkeypatch):
        plans = {"img_mlp.2": LayerPlan("svdquant_w4a4", "", 16)}
        subject = runs.Subject(
            family=None, module=None, shapes={"img_mlp.2": (D, H)}, nbytes={}, dtype=torch.bfloat16,
            weight=lambda n: (Block("gelu").img_mlp[2].weight.detach(), None), sample=lambda: None, prompts=1,
            drawn=["a"], device="cpu",
        )  # fmt: skip
        settings = runs.Settings("fast", "svdquant_w4a4", 16, 0, 8, 3.0, 0)
        signatures = [runs.signature_of(subject, settings, plans)]
        monkeypatch.setattr(engine, "METHOD", engine.METHOD - 1)
        signatures.append(runs.signature_of(subject, settings, plans))
        assert len(set(signatures)) == 2

    @pytest.mark.parametrize("change", [
        lambda v: v["plan"].update(signs="none"), lambda v: v["solved"].pop("error"), lambda v: v.update(lowest=0.1),
        lambda v: v.pop("plan"), lambda v: v.update(plan=[1]), lambda v: v.update(solved=None)])  # fmt: skip
    def test_a_record_of_other_fields_is_taken_for_absent(self, change, tmp_path):
        x = torch.randn(1200, D, generator=torch.Generator().manual_seed(2))
        store, layer = resume.Folder(tmp_path), run("gelu", True, x)
        store.put(layer)
        assert store.get("img_mlp.2").plan == layer.plan
        (file,) = tmp_path.iterdir()
        tensors, values = kept.load(file)
        change(values)
        kept.save(file, tensors, values)
        assert store.get("img_mlp.2") is None


def test_modulations_are_never_unsigned():
    w, x = fed("relu")
    chosen, solved = solve_best(w, None, Sample(x, x.abs().amax(0)), LayerPlan("awq_w4a16", "m"), FAST, torch.bfloat16)
    assert isinstance(solved.weight, awq.AWQWeight) and not chosen.act_unsigned


def test_a_stored_bias_belongs_to_what_was_chosen(sqnr):
    w, x = fed("swiglu")
    bias = torch.randn(D)
    _, solved = solve_best(w, bias, Sample(x, x.abs().amax(0)), LayerPlan("svdquant_w4a4", "", 16, True), FAST,
                           torch.bfloat16)  # fmt: skip
    assert torch.equal(solved.bias, bias)
    assert sqnr(x @ w.t() + bias, svdquant.linear(x, solved.weight, solved.bias)) > 12
