"""LoRA factors beside linears of every kind: nothing changes at the start, gradients are those of the dense product,
and nothing stays behind.
"""

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfyui_nibble.quant import kernels
from comfyui_nibble.quant.modules import install, quantize_weight
from comfyui_nibble.quant.nvfp4_lowrank import NVFP4LowRankWeight
from comfyui_nibble.quant.policy import LayerPlan
from comfyui_nibble.training import adapters
from comfyui_nibble.training.adapters import Adapters, Product, dense
from comfyui_nibble.training.loop import Plan, train
from torch import nn

N, K = 128, 256
CORE = ["TensorCoreFP8Layout", "TensorCoreNVFP4Layout", "TensorWiseINT8Layout", "TensorCoreConvRotW4A4Layout",
        "TensorCoreMXFP8Layout"]  # fmt: skip


def layer(kind: str, weight) -> nn.Linear:
    out = nn.Linear(K, N)
    w, bias = weight(N, K), torch.randn(N)
    if kind == "dense":
        out.weight, out.bias = nn.Parameter(w, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    elif kind in ("svdquant_w4a4", "awq_w4a16", "unsigned"):
        scheme = "svdquant_w4a4" if kind == "unsigned" else kind
        done = quantize_weight(w, bias, LayerPlan(scheme, 16, act_unsigned=kind == "unsigned"), torch.float32)
        install(out, done.weight, done.bias, torch.float32)
    else:
        wrapped = QuantizedTensor.from_float(w, kind)
        out.weight, out.bias = nn.Parameter(wrapped, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return out


class Net(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("kind", ["dense", "svdquant_w4a4", "unsigned", "awq_w4a16", *CORE])
def test_gradients_are_those_of_the_dense_product(kind, weight):
    net = Net(layer(kind, weight))
    adapters = Adapters(net, ["inner"], rank=4, alpha=2.0)
    adapters.put({"inner": (torch.randn(4, K), torch.randn(N, 4))})
    x, grad = torch.randn(6, K, requires_grad=True), torch.randn(6, N)
    with torch.no_grad():
        plain = net(x)
    codes = (
        {n: t.clone() for n, t in kernels.tensors(net.inner.weight).items()}
        if kernels.is_ours(net.inner.weight)
        else {}
    )
    with adapters.attached():
        y = net(x)
        y.backward(grad)
    factors = adapters.factors["inner"]
    low = x.detach() @ factors.down.T
    torch.testing.assert_close(y.detach() - plain, (low @ factors.up.T * 0.5).detach(), atol=1e-4, rtol=1e-4)
    effective = dense(net.inner, torch.float32, "cpu") + 0.5 * (factors.up @ factors.down).detach()
    torch.testing.assert_close(x.grad, grad @ effective, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(factors.up.grad, 0.5 * grad.T @ low.detach(), atol=1e-3, rtol=1e-4)
    for name, tensor in codes.items():
        assert torch.equal(kernels.tensors(net.inner.weight)[name], tensor)


def test_training_sees_the_rounding_of_activations(weight, sqnr):
    """The forward pass is the real kernel, not the product with the dequantized weight."""
    net = Net(layer("svdquant_w4a4", weight))
    x = torch.randn(64, K)
    with Adapters(net, ["inner"], 4).attached():
        y = net(x)
    assert torch.equal(y.detach(), net(x).detach())
    exact = x @ dense(net.inner, torch.float32, "cpu").T + net.inner.bias
    assert 10 < sqnr(exact, y.detach()) < 40


def test_no_dense_weight_is_kept_for_the_backward_pass(weight):
    net, kept = Net(layer("svdquant_w4a4", weight)), []
    adapters = Adapters(net, ["inner"], 4)
    pack = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t)
    with adapters.attached(), pack:
        net(torch.randn(6, K, requires_grad=True)).sum()
    assert kept and (N, K) not in kept and (K, N) not in kept


class Stopped(BaseException):
    pass


def test_nothing_stays_behind(weight):
    net = Net(layer("svdquant_w4a4", weight))
    adapters, x = Adapters(net, ["inner"], 4), torch.randn(3, K)
    adapters.put({"inner": (torch.randn(4, K), torch.randn(N, 4))})
    before, state = net(x), list(net.state_dict())

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped), adapters.attached(check=stop):
        net(x)
    assert "forward" not in net.inner.__dict__ and torch.equal(net(x), before)
    with adapters.attached():
        changed = net(x)
        with adapters.off():
            assert torch.equal(net(x), before)
            assert list(net.state_dict()) == state  # the factors are no part of the module
        assert torch.equal(net(x), changed) and not torch.equal(changed, before)
    assert torch.equal(net(x), before)


def test_a_forward_of_another_pack_stays(weight):
    """An instance's own forward (a bypass LoRA of ComfyUI's) is part of what is frozen, and comes back."""
    net = Net(layer("dense", weight))
    original = net.inner.forward
    net.inner.forward = lambda x: original(x) + 1
    x = torch.randn(3, K)
    before = net(x)
    with Adapters(net, ["inner"], 4).attached():
        assert torch.equal(net(x).detach(), before.detach())
    assert torch.equal(net(x), before)


def test_external_peft_parity_one_step(weight):
    """peft's own LoRA on the same dense layer: same start, same output, same gradients."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    net = Net(layer("dense", weight))
    theirs = get_peft_model(Net(layer("dense", weight)), LoraConfig(r=4, lora_alpha=8, target_modules=["inner"]))
    inner = theirs.base_model.model.inner
    ours = Adapters(net, ["inner"], 4, alpha=8.0)
    bound = K**-0.5
    down = ours.factors["inner"].down
    assert down.abs().max() <= bound and inner.lora_A.default.weight.abs().max() <= bound
    assert down.std().item() == pytest.approx(bound / 3**0.5, rel=0.1) and not ours.factors["inner"].up.any()
    up = torch.randn(N, 4) * 0.1
    ours.put({"inner": (inner.lora_A.default.weight, up)})
    with torch.no_grad():
        inner.lora_B.default.weight.copy_(up)
        inner.base_layer.weight.copy_(net.inner.weight)
        inner.base_layer.bias.copy_(net.inner.bias)
    x = torch.randn(5, K)
    with ours.attached():
        net(x).square().mean().backward()
    theirs(x).square().mean().backward()
    torch.testing.assert_close(ours.factors["inner"].down.grad, inner.lora_A.default.weight.grad)
    torch.testing.assert_close(ours.factors["inner"].up.grad, inner.lora_B.default.weight.grad)


@pytest.mark.parametrize("kind", ["dense", "svdquant_w4a4"])
def test_whole_matrices_with_galore(kind, weight):
    """Rank 0: the update is learned whole, beside codes that stay, and is what the file holds."""
    pytest.importorskip("pytorch_optimizer")
    net, target = Net(layer(kind, weight)), torch.randn(N, K) / K**0.5
    adapters = Adapters(net, ["inner"], rank=0)
    x = torch.randn(32, K)
    with torch.no_grad():
        wanted = net(x) + x @ target.T
    plan = Plan("whole", 30, 32, 0.02, warmup=0, ema=0.0, weight_decay=0.0, optimizer="galore")
    with adapters.attached():
        losses = train(plan, adapters.parameters(), lambda _s, _g: (net(x) - wanted).square().mean()).losses
    assert losses[-1] < 0.5 * losses[0]
    state = adapters.state_dict()
    assert list(state) == ["diffusion_model.inner.diff"] and state["diffusion_model.inner.diff"].shape == (N, K)


def test_names_of_the_file(weight):
    adapters = Adapters(Net(layer("dense", weight)), ["inner"], 4, alpha=2.0)
    state = adapters.state_dict(rename=lambda n: f"blocks.0.{n}")
    assert {n: tuple(t.shape) for n, t in state.items()} == {
        "diffusion_model.blocks.0.inner.lora_down.weight": (4, K),
        "diffusion_model.blocks.0.inner.lora_up.weight": (N, 4),
        "diffusion_model.blocks.0.inner.alpha": (),
    }
    with pytest.raises(ValueError, match="no linear layer 'outer'"):
        Adapters(Net(layer("dense", weight)), ["outer"], 4)


def test_a_trained_product_has_its_gradients_and_keeps_no_copy():
    x, w = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 5), (4, 5)))
    assert torch.autograd.gradcheck(Product.apply, (x, w))
    kept = []
    half, w32 = torch.randn(6, 5, dtype=torch.bfloat16), torch.randn(4, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = Product.apply(half, w32)
    assert y.dtype == torch.bfloat16 and {t.data_ptr() for t in kept} == {half.data_ptr(), w32.data_ptr()}
    y.float().sum().backward()
    torch.testing.assert_close(w32.grad, torch.ones(4, 6) @ half.float(), atol=0.05, rtol=0.02)


def test_a_trained_product_in_a_lower_precision_than_its_input():
    """As under autocast: the gradient comes in another dtype than the input."""
    x, w = torch.randn(5, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Product.apply(x, w).float().sum().backward()
    torch.testing.assert_close(x.grad, w.detach().sum(0).expand(5, 6), atol=0.05, rtol=0.02)
    torch.testing.assert_close(w.grad, x.detach().sum(0).expand(4, 6), atol=0.05, rtol=0.02)


def fp4(n: int, k: int) -> nn.Linear:
    """A linear of random nvfp4 codes with a branch."""
    out = nn.Linear(k, n).requires_grad_(False)
    weight = NVFP4LowRankWeight(
        torch.randint(256, (n, k // 2), dtype=torch.uint8), torch.rand(n, k // 16).to(torch.float8_e4m3fn),
        torch.rand(n), torch.rand(k) + 0.5, torch.randn(k, 4), torch.randn(n, 4),
    )  # fmt: skip
    out.weight = nn.Parameter(kernels.wrap(weight, torch.float32), requires_grad=False)
    return out


@pytest.mark.parametrize("kind", ["svdquant_w4a4", "awq_w4a16", "nvfp4"])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_large_4_bit_weight_is_dense_in_parts(monkeypatch, weight, kind, dtype):
    one = fp4(N, K) if kind == "nvfp4" else layer(kind, weight)
    whole = dense(one, dtype, "cpu")
    monkeypatch.setattr(adapters, "ELEMENTS", K * 50)
    parts = list(adapters.blocks(one, dtype, "cpu"))
    assert [len(p) for p in parts] == [48, 48, 32] and torch.equal(torch.cat(parts), whole)
    x, v = torch.randn(3, K, dtype=dtype, requires_grad=True), torch.randn(3, N, dtype=dtype)
    y = adapters.Frozen.apply(x, lambda x: (x @ whole.T).detach(), lambda *at: adapters.blocks(one, *at))
    expected, (got,) = v.float() @ whole.float(), torch.autograd.grad(y, x, v)
    assert float((got.float() - expected).norm() / expected.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)
