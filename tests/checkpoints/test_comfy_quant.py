"""ComfyUI's per-layer contract: what is written is read back, under every spelling that files have."""

import json

import pytest
import torch
from comfyui_nibble.checkpoints.errors import CheckpointError
from comfyui_nibble.checkpoints.formats import comfy_quant, core_quant
from comfyui_nibble.checkpoints.load import marked_layers, parse
from comfyui_nibble.quant import core_formats, kernels, parts
from comfyui_nibble.quant.awq import AWQWeight
from comfyui_nibble.quant.core_low_rank import CoreLowRankWeight
from comfyui_nibble.quant.modules import quantize_weight
from comfyui_nibble.quant.parts import COLUMNS, Parts
from comfyui_nibble.quant.policy import LayerPlan
from comfyui_nibble.quant.weight_only import WeightOnly

from .fixtures import blocks

N, K, R = 128, 256, 4
BF16 = torch.bfloat16
NAME = "double_blocks.0.img_attn.proj"


def entry(config: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def ours(weight, scheme: str, rank: int = R):
    return quantize_weight(weight(N, K), None, LayerPlan(scheme, "", rank), BF16).weight


def stored_codes():
    return WeightOnly("q8_0", (N, K), torch.from_numpy(blocks("q8_0", N, K).reshape(N, -1)))


def branch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(K, R, generator=g).to(BF16), torch.randn(N, R, generator=g).to(BF16)


def read(tensors: dict, name: str = "a.safetensors"):
    """(the one layer, tensors that are left)"""
    left = dict(tensors)
    found = comfy_quant.read(left, name)
    return found[NAME].weight, left


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def made(kind: str, weight):
    """A plain weight of each kind, with and without a branch of its own."""
    down, up = branch()
    if kind in core_formats.FORMATS:
        return CoreLowRankWeight(core_formats.quantize(weight(N, K), kind, BF16), down, up)
    awq = ours(weight, "awq_w4a16")
    halves = tuple(quantize_weight(w.contiguous(), None, LayerPlan("svdquant_w4a4", "", R), BF16).weight
                   for w in weight(N, K).chunk(2, 1))  # fmt: skip
    return {
        "svdquant": lambda: ours(weight, "svdquant_w4a4"),
        "awq": lambda: awq,
        "awq branch": lambda: AWQWeight(awq.qweight, awq.wscales, awq.wzeros, down, up),
        "codes": stored_codes,
        "codes branch": lambda: Parts((stored_codes(),), "rows", down, up),
        "parts": lambda: Parts(halves, COLUMNS),
        "parts branch": lambda: Parts(halves, COLUMNS, down, up),
    }[kind]()


KINDS = ("svdquant", "awq", "awq branch", "codes", "codes branch", "parts", "parts branch", *core_formats.FORMATS)


class TestEveryKind:
    @pytest.mark.parametrize("kind", KINDS)
    def test_is_read_back_as_it_was(self, kind, weight):
        before = made(kind, weight)
        tensors = comfy_quant.write(NAME, before)
        after, left = read(tensors)
        assert not left
        assert torch.equal(parts.dequantize(after), parts.dequantize(before))
        again = comfy_quant.write(NAME, after)
        assert again.keys() == tensors.keys() and all(same_bytes(again[n], t) for n, t in tensors.items())

    @pytest.mark.parametrize("kind", KINDS)
    def test_answers_for_a_weight(self, kind, weight):
        """ComfyUI knows a layer by this name only; its first dimension is the layer's."""
        tensors = comfy_quant.write(NAME, made(kind, weight))
        assert tensors[f"{NAME}.weight"].shape[0] == N

    @pytest.mark.parametrize("kind", [k for k in KINDS if "branch" in k or k in core_formats.FORMATS])
    def test_a_branch_has_a_format_name_of_its_own(self, kind, weight):
        """ComfyUI knows awq_w4a16 and its own formats, and would drop the branch without a word."""
        config = comfy_quant.decode_config(comfy_quant.write(NAME, made(kind, weight))[f"{NAME}.comfy_quant"], "", "")
        assert config["format"] in ("nibble_low_rank", "nibble_parts")

    def test_full_precision_and_smoothing_are_kept(self, weight):
        w = made("nvfp4", weight)
        w = CoreLowRankWeight(w.base, w.proj_down, w.proj_up, torch.tensor(2.0), torch.rand(K), full_precision=True)
        after, _ = read(comfy_quant.write(NAME, w))
        assert after.full_precision and torch.equal(after.pre_quant_scale, w.pre_quant_scale)
        assert float(after.input_scale) == 2.0

    def test_what_this_machine_emulates_is_no_property_of_the_file(self, weight):
        w = made("nvfp4", weight)
        w = CoreLowRankWeight(w.base, w.proj_down, w.proj_up, emulate=True)
        after, _ = read(comfy_quant.write(NAME, w))
        assert not after.emulate and not after.full_precision


class TestOlderFiles:
    """As this pack's 0.1.0 wrote them."""

    def test_awq_with_a_branch(self, weight):
        w, (down, up) = ours(weight, "awq_w4a16"), branch()
        tensors = comfy_quant.write(NAME, w) | {f"{NAME}.proj_down": down, f"{NAME}.proj_up": up}
        after, left = read(tensors)
        assert not left and torch.equal(after.proj_up, up)

    def test_parts_without_a_weight(self, weight):
        before = made("parts branch", weight)
        tensors = comfy_quant.write(NAME, before)
        del tensors[f"{NAME}.weight"]
        tensors[f"{NAME}.comfy_quant"] = entry({"format": "nibble_parts", "axis": "columns", "parts": 2})
        after, left = read(tensors)
        assert not left and torch.equal(parts.dequantize(after), parts.dequantize(before))


class TestAWQGroups:
    @pytest.mark.parametrize("zeros", ["weight_zero", "weight_zeros"])
    @pytest.mark.parametrize("group", [64, 128, 256])
    def test_scales_of_larger_groups_are_repeated(self, group, zeros):
        g = torch.Generator().manual_seed(0)
        codes = torch.randint(0, 16, (N, K), generator=g, dtype=torch.uint8)
        scale, zero = (torch.rand(K // group, N, generator=g).to(BF16) for _ in range(2))
        packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8)
        config = entry({"format": "awq_w4a16", "group_size": group})
        after, left = read({f"{NAME}.weight": packed, f"{NAME}.weight_scale": scale, f"{NAME}.{zeros}": zero,
                            f"{NAME}.comfy_quant": config})  # fmt: skip
        wide = [t.float().repeat_interleave(group, 0).t() for t in (scale, zero)]
        assert not left and torch.equal(parts.dequantize(after), (codes.float() - 8) * wide[0] + wide[1])


class TestAnotherPacksBranch:
    def tensors(self, weight) -> dict:
        down, up = branch()
        base = core_quant.write(NAME, core_formats.quantize(weight(N, K), "convrot_w4a4", BF16))
        return base | {f"{NAME}.svdq_l1": up, f"{NAME}.svdq_l2": down.t().contiguous()}

    def test_is_read(self, weight):
        """y + (x l2^T) l1^T: l1 is up (N, R), l2 is down (R, K)."""
        tensors, (down, up) = self.tensors(weight), branch()
        after, left = read(tensors)
        base = kernels.dense(core_formats.quantize(weight(N, K), "convrot_w4a4", BF16))
        assert not left
        assert torch.equal(parts.dequantize(after), base + up.float() @ down.float().t())

    def test_in_metadata_too(self, weight):
        tensors = self.tensors(weight)
        config = json.loads(bytes(tensors.pop(f"{NAME}.comfy_quant").tolist()))
        metadata = {"_quantization_metadata": json.dumps({"layers": {NAME: config}})}
        assert NAME in parse(tensors, metadata, "a.safetensors").layers

    @pytest.mark.parametrize(("lost", "sentence"), [
        ("svdq_l1", "its low-rank branch is not whole"),
        ("svdq_l2", "its low-rank branch is not whole"),
        ("comfy_quant", "nothing says in which format the layer is"),
        ("weight_scale", "convrot_w4a4 needs weight_scale"),
        ("weight", "convrot_w4a4 needs weight"),
    ])  # fmt: skip
    def test_a_part_of_it_is_refused(self, lost, sentence, weight):
        tensors = self.tensors(weight)
        del tensors[f"{NAME}.{lost}"]
        with pytest.raises(CheckpointError, match=sentence) as raised:
            read(tensors)
        assert NAME in str(raised.value)

    def test_a_promised_one_that_is_not_there_is_refused(self, weight):
        tensors = {n: t for n, t in self.tensors(weight).items() if "svdq" not in n}
        tensors[f"{NAME}.comfy_quant"] = entry({"format": "convrot_w4a4", "svdquant": True})
        with pytest.raises(CheckpointError, match="its low-rank branch is not whole"):
            read(tensors)

    def test_codes_of_another_size_are_refused(self, weight):
        tensors = self.tensors(weight)
        tensors[f"{NAME}.weight"] = tensors[f"{NAME}.weight"][:, :-8].contiguous()
        with pytest.raises(CheckpointError, match=r"weight has shape \(128, 120\), which holds no convrot_w4a4 layer"):
            read(tensors)


class TestMarks:
    def test_an_empty_mark_marks_nothing(self):
        """Some programs leave one beside a float layer."""
        tensors = {f"{NAME}.weight": torch.ones(4, 4), f"{NAME}.comfy_quant": torch.empty(0, dtype=torch.uint8)}
        checkpoint = parse(tensors, None, "a.safetensors")
        assert not checkpoint.layers and set(checkpoint.dense) == {f"{NAME}.weight"}

    @pytest.mark.parametrize("there", ["", "model.diffusion_model.", "diffusion_model.", "model."])
    @pytest.mark.parametrize("said", ["", "model.diffusion_model.", "diffusion_model.", "model."])
    def test_metadata_names_layers_with_any_prefix(self, said, there):
        """A quantizer of diffusion models names them without, a checkpoint keeps them under one."""
        assert marked_layers({said + NAME: {"format": "x"}}, {f"{there}{NAME}.weight"}) == {
            there + NAME: {"format": "x"}
        }

    def test_metadata_of_a_layer_that_is_not_there_marks_nothing(self):
        assert marked_layers({"gone": {"format": "x"}}, {f"{NAME}.weight"}) == {}

    def test_formats_of_a_newer_comfyui_are_left_for_it(self):
        tensors = {f"{NAME}.weight": torch.ones(4, 4), f"{NAME}.comfy_quant": entry({"format": "int2_tomorrow"})}
        checkpoint = parse(dict(tensors), None, "a.safetensors", core=(*comfy_quant.CORE, "int2_tomorrow"))
        assert set(checkpoint.dense) == set(tensors)
        with pytest.raises(CheckpointError, match="'int2_tomorrow' is unknown to this version"):
            parse(dict(tensors), None, "a.safetensors")


@pytest.mark.parametrize("id", core_formats.FORMATS)
def test_core_layers_are_built_as_comfyui_builds_them(id, weight):
    """Every tensor and option of the layer: what is written is what is built."""
    before = core_formats.quantize(weight(N, K), id, BF16)
    tensors = {n.removeprefix("x."): t for n, t in core_quant.write("x", before).items()}
    config = json.loads(bytes(tensors.pop("comfy_quant").tolist()))
    after = core_quant.build(config, tensors, (N, K), BF16)
    assert torch.equal(kernels.dense(after), kernels.dense(before)) and core_quant.config_of(after) == config
    del config["format"]
    nested = core_quant.build({"format": id, "params": config}, tensors, (N, K), BF16)
    assert torch.equal(kernels.dense(nested), kernels.dense(before))
