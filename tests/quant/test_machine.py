"""The table of what machines run, against comfy-kitchen's own constraints and on machines that are not there."""

import pytest
import torch
from comfy_kitchen.backends import cuda, hip
from comfyui_nibble.headless import doctor
from comfyui_nibble.headless.cli import main
from comfyui_nibble.profiling import cards
from comfyui_nibble.quant import machine
from comfyui_nibble.quant.machine import AMD, APPLE, CPU, INTEL, KERNELS, NVIDIA, Machine

NATIVE = {
    "Turing": "rotated int4",
    "Ampere": "int4",
    "Ada": "int4",
    "Hopper": "4-bit weights, int8",
    "Blackwell": "fp4",
    "RDNA3": "int4",
}


def nvidia(sm: int, cuda=(13, 0), missing="") -> Machine:
    return Machine(NVIDIA, "a card", sm, cuda=cuda, missing=missing)


def amd(arch: str) -> Machine:
    return Machine(AMD, "a card", arch=arch)


class TestAgainstKitchen:
    def test_the_least_capability_is_kitchens(self, monkeypatch):
        monkeypatch.setattr(cuda, "_CUBLASLT_AVAILABLE", True)
        theirs = cuda._build_constraints()
        for name, kernel in KERNELS.items():
            if kernel.function:
                major, minor = theirs[kernel.function].min_compute_capability
                assert kernel.floor == 10 * major + minor, name

    @pytest.mark.parametrize("wmma", [True, False])
    def test_amds_kernels_are_kitchens(self, wmma):
        theirs = hip._build_constraints(wmma)
        for name, kernel in KERNELS.items():
            there = kernel.amd if wmma else kernel.elementwise
            assert not kernel.function or (kernel.function in theirs) is there, name

    def test_amds_architectures_are_kitchens(self):
        groups = {name: set(archs) for name, archs in hip._ARCH_GROUPS.items()}
        for arch in set().union(*groups.values()) | {"gfx906", "gfx90a", "gfx942", "gfx950"}:
            wmma = any(arch in archs for name, archs in groups.items() if name.startswith("wmma"))
            assert (amd(arch).lacks("int4") == "") is wmma, arch
            assert (amd(arch).lacks("4-bit weights") == "") is (wmma or arch in groups["elementwise_only"]), arch

    def test_what_the_cards_of_the_table_run(self):
        """A 4-bit kernel for every architecture; Turing has the rotated one alone."""
        for row in cards.ARCHITECTURES.values():
            native = NATIVE[row.id.split()[0]]
            for sm in row.compute:
                assert nvidia(sm).lacks(native) == "", row.id
            assert bool(row.gfx) is not bool(row.compute)
            if row.gfx:
                assert amd(row.gfx).lacks(native) == "", row.id


@pytest.mark.parametrize(("here", "runs"), [
    (nvidia(61), set()),
    (nvidia(70), set()),
    (nvidia(75), {"rotated int4", "int8"}),
    (nvidia(80), {"int4", "rotated int4", "4-bit weights", "4-bit weights, int8", "int8"}),
    (nvidia(86), {"int4", "rotated int4", "4-bit weights", "4-bit weights, int8", "int8"}),
    (nvidia(89), {"int4", "rotated int4", "4-bit weights", "4-bit weights, int8", "int8", "fp8"}),
    (nvidia(90), {"4-bit weights", "4-bit weights, int8", "int8", "fp8"}),
    (nvidia(120), set(KERNELS)),
    (nvidia(120, (12, 8)), {"int4", "fp8"}),
    (nvidia(89, (12, 8)), {"int4", "fp8"}),
    (nvidia(75, (12, 8)), set()),
    (nvidia(89, missing="it is broken"), {"fp8"}),
    (amd("gfx1100"), {"int4", "rotated int4", "4-bit weights", "4-bit weights, int8", "int8"}),
    (amd("gfx1201"), {"int4", "rotated int4", "4-bit weights", "4-bit weights, int8", "int8"}),
    (amd("gfx1030"), {"4-bit weights"}),
    (amd("gfx942"), set()),
    (Machine(APPLE), set()),
    (Machine(INTEL, "Arc B580"), set()),
    (Machine(CPU), set()),
], ids=lambda x: f"{x.title} {x.cuda[:1]}" if isinstance(x, Machine) else "")  # fmt: skip
def test_what_runs_where(here, runs):
    """Every form that does not has a reason in words."""
    assert {name for name in KERNELS if not here.lacks(name)} == runs
    assert all(len(here.lacks(name)) > 10 for name in set(KERNELS) - runs)


def test_the_reasons_are_the_real_ones():
    assert nvidia(75).lacks("int4") == "the kernel needs sm_80"
    assert nvidia(90).lacks("int4") == "sm_90 has no such tensor cores"
    assert "PyTorch here is built for CUDA 12.8" in nvidia(89, (12, 8)).lacks("int8")
    assert amd("gfx1030").lacks("int4") == "gfx1030 has no matrix cores"
    assert amd("gfx942").lacks("int8") == "comfy-kitchen has no kernels for gfx942"
    assert Machine(CPU).lacks("int4") == "comfy-kitchen has no kernels for a CPU"


def test_this_machine_is_read_from_torch(monkeypatch):
    class Properties:
        name, gcnArchName = "a card", "gfx1100:sramecc+"

    machine.capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert machine.here() == Machine(NVIDIA, "a card", 89, cuda=(12, 8), missing=machine._missing("cuda"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert (machine.here().kind, machine.here().arch) == (AMD, "gfx1100")
    machine.capability.cache_clear()


def test_doctor_says_what_runs_and_what_to_do(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(machine.here().title) and "svdquant_w4a4" in said and "comfy-kitchen" in said
    assert main(["doctor", "--json"]) == 0
    old = doctor.diagnose(nvidia(89, (12, 8)))
    assert "built for CUDA 13" in old.text() and "svdquant_w4a4        native" in old.text()
    assert doctor.diagnose(nvidia(89)).advice == ()
