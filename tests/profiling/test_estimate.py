"""Weights to the byte, constants that find themselves again, and estimates that move the right way."""

import json
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from comfyui_nibble.profiling import calibrate, cards, estimate, weights, work
from comfyui_nibble.profiling.calibrate import Key, Measurement
from comfyui_nibble.profiling.estimate import Known, Task
from comfyui_nibble.quant.modules import quantize_weight
from comfyui_nibble.quant.policy import LayerPlan
from comfyui_nibble.quant.schemes import SCHEMES

KEY = Key("comfyui", "sd15", "float32", "fused", "16-bit", "a machine")
PRECISIONS = weights.precisions(SCHEMES)
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8"}


@dataclass(frozen=True)
class Entry:
    dtype: str
    shape: tuple
    nbytes: int


def entry(t: torch.Tensor) -> Entry:
    return Entry(NAMES[t.dtype], tuple(t.shape), t.numel() * t.element_size())


def model(dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A model of four tensors that a policy shrinks two of."""
    g = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (128, 64), "a.bias": (128,), "b.weight": (64, 256), "conv.weight": (8, 4, 3, 3)}
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


PLANS = {"a": LayerPlan("svdquant_w4a4", "", 16), "b": LayerPlan("svdquant_w4a4", "", 16, act_unsigned=True),
         "conv": LayerPlan("keep", "")}  # fmt: skip


def split(tensors: dict[str, torch.Tensor]) -> weights.Weights:
    layers = {n: (*tensors[f"{n}.weight"].shape, entry(tensors[f"{n}.weight"]).nbytes, "keep") for n in ("a", "b")}
    entries = {n: entry(t) for n, t in tensors.items()} | {"a.comfy_quant": Entry("U8", (99,), 99)}
    return weights.split(entries, layers, PLANS, name="m", family="f")


def nbytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def parts(q) -> list:
    """Every tensor of a quantized weight."""
    return [v for v in vars(q).values() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_stored_and_16_bit_bytes(dtype):
    tensors = model(dtype)
    w = split(tensors)
    assert w.stored == nbytes(tensors.values())
    assert PRECISIONS["16-bit"].total(w, 0) == nbytes(t.half() for t in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rank", [0, 16, 48])
@pytest.mark.parametrize("id", ["4-bit", *SCHEMES])
def test_every_scheme_is_counted_as_its_quantizer_stores_it(id, rank, dtype):
    """Against real tensors, the bias that an unsigned layer gains included."""
    tensors = model(dtype)
    total = 0
    for name, planned in PLANS.items():
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        if planned.scheme == "keep":
            total += nbytes([weight.half()])
            continue
        scheme = SCHEMES[planned.scheme if id == "4-bit" else id]
        unsigned = planned.act_unsigned and scheme.act_bits == 4
        done = quantize_weight(weight, bias, replace(planned, scheme=scheme.id, rank=min(rank, *weight.shape),
                               act_unsigned=unsigned), torch.float16)  # fmt: skip
        gained = [done.bias.half()] if done.bias is not None else []
        total += nbytes(parts(done.weight)) + nbytes(gained)
        if planned.act_unsigned and not unsigned and bias is None:
            total += 2 * len(weight)  # the estimate counts the policy's bias under every 4-bit scheme
    assert PRECISIONS[id].total(split(tensors), rank) == total


def test_8_bit_is_a_byte_a_weight_and_a_scale():
    tensors = model()
    fp8 = [tensors[n].to(torch.float8_e4m3fn) for n in ("a.weight", "b.weight")]
    rest = [tensors["a.bias"].half(), tensors["conv.weight"].half()]
    assert PRECISIONS["8-bit"].total(split(tensors), 0) == nbytes([*fp8, *rest, torch.ones(2)])


def test_a_lora_is_two_16_bit_factors_a_layer():
    r, w = 8, split(model())
    factors = [torch.zeros(n, r).half() for n in (128, 64)] + [torch.zeros(r, k).half() for k in (64, 256)]
    assert w.lora(r) == nbytes(factors)


# ---- constants ----


def measured(true: calibrate.Constants, noise: float = 0.0) -> list[Measurement]:
    rng = np.random.default_rng(0)
    out = []
    for side in (512, 768, 1024):
        pixels, flops, live = side**2, 3_000_000 * side**2, 900 * side**2
        for n in (2, 6):
            stretch = 1 + noise * rng.standard_normal()
            out.append(Measurement(pixels, flops, live, true.activation(live), n,
                                   true.seconds(pixels, flops, n) * stretch))  # fmt: skip
    return out


TRUE = calibrate.Constants(KEY, 5e6, 1.2, 0.3, 2e-7, 0.05, 4e12, 6)


def test_a_fit_finds_the_constants_again():
    found = calibrate.fit(KEY, measured(TRUE))
    for name in ("activation_fixed", "activation_factor", "run_fixed", "run_per_pixel", "evaluation_fixed",
                 "flops_per_second"):  # fmt: skip
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-4), name
    assert found.time_error < 1e-6 and found.memory_error < 1e-6 and found.runs == 6


def test_a_noisy_fit_predicts_steps_it_never_saw():
    """Fitted on 2 and 6 steps of times that vary by 4 %, 4 and 10 steps are within 15 %."""
    found = calibrate.fit(KEY, measured(TRUE, noise=0.04))
    for m in measured(TRUE):
        for n in (4, 10):
            truth = TRUE.seconds(m.pixels, m.flops, n)
            assert found.seconds(m.pixels, m.flops, n) == pytest.approx(truth, rel=0.15)
    assert 0 < found.time_error < 0.15


def test_constants_are_never_negative_and_speed_is_finite():
    """Times that shrink with size would want a negative constant."""
    odd = [Measurement(10, 1000, 10, 0, 2, 5.0), Measurement(1000, 100_000, 10, 0, 2, 1.0)]
    found = calibrate.fit(KEY, odd)
    values = (found.run_fixed, found.run_per_pixel, found.evaluation_fixed, 1 / found.flops_per_second)
    assert all(v >= 0 for v in values) and values[-1] > 0
    assert (found.memory_error, found.activation_factor, found.activation_fixed) == (-1.0, 1.0, 0.0)


def test_one_run_is_explained_exactly():
    found = calibrate.fit(KEY, [Measurement(100, 10**9, 10, 20, 4, 8.0)])
    assert found.seconds(100, 10**9, 4) == pytest.approx(8.0) and found.activation(10) == 20


def test_nothing_to_fit_is_said():
    with pytest.raises(ValueError, match="no measured run of sd15"):
        calibrate.fit(KEY, [])
    with pytest.raises(ValueError, match="took no time"):
        calibrate.fit(KEY, [Measurement(1, 1, 1, 1, 1, 0.0)])


def test_calibrations_there_and_back_and_bad_ones_refused():
    rows = [TRUE, calibrate.fit(KEY, measured(TRUE))]
    assert calibrate.from_json(calibrate.to_json(rows)) == rows
    data = json.loads(calibrate.to_json(rows))
    for change in (lambda d: d.update(format="x"), lambda d: d["rows"][0].update(flops_per_second=0.0),
                   lambda d: d["rows"][0]["key"].update(extra="x"), lambda d: d.update(rows=3)):  # fmt: skip
        bad = json.loads(json.dumps(data))
        change(bad)
        with pytest.raises(ValueError, match=r"^c\.json: it is not a calibration"):
            calibrate.from_json(json.dumps(bad), "c.json")


def test_the_shipped_constants_are_sound():
    for row in calibrate.shipped():
        assert row.key.engine in calibrate.ENGINES and row.key.attention in work.KINDS and row.runs >= 2
        assert row.memory_error < 0.15 and row.time_error < 0.3


def test_constants_of_another_machine_or_family_are_not_used():
    rows = [TRUE]
    assert calibrate.find(rows, KEY)[0] is TRUE
    assert calibrate.find(rows, replace(KEY, weights="4-bit"))[0] is TRUE  # said in words
    assert "16-bit weights" in calibrate.find(rows, replace(KEY, weights="4-bit"))[1]
    for other in (dict(device="b"), dict(family="flux"), dict(dtype="float16"), dict(attention="matrix"),
                  dict(engine="diffusers")):  # fmt: skip
        found, how = calibrate.find(rows, replace(KEY, **other))
        assert found is None and "was measured" in how
    assert calibrate.find([TRUE, replace(TRUE, runs=9)], KEY)[0].runs == 9  # the newest counts


# ---- estimates ----


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(64, 128)
        self.b = torch.nn.Linear(128, 64)

    def forward(self, x):
        return self.b(torch.nn.functional.gelu(self.a(x)))


def known(task: Task, constants=None) -> Known:
    with torch.device("meta"):
        net = Net()
    x = torch.empty(task.rows, task.width * task.height // 64, 64, device="meta")
    return Known(split(model()), work.simulate(net, lambda: net(x)), constants, "fitted", vae_activation=1000)


BASE = Task(512, 512, 1, 20, 4.0)


def peak(task: Task, constants=TRUE) -> int:
    return estimate.estimate(task, known(task, constants), PRECISIONS).peak


@pytest.mark.parametrize("constants", [None, TRUE])
@pytest.mark.parametrize("field, values", [
    ("width", (64, 128, 256, 512)), ("height", (64, 200, 512)), ("batch", (1, 2, 3, 8)), ("cfg", (1.0, 4.0)),
])  # fmt: skip
def test_memory_and_time_grow_with_the_task(field, values, constants):
    tasks = [replace(BASE, **{field: v}) for v in values]
    peaks = [peak(t, constants) for t in tasks]
    assert all(a < b for a, b in pairwise(peaks)), peaks
    if constants is not None:
        times = [estimate.estimate(t, known(t, constants), PRECISIONS).seconds for t in tasks]
        assert all(a < b for a, b in pairwise(times)), times


def test_memory_grows_with_precision_ranks_and_time_with_steps():
    order = ["4-bit", "8-bit", "16-bit", weights.STORED]  # stored in 32 bits here
    small = replace(BASE, rank=8)
    sizes = [estimate.estimate(replace(small, precision=p), known(BASE), PRECISIONS).weights for p in order]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
    ranks = [peak(replace(BASE, precision="4-bit", rank=r)) for r in (0, 16, 32)]
    assert ranks == sorted(set(ranks))
    loras = [peak(replace(BASE, precision="4-bit", lora_rank=r)) for r in (0, 4, 64)]
    assert loras == sorted(set(loras))
    times = [estimate.estimate(replace(BASE, steps=n), known(BASE, TRUE), PRECISIONS).seconds for n in (1, 4, 20)]
    assert times == sorted(set(times))


def test_a_merged_lora_takes_nothing():
    assert peak(replace(BASE, precision="16-bit", lora_rank=64)) == peak(replace(BASE, precision="16-bit"))


def test_fits_offloads_or_not():
    e = estimate.estimate(BASE, known(BASE), PRECISIONS, gpu=False)
    assert e.context == 0 and e.fits(e.peak) == estimate.YES
    assert e.fits(e.peak - 1) in (estimate.OFFLOAD, estimate.NO)
    heavy = replace(e, weights=10**12)
    assert heavy.fits(int(1.2 * e.activation)) == estimate.OFFLOAD and heavy.fits(e.activation) == estimate.NO
    assert e.resident >= e.peak


def test_the_formula_shows_the_numbers_it_used():
    k = known(BASE, TRUE)
    e = estimate.estimate(replace(BASE, precision="4-bit", lora_rank=4), k, PRECISIONS)
    text = "\n".join(e.formula)
    assert (
        f"{e.weights:,} B" in text and "1.200 x" in text and f"= {e.peak:,} B" in text and f"{e.seconds:.2f} s" in text
    )
    words = estimate.markdown(e, k, "a card", 10**9, estimate.fit_table(BASE, k, PRECISIONS))
    assert "It fits" in words and all(c in words for c in cards.CARDS) and "Not calibrated" not in words
    assert "does not fit" in estimate.markdown(e, k, "a card", 10**3, [])
    assert "Not calibrated" in estimate.markdown(replace(e, calibrated=False), k, "a card", 10**9, [])
    assert json.loads(estimate.to_json(e, k))["peak"] == e.peak


def test_bad_tasks_are_refused():
    with pytest.raises(ValueError, match="1 or more"):
        replace(BASE, batch=0)
    with pytest.raises(ValueError, match="unknown precision '3-bit'"):
        estimate.estimate(replace(BASE, precision="3-bit"), known(BASE), PRECISIONS)


# ---- cards ----


@pytest.mark.parametrize("name, fp16, int8, four", [
    ("RTX 3090 24 GB", 71, 284, 568), ("RTX 4090 24 GB", 165.2, 660.6, 1321), ("RTX 5090 32 GB", 209.5, 838, 1676),
    ("A100 80 GB", 312, 624, 1248), ("H100 80 GB", 989.4, 1979, 989.4), ("T4 16 GB", 65, 130, 260),
    ("L4 24 GB", 121, 242, 485),
])  # fmt: skip
def test_rates_are_those_of_the_whitepapers(name, fp16, int8, four):
    """In 10^12 operations a second, dense; Hopper has no 4-bit mode."""
    card = cards.CARDS[name]
    for kind, value in (("fp16", fp16), ("int8", int8), ("four_bit", four)):
        assert card.rate(kind) / 1e12 == pytest.approx(value, rel=0.01)


def test_every_card_is_plausible_and_its_native_scheme_is_known():
    for card in cards.CARDS.values():
        box = float(card.name.split()[-2])
        assert 0.88 * box <= card.gib <= box, card.name
        assert 100 < card.bandwidth < 10_000 and card.architecture in cards.ARCHITECTURES
    assert cards.by_compute(8, 9).native == cards.by_compute(8, 0).native == "svdquant_w4a4"
    assert cards.by_compute(12, 0).native == "nvfp4" and cards.by_compute(9, 0).native == "asym_w4a8_int8"
    assert cards.by_compute(5, 2) is None


def test_a_bound_is_below_what_was_measured_nowhere():
    """Twice the card, half the bound; and never faster than reading the weights once a step."""
    k = known(BASE)
    card, p = cards.CARDS["RTX 3090 24 GB"], PRECISIONS["16-bit"]
    one = estimate.at_best(card, k.work, k.weights, p, BASE, 10**6)
    assert one == pytest.approx(2 * estimate.at_best(replace(card, units=164), k.work, k.weights, p, BASE, 10**6))
    slow = estimate.at_best(card, k.work, k.weights, p, BASE, 936 * 10**9)
    assert slow == pytest.approx(BASE.steps)
