"""Timesteps by strength, denoise and list: hand-computed values, and refusals in words."""

import pytest
from comfyui_nibble.sampling import schedules as s
from comfyui_nibble.sampling.presets import preset


def test_grids_by_hand():
    assert s.consistency_grid(4) == (999, 759, 499, 259)
    assert s.consistency_grid(1) == (999,)
    assert s.consistency_grid(4, 0.5) == (499, 379, 259, 139)  # 25 points left: indices 0, 6, 12, 18 from the top
    assert s.trailing(4) == (999, 749, 499, 249)
    assert s.trailing(3) == (999, 666, 332)
    assert s.tenths(4) == (999, 899, 799, 699)
    assert s.tenths(2, 0.5) == (499, 399)
    assert s.windows(4) == (1000, 750, 500, 250)
    assert s.windows(6) == (1000, 875, 750, 625, 500, 250)
    assert s.windows(8) == (1000, 875, 750, 625, 500, 375, 250, 125)


@pytest.mark.parametrize("n", range(1, 51))
def test_grids_descend_inside_the_table(n):
    for grid in (s.consistency_grid(n), s.trailing(n), s.windows(max(n, 4))):
        assert list(grid) == sorted(set(grid), reverse=True)
        assert 0 <= grid[-1] <= grid[0] <= 1000


def test_denoise_takes_the_last_steps_of_a_longer_run():
    row = preset("lightning_sdxl")
    assert s.plan(row, 4, 0.5) == s.Plan(4, "simple", 8)
    assert s.plan(row, 4, 0.6) == s.Plan(4, timesteps=s.trailing(6)[-4:])  # 6 does not divide 1000
    assert s.plan(preset("rectified_flow_2"), 2, 0.5).sigmas == (0.5, 0.25)
    assert s.plan(preset("perflow_sd15"), 4, 0.5).timesteps == (500, 375, 250, 125)
    assert s.plan(preset("lcm_lora_sd15"), 4, 0.5).timesteps == s.consistency_grid(4, 0.5)
    assert s.plan(preset("lcm_lora_sd15"), 4) == s.Plan(4, "simple", 4)


@pytest.mark.parametrize(
    ("id", "steps", "denoise", "message"),
    [
        ("lcm_lora_sd15", 4, 0.05, "4 steps do not fit into the 2 trained timesteps .* raise denoise to 0.08 or more"),
        ("tcd_sdxl", 51, 1.0, "at most 50 steps"),
        ("sdxl_turbo", 11, 1.0, "this schedule has 10 steps at denoise 1, not 11"),
        ("sdxl_turbo", 6, 0.5, "this schedule has 5 steps at denoise 0.5, not 6"),
        ("dmd2_sdxl_1step", 0, 0.5, "draws in one step from pure noise and has no image-to-image form"),
        ("instaflow", 2, 1.0, "draws in one step only, not in 2: set steps to 1"),
        ("perflow_sdxl", 3, 1.0, "use 4 or more steps"),
    ],
)
def test_runs_that_do_not_exist(id, steps, denoise, message):
    with pytest.raises(ValueError, match=message):
        s.plan(preset(id), steps, denoise)


@pytest.mark.parametrize("text", ["999, 749, 499", "999 749 499", "[999, 749, 499]", " 999,749 ,499\n"])
def test_timestep_lists(text):
    assert s.parse_timesteps(text) == (999, 749, 499)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got 0 numbers"),
        ("999, abc", "'abc' is not a number"),
        ("1000", "1000 is outside 0 to 999"),
        ("nan", "nan is outside"),
        ("499, 499", "499 comes after 499; write them from high to low"),
        ("1 " * 1001, "got 1001 numbers"),
        ("9" * 5000, "outside"),
    ],
)
def test_bad_timestep_lists(text, message):
    with pytest.raises(ValueError, match=message):
        s.parse_timesteps(text)


def test_the_last_part_of_a_list():
    assert s.last_part((999, 749, 499, 249), 0.5) == (499, 249)
    assert s.last_part((999,), 1.0) == (999,)
    with pytest.raises(ValueError, match=r"strength 0.2 leaves none of 4 timesteps"):
        s.last_part((999, 749, 499, 249), 0.2)
