"""Every layout on a GPU that is not there (tests/pretended_gpu.py): no product mixes devices or waits for a number, and
what comes out is what the CPU gives.
"""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfyui_nibble.checkpoints.formats.core_quant import StoredCore
from comfyui_nibble.quant import kernels, machine
from comfyui_nibble.quant.modules import quantize_weight
from comfyui_nibble.quant.policy import LayerPlan

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "comfy")]
import layout_files as files  # noqa: E402
import pretended_gpu  # noqa: E402

N, K = 128, 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((6, K), (2, 3, K), (2, 1, 3, K), (1, 2, 1, 3, K))


def _svdquant(w, unsigned=False, tiled=False):
    return kernels.wrap(
        quantize_weight(w, None, LayerPlan("svdquant_w4a4", "", 8, unsigned), w.dtype).weight, tiled=tiled
    )


def _core(name):
    def make(w):
        layer = dict(files.CORE[name](w.to(torch.bfloat16)))
        config = json.loads(bytes(layer.pop("comfy_quant").tolist()))
        return kernels.wrap(StoredCore(config, layer).build((N, K), w.dtype))

    return make


LAYOUTS = {
    "svdquant": _svdquant,
    "svdquant unsigned": lambda w: _svdquant(w, unsigned=True),
    "svdquant tiled": lambda w: _svdquant(w, tiled=True),
    "awq": lambda w: kernels.wrap(quantize_weight(w, None, LayerPlan("awq_w4a16", ""), w.dtype).weight),
    "nvfp4 branch": lambda w: kernels.wrap(files.nvfp4_branch(w.float()).to(w.dtype)),
    "nf4": lambda w: kernels.wrap(files.nf4(w), w.dtype),
    "q8_0": lambda w: kernels.wrap(files.q8_0(w), w.dtype),
    "two parts": lambda w: kernels.wrap(_halves(w)),
    **{name: _core(name) for name in files.CORE if not name.startswith("fp8")},
}


def _halves(w):
    plan = LayerPlan("svdquant_w4a4", "", 8)
    parts = [quantize_weight(p.contiguous(), None, plan, w.dtype).weight for p in w.chunk(2, 1)]
    return files.Parts(tuple(parts), files.COLUMNS)


@pytest.fixture(scope="module")
def weights():
    """A layout's weight on the CPU, made once for each dtype."""
    g, made = torch.Generator().manual_seed(0), {}
    w = torch.randn(N, K, generator=g) / 16

    def get(layout, dtype):
        if (layout, dtype) not in made:
            made[layout, dtype] = LAYOUTS[layout](w.to(dtype))
        return made[layout, dtype]

    return get


def on_gpu(weight: QuantizedTensor) -> QuantizedTensor:
    return weight.to("cuda")


def linear(x, weight, bias=None):
    return torch.nn.functional.linear(x, weight, bias)


def test_the_test_itself_hears_devices_mix_and_numbers_read(weights):
    weight, x = weights("svdquant", torch.bfloat16), torch.randn(3, K, dtype=torch.bfloat16)
    with pretended_gpu.on() as log:
        with pytest.raises(pretended_gpu.DevicesMix):
            linear(x, on_gpu(weight))
        with pytest.raises(pretended_gpu.DevicesMix):
            linear(x.to("cuda"), weight)
        before = log.syncs
        assert len(log.mixes) == 2
        assert x.to("cuda").sum().item() == x.sum().item() and log.syncs == before + 2


@pytest.mark.parametrize(("layout", "dtype"), list(itertools.product(LAYOUTS, DTYPES)), ids=str)
def test_a_forward_stays_on_the_gpu(layout, dtype, weights):
    """Without and with a LoRA in the branch, with and without a bias, 2 to 5 dimensions."""
    weight, down, up, bias = weights(layout, dtype), torch.randn(K, 4), torch.randn(N, 4), torch.randn(N, dtype=dtype)
    branches = {"none": weight, "lora": kernels.extend(weight, down, up)}
    x = torch.randn(6, K, dtype=dtype)
    expected = {(name, b is None): linear(x, w, b) for name, w in branches.items() for b in (None, bias)}
    with pretended_gpu.on() as log:
        plain = on_gpu(weight)
        branches = {"none": plain, "lora": kernels.extend(plain, down, up)}  # a LoRA's file is read on the CPU
        x, bias = x.to("cuda"), bias.to("cuda")
        for (name, w), shape, b in itertools.product(branches.items(), SHAPES, (None, bias)):
            linear(x, w)  # kitchen makes its rotations on first use
            before = log.syncs
            y = linear(x.reshape(*shape), w, b)
            assert log.syncs == before and log.mixes == []
            assert (y.device.type, y.dtype, y.shape) == ("cuda", dtype, (*shape[:-1], N))
            assert torch.equal(y.cpu().reshape(6, N), expected[name, b is None])
        for made in (kernels.dense(w), w.dequantize(), kernels.shift(w)):
            assert made is None or made.device.type == "cuda"


class TestWhoMultiplies:
    """Kitchen's svdquant kernels are called where they are: never below sm 80, where they return zeros."""

    @pytest.mark.parametrize(
        ("sm", "kernel"),
        [(60, False), (70, False), (75, False), (80, True), (86, True), (89, True), (90, True), (120, True)],
    )
    @pytest.mark.parametrize("n", [128, 124])
    def test_by_capability_and_aligned_rows(self, sm, kernel, n, monkeypatch, weights):
        called = self.watched(monkeypatch, sm)
        weight = _svdquant(torch.randn(n, K).to(torch.bfloat16))
        with pretended_gpu.on():
            linear(torch.zeros(3, K, dtype=torch.bfloat16, device="cuda"), on_gpu(weight))
        assert called == (["quantize", "multiply"] if kernel and n % 8 == 0 else [])

    def test_never_in_32_bits(self, monkeypatch, weights):
        called = self.watched(monkeypatch, 89)
        with pretended_gpu.on():
            linear(torch.zeros(3, K, device="cuda"), on_gpu(weights("svdquant", torch.float32)))
        assert called == []

    def test_each_gpu_is_asked_for_itself(self, monkeypatch):
        """Kitchen's registry asks the first GPU, and takes its answer for all."""
        sm = {0: (8, 9), 1: (7, 5)}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: sm[d.index])
        machine.capability.cache_clear()
        found = [machine.int4_kernels(torch.device("cuda", i)) is not None for i in sm]
        machine.capability.cache_clear()
        assert found == [True, False]

    def test_on_amd_kitchens_registry_decides(self, monkeypatch, weights):
        called = self.watched(monkeypatch, None)
        monkeypatch.setattr(machine, "is_amd", lambda: True)
        with pretended_gpu.on():
            x = torch.zeros(3, K, dtype=torch.bfloat16, device="cuda")
            linear(x, on_gpu(weights("svdquant", torch.bfloat16)))
        assert called == []

    def watched(self, monkeypatch, sm):
        """A list of kitchen's CUDA functions that are called on a GPU of capability ``sm``."""
        from comfy_kitchen.backends import cuda, eager

        called = []

        def watch(name, what):
            def run(*args, **kwargs):
                called.append(what)
                return getattr(eager, name)(*args, **kwargs)

            monkeypatch.setattr(cuda, name, run)

        watch("quantize_svdquant_w4a4", "quantize")
        watch("scaled_mm_svdquant_w4a4", "multiply")
        monkeypatch.setattr(cuda, "_EXT_AVAILABLE", True)
        monkeypatch.setattr(machine, "capability", lambda device: sm)
        return called


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_transposed_weight_is_the_weight_transposed(layout, weights):
    """Torch multiplies a slice of one row by W^T made dense; a second transposition there is silent where N = K."""
    weight = weights(layout, torch.float32)
    dense, x = kernels.dense(weight), torch.randn(1, 3, K)
    assert torch.equal(weight.t().dequantize(), dense.t())
    assert torch.allclose(torch.matmul(x, weight.t()), linear(x, weight), atol=1e-4)
