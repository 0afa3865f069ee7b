"""Every kind of LoRA against its own formula, and its exact low-rank form where it has one."""

import lora_files
import pytest
import torch
from comfyui_nibble.lora.apply import apply
from comfyui_nibble.lora.names import Slot
from comfyui_nibble.lora.read import read
from comfyui_nibble.lora.weights import LohaWeights, LokrWeights, LoraWeights, stays_low_rank
from comfyui_nibble.quant import kernels, svdquant
from comfyui_nibble.quant.modules import install, quantize_weight
from comfyui_nibble.quant.policy import LayerPlan

N, K = 128, 64


def weights(kind: str, n: int = N, k: int = K):
    tensors = {f"layer{end}": t for end, t in lora_files.kind(kind, n, k).items()}
    return read(tensors).targets["layer"], {end[1:]: t.double() for end, t in lora_files.kind(kind, n, k).items()}


def by_hand(kind: str, t: dict, w: torch.Tensor) -> torch.Tensor:
    """The patched weight, written out from the papers' formulas."""
    scale = 0.5  # lora_files: alpha is half the rank
    if kind in ("lora", "dora", "dora columns"):
        new = w + scale * t["lora_up.weight"] @ t["lora_down.weight"]
        if kind != "lora":
            new = new * t["dora_scale"] / new.norm(dim=1 if kind == "dora" else 0, keepdim=True)
        return new
    if kind == "loha":
        return w + scale * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    if kind == "lokr":
        return w + torch.kron(t["lokr_w1"], t["lokr_w2"])
    if kind == "lokr low":
        return w + scale * torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"])
    return w + t["diff"]


@pytest.mark.parametrize("kind", ["lora", "dora", "dora columns", "loha", "lokr", "lokr low", "diff"])
def test_is_the_formula(kind, sqnr):
    ours, tensors = weights(kind)
    w = torch.randn(N, K)
    assert ours.shape == (N, K)
    assert sqnr(by_hand(kind, tensors, w.double()), ours.patched(w, 1.0)) > 110
    half = w + 0.5 * (by_hand(kind, tensors, w.double()) - w)
    assert sqnr(half, ours.patched(w, 0.5)) > 110


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr low"])
def test_low_rank_form_is_exact(kind, sqnr):
    ours, _ = weights(kind)
    down, up = ours.scaled(0.7)
    assert down.shape == (K, ours.rank) and up.shape == (N, ours.rank)
    assert sqnr(0.7 * ours.delta(), up @ down.t()) > 110


def test_rank_of_products():
    """LoHa's rank is the square; LoKr's is the product of its two matrices' ranks."""
    assert weights("lora")[0].rank == 4 and weights("loha")[0].rank == 16
    assert weights("lokr low")[0].rank == 8 * 4 and weights("lokr")[0].rank == 8 * 8
    assert weights("diff")[0].rank is None and weights("dora")[0].rank is None


def test_low_rank_only_where_it_is_smaller():
    big = LohaWeights(*(torch.zeros(s) for s in ((640, 16), (16, 640), (640, 16), (16, 640))), 16.0)
    assert big.rank == 256 and not stays_low_rank(big)  # 256 (640 + 640) > 0.735 * 640^2
    assert stays_low_rank(LohaWeights(*(torch.zeros(s) for s in ((640, 8), (8, 640)) * 2), 8.0))
    assert not stays_low_rank(LokrWeights((torch.zeros(8, 8),), (torch.zeros(80, 80),), 1.0))
    assert stays_low_rank(LoraWeights(torch.zeros(600, 640), torch.zeros(640, 600), 1.0))  # a plain LoRA always


def test_convolutions(sqnr):
    """LoCon: the down half carries the kernel; with a core (Tucker) the kernel sits between."""
    up, down, core = torch.randn(8, 2, 1, 1), torch.randn(2, 4, 3, 3), torch.randn(2, 2, 3, 3)
    plain = LoraWeights(down, up, 2.0)
    assert plain.shape == (8, 36)
    assert sqnr(torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down).flatten(1), plain.delta()) > 110
    tucker = LoraWeights(torch.randn(2, 4, 1, 1), up, 2.0, core)
    expected = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], core, tucker.down[:, :, 0, 0])
    assert tucker.shape == (8, 36) and sqnr(expected.flatten(1), tucker.delta()) > 110


def layer(unsigned: bool = False, scheme: str = "svdquant_w4a4"):
    net = torch.nn.Module()
    net.layer = torch.nn.Linear(K, N)
    done = quantize_weight(
        net.layer.weight.detach(), net.layer.bias.detach(), LayerPlan(scheme, "", 8, unsigned), torch.float32
    )
    install(net.layer, done.weight, done.bias, torch.float32)
    return net, svdquant.dense_bias(done.weight, done.bias) if scheme == "svdquant_w4a4" else done.bias


@pytest.mark.parametrize("scheme", ["svdquant_w4a4", "awq_w4a16"])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "dora", "diff"])
def test_on_a_4bit_layer(kind, scheme, sqnr):
    """Low-rank kinds share the codes; the others leave a dense layer with exactly the patched weight."""
    net, _ = layer(scheme=scheme)
    ours, _ = weights(kind)
    before = net.layer.weight
    report = apply(net, read({f"layer{e}": t for e, t in lora_files.kind(kind, N, K).items()}), 1.0)
    assert report.applied == ("layer",)
    after = net.layer.weight
    assert kernels.is_ours(after) == stays_low_rank(ours)
    if kernels.is_ours(after):
        assert torch.equal(before._qdata, after._qdata)

    def dense(w):
        return torch.nn.functional.linear(torch.eye(K), w).t() if not kernels.is_ours(w) else w.dequantize()

    assert sqnr(ours.patched(dense(before), 1.0), dense(after)) > 90


def test_an_unsigned_layer_gets_its_shift_back_when_it_turns_dense(sqnr):
    """The stored bias of a layer that reads a GELU is off by the shift; a dense weight must not inherit that."""
    net, bias = layer(unsigned=True)
    ours, _ = weights("dora")
    dense = net.layer.weight.dequantize()
    apply(net, read({f"layer{e}": t for e, t in lora_files.kind("dora", N, K).items()}), 1.0)
    x = torch.randn(9, K)
    expected = torch.nn.functional.linear(x, ours.patched(dense, 1.0), bias)
    assert sqnr(expected, net.layer(x)) > 90


def test_rows_of_fused_and_split_layers():
    from comfyui_nibble.lora.apply import placed

    rows = torch.arange(6.0).reshape(6, 1)
    assert placed(rows, Slot("a", into=(2, 6)), 9).flatten().tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 0]
    assert placed(rows, Slot("a", source=(2, 2)), 2).flatten().tolist() == [2, 3]
    assert placed(rows, Slot("a", swap=True), 6).flatten().tolist() == [3, 4, 5, 0, 1, 2]
