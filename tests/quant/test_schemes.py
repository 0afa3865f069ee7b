"""Every row of the scheme table keeps its promises: bytes, accuracy, eager reference against kitchen."""

import pytest
import torch
from comfyui_nibble.quant import awq, kernels, scales, schemes, svdquant
from comfyui_nibble.quant.modules import quantize_weight
from comfyui_nibble.quant.policy import LayerPlan

# scheme -> least SQNR in dB of a forward on outlier-heavy weights, rank 16
FLOOR = {"svdquant_w4a4": 16.0, "awq_w4a16": 17.0}


@pytest.mark.parametrize("row", schemes.SCHEMES.values(), ids=lambda r: r.id)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (192, 128), (830, 576)])
class TestEveryScheme:
    def quantized(self, row, weight, dtype=torch.float32):
        return quantize_weight(weight, None, LayerPlan(row.id, "", 16), dtype).weight

    def test_stored_bytes_are_what_the_table_says(self, row, n, k, weight):
        q = self.quantized(row, weight(n, k), torch.bfloat16)
        rank = getattr(q, "rank", 0)
        assert kernels.nbytes(kernels.wrap(q)) == row.bytes(n, k, rank)

    def test_accuracy(self, row, n, k, weight, sqnr):
        w, x = weight(n, k), torch.randn(64, k)
        linear = svdquant.linear if row.id == "svdquant_w4a4" else awq.linear
        got = sqnr(x @ w.t(), linear(x, self.quantized(row, w)))
        assert got > FLOOR[row.id]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_kitchen_matches_the_reference(self, row, n, k, dtype, weight, sqnr):
        """The reference is the specification; 16-bit kernels flip codes that lie on a rounding tie."""
        w, x, bias = weight(n, k), torch.randn(3, 20, k), torch.randn(n)
        q = self.quantized(row, w, dtype)
        linear = svdquant.linear if row.id == "svdquant_w4a4" else awq.linear
        expected = linear(x.to(dtype), q, bias.to(dtype))
        got = torch.nn.functional.linear(x.to(dtype), kernels.wrap(q), bias.to(dtype))
        assert got.dtype == dtype and got.shape == (3, 20, n)
        assert sqnr(expected, got) > (100 if dtype == torch.float32 else 26)

    def test_dequantize_matches_kitchen(self, row, n, k, weight, sqnr):
        q = self.quantized(row, weight(n, k))
        dense = (svdquant if row.id == "svdquant_w4a4" else awq).dequantize(q)
        assert sqnr(dense, kernels.wrap(q).dequantize()) > 100

    def test_wrap_and_unwrap_lose_nothing(self, row, n, k, weight):
        q = self.quantized(row, weight(n, k))
        again = kernels.unwrap(kernels.wrap(q))
        for name in ("qweight", "wscales"):
            assert torch.equal(getattr(q, name), getattr(again, name))


def test_unknown_scheme_lists_what_there_is():
    with pytest.raises(ValueError, match=r"unknown scheme 'w3a3'.*svdquant_w4a4, awq_w4a16"):
        schemes.scheme("w3a3")


def test_tile_packed_runs_bit_for_bit_like_natural(weight):
    q = quantize_weight(weight(256, 128), None, LayerPlan("svdquant_w4a4", "", 16), torch.float32).weight
    x = torch.randn(7, 128)
    natural, tiled = kernels.wrap(q), kernels.wrap(q, tiled=True)
    assert kernels.is_tiled(tiled) and not kernels.is_tiled(natural)
    assert torch.equal(torch.nn.functional.linear(x, natural), torch.nn.functional.linear(x, tiled))
    assert torch.equal(kernels.unwrap(tiled).qweight, q.qweight)


class TestUnsigned:
    """Layers after a GELU: shift, unsigned grid, and a bias that takes the shift back."""

    def layer(self, weight):
        w, bias = weight(128, 256), torch.randn(128)
        x = torch.nn.functional.gelu(torch.randn(200, 256))
        return w, bias, x, torch.nn.functional.linear(x, w, bias)

    def test_closer_than_signed(self, weight, sqnr):
        w, bias, x, y = self.layer(weight)
        signed = quantize_weight(w, bias, LayerPlan("svdquant_w4a4", "", 32), torch.float32)
        unsigned = quantize_weight(w, bias, LayerPlan("svdquant_w4a4", "", 32, True), torch.float32)
        gain = sqnr(y, svdquant.linear(x, unsigned.weight, unsigned.bias)) - sqnr(
            y, svdquant.linear(x, signed.weight, bias)
        )
        assert gain > 2

    def test_kitchen_agrees(self, weight, sqnr):
        w, bias, x, _ = self.layer(weight)
        q = quantize_weight(w, bias, LayerPlan("svdquant_w4a4", "", 32, True), torch.float32)
        got = torch.nn.functional.linear(x, kernels.wrap(q.weight), q.bias)
        assert sqnr(svdquant.linear(x, q.weight, q.bias), got) > 100

    def test_dense_path_corrects_the_bias(self, weight, sqnr):
        """Without the correction a dense fall-back is off by the shift, without any error message."""
        w, bias, x, y = self.layer(weight)
        q = quantize_weight(w, bias, LayerPlan("svdquant_w4a4", "", 32, True), torch.float32)
        dense = svdquant.dequantize(q.weight)
        right = torch.nn.functional.linear(x, dense, svdquant.dense_bias(q.weight, q.bias))
        wrong = torch.nn.functional.linear(x, dense, q.bias)
        assert sqnr(y, right) > sqnr(y, wrong) + 3
        assert torch.allclose(svdquant.dense_bias(q.weight, q.bias), bias, atol=1e-5)

    def test_a_layer_without_bias_gets_one(self, weight):
        q = quantize_weight(weight(128, 256), None, LayerPlan("svdquant_w4a4", "", 16, True), torch.float32)
        assert q.bias.shape == (128,)


class TestScales:
    def test_never_worse_than_nearest(self, weight):
        w = weight(64, 256)
        error = {}
        for name, candidates in (("search", scales.CANDIDATES), ("nearest", scales.NEAREST)):
            codes, s = scales.search(w, dtype=torch.float32, candidates=candidates)
            dense = (codes.float().reshape(64, 4, 64) * s.t().unsqueeze(-1)).reshape(64, 256)
            error[name] = (dense - w).square().sum()
        assert error["search"] < 0.9 * error["nearest"]

    def test_uses_all_sixteen_codes_and_negative_scales(self, weight):
        codes, s = scales.search(weight(128, 256))
        assert codes.min() == -8 and codes.max() == 7
        assert 0.2 < (s < 0).float().mean() < 0.8

    def test_importance_moves_the_error(self, weight):
        w = weight(64, 64)
        h = torch.ones(64)
        h[:8] = 1000
        errors = []
        for importance in (None, h):
            codes, s = scales.search(w, importance, torch.float32)
            errors.append((codes.float() * s.t() - w)[:, :8].square().sum())
        assert errors[1] < errors[0]

    def test_a_row_of_zeros_stays_zero(self):
        codes, s = scales.search(torch.zeros(2, 64))
        assert not codes.any() and torch.isfinite(s).all()

    def test_chunks_do_not_change_the_result(self, weight, monkeypatch):
        w = weight(100, 128)
        whole = scales.search(w)
        monkeypatch.setattr(scales, "CHUNK", 128 * 7)
        assert all(torch.equal(a, b) for a, b in zip(whole, scales.search(w), strict=True))

    def test_k_must_be_grouped(self):
        with pytest.raises(ValueError, match="K=100 is not a multiple of 64"):
            scales.search(torch.zeros(4, 100))


class TestDataFree:
    def test_rank_buys_accuracy(self, weight, sqnr):
        w = weight(256, 256)
        dense = [
            sqnr(
                w,
                svdquant.dequantize(quantize_weight(w, None, LayerPlan("svdquant_w4a4", "", r), torch.float32).weight),
            )
            for r in (0, 8, 32)
        ]
        assert dense[0] + 1 < dense[1] and dense[1] + 1 < dense[2]

    def test_same_seed_same_bytes(self, weight):
        w, p = weight(128, 128), LayerPlan("svdquant_w4a4", "", 16)
        a, b, c = (quantize_weight(w, None, p, torch.bfloat16, seed).weight for seed in (1, 1, 2))
        assert torch.equal(a.qweight, b.qweight) and torch.equal(a.proj_up, b.proj_up)
        assert not torch.equal(a.proj_up, c.proj_up)

    def test_leaves_the_global_generator_alone(self, weight):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        quantize_weight(weight(64, 64), None, LayerPlan("svdquant_w4a4", "", 16), torch.bfloat16)
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_broken_weights_are_refused(self, bad, weight):
        w = weight(64, 64)
        w[3, 3] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize_weight(w, None, LayerPlan("svdquant_w4a4", "", 16), torch.bfloat16)


class TestExtend:
    """A LoRA grows the low-rank branch; the codes are the same memory."""

    @pytest.mark.parametrize("scheme", ["svdquant_w4a4", "awq_w4a16"])
    @pytest.mark.parametrize("tiled", [False, True])
    def test_adds_exactly_the_update(self, scheme, tiled, weight, sqnr):
        q = quantize_weight(weight(256, 128), None, LayerPlan(scheme, "", 16), torch.float32).weight
        base = kernels.wrap(q, tiled=tiled and scheme == "svdquant_w4a4")
        down, up, x = torch.randn(128, 4), torch.randn(256, 4), torch.randn(9, 128)
        grown = kernels.extend(kernels.extend(base, down[:, :1], up[:, :1]), down[:, 1:], up[:, 1:])
        assert grown._qdata.data_ptr() == base._qdata.data_ptr()
        difference = torch.nn.functional.linear(x, grown) - torch.nn.functional.linear(x, base)
        assert sqnr(x @ down @ up.t(), difference) > 90

    def test_order_of_two_does_not_matter(self, weight, sqnr):
        base = kernels.wrap(
            quantize_weight(weight(128, 128), None, LayerPlan("awq_w4a16", "", 0), torch.float32).weight
        )
        a, b = [(torch.randn(128, 3), torch.randn(128, 3)) for _ in range(2)]
        x = torch.randn(5, 128)
        one = torch.nn.functional.linear(x, kernels.extend(kernels.extend(base, *a), *b))
        two = torch.nn.functional.linear(x, kernels.extend(kernels.extend(base, *b), *a))
        assert sqnr(one, two) > 100

    def test_awq_branch_survives_transposes_and_dequantizing(self, weight, sqnr):
        base = kernels.wrap(quantize_weight(weight(128, 64), None, LayerPlan("awq_w4a16", "", 0), torch.float32).weight)
        grown = kernels.extend(base, torch.randn(64, 2), torch.randn(128, 2))
        x, bias = torch.randn(5, 64), torch.randn(128)
        expected = torch.nn.functional.linear(x, grown, bias)
        assert sqnr(expected, torch.addmm(bias, x, grown.t())) > 100
        assert sqnr(expected - bias, torch.mm(x, grown.t())) > 100
        assert sqnr(expected, torch.nn.functional.linear(x, grown.dequantize(), bias)) > 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_cast_gives_one_dtype(dtype, weight):
    q = quantize_weight(weight(64, 64), None, LayerPlan("svdquant_w4a4", "", 8), torch.bfloat16).weight
    cast = kernels.cast(kernels.wrap(q), dtype)
    assert cast.dtype == dtype and {getattr(cast._params, n).dtype for n in cast._params._tensor_fields()} == {dtype}


def test_unwrap_names_a_foreign_layout():
    with pytest.raises(TypeError, match="Tensor is not a 4-bit layout of this pack"):
        kernels.unwrap(torch.zeros(2, 2))


@pytest.mark.parametrize("scheme", ["svdquant_w4a4", "awq_w4a16"])
def test_wrong_shapes_are_named(scheme, weight):
    from dataclasses import replace

    q = quantize_weight(weight(128, 64), None, LayerPlan(scheme, "", 8), torch.float32).weight
    with pytest.raises(ValueError, match=rf"{scheme}: wscales has shape \(2, 128\), expected \(1, 128\)"):
        replace(q, wscales=torch.zeros(2, 128))
