"""What a file, a folder or a stranger's workflow is called never stops the queue of a real server.

ComfyUI logs errors into a strict UTF-8 stream in the thread that runs the queue. A lone surrogate there (a byte of a
name that is not UTF-8) ended that thread: the server answered, and nothing ran any more. This module has a server of
its own, as it deletes the folders that others use.
"""

import json
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = json.loads((ROOT / "workflows" / "api" / "quickstart.json").read_text(encoding="utf-8"))
BYTE, HALF = "caf\udce9", "a\ud83d"  # a byte that is not UTF-8, as Python has it; half of a pair, as JSON can spell it
DEMO = QUICKSTART["1"]
LATENT, TEXT = QUICKSTART["4"], QUICKSTART["2"]


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def shown(source: str, index: int = 0) -> dict:
    return node("PreviewAny", source=[source, index])


@pytest.fixture(scope="module")
def hostile(own_server):
    """Files and folders with every kind of name, where the nodes look for them."""
    pictures = own_server.base / "input" / "pictures"
    for folder in (pictures, own_server.base / "input" / BYTE, own_server.base / "output" / "nibble"):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "red").save(pictures / "a.png")
    (pictures / "a.txt").write_text("red")
    (pictures / f"{BYTE}.png").write_bytes(b"no picture")
    (pictures / f"{BYTE}.txt").write_text("blue")
    shutil.copytree(pictures, own_server.base / "input" / "captions")
    Image.new("RGB", (64, 64), "blue").save(own_server.base / "input" / "captions" / f"{BYTE}.png")
    (own_server.base / "input" / "captions" / f"{BYTE}.txt").write_bytes(b"\0\1\2")
    for folder in ("loras", "diffusion_models", "checkpoints", "ipadapter", "controlnet", "nibble_domains"):
        (own_server.models(folder) / f"{BYTE}.safetensors").write_bytes(b"no model")
        (own_server.models(folder) / f"{BYTE}.gguf").write_bytes(b"no model")
        (own_server.models(folder) / "bad\u202e\x1b.safetensors").write_bytes(b"no model")
    (own_server.models("nibble_domains") / f"{BYTE}.yaml").write_text("id: x@1")
    for name in (f"{BYTE}.txt", "good.txt", f"{BYTE}.json"):
        (own_server.base / "input" / name).write_text("a red apple\n")
    (own_server.base / "output" / "nibble" / f"{BYTE}.json").write_text(json.dumps({"format": "nibble-profile-1"}))
    return own_server


def train(folder: str) -> dict:
    how = dict(folder=folder, name="loras/x", steps=1, batch=1, rank=1, learning_rate=1e-4, resolution=64, seed=0,
               optimizer="adamw", schedule="cosine", accumulate=1, caption_dropout=0.1, average=0.0, hold_out=0.0,
               checkpointing=False, compress_frozen=False)  # fmt: skip
    links = dict(model=["1", 0], clip=["1", 1], vae=["1", 2])
    return {"1": DEMO, "t": node("NibbleTrainLora", **links, **how), "s": shown("t", 2)}


def profiled(label: str = "run", prefix: str = "nibble/run", **meta) -> dict:
    return {"1": DEMO | meta, "p": node("NibbleProfiler", anything=["1", 0], label=label, filename_prefix=prefix)}


def saved(prefix: str) -> dict:
    return {"1": DEMO, "s": node("NibbleSaveModel", model=["1", 0], filename_prefix=prefix)}


def scored(folder: str, **more) -> dict:
    how = dict(reference_folder="none", prompts="a", image_reward=False) | more
    links = dict(clip=["1", 1], clip_vision=["1", 3])
    return {"1": DEMO, "s": node("NibbleScores", folder=folder, **links, **how)}


def domain(**more) -> dict:
    how = dict(domain="emoji@1", subject="fox", seed=0, style="auto", overrides="", triggers="none") | more
    return {"d": node("NibbleDomainPrompt", **how), "s": shown("d")}


def prompt_set(**more) -> dict:
    how = dict(set="COCO Captions", file="", domain="any", words="", calibration_count=1, evaluation_count=1, seed=0)
    return {"d": node("NibblePromptSet", **(how | more)), "s": shown("d")}


def compared(**more) -> dict:
    how = dict(reference_label="a", candidate_label="b", full_scale=0.25) | more
    pictures = {"i": node("EmptyImage", width=32, height=32, batch_size=1, color=0)}
    return pictures | {"c": node("NibbleCompareImages", reference=["i", 0], candidate=["i", 0], **how)}


# prompt, what the error has ("": it succeeds)
CASES = {
    "a picture to train on": (train("pictures"), "caf\\udce9.png"),
    "a caption to train on": (train("captions"), "caf\\udce9.txt"),
    "a picture to score": (scored("input/pictures"), "caf\\udce9.png"),
    "a caption to score by": (scored("input/captions", prompts=""), "caf\\udce9.txt"),
    "a label": (profiled(BYTE), "label: character 4 is half a letter (U+DCE9)"),
    "half of a label": (profiled(HALF), "label: character 2 is half a letter (U+D83D)"),
    "a label of several lines": (profiled("one\ntwo\x1b[31m"), ""),
    "a long label": (profiled("W" * 200_000), ""),
    "a title": (profiled(_meta={"title": f"{BYTE} {HALF}\n"}), ""),
    "a long title": (profiled(_meta={"title": "W" * 200_000}), ""),
    "a title that is none": (profiled(_meta="title"), ""),
    "a report's name": (profiled(prefix=f"nibble/{BYTE}"), "filename_prefix: character 11 is half a letter"),
    "a report's long name": (profiled(prefix="nibble/" + "x" * 1_000_116), "is too long for the name of a file"),
    "a model's name": (saved(BYTE), "half a letter"),
    "a model's name in a folder": (saved(f"{HALF}/x"), "half a letter"),
    "a model's long name": (saved("x" * 300), "is too long for the name of a file"),
    "a model's name with nothing in it": (saved("a\0b"), "a\\x00b"),
    "a model's name that leads out": (saved("../../x"), "leads out of the output folder"),
    "a subject": (domain(subject=BYTE), "subject: character 4 is half a letter"),
    "overrides": (domain(overrides=f"{HALF}: x"), "overrides: character 2 is half a letter"),
    "long overrides": (domain(overrides="x" * 1_000_116), "overrides"),
    "a file of prompts": (prompt_set(file=f"{BYTE}.json"), "file: character 4 is half a letter"),
    "a long file of prompts": (prompt_set(file="x" * 1_000_116), "xxx"),
    "a picture's label": (compared(reference_label=BYTE), "reference_label: character 4 is half a letter"),
    "a picture's long label": (compared(reference_label="W" * 200_000, candidate_label="a\nb"), ""),
}


def still_runs(own_server):
    """The quickstart, with a seed of its own so that nothing comes from the cache, gives its picture."""
    graph = json.loads(json.dumps(QUICKSTART))
    graph["5"]["inputs"] |= {"seed": time.time_ns(), "steps": 2}
    assert own_server.image(own_server.done(graph), "7").shape == (128, 128, 3)


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_name_is_a_sentence_and_the_queue_goes_on(case, hostile):
    prompt, says = CASES[case]
    found = hostile.wait(hostile.queue(prompt), 120)
    assert found.status == ("error" if says else "success"), found.error
    assert says in found.error
    assert len(found.error.strip().splitlines()) <= 1 and len(found.error) < 2010
    assert str(hostile.base) not in found.error
    found.error.encode()
    still_runs(hostile)


@pytest.mark.parametrize("name", [BYTE, HALF, "x" * 100_000, 5, None, [1], {"a": 1}, True, float("nan")])
def test_a_name_that_no_list_has_is_refused(name, hostile):
    """Whatever a stranger's workflow puts into a list's place; the server answers, and goes on."""
    for kind, field in (
        ("NibbleLoadModel", "model_name"), ("NibbleInspect", "file"), ("NibbleLoadCheckpoint", "ckpt_name"),
        ("NibbleLoadIPAdapter", "ipadapter_name"), ("NibbleChooseLora", "lora_name"),
        ("NibbleCalibrationPrompts", "source"), ("NibbleDomainPrompt", "domain"), ("NibbleScores", "folder"),
        ("NibbleCompareProfiles", "first"), ("NibbleEstimate", "file"), ("NibbleConvert", "file"),
    ):  # fmt: skip
        graph = {"n": node(kind, **{field: name}), "s": shown("n")}
        reply = hostile.post("/prompt", {"prompt": graph, "client_id": hostile.client})
        assert reply["http"] == 400, kind
    still_runs(hostile)


def test_lists_have_the_names_that_a_workflow_can_hold(hostile):
    info = hostile.get("/object_info")
    text = json.dumps({name: row for name, row in info.items() if name.startswith("Nibble")})
    assert "\\ud" not in text  # JSON's own way to write a lone surrogate
    assert "bad\\u202e\\u001b.safetensors" in text
    sources = info["NibbleCalibrationPrompts"]["input"]["required"]["source"][1]["options"]
    assert "good.txt" in sources and not any(BYTE in s for s in sources)
    assert "input/pictures" in info["NibbleScores"]["input"]["required"]["folder"][1]["options"]


@pytest.mark.parametrize("kind, field", [("NibbleLoadModel", "model_name"), ("NibbleLoadIPAdapter", "ipadapter_name")])
def test_a_name_of_controls_is_shown_escaped(kind, field, hostile):
    found = hostile.run({"n": node(kind, **{field: "bad\u202e\x1b.safetensors"}), "s": shown("n")})
    assert found.status == "error" and "bad\\u202e\\x1b.safetensors" in found.error
    assert str(hostile.base) not in found.error


NUMBERS = {
    "cfg": {"1": DEMO, "l": LATENT, "n": node("NibbleCalibrate", model=["1", 0], latent=["l", 0], preset="data_free",
            target="svdquant_w4a4", rank=16, budget_mib=0, noise_levels=2, cfg="BAD", seed=0), "s": shown("n", 1)},
    "strength_model": {"1": DEMO, "n": node("NibbleApplyLora", model=["1", 0], lora_name="LORA", strength_model="BAD",
                       strength_clip=1.0), "s": shown("n", 2)},
    "eta": {"n": node("NibbleSamplerTCD", eta="BAD"), "s": shown("n")},
    "full_scale": compared(full_scale="BAD"),
    "caption_dropout": train("pictures"),
    "shift": {"1": DEMO, "n": node("NibbleModelSamplingRectifiedFlow", model=["1", 0], velocity="data - noise",
              shift="BAD"), "s": shown("n")},
}  # fmt: skip


@pytest.mark.parametrize("field", NUMBERS)
def test_nan_in_a_workflow_is_a_sentence(field, hostile):
    """ComfyUI lets it pass: it is neither below the least nor above the most. Seven of fifteen nodes just went on."""
    listed = hostile.get("/object_info/NibbleApplyLora")["NibbleApplyLora"]["input"]["required"]["lora_name"][1]
    text = json.dumps(NUMBERS[field]).replace('"LORA"', json.dumps(listed["options"][-1]))
    graph = json.loads(text.replace('"BAD"', "NaN"))
    if field == "caption_dropout":
        graph["t"]["inputs"]["caption_dropout"] = float("nan")
    found = hostile.run(graph)
    assert found.status == "error"
    assert found.error.startswith(f"{field} is nan. Set it to a number of at least")


def test_what_comes_through_a_link_of_any_type_is_checked(hostile):
    """PreviewAny-like nodes give whatever they got; ComfyUI compares types only where both have one."""
    cases = [
        (node("NibbleSamplerTCD", eta=["a", 0]), "lots", "eta is lots. Set it to a number of at least 0 and at most 1"),
        (node("NibbleSamplerTCD", eta=["a", 0]), 7.5, "eta is 7.5. Set it to a number of at least 0 and at most 1"),
        (node("NibbleLoadDemo", precision=["a", 0], rank=16), "2-bit", "precision: 2-bit is not in its list. Choose"),
        (node("NibbleLoadDemo", precision="4-bit", rank=["a", 0]), 7.5, "rank is 7.5. Set it to a whole number"),
        (node("NibbleProfileModel", model=["a", 0], label=""), "x", "model: what came is no MODEL, but x. Connect a"),
    ]
    for wrong, value, says in cases:
        found = hostile.run({"a": node("NibbleTestAny", value=json.dumps(value)), "n": wrong, "s": shown("n")})
        assert found.status == "error" and says in found.error, found.error
    rank = node("NibbleLoadDemo", precision="4-bit", rank=["a", 0])
    hostile.done({"a": node("NibbleTestAny", value="16.0"), "n": rank, "s": shown("n")})
    still_runs(hostile)


def test_saved_pictures_do_not_carry_the_names_of_runs(hostile):
    """A graph with every node whose fingerprint looks at files; the picture holds the graph as ComfyUI changed it."""
    graph = json.loads(json.dumps(QUICKSTART)) | profiled("secret-label", "nibble/secret-name")
    hostile.done(graph)
    task = dict(width=128, height=128, batch=1, steps=4, cfg=3.0, precision="as stored", rank=16, lora_rank=0)
    graph |= {"e": node("NibbleEstimate", file="none", model=["1", 0], gpu="this one", **task)}
    graph |= {"c": node("NibbleCompareProfiles", first="the newest run", second="the newest run", third="none",
                        fourth="none")}  # fmt: skip
    graph |= {"t": node("NibbleCalibrationPrompts", source="good.txt", count=1, seed=0), "ts": shown("t")}
    graph |= domain(domain="emoji@1")
    del graph["p"]
    graph["5"]["inputs"]["seed"] = time.time_ns()
    result = hostile.done(graph)
    entry = result.outputs["7"]["images"][0]
    with Image.open(hostile.base / entry["type"] / entry["subfolder"] / entry["filename"]) as picture:
        held = json.loads(picture.text["prompt"])
    marks = {id: row["is_changed"] for id, row in held.items() if "is_changed" in row}
    assert set(marks) >= {"e", "c", "t", "d"}
    for mark in marks.values():
        assert len(mark) == 1 and len(mark[0]) <= 64 and set(mark[0]) <= set("0123456789abcdef")
    assert "secret" not in json.dumps(held)


def test_folders_that_are_deleted_are_listed_as_empty(hostile):
    """Each folder that any list is made from, one after another, while the server runs."""
    asked = (
        "NibbleLoadModel",
        "NibbleInspect",
        "NibbleScores",
        "NibbleTrainLora",
        "NibbleDomainPrompt",
        "NibbleEstimate",
    )
    rest = {"d": domain()["d"], "s": shown("d")} | {
        "t": node("NibbleCalibrationPrompts", source="shipped list", count=1, seed=0), "ts": shown("t"),
        "c": node("NibbleCompareProfiles", first="the run before it", second="the newest run", third="none",
                  fourth="none"),
        "e": node("NibbleEstimate", file="none", width=64, height=64, batch=1, steps=1, cfg=1.0, lora_rank=0, rank=0,
                  precision="as stored", gpu="this one", model=["1", 0]),
        "1": DEMO,
    }  # fmt: skip
    below = [p for parent in ("models", "output", "input") for p in (hostile.base / parent).iterdir() if p.is_dir()]
    (hostile.base / "output" / "diffusion_models").mkdir(exist_ok=True)
    below += [hostile.base / "output" / name for name in ("diffusion_models", "loras", "nibble_domains")]
    for folder in dict.fromkeys([*below, *(hostile.base / n for n in ("input", "output", "models", "temp"))]):
        folder.mkdir(parents=True, exist_ok=True)
        info = hostile.get("/object_info")  # ComfyUI now remembers the folder
        before = {name for name in info if name.startswith("Nibble")}
        shutil.rmtree(folder)
        info = hostile.get("/object_info")
        assert {name for name in info if name.startswith("Nibble")} == before, folder
        for name in asked:
            assert hostile.get(f"/object_info/{name}")[name]["input"], folder
        hostile.wait(hostile.queue(rest), 120)
        still_runs(hostile)
    names = hostile.get("/object_info/NibbleLoadModel")["NibbleLoadModel"]["input"]["required"]["model_name"][1]
    assert names["options"] == []
    (hostile.models("diffusion_models") / "new.safetensors").write_bytes(b"")
    names = hostile.get("/object_info/NibbleLoadModel")["NibbleLoadModel"]["input"]["required"]["model_name"][1]
    assert names["options"] == ["new.safetensors"]


def test_what_is_no_folder_is_listed_as_empty(hostile):
    """A file, a link that leads nowhere and one that leads to itself where folders are expected."""
    for name in ("output/nibble", "models/nibble_domains", "output/diffusion_models", "input"):
        path = hostile.base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        for target in ("", "nowhere", path.name):
            path.symlink_to(target) if target else path.touch()
            info = hostile.get("/object_info")
            assert sum(kind.startswith("Nibble") for kind in info) > 30
            hostile.done(domain())
            path.unlink()
    still_runs(hostile)
