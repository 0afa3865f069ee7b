"""Weights to the byte, and estimates that move the right way."""

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from comfyui_nibble.profiling import calibrate, cards, estimate, weights, work
from comfyui_nibble.profiling.calibrate import Key
from comfyui_nibble.profiling.estimate import Known, Task
from comfyui_nibble.quant.modules import quantize_weight
from comfyui_nibble.quant.policy import LayerPlan
from comfyui_nibble.quant.schemes import SCHEMES

KEY = Key("comfyui", "sd15", "float32", "fused", "16-bit", "a machine")
TRUE = calibrate.Constants(KEY, 5e6, 1.2, 0.3, 2e-7, 0.05, 4e12, 6)
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


def test_4_bit_layers_of_another_kind_stay_what_they_are():
    """A scheme that the table does not write, on a layer that the policy would keep in 16 bits."""
    tensors = model()
    layers = {"conv": (8, 36, 777, "of_another_pack")}
    entries = {"conv.codes": Entry("U8", (777,), 777), "a.weight": entry(tensors["a.weight"].half())}
    w = weights.split(entries, layers, PLANS, name="m", family="f")
    assert w.four_bit and w.stored == PRECISIONS["4-bit"].total(w, 16) == 777 + 2 * 128 * 64
    assert PRECISIONS["16-bit"].total(w, 0) == 2 * 8 * 36 + 2 * 128 * 64


def test_the_documented_bits_are_those_that_are_counted():
    """Every precision but the mix has its row in docs/profiling.md."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "profiling.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(" `").split(" (")[0]: line for line in text.splitlines() if line.count("|") == 4}
    for id, precision in PRECISIONS.items():
        if id != "4-bit":
            layer = weights.Linear("x", 3072, 3072, 0, id)
            assert rows[id].endswith(f"| {precision.nbytes(layer, 32) * 8 / 3072**2:.3f} |"), id


def test_8_bit_is_a_byte_a_weight_and_a_scale():
    tensors = model()
    fp8 = [tensors[n].to(torch.float8_e4m3fn) for n in ("a.weight", "b.weight")]
    rest = [tensors["a.bias"].half(), tensors["conv.weight"].half()]
    assert PRECISIONS["8-bit"].total(split(tensors), 0) == nbytes([*fp8, *rest, torch.ones(2)])


def test_a_lora_is_two_16_bit_factors_a_layer():
    r, w = 8, split(model())
    factors = [torch.zeros(n, r).half() for n in (128, 64)] + [torch.zeros(r, k).half() for k in (64, 256)]
    assert w.lora(r) == nbytes(factors)


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


def test_a_task_far_from_what_was_measured_is_marked():
    k = known(BASE, TRUE)
    assert estimate.far(k) == "" == estimate.far(known(BASE))
    for low, high, words in (
        (1.0, 1.0, ""),
        (0.7, 1.4, ""),
        (2.0, 4.0, "0.5 times the smallest"),
        (0.1, 0.5, "2 times the largest"),
    ):
        c = replace(TRUE, flops_least=round(low * k.work.flops), flops_most=round(high * k.work.flops))
        note = estimate.far(replace(k, constants=c))
        assert (words in note) if words else note == ""


def test_bad_tasks_are_refused():
    with pytest.raises(ValueError, match="1 or more"):
        replace(BASE, batch=0)
    with pytest.raises(ValueError, match="unknown precision '3-bit'"):
        estimate.estimate(replace(BASE, precision="3-bit"), known(BASE), PRECISIONS)


def test_a_bound_is_below_what_was_measured_nowhere():
    """Twice the card, half the bound; and never faster than reading the weights once a step."""
    k = known(BASE)
    card, p = cards.CARDS["RTX 3090 24 GB"], PRECISIONS["16-bit"]
    one = estimate.at_best(card, k.work, k.weights, p, BASE, 10**6)
    assert one == pytest.approx(2 * estimate.at_best(replace(card, units=164), k.work, k.weights, p, BASE, 10**6))
    slow = estimate.at_best(card, k.work, k.weights, p, BASE, 936 * 10**9)
    assert slow == pytest.approx(BASE.steps)
