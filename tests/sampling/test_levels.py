"""What presets visit in numbers: the table's, and the last part of a longer run where a picture is started from."""

import pytest
from comfyui_nibble.families import PRESETS
from comfyui_nibble.sampling.presets import preset
from comfyui_nibble.sampling.schedules import flux2_shift, size_shift, visits


@pytest.mark.parametrize("id", PRESETS)
def test_a_row_visits_what_it_shows(id):
    row = preset(id)
    assert visits(row) == pytest.approx(row.shown, abs=6e-5)


@pytest.mark.parametrize("id", PRESETS)
def test_every_number_of_steps_descends(id):
    row = preset(id)
    for steps in row.made_for:
        found = visits(row, steps)
        assert len(found) == steps and list(found) == sorted(set(found), reverse=True) and found[-1] > 0


@pytest.mark.parametrize(
    ("id", "steps", "denoise", "expected"),
    [
        ("distilled_sd15", 4, 0.5, (499, 374, 249, 124)),
        ("distilled_sd15", 3, 0.5, (499, 332, 166)),
        ("lcm_lora_sd15", 4, 0.5, (499, 379, 259, 139)),
        ("tcd_sdxl", 2, 0.5, (499, 259)),
        ("sd_turbo", 2, 0.5, (499, 399)),
        ("flux_schnell", 2, 0.5, (0.5, 0.25)),
        ("qwen_lightning", 2, 0.5, (0.75, 0.5)),
        ("rectified_flow_2", 5, 0.5, (0.5, 0.4, 0.3, 0.2, 0.1)),
        ("hyper_sd15", 4, 0.0, ()),
    ],
)
def test_the_last_part(id, steps, denoise, expected):
    assert visits(preset(id), steps, denoise) == pytest.approx(expected)


def test_shifts_by_size():
    assert size_shift((1024, 1024)) == pytest.approx(3.1582, abs=1e-4)  # e^1.15
    assert size_shift((256, 256)) == pytest.approx(1.6487, abs=1e-4)  # e^.5
    assert visits(preset("hyper_flux"), 2, 1.0, (256, 256))[1] == pytest.approx(0.6225, abs=1e-4)
    assert flux2_shift((1024, 1024), 4) == pytest.approx(9.886, abs=0.01)
    assert flux2_shift((2048, 2048), 4) == pytest.approx(flux2_shift((2048, 2048), 50))


@pytest.mark.parametrize(("id", "steps"), [("instaflow", 2), ("perflow_sd15", 3), ("sd_turbo", 11)])
def test_a_run_that_there_is_not(id, steps):
    with pytest.raises(ValueError, match="step"):
        visits(preset(id), steps)
