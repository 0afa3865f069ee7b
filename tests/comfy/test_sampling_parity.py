"""Presets on ComfyUI's own classes: the table's numbers, diffusers as the oracle, and what the network is handed."""

import pytest
from comfyui_nibble.families import PRESETS
from comfyui_nibble.families.preset import SAMPLERS
from comfyui_nibble.sampling.presets import preset


@pytest.fixture(scope="module")
def rows(inside):
    """What every preset gives on its family's ComfyUI class."""
    return inside("sampling_rows")


@pytest.fixture(scope="module")
def exact(inside, tiny, tmp_path_factory):
    return inside("sampling_exact", tiny("sd15"), tiny("sdxl"), tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def parity(inside, tmp_path_factory):
    return inside("sampling_parity", tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("id", PRESETS)
def test_sigmas_equal_the_table_and_names_exist(id, rows):
    row, got = preset(id), rows["rows"][id]
    assert got["sigmas"][-1] == 0 and len(got["sigmas"]) == row.steps + 1
    values = got["sigmas"][:-1] if row.has_sigmas else got["timesteps"]
    assert values == pytest.approx(row.shown, abs=1e-4)
    if not SAMPLERS[row.sampler]:
        assert row.sampler in rows["samplers"]
        assert got["sampler"] == f"sample_{row.sampler}"
    if got["scheduler"] not in ("", "flux2"):
        assert got["scheduler"] in rows["schedulers"]
    assert got["cfg"] == row.cfg_for(row.steps)
    assert row.source in got["text"] and row.title in got["text"]


VP_SIGMAS = {999: 14.6146, 800: 5.1110, 399: 1.1606, 259: 0.7194}


def test_sigmas_of_timesteps_are_the_known_numbers(rows):
    for id, t in (("lightning_sdxl_1step", 999), ("hyper_sdxl_1step_unet", 800), ("dmd2_sdxl_1step", 399)):
        assert rows["rows"][id]["sigmas"] == pytest.approx([VP_SIGMAS[t], 0.0], abs=1e-4)
    assert rows["rows"]["lcm_lora_sd15"]["sigmas"][3] == pytest.approx(VP_SIGMAS[259], abs=1e-4)


@pytest.mark.parametrize(
    ("id", "base"),
    [
        ("lcm_lora_sd15", "LCM"),
        ("lightning_sdxl_1step", "X0"),
        ("instaflow", "RectifiedFlow"),
        ("perflow_sd15", "PeRFlowSampling"),
        ("sd35_large_turbo", "ModelSamplingDiscreteFlow"),
        ("flux_dev", "ModelSamplingFlux"),
        ("dmd2_sdxl", "EPS"),
    ],
)
def test_model_sampling(id, base, rows):
    assert base in rows["rows"][id]["bases"]


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("kind", ["lcm", "lcm omega"])
def test_lcm_equals_diffusers(kind, n, parity):
    assert parity[f"{kind} n={n}"] <= 1e-4
    assert parity[f"effect of omega n={n}"] > 0.1


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_equals_diffusers(eta, n, parity):
    assert parity[f"tcd eta={eta} n={n}"] <= 1e-4


OTHERS = [
    *(f"lcm v n={n}" for n in (1, 2, 4, 8)), "lcm image strength=0.5", "lcm image strength=0.8",
    "hyper unified n=1", "hyper unified n=4", *(f"ddim trailing n={n}" for n in (2, 4, 8)),
    *(f"euler trailing n={n}" for n in (2, 3, 4, 8, 12)), "x0 one step",
    *(f"one step {s} t={t}" for s in ("lcm", "euler") for t in (399, 800)),
    "perflow diff_eps n=4", "perflow ddim_eps n=4", "flow sd35_large_turbo", "flow flux_turbo_alpha",
]  # fmt: skip


@pytest.mark.parametrize("check", OTHERS)
def test_equals_diffusers(check, parity):
    assert parity[check] <= 1e-4


@pytest.mark.parametrize("check", ["n=1 g=1.0", "n=2 g=1.0", "n=4 g=1.5", "n=25 g=1.5"])
def test_instaflow_equals_the_papers_loop(check, parity):
    assert parity[f"instaflow {check}"] <= 1e-5


STARTS = ["399", "800", "999", "dmd2_sdxl_1step", "hyper_sdxl_1step_unet", "lightning_sdxl_1step"]


@pytest.mark.parametrize("start", STARTS)
def test_one_step_models_see_unit_noise(start, exact):
    assert exact["noise"][start]["std"] == pytest.approx(1.0, abs=1e-3)
    assert exact["noise"][start]["difference"] < 1e-5


def test_without_the_patch_they_would_not(exact):
    assert exact["noise"]["399 stock"]["std"] == pytest.approx(0.758, abs=1e-3)
    assert exact["noise"]["800 stock"]["std"] == pytest.approx(0.981, abs=1e-3)
    assert exact["noise"]["999 stock"]["std"] == pytest.approx(1.0, abs=1e-3)


def test_the_patch_touches_nothing_else(exact):
    noise = exact["noise"]
    assert noise["image to image is left alone"] and noise["later noise is left alone"]
    assert noise["the table is shared, the object is not"]


def test_guidance_goes_into_the_bias_once(exact):
    found = exact["guidance"]
    assert found["text"].startswith("preset lcm_full_sd15: unnamed.safetensors holds the guidance embedding")
    assert (found["patches"], found["came in"], found["not twice"]) == (1, 0, 1)
    assert found["a LoRA below counts"] < 1e-4


def test_progress_and_previews_are_the_stock_samplers(exact):
    found = exact["progress"]
    assert found["stock"] == [[i, 4, True] for i in range(1, 5)]
    assert found["euler"] == found["tcd"] == found["stock"]


def test_straightness_of_known_fields(exact):
    fields = exact["fields"]
    assert fields["constant"] == pytest.approx(0.0, abs=1e-9)
    assert fields["rotating"] == pytest.approx(fields["analytic"], rel=0.01)
    assert fields["steps"] == 500 and fields["chart"][0] == 1 and fields["chart"][3] == 3
