"""The preset table: each row is sound, shows what its formula gives, and is found by its files' names."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from comfyui_nibble.families import PRESETS, TITLES
from comfyui_nibble.families.preset import SAMPLERS
from comfyui_nibble.sampling import presets
from comfyui_nibble.sampling.detect import Facts, File, choose, detect, upstream_files
from comfyui_nibble.sampling.presets import of_family, preset
from comfyui_nibble.sampling.schedules import plan

PAGE = Path(__file__).resolve().parents[2] / "docs" / "few-step.md"
MU = {"flux": 1.15, "krea2": 1.15, "lens": 1.15}  # FLUX.1's shift at 1024 x 1024, as a logarithm
SHIFT = {"flux_schnell": 1.0, "ernie": 3.0, "mage_flow": 6.0, "boogu": 3.16}  # what ComfyUI loads these with

# What people have on their disks, by family, and the preset (and steps) it must give.
NAMES = [
    ("sdxl", "sdxl_lightning_4step_lora.safetensors", "lightning_sdxl", 4),
    ("sdxl", "sdxl_lightning_8step.safetensors", "lightning_sdxl", 8),
    ("sdxl", "sdxl_lightning_1step_x0.safetensors", "lightning_sdxl_1step", 0),
    ("sdxl", "juggernautXL_v9Rdphoto2Lightning.safetensors", "lightning_sdxl", 0),
    ("sdxl", "Hyper-SDXL-8steps-lora.safetensors", "hyper_sdxl", 8),
    ("sdxl", "Hyper-SDXL-12steps-CFG-lora.safetensors", "hyper_sdxl_cfg", 12),
    ("sdxl", "Hyper-SDXL-1step-lora.safetensors", "hyper_sdxl_1step", 0),
    ("sdxl", "Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors", "hyper_sdxl_1step_unet", 0),
    ("sd15", "Hyper-SD15-1step-lora.safetensors", "hyper_sd15_1step", 0),
    ("sd15", "Hyper-SD15-4steps-lora.safetensors", "hyper_sd15", 4),
    ("sd15", "Hyper-SD15-12steps-CFG-lora.safetensors", "hyper_sd15_cfg", 12),
    ("sd3", "Hyper-SD3-16steps-CFG-lora.safetensors", "hyper_sd3_cfg", 16),
    ("flux", "Hyper-FLUX.1-dev-16steps-lora.safetensors", "hyper_flux", 16),
    ("sd15", "lcm-lora-sdv1-5.safetensors", "lcm_lora_sd15", 0),
    ("sd15", "LCM/LCM_LoRA_Weights_SD15.safetensors", "lcm_lora_sd15", 0),
    ("sd15", "nibble_demo_lcm.safetensors", "lcm_lora_sd15", 0),
    ("sd15", "dreamshaper_8LCM.safetensors", "lcm_lora_sd15", 0),
    ("sdxl", "lcm-lora-sdxl.safetensors", "lcm_lora_sdxl", 0),
    ("sdxl", "dmd2_sdxl_4step_lora_fp16.safetensors", "dmd2_sdxl", 0),
    ("sdxl", "dmd2_sdxl_1step_unet_fp16.safetensors", "dmd2_sdxl_1step", 0),
    ("sdxl", "sd_xl_turbo_1.0_fp16.safetensors", "sdxl_turbo", 0),
    ("sd2", "sd_turbo.safetensors", "sd_turbo", 0),
    ("sdxl", "TCD-SDXL-LoRA.safetensors", "tcd_sdxl", 0),
    ("sd15", "instaflow_0_9B_from_sd_1_5.safetensors", "instaflow", 0),
    ("sd15", "2_rectified_flow_from_sd_1_5.safetensors", "rectified_flow_2", 0),
    ("sd15", "perflow-sd15-dreamshaper.safetensors", "perflow_sd15", 0),
    ("sd3", "sd3.5_large_turbo.safetensors", "sd35_large_turbo", 0),
    ("flux", "FLUX.1-Turbo-Alpha.safetensors", "flux_turbo_alpha", 0),
    ("flux", "svdq-int4_r32-flux.1-dev.safetensors", "flux_dev", 0),
    ("flux_schnell", "svdq-int4_r32-flux.1-schnell.safetensors", "flux_schnell", 0),
    ("z_image", "z_image_turbo_bf16.safetensors", "z_image_turbo", 0),
    ("qwen_image", "svdq-int4_r128-qwen-image-lightningv1.1-4steps.safetensors", "qwen_lightning", 4),
    ("qwen_image", "Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16.safetensors", "qwen_lightning", 8),
    ("qwen_image", "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors", "qwen_2512_turbo", 0),
    ("flux2", "flux-2-klein-4b.safetensors", "flux2_klein", 0),
    ("flux2", "flux-2-klein-base-9b-fp8.safetensors", "flux2_klein_base", 0),
    ("flux2", "Flux_2-Turbo-LoRA_comfyui.safetensors", "flux2_dev_turbo", 0),
    ("krea2", "krea2_turbo_fp8_scaled.safetensors", "krea2_turbo", 0),
    ("lens", "lens_turbo_bf16.safetensors", "lens_turbo", 0),
    ("ernie", "ernie-image-turbo.safetensors", "ernie_turbo", 0),
    ("mage_flow", "mage_flow_turbo_int8_convrot.safetensors", "mage_flow_turbo", 0),
    ("boogu", "boogu_image_turbo_fp8_scaled.safetensors", "boogu_turbo", 0),
]
WRONG_LORA = File("sdxl_lightning_4step_lora.safetensors", 1.0)
WRONG_WORD = File("a.safetensors", metadata={"nibble.preset": "tcd_sdxl"})
STRANGERS = [
    ("sd15", "v1-5-pruned-emaonly.safetensors"),
    ("sdxl", "style_welcome_lcmatrix.safetensors"),
    ("sdxl", "dreamshaperXL_turboDpmppSDE.safetensors"),
    ("z_image", "z_image_bf16.safetensors"),
    ("flux2", "flux2_dev_fp8mixed.safetensors"),
    ("sd3", "sd3.5_large.safetensors"),
]


def shifted(u: float, shift: float) -> float:
    return shift * u / (1 + (shift - 1) * u)


def by_mu(u: float, mu: float) -> float:
    return math.exp(mu) / (math.exp(mu) + 1 / u - 1) if u else 0.0


def flux2_mu(tokens: int, steps: int) -> float:
    """FLUX.2's fit: linear in the steps between its lines for 10 and for 200 of them."""
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return at_200 if tokens > 4300 else at_200 + (at_10 - at_200) * (200 - steps) / 190


def even(first: float, last: float, n: int) -> list[float]:
    return [first + (last - first) * i / (n - 1) for i in range(n)]


def expected(row) -> list[float]:
    """The row's sigmas by formula, from no code of the pack or of ComfyUI."""
    n = row.steps
    u = [1 - i / n for i in range(n)]
    shift = row.shift or SHIFT.get(row.family, 1.0)
    if row.schedule == "flux2":
        return [by_mu(x, flux2_mu(4096, n)) for x in u]
    if row.schedule == "normal":
        return [shifted(x, shift) for x in even(1.0, shifted(0.001, shift), n)]
    if row.schedule == "sgm_uniform":
        return [shifted(x, shift) for x in even(1.0, shifted(0.001, shift), n + 1)[:-1]]
    if row.family in MU:
        return [by_mu(x, MU[row.family]) for x in u]
    return [shifted(x, shift) for x in u]


@pytest.mark.parametrize("id", PRESETS)
def test_shows_what_its_schedule_gives(id):
    row = preset(id)
    if row.has_sigmas:
        assert row.shown == pytest.approx(expected(row), abs=6e-5)
    else:
        made = plan(row)
        grid = {"lcm": plan(replace(row, schedule="tcd", sampler="tcd", eta=0.0))} if row.schedule == "lcm" else {}
        timesteps = grid.get("lcm", made).timesteps or tuple(
            round(1000 - 1000 * i / row.steps) - 1 for i in range(row.steps)
        )
        assert row.shown == timesteps  # fmt: skip


@pytest.mark.parametrize("id", PRESETS)
def test_every_family_and_step_count_has_a_run(id):
    row = preset(id)
    for steps in row.made_for:
        assert plan(row, steps).keep == steps
        assert row.cfg_for(steps) >= 1
    assert plan(row, denoise=0.0).keep == 0


def test_every_family_has_rows_and_ours_are_used():
    assert all(of_family(family) for family in TITLES)
    used = {row.sampler for row in PRESETS.values()}
    assert used == set(SAMPLERS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sampler="ddpm"), "unknown sampler 'ddpm'"),
        (dict(schedule="karras"), "unknown schedule"),
        (dict(prediction="noise"), "unknown prediction"),
        (dict(steps=3), "its usual number of steps is not among"),
        (dict(shown=(1.0, 2.0)), "it shows 2 values for 4 steps"),
        (dict(shown=(1, 2, 3, 4)), "do not descend"),
        (dict(source="somewhere"), "its source is not a link"),
        (dict(timesteps=(999,)), "only the schedule 'listed' has timesteps"),
        (dict(eta=0.5), "only the sampler 'tcd' has an eta"),
        (dict(sampler="perflow"), "PeRFlow needs its own sampler"),
        (dict(cfg=0.5), "its cfg is below 1"),
        (dict(id="LCM LoRA"), "lower case"),
    ],
)
def test_a_wrong_row_cannot_be_made(change, message):
    with pytest.raises(ValueError, match=message):
        replace(preset("lightning_sdxl"), **change)


def test_cfg_that_depends_on_the_steps():
    assert [preset("perflow_sd15").cfg_for(n) for n in (4, 5, 6, 7, 8, 16)] == [4.5, 4.5, 6.0, 6.0, 7.5, 7.5]
    assert [preset("hyper_sd3_cfg").cfg_for(n) for n in (4, 8, 16)] == [3.0, 5.0, 7.0]


def test_the_page_is_the_table():
    assert PAGE.read_text(encoding="utf-8") == presets.page(), (
        "docs/few-step.md is stale: python -m comfyui_nibble.sampling.presets docs/few-step.md"
    )


def test_the_page_names_every_row_and_source():
    text = presets.page()
    for row in PRESETS.values():
        assert f"| `{row.id}` |" in text and row.source in text


@pytest.mark.parametrize(("family", "name", "id", "steps"), NAMES, ids=[n[1] for n in NAMES])
def test_file_names(family, name, id, steps):
    match = detect(Facts(family, "Class", (File(name, 1.0),)))
    assert (match.preset.id, match.steps) == (id, steps)
    assert name in match.why


@pytest.mark.parametrize(("family", "name"), STRANGERS, ids=[n[1] for n in STRANGERS])
def test_other_names_are_not_guessed(family, name):
    with pytest.raises(ValueError, match=r"no few-step preset was recognised for this .* Choose one of: ") as e:
        detect(Facts(family, "Class", (File(name),)))
    assert name in str(e.value)


def test_every_lora_of_the_table_is_found_by_its_own_name():
    for row in PRESETS.values():
        if row.lora and row.omega is None:
            assert detect(Facts(row.family, "Class", (File(row.lora + ".safetensors", 1.0),))).preset is row


def test_metadata_comes_first_then_keys_then_names():
    ours = File("dmd2.safetensors", metadata={"nibble.preset": "tcd_sdxl"})
    record = File("dmd2.safetensors", metadata={"nibble": '{"preset": "tcd_sdxl"}'})
    titled = File("unnamed.safetensors", metadata={"ss_output_name": "my-lcm-lora-sdxl"})
    keyed = File("dmd2.safetensors", keys=frozenset({"time_embedding.cond_proj.weight"}))
    for file, id in ((ours, "tcd_sdxl"), (record, "tcd_sdxl"), (titled, "lcm_lora_sdxl"), (keyed, "lcm_full_sdxl")):
        match = detect(Facts("sdxl", "SDXL", (file,)))
        assert match.preset.id == id and file.name in match.why
    for junk in ("{", "[]", '{"preset": 3}'):
        assert (
            detect(Facts("sdxl", "SDXL", (File("dmd2.safetensors", metadata={"nibble": junk}),))).preset.id
            == "dmd2_sdxl"
        )


def test_the_name_of_a_lora_beats_the_title_of_its_base():
    base = File("base.safetensors", metadata={"modelspec.title": "SDXL-Turbo"})
    lora = File("sdxl_lightning_4step_lora.safetensors", 1.0)
    assert detect(Facts("sdxl", "SDXL", (lora, base))).preset.id == "lightning_sdxl"
    assert detect(Facts("sdxl", "SDXL", (File("style.safetensors", 1.0), base))).preset.id == "sdxl_turbo"


def test_the_class_alone_decides_for_flux():
    assert detect(Facts("flux_schnell", "FluxSchnell")).preset.id == "flux_schnell"
    assert detect(Facts("flux", "Flux")).preset.id == "flux_dev"


def test_the_last_lora_wins_over_the_base():
    files = (File("Hyper-SDXL-4steps-lora.safetensors", 1.0), File("sd_xl_turbo_1.0.safetensors"))
    assert detect(Facts("sdxl", "SDXL", files)).preset.id == "hyper_sdxl"


@pytest.mark.parametrize(
    ("facts", "choice", "message"),
    [
        (Facts("flux", "Flux"), "lightning_sdxl", "for SDXL and this model is FLUX.1-dev .*Choose one of: hyper_flux"),
        (Facts(None, "WAN21_T2V"), "lightning_sdxl", "of a family without few-step presets .*own sampler nodes"),
        (Facts(None, "WAN21_T2V"), "auto", "class WAN21_T2V.* of a family without few-step presets"),
        (Facts("sd15", "SD15"), "lcm", "unknown preset 'lcm'; this version knows lcm_full_sd15"),
        (Facts("sd15", "SD15", (WRONG_LORA,)), "auto", "preset lightning_sdxl is for SDXL .*the LoRA is "
        "sdxl_lightning"),
        (Facts("sd15", "SD15", (WRONG_WORD,)), "auto", "preset tcd_sdxl is for SDXL"),
        (Facts("sdxl", "SDXL", distilled=True), "auto", "A distillation LoRA seems to be applied"),
    ],
)  # fmt: skip
def test_refusals_are_sentences(facts, choice, message):
    with pytest.raises(ValueError, match=message):
        choose(choice, facts)


def test_a_choice_by_hand_keeps_the_steps_of_the_name():
    match = choose("lightning_sdxl", Facts("sdxl", "SDXL", (File("sdxl_lightning_8step_lora.safetensors", 0.9),)))
    assert (match.steps, match.why, match.file.strength) == (8, "chosen by hand", 0.9)


def test_files_above_a_node():
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "base.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "DualCLIPLoader", "inputs": {"clip_name1": "clip_l.safetensors"}},
        "3": {"class_type": "LoraLoader", "inputs": {"model": ["1", 0], "clip": ["2", 0], "strength_model": 0.8,
                                                     "lora_name": "a/style.safetensors"}},
        "4": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["3", 0], "lora_name": "lcm.safetensors",
                                                              "strength_model": 1.0}},
        "5": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["4", 0], "lora_name": "off.safetensors",
                                                              "strength_model": 0.0}},
        "6": {"class_type": "ModelMergeSimple", "inputs": {"model1": ["5", 0], "model2": ["10", 0], "ratio": 0.5}},
        "7": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "other.ckpt"}},
        "8": {"class_type": "Reroute", "inputs": {"": ["6", 0]}},
        "9": {"class_type": "NibbleFewStepSampler", "inputs": {"model": ["8", 0], "positive": ["2", 0]}},
        "10": {"class_type": "NibbleLoraStack", "inputs": {"model": ["7", 0], "loras.lora0": ["11", 0]}},
        "11": {"class_type": "NibbleChooseLora", "inputs": {"lora_name": "tcd.safetensors", "strength_model": 0.6}},
    }  # fmt: skip
    files = upstream_files(prompt, "9")
    assert {(f.name, f.strength) for f in files} == {
        ("lcm.safetensors", 1.0), ("other.ckpt", None), ("a/style.safetensors", 0.8), ("base.safetensors", None),
        ("tcd.safetensors", 0.6),
    }  # fmt: skip
    names = [f.name for f in files]
    assert names.index("lcm.safetensors") < names.index("a/style.safetensors") < names.index("base.safetensors")
    assert upstream_files(prompt, "nowhere") == [] and upstream_files({}, "9") == []


def test_a_circle_in_the_graph_ends():
    circle = {"1": {"inputs": {"model": ["2", 0]}}, "2": {"inputs": {"model": ["1", 0], "lora_name": "x.safetensors"}}}
    assert [f.name for f in upstream_files(circle, "1")] == ["x.safetensors"]
