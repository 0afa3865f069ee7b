"""What the families claim of layers, against ComfyUI's own classes with hooks on every layer."""

from comfyui_nibble.quant.svdquant import SHIFT
from new_family import grown


def test_layers_that_are_called_unsigned_read_a_gelu(inside):
    """And no other layer does: in FLUX.1, Chroma, SD3, Qwen-Image and PixArt some, in what is gated by SiLU none."""
    found = inside("unsigned_inputs")
    claimed = {name: (family, count) for name, (family, count, *_) in found.items()}
    assert claimed == {
        "flux": ("flux", 2), "chroma": ("flux", 2), "sd3": ("sd3", 3), "qwen_image": ("qwen_image", 2),
        "pixart": ("pixart", 1), "ovis": ("flux", 0), "flux2": ("flux2", 0),
        "flux2 with modulations of its own": ("flux", 0),
    }  # fmt: skip
    for name, (_, count, four, lowest, missed) in found.items():
        assert four >= 6 and not missed, name
        assert (lowest is None) if not count else -SHIFT < lowest < -0.165, (name, lowest)


def test_a_new_file_is_enough_for_the_nodes(inside, tmp_path):
    """Five tokens of width 64 through one layer, for three pictures."""
    assert inside("new_family", pack=grown(tmp_path)) == {
        "variant": "toy", "preset": "toy_turbo", "family": "toy", "flops": 3 * 5 * 2 * 64 * 64, "listed": [True, True],
    }  # fmt: skip
