"""LoRAs that this pack distilled, of 0.1.0 and of today, from the node and the command line: all are known again."""

import json

import pytest
from comfyui_nibble.checkpoints.save import record
from comfyui_nibble.headless import distill as command
from comfyui_nibble.sampling import distilled
from comfyui_nibble.sampling.detect import Facts, File, choose, detect, find
from comfyui_nibble.training.distill import MODES

UNETS = ("sd15", "sd2", "sdxl")
PRESETS = {
    "lcm": {"sd15": "lcm_lora_sd15", "sd2": "lcm_sd21", "sdxl": "lcm_lora_sdxl"},
    "other": {family: f"distilled_{family}" for family in UNETS},
}


def written(way: str, steps: int, how: str, family: str = "sd15") -> dict[str, str]:
    """A file's metadata by each of its writers; the node's and the command line's of 0.1.0 as they were."""
    old = {
        "node": {"mode": way, "updates": 300, "steps": steps, "sampling": "sampler euler, scheduler sgm_uniform"},
        "command": {"way": way, "updates": 300, "batch": 4, "rank": 16, "rate": 1e-4, "cfg": 3.0, "steps": steps},
    }
    if how in old:
        return {"nibble_distill": json.dumps(old[how]), "nibble": json.dumps({"method": f"distill {way}"})}
    if how == "record alone":
        return record(method=f"distill {way}", **distilled.record(way, steps, family))
    return {"nibble_distill": json.dumps(old["command"])} | record(method="", **distilled.record(way, steps, family))


def test_the_ways_are_those_of_the_trainer():
    assert set(distilled.CONSISTENT) < set(distilled.WORDS) and set(distilled.WORDS) == set(MODES) == set(command.WAYS)


@pytest.mark.parametrize("how", ["node", "command", "record alone", "now"])
@pytest.mark.parametrize("family", UNETS)
@pytest.mark.parametrize("way", MODES)
def test_every_way_is_sampled_as_it_was_trained(way, family, how):
    match = detect(Facts(family, "Class", (File("mine.safetensors", 1.0, written(way, 6, how, family)),)))
    row = match.preset
    assert row.id == PRESETS["lcm" if way in ("lcm", "lcf") else "other"][family]
    assert match.steps == (1 if way == "one_step" else 6) and "mine.safetensors" in match.why
    told = distilled.record(way, 6, family)["sampling"]
    assert (told["sampler"], told["schedule"], told["steps"]) == (row.sampler, row.schedule, match.steps)


@pytest.mark.parametrize("family", ["flux", "sd3", "z_image"])
def test_a_flow_model_has_no_preset_of_it_and_the_sentence_says_how(family):
    assert distilled.record("phased", 4, family) == {
        "sampling": {"sampler": "euler", "schedule": "simple", "steps": 4, "cfg": 1.0}
    }
    facts = Facts(family, "Class", (File("mine.safetensors", 1.0, written("phased", 4, "node")),))
    with pytest.raises(ValueError, match=r"mine\.safetensors says .* phased; .*sampler euler, .* 4 steps, cfg 1"):
        detect(facts)


def test_a_name_does_not_outdo_what_the_file_says():
    named = File("my-lcm-lora.safetensors", 1.0, written("reflow", 4, "command"))
    assert detect(Facts("sd15", "Class", (named,))).preset.id == "distilled_sd15"


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"way": []}', '{"way": "guess"}', '{"mode": null}', "[" * 9000])
def test_junk_says_nothing(text):
    file = File("style.safetensors", 1.0, {"nibble_distill": text, "nibble": text})
    assert find(Facts("sd15", "Class", (file,))) is None


@pytest.mark.parametrize("steps", [0, -1, 51, 2.5, "4", True, None])
def test_a_number_of_steps_that_cannot_be_is_the_presets_own(steps):
    text = json.dumps({"way": "phased", "steps": steps})
    assert detect(Facts("sd15", "Class", (File("a", 1.0, {"nibble_distill": text}),))).steps == 0


def test_they_can_be_chosen_by_hand():
    assert choose("distilled_sdxl", Facts("sdxl", "SDXL")).preset.schedule == "trailing"
