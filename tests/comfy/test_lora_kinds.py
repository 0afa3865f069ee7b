"""Every kind of update at every place through this pack's nodes, inside ComfyUI's Python (inside/lora_kinds.py)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lora"))
from lora_matrix import CONVOLUTIONS, KINDS, refused

PLACES = ("same", "fused on split", "split on fused", "rows of linear1", "swapped", "swapped, other names")
CASES = [(name, place) for name in KINDS for place in PLACES] + [(name, "convolution") for name in CONVOLUTIONS]


@pytest.fixture(scope="module", params=["16-bit", "4-bit"])
def found(request, inside, tiny, tiny_4bit):
    files = tiny_4bit if request.param == "4-bit" else tiny
    return inside("lora_kinds", *map(files, ("sd15", "flux", "sd3")))


@pytest.mark.parametrize(("name", "place"), CASES)
def test_is_the_reference_or_refused_with_the_reason(name, place, found):
    got = found[f"{name} | {place}"]
    assert got["keys"]
    why_not = refused(name, place.removesuffix(", other names"), comfyui=True)
    if place == "fused on split" and "bias" in name:  # SD1.5's attention has none
        why_not = "unknown", "the layer has no bias"
    if why_not is not None:
        assert len(got["why"]) == 1 and got["why"][0].startswith(why_not[1])
    if why_not is not None and name != "lora with a bias":
        assert got["status"] == [why_not[0]] and got["patches"] == 0
        return
    assert got["status"] == (["model"] if why_not is None else ["model", why_not[0]]), got
    print(f"{name} | {place} | {got['error']:.1e}")
    assert got["error"] < 1e-5 and got["others"] == []


def test_thin_updates_leave_4_bits_as_they_are(found):
    """Also where their rows are cut: a plain LoRA always, LoKr where its exact product is thin."""
    bits = {case: set(got.get("4-bit", ())) for case, got in found.items() if case != "shares"}
    places = [place for place in PLACES if True in bits[f"lora | {place}"]]  # final_layer.adaLN_modulation is not 4-bit
    assert places in ([], list(PLACES[:-1]))
    for place in places:
        assert bits[f"lora | {place}"] == bits[f"lokr low across | {place}"] == {True}, place
        assert bits[f"dora | {place}"] == bits[f"lokr across, dora | {place}"] == {False}, place


def test_shares_of_a_fused_magnitude_do_not_depend_on_what_is_loaded(found):
    assert found["shares"]
