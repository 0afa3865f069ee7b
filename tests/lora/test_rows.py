"""What form an update takes when its rows are cut: the same kind where it can be, else the smaller of two."""

import pytest
import torch
from comfyui_nibble.lora.read import sort
from comfyui_nibble.lora.rows import Region, divide
from comfyui_nibble.lora.status import Refused
from lora_matrix import kind


def update(name: str, n: int, k: int, piece: int):
    return sort({f"a{end}": t for end, t in kind(name, n, k, piece).items()}).updates[0]


def three(shape: tuple[int, int]) -> list[Region]:
    return [Region(shape, (i * shape[0], shape[0])) for i in range(3)]


@pytest.mark.parametrize(
    ("name", "kinds", "size"),
    [
        ("lokr", {"lokr"}, None),  # w2's rows end where the layers do: rows of w1
        ("lokr low across", {"lora"}, 2 * 9),  # rank 2 for each of the rows of w1 that a layer touches
        ("lokr across", {"diff"}, None),  # its product is of a higher rank than is worth two factors
        ("lokr across, dora", {"lora"}, None),  # a magnitude needs factors, however thick
    ],
)
def test_lokr(name, kinds, size):
    pieces = divide(update(name, 192, 64, 64), three((64, 64)))
    assert {p.kind for p in pieces} == kinds
    if size is not None:
        assert max(p.weights.rank for p in pieces) <= size


def test_what_is_not_cut_is_the_same_tensors():
    """So that a file in the model's own names acts bit for bit as ComfyUI's loader makes it act."""
    for name in ("lora", "loha", "lokr", "oft", "glora", "dora"):
        whole = update(name, 64, 64, 64)
        (piece,) = divide(whole, [Region((64, 64))])
        assert piece.kind == whole.kind and all(
            t.data_ptr() == whole.parts[role].data_ptr() for role, t in piece.parts.items()
        )


def test_halves_of_an_odd_number_of_rows():
    """As torch's chunk has them: the first half is the longer one."""
    assert Region((5, 4), swap=True).spans() == [(3, 2), (0, 3)]
    assert Region((5, 4), source=(10, 5), swap=True).spans() == [(13, 2), (10, 3)]


def test_layers_of_other_heights_together():
    with pytest.raises(Refused, match=r"made for 192 x 64, its 2 layers have 128 x 64") as e:
        divide(update("lora", 192, 64, 64), three((64, 64))[:2])
    assert e.value.status == "shape"


def test_a_lora_that_makes_its_layer_larger():
    tensors = {"a.lora_A.weight": torch.ones(4, 96), "a.lora_B.weight": torch.ones(64, 4)}
    larger = sort(tensors | {"a.reshape_weight": torch.tensor([64, 96])}).updates[0]
    assert divide(larger, [Region((64, 64))])[0].parts["reshape"].tolist() == [64, 96]
    for region, status, why in (
        (Region((64, 64), inside=True), "rows", "a LoRA that makes its layer larger"),
        (Region((64, 128)), "shape", "made for at most"),
    ):
        with pytest.raises(Refused, match=why) as e:
            divide(larger, [region])
        assert e.value.status == status
    wrong = sort(tensors | {"a.reshape_weight": torch.tensor([64, 80])}).updates[0]
    with pytest.raises(Refused, match="its new shape"):
        divide(wrong, [Region((64, 64))])


def test_a_norm_takes_no_factors():
    with pytest.raises(Refused, match=r"made for 64 x 1, the layer has 64 numbers"):
        divide(
            sort({"a.lora_A.weight": torch.ones(4, 1), "a.lora_B.weight": torch.ones(64, 4)}).updates[0],
            [Region((64,))],
        )
