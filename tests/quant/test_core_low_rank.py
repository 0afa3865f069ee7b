"""A branch beside ComfyUI's own formats: the layer is what it was plus exactly the branch, nothing is rounded again."""

import dataclasses

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfyui_nibble.quant import core_formats, core_low_rank, kernels
from comfyui_nibble.quant.core_low_rank import CoreLowRankWeight

N, K, R = 64, 256, 3
EMULATED = {"nvfp4"}  # no CPU kernel: ComfyUI dequantizes it there


@pytest.fixture(params=core_formats.FORMATS)
def base(request, weight):
    return core_formats.quantize(weight(N, K), request.param, torch.float32)


def weight_beside(base, **more) -> CoreLowRankWeight:
    g = torch.Generator().manual_seed(1)
    down, up = torch.randn(K, R, generator=g) / 16, torch.randn(N, R, generator=g)
    emulate = core_formats.FORMATS["nvfp4"].layout == base._layout_cls
    return CoreLowRankWeight(base, down, up, **{"emulate": emulate, **more})


def linear(x, weight, bias=None):
    return torch.nn.functional.linear(x, weight, bias)


class TestTheProduct:
    def test_is_the_base_plus_the_branch(self, base):
        w, x, bias = weight_beside(base), torch.randn(2, 5, K), torch.randn(N)
        plain = kernels.wrap(core_low_rank.beside(base, emulate=w.emulate))
        got = linear(x, kernels.wrap(w), bias) - linear(x, plain, bias)
        expected = x.double() @ w.proj_down.double() @ w.proj_up.double().t()
        assert (got.double() - expected).norm() / expected.norm() < 1e-5

    def test_of_rank_0_is_the_base(self, base):
        if base._layout_cls == core_formats.FORMATS["nvfp4"].layout:
            pytest.skip("no kernel on this machine")
        x = torch.randn(4, K)
        assert torch.equal(linear(x, kernels.wrap(core_low_rank.beside(base))), linear(x, base))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_16_bits(self, base, dtype, sqnr):
        w, x = weight_beside(base), torch.randn(6, K)
        got = linear(x.to(dtype), kernels.wrap(w.to(dtype)))
        assert got.dtype == dtype
        assert sqnr(linear(x, kernels.wrap(w)), got) > 30

    def test_smoothing_scales_the_input_of_the_codes_alone(self, base):
        scale, x = 0.5 + torch.rand(K), torch.randn(6, K)
        w = weight_beside(base, pre_quant_scale=scale, emulate=True)
        expected = x @ (base.dequantize() * scale + w.proj_up @ w.proj_down.t()).t()
        assert torch.allclose(linear(x, kernels.wrap(w)), expected, atol=1e-4)
        assert torch.allclose(kernels.dense(kernels.wrap(w)), base.dequantize() * scale + w.proj_up @ w.proj_down.t())

    def test_a_file_can_ask_for_full_precision(self, base):
        w, x = weight_beside(base, full_precision=True), torch.randn(6, K)
        assert torch.allclose(linear(x, kernels.wrap(w)), x @ kernels.dense(kernels.wrap(w)).t(), atol=1e-4)


class TestTheValue:
    def test_shares_the_codes(self, base):
        wrapped = kernels.wrap(weight_beside(base))
        assert wrapped._qdata.data_ptr() == base._qdata.data_ptr()
        assert kernels.unwrap(wrapped).base._qdata.data_ptr() == base._qdata.data_ptr()
        grown = kernels.extend(wrapped, torch.ones(K, 2), torch.ones(N, 2))
        assert grown._qdata.data_ptr() == base._qdata.data_ptr() and kernels.unwrap(grown).rank == R + 2
        assert kernels.cast(grown, torch.bfloat16)._qdata.data_ptr() == base._qdata.data_ptr()

    def test_a_plain_weight_takes_a_branch(self, base):
        down, up = torch.randn(K, 2), torch.randn(N, 2)
        grown = kernels.extend(base, down, up)
        assert kernels.is_ours(grown) and kernels.format_of(grown._layout_cls) == "nibble_low_rank"
        assert torch.allclose(kernels.dense(grown) - kernels.dense(base), up @ down.t(), atol=1e-4)

    def test_survives_moving_copying_and_flattening(self, base):
        weight = kernels.wrap(weight_beside(base, pre_quant_scale=torch.rand(K)))
        for other in (weight.detach(), weight.clone(), weight.to(torch.bfloat16).to(torch.float32), weight.t().t()):
            assert torch.equal(kernels.dense(other), kernels.dense(weight))
        names, context = weight.__tensor_flatten__()
        inner = {n: getattr(weight, n) for n in names}
        again = QuantizedTensor.__tensor_unflatten__(inner, context, weight.shape, weight.stride())
        assert torch.equal(kernels.dense(again), kernels.dense(weight))
        assert torch.equal(again.dequantize(), weight.dequantize())

    def test_bytes(self, base):
        branch = 4 * R * (N + K)
        assert kernels.nbytes(kernels.wrap(weight_beside(base))) == kernels.nbytes(base) + branch

    def test_shapes_are_checked(self, base):
        with pytest.raises(ValueError, match=r"proj_up has shape \(64, 2\), expected \(64, 3\)"):
            dataclasses.replace(weight_beside(base), proj_up=torch.zeros(N, 2))


def test_bytes_of_codes_that_kitchen_packed_for_one_gpu(monkeypatch, weight):
    """Its layout raises when it is asked for their names."""
    packed = core_formats.quantize(weight(N, K), "asym_w4a8_int8", torch.bfloat16)
    expected = kernels.nbytes(packed)

    def refuse(cls, qdata, params):
        raise ValueError("GEMV-optimized weights are resident-only")

    monkeypatch.setattr(packed.layout_cls, "state_dict_tensors", classmethod(refuse))
    assert kernels.nbytes(packed) == expected == N * K // 2 + N * K // 16 + 4 * N + 64
