"""Every key has one status, chosen by its cause; nothing that a file holds is an exception."""

import json

import lora_files
import lora_odd
import pytest
import torch
from comfyui_nibble.families.spec import Rule
from comfyui_nibble.lora.apply import apply
from comfyui_nibble.lora.read import read, read_file, sort
from comfyui_nibble.lora.report import KeyReport, describe
from comfyui_nibble.lora.status import STATUSES
from comfyui_nibble.quant import kernels
from comfyui_nibble.quant.modules import linear_shapes, quantize_module
from comfyui_nibble.quant.policy import plan
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_matrix import KINDS, kind
from lora_odd import ALONE, TYPES, cases, of_type
from safetensors.torch import save_file

N = K = 64
CASES = cases(N, K)
LAYER = "blocks.0.ff"


def module(four_bit: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    out = torch.nn.Module()
    out.blocks = torch.nn.ModuleList([torch.nn.Module()])
    out.blocks[0].ff, out.blocks[0].norm = torch.nn.Linear(K, N), torch.nn.LayerNorm(N)
    if four_bit:
        quantize_module(out, plan(linear_shapes(out), (Rule(r"ff", "svdquant_w4a4", ""),), 8), torch.float32)
    return out


def weight(net: torch.nn.Module) -> torch.Tensor:
    w = net.blocks[0].ff.weight.detach()
    return (kernels.dense(w) if kernels.is_ours(w) else w).double()


@pytest.mark.parametrize("four_bit", [False, True], ids=["16-bit", "4-bit"])
@pytest.mark.parametrize("name", CASES)
def test_each_cause_has_its_status(name, four_bit):
    tensors, status, why = CASES[name]
    file = sort({f"{LAYER}{end}": t for end, t in tensors.items()})
    net = module(four_bit)
    before = weight(net)
    report = apply(net, file)
    assert dict(report.status) == {f"{LAYER}{end}": s for end, s in status.items()}
    assert set(report.why.values()) == ({why} if why else set())
    assert torch.equal(weight(net), before) == ("model" not in status.values())


@pytest.mark.parametrize("key", ALONE)
def test_kinds_that_name_no_layer(key):
    report = apply(module(), sort({key: torch.ones(4)}))
    assert report.status == {key: "unread"} and report.why == {key: ALONE[key]}
    assert describe({key: (4,)})[0] == f"holds {ALONE[key]}, a kind that is not read"


def test_the_report_names_a_kind_that_is_not_read():
    status = {"a.ia3_l": "unread", "b.ia3_l": "unread", "c.lora_A.weight": "shape"}
    why = {"a.ia3_l": "IA3", "b.ia3_l": "IA3", "c.lora_A.weight": "made for 8 x 8, the layer has 4 x 8"}
    said = KeyReport("x", "holds IA3, a kind that is not read", {}, (), status, (), why)
    assert said.text().splitlines()[2:] == [
        "- of another shape than the layer: c.lora_A.weight (made for 8 x 8, the layer has 4 x 8)",
        "- of a kind that is not read: a.ia3_l, b.ia3_l (IA3)",
    ]
    assert said.reasons() == (
        "2 of a kind that is not read (IA3), 1 of another shape than the layer (made for 8 x 8, the layer has 4 x 8)"
    )
    assert json.loads(said.to_json())["why"] == why
    many = {f"k{i}.lora_A.weight": "shape" for i in range(9)}
    said = KeyReport("x", "", {}, (), many, (), {key: f"reason {key}" for key in many})
    assert said.sentences("shape")[-1] == "of another shape than the layer: 3 more keys, for other reasons"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("end", [".lora_up.weight", ".alpha"])
def test_a_broken_file_is_an_error_that_names_the_key(value, end, tmp_path):
    tensors = {f"{LAYER}{e}": t for e, t in {**lora_odd.lora(N, K), ".alpha": torch.tensor(1.0)}.items()}
    tensors[f"{LAYER}{end}"] = torch.full_like(tensors[f"{LAYER}{end}"], value)
    with pytest.raises(
        ValueError, match=rf"^LoRA key {LAYER}{end} holds NaN or infinity\. Train or download it again$"
    ):
        read(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"^x\.safetensors: LoRA key {LAYER}{end} holds NaN or infinity\."):
        read_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("four_bit", [False, True], ids=["16-bit", "4-bit"])
@pytest.mark.parametrize("what", ["lora", "lokr"])
@pytest.mark.parametrize("dtype", TYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_numbers_of_every_type(dtype, what, four_bit):
    tensors = of_type(dtype, N, K, what)
    net = module(four_bit)
    before = weight(net)
    assert apply(net, read({f"{LAYER}{end}": t for end, t in tensors.items()})).whole
    one, two = (t.double() for t in tensors.values())
    expected = two @ one if what == "lora" else torch.kron(one, two)
    assert (weight(net) - before - expected).norm() / expected.norm() < 1e-5


def test_numbers_of_no_type_are_refused():
    tensors = {f"{LAYER}{end}": t.to(torch.complex64) for end, t in lora_odd.lora(N, K).items()}
    assert set(sort(tensors).refused[f"{LAYER}.lora_up.weight"].args) == {
        "of a kind that is not read: numbers of type complex64"
    }


def test_two_kinds_on_one_layer_are_both_applied():
    """ComfyUI's loader takes the difference and forgets the LoRA."""
    tensors = {**lora_odd.lora(N, K), ".diff": torch.full((N, K), 0.1), ".diff_b": torch.ones(N)}
    net = module()
    before, bias = weight(net), net.blocks[0].ff.bias.detach().clone()
    assert apply(net, read({f"{LAYER}{end}": t for end, t in tensors.items()})).whole
    expected = tensors[".lora_up.weight"] @ tensors[".lora_down.weight"] + tensors[".diff"]
    assert (weight(net) - before - expected).norm() / expected.norm() < 1e-5
    assert torch.allclose(net.blocks[0].ff.bias.detach(), bias + 1)


def test_adapters_with_names_are_not_mixed():
    """Of two adapters in one file, the halves that belong together are multiplied; a lone half is named."""
    one, two = (lora_files.factors({LAYER: (N, K)}, seed=s)[LAYER] for s in (1, 2))
    tensors = {
        f"{LAYER}.lora_A.a.weight": torch.ones(4, K),
        f"{LAYER}.lora_A.b.weight": one[0], f"{LAYER}.lora_B.b.weight": one[1],
        f"{LAYER}.lora_A.c.weight": two[0], f"{LAYER}.lora_B.c.weight": two[1],
    }  # fmt: skip
    net = module()
    before = weight(net)
    report = apply(net, read(tensors))
    assert report.status.pop(f"{LAYER}.lora_A.a.weight") == "incomplete" and report.whole
    expected = one[1] @ one[0] + two[1] @ two[0]
    assert (weight(net) - before - expected).norm() / expected.norm() < 1e-5


def test_a_layer_without_a_bias():
    net = torch.nn.Module()
    net.ff = torch.nn.Linear(K, N, bias=False)
    report = apply(net, read({"ff.diff_b": torch.ones(N)}))
    assert report.status == {"ff.diff_b": "unknown"} and report.why == {"ff.diff_b": "the layer has no bias"}


BAD_FILES = {
    "empty.safetensors": (b"", "not a whole safetensors file"),
    "page.safetensors": (b"<html>404 not found</html>" * 40, "not a whole safetensors file"),
    "pickle.safetensors": (b"\x80\x02}q\x00." * 20, "this is a pickle"),
    "header.safetensors": ((2**40).to_bytes(8, "little") + b"{" * 99, "not a whole safetensors file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_sentence_with_its_name(name, tmp_path):
    data, what = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"^{name}: {what}") as e:
        read_file(tmp_path / name)
    assert len(str(e.value).splitlines()) == 1 and str(tmp_path) not in str(e.value)


def test_half_a_download_and_no_file(tmp_path):
    save_file({f"{LAYER}{end}": t for end, t in lora_odd.lora(N, K).items()}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^x\.safetensors: not a whole safetensors file \(it is truncated\)"):
        read_file(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"^gone\.safetensors: there is no such file"):
        read_file(tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match=r"^adapter_model\.safetensors: there is no such file"):
        read_file(tmp_path)  # a folder that is no adapter's


TARGETS = (
    LAYER, "lora_unet_blocks_0_ff", "base_model.model.blocks.0.norm", "lora_unet_nowhere",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
)  # fmt: skip
SETS = (*(kind(name, N, K, N) for name in KINDS), *(tensors for tensors, _, _ in CASES.values()))
LOOSE = {
    "note": torch.zeros(1),
    "alpha": torch.tensor(1.0),
    ".alpha": torch.tensor(1.0),
    **dict.fromkeys(ALONE, torch.ones(1)),
}


@st.composite
def files(draw) -> dict[str, torch.Tensor]:
    """Some whole updates of any kind for any target, less some of their keys, and some keys of no layer."""
    out = {key: LOOSE[key] for key in draw(st.sets(st.sampled_from(sorted(LOOSE)), max_size=2))}
    for target, number in draw(
        st.lists(st.tuples(st.sampled_from(TARGETS), st.integers(0, len(SETS) - 1)), max_size=5)
    ):
        out |= {f"{target}{end}": t for end, t in SETS[number].items()}
    lost = draw(st.sets(st.sampled_from(sorted(out)))) if out and draw(st.booleans()) else set()
    return {key: t for key, t in out.items() if key not in lost}


@settings(max_examples=300, deadline=None)
@given(files())
def test_any_subset_of_keys_is_accounted_for_once(tensors):
    keys, file = set(tensors), sort(tensors)
    used = [key for u in file.updates for key in u.keys.values()]
    assert set(used) | set(file.refused) == keys and not set(used) & set(file.refused)
    net = module()
    before, bias = weight(net), net.blocks[0].ff.bias.detach().clone()
    report = apply(net, file)
    assert set(report.status) == keys and set(report.status.values()) <= set(STATUSES)
    assert set(report.why) <= keys and not any(report.status[key] == "model" for key in report.why)
    counted = [key for s in STATUSES for key in report.status if report.status[key] == s]
    assert sorted(counted) == sorted(keys)
    said = KeyReport("x", *describe({k: tuple(t.shape) for k, t in tensors.items()}), report.status, (), report.why)
    assert sum(said.count(s) for s in STATUSES) == len(keys) and json.loads(said.to_json())["keys"] == report.status
    assert said.text() and report.summary()
    changed = not torch.equal(weight(net), before) or not torch.equal(net.blocks[0].ff.bias, bias)
    assert changed == bool({LAYER, "lora_unet_blocks_0_ff"} & set(report.applied))


@settings(max_examples=400, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans())
def test_no_shape_is_an_exception(chance, four_bit):
    tensors = {f"{chance.choice(TARGETS[:3])}{end}": t for end, t in lora_odd.misshapen(chance).items()}
    report = apply(module(four_bit), sort(tensors), 0.5)
    assert set(report.status) == set(tensors) and "broken" not in report.status.values()
