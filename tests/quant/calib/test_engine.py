"""Whole modules: what is watched, in how many runs, in how much memory, and what comes out."""

import dataclasses

import pytest
import torch
from comfyui_nibble.calibration import report, resume
from comfyui_nibble.checkpoints import save
from comfyui_nibble.demo import parts
from comfyui_nibble.profiling.work import LiveBytes
from comfyui_nibble.quant.calib import engine, presets
from comfyui_nibble.quant.calib.observe import Observer, runs_needed
from comfyui_nibble.quant.policy import LayerPlan
from torch import nn


class Block(nn.Module):
    """q, k and v of one input, an output, and a layer that no forward pass reaches."""

    def __init__(self, width: int = 128):
        super().__init__()
        for name in ("q", "k", "v", "out", "unused"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x):
        return self.out(self.q(x) * self.k(x) + self.v(x))


def block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block()


def inputs(seed: int = 1) -> torch.Tensor:
    x = torch.randn(4, 160, 128, generator=torch.Generator().manual_seed(seed))
    x[..., 5] *= 20
    return x


def job(module: Block, names=("q", "k", "v", "out", "unused"), preset: str = "fast", **options) -> engine.Job:
    x = inputs()
    plans = {n: LayerPlan("svdquant_w4a4", "", 16) for n in names}
    weights = {n: (m.weight.detach(), m.bias.detach()) for n, m in module.named_children()}
    return engine.Job(
        plans=plans,
        preset=presets.preset(preset),
        dtype=torch.bfloat16,
        run=lambda: module(x),
        weight=weights.get,
        **options,
    )


class TestObserver:
    def test_layers_that_share_an_input_share_one_reservoir(self):
        module, x = block(), inputs()
        observer = Observer(dict.fromkeys(("q", "k", "v", "out"), 128), 256)
        (reservoirs,) = [dict(r) for r in runs_needed(observer, lambda: module(x), module)]
        assert set(reservoirs) == {"q", "out"} and observer.members("q") == ["q", "k", "v"]
        assert reservoirs["q"].seen == 4 * 160

    def test_no_hook_is_left_whatever_ends_the_run(self):
        class Stop(BaseException):
            pass

        def stop():
            raise Stop

        module, x = block(), inputs()
        observer = Observer({"q": 128}, 256, on_forward=stop)
        with pytest.raises(Stop), observer.watching(module):
            module(x)
        assert not any(m._forward_pre_hooks for m in module.modules())

    def test_a_small_budget_takes_more_runs_and_the_same_tokens(self):
        module, x = block(), inputs()
        widths = dict.fromkeys(("q", "k", "v", "out"), 128)
        one = {
            n: r.tokens()
            for run in runs_needed(Observer(widths, 256), lambda: module(x), module)
            for n, r in run.items()
        }
        observer, held = Observer(widths, 256, budget=1024 * 128 * 2), []
        several = {}
        for run in runs_needed(observer, lambda: module(x), module):
            held.append(observer.nbytes)
            several |= {n: r.tokens() for n, r in run.items()}
        assert len(held) == 2 and max(held) <= observer.budget + 4 * 128
        assert one.keys() == several.keys() and all(torch.equal(one[n], several[n]) for n in one)


class TestCalibrate:
    def test_every_layer_is_solved_and_those_without_input_from_their_weights(self):
        module = block()
        layers = engine.calibrate(module, job(module))
        assert list(layers) == ["q", "k", "v", "out", "unused"]
        assert layers["unused"].tokens == 0 and not layers["unused"].solved.calibrated
        assert all(
            layers[n].tokens > 0 and layers[n].solved.error <= layers[n].solved.data_free for n in ("q", "k", "v")
        )

    @pytest.mark.parametrize("scheme", ["svdquant_w4a4", "awq_w4a16", "nvfp4", "int8_tensorwise"])
    def test_a_layer_that_nothing_reaches_is_named(self, scheme):
        module = block()
        base = job(module)
        plans = {**base.plans, "unused": LayerPlan(scheme, "")}
        layers = engine.calibrate(module, dataclasses.replace(base, plans=plans))
        told = "1 were never run, so nothing is known of their input: unused."
        for text in (report.summary(layers, "fast"), report.table(layers, "fast"), report.page(layers, "fast", "t")):
            assert told in text
        (row,) = [line for line in report.table(layers, "fast").splitlines() if line.startswith("| unused |")]
        assert "| no data |" in row and report.unreached(layers, "fast") == ["unused"]
        assert "0 kept the data-free weight" in report.summary(layers, "fast")

    def test_where_no_data_is_asked_for_none_is_missed(self):
        module = block()
        layers = engine.calibrate(module, job(module, preset="data_free"))
        assert "never run" not in report.table(layers, "data_free") and "no data" not in report.table(
            layers, "data_free"
        )

    def test_a_layer_with_too_few_tokens_is_named(self):
        module = block()
        work = dataclasses.replace(job(module, ("q", "out")), run=lambda: module(inputs()[:1, :5]))
        text = report.summary(engine.calibrate(module, work), "fast")
        assert "2 were fed fewer than 8 tokens, too few to calibrate: q, out." in text and "no worse" not in text

    def test_an_input_by_name_is_seen(self):
        """ComfyUI's models may call a layer so; and one that is never called is not."""
        module, x = block(), inputs()
        work = dataclasses.replace(job(module, ("q", "k")), run=lambda: module.q(input=x))
        layers = engine.calibrate(module, work)
        assert layers["q"].tokens > 0 == layers["k"].tokens

    def test_same_seed_same_codes(self):
        one, two = (engine.calibrate(m, job(m, seed=3)) for m in (block(), block()))
        for n in one:
            assert torch.equal(one[n].solved.weight.qweight, two[n].solved.weight.qweight)
            assert torch.equal(one[n].solved.weight.proj_up, two[n].solved.weight.proj_up)

    def test_the_module_is_as_it_was(self):
        module = block()
        before = {k: v.clone() for k, v in module.state_dict().items()}
        engine.calibrate(module, job(module))
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        assert not any(m._forward_pre_hooks for m in module.modules())

    def test_a_hopeless_layer_leaves_4_bits(self):
        module = block()
        layers = engine.calibrate(module, job(module, ("q",), promote=1e-4))
        assert layers["q"].plan.reason.startswith("promoted: 4 bits err by")
        assert layers["q"].plan.scheme != "svdquant_w4a4" and layers["q"].solved.error <= 1e-4

    def test_nan_in_a_weight_names_the_layer(self):
        module = block()
        with torch.no_grad():
            module.k.weight[3, 3] = float("nan")
        with pytest.raises(ValueError, match="layer k: the weight holds NaN"):
            engine.calibrate(module, job(module))

    def test_tokens_that_follow_a_fused_layer(self):
        """A file may fuse what the module keeps apart: the fused layer takes the input of the part it is placed at."""
        module = block()
        fused = torch.cat([module.q.weight, module.k.weight, module.v.weight]).detach()
        base = job(module, ("qkv",))
        work = dataclasses.replace(base, weight=lambda n: (fused, None), place=lambda n: "q")
        layer = engine.calibrate(module, work)["qkv"]
        assert layer.shape == (384, 128) and layer.tokens > 0


class TestResume:
    def test_a_second_run_takes_what_is_solved_and_ends_the_same(self, tmp_path):
        class Stop(Exception):
            pass

        def stop_at(n: int):
            def layer(_layer, done, _total):
                if done == n:
                    raise Stop

            return layer

        module, store = block(), resume.Folder(tmp_path)
        with pytest.raises(Stop):
            engine.calibrate(module, job(module), engine.Watch(layer=stop_at(2), store=store))
        seen = []
        watch = engine.Watch(layer=lambda layer, *_: seen.append(layer.name), store=store)
        again, whole = engine.calibrate(module, job(module), watch), engine.calibrate(module, job(module))
        assert seen == ["v", "out", "unused"]
        for n in whole:
            one, other = again[n].solved.weight, whole[n].solved.weight
            for field in ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up"):
                assert torch.equal(getattr(one, field), getattr(other, field)), n
            assert torch.equal(again[n].solved.bias, whole[n].solved.bias)
        assert store.found == 2 and store.recalled == 1

    def test_a_fingerprint_sees_one_changed_value(self):
        a = torch.randn(64, 64)
        b = a.clone()
        b[17, 3] += 1e-3
        assert save.fingerprint({"w": a}) == save.fingerprint({"w": a.clone()}) != save.fingerprint({"w": b})


@pytest.mark.parametrize("preset", ["fast", "best"])
@pytest.mark.parametrize(("n", "k"), [(512, 512), (1024, 256), (256, 1024)])
def test_peak_memory_of_a_layer_stays_under_the_stated_bound(n, k, preset):
    """Tensor bytes alive while one layer is solved, counted at every operation, above what was there before."""
    row = presets.preset(preset)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=g)
    tokens = torch.randn(max(1024, min(row.tokens, 2 * k)), k, generator=g)
    from comfyui_nibble.quant.calib.solve import Sample, solve

    sample = Sample(tokens, tokens.abs().amax(0))
    with LiveBytes() as count:
        solve(weight, None, sample, LayerPlan("svdquant_w4a4", "", 32), row, torch.bfloat16)
    assert n * k * 4 < count.peak <= engine.working_bytes(n, k, row)


@pytest.mark.parametrize("budget", [2**20, 2**23])
def test_peak_memory_of_a_run_stays_under_the_stated_bound(budget):
    """A denoiser four times the demo model's size, every fourth layer, above what its own forward pass takes."""
    diffusers = pytest.importorskip("diffusers")
    wide = {"block_out_channels": tuple(2 * c for c in parts.UNET["block_out_channels"]), "cross_attention_dim": 256}
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**parts.UNET | wide).eval()
    assert sum(p.numel() for p in unet.parameters()) > 3.5 * 10.9e6
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Linear) and not m.in_features % 64}
    layers = dict(list(layers.items())[::4])
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 16, 256)

    @torch.no_grad()
    def run():
        for t in (100, 500, 900):
            unet(x, t, text)

    with LiveBytes() as alone:
        run()
    work = engine.Job(
        plans={n: LayerPlan("svdquant_w4a4", "", 32) for n in layers},
        preset=presets.preset("fast"),
        dtype=torch.bfloat16,
        run=run,
        weight=lambda n: (layers[n].weight.detach(), None),
        budget=budget,
    )
    shapes = {n: tuple(m.weight.shape) for n, m in layers.items()}
    with LiveBytes() as count, torch.no_grad():
        solved = engine.calibrate(unet, work)
    bound = engine.peak_bytes(shapes, work)
    print(f"forward {alone.peak / 2**20:.1f}, calibration {count.peak / 2**20:.1f}, bound {bound / 2**20:.1f} MiB")
    assert len(solved) == len(layers) >= 15
    assert alone.peak < count.peak <= alone.peak + bound
