"""``nibble generate`` as people type it, on the shipped model: which timesteps the network sees, which words, and what
is drawn from pictures.
"""

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_nibble import demo
from comfyui_nibble.headless import pipeline
from comfyui_nibble.headless.cli import main
from comfyui_nibble.metrics.images import mean_psnr
from comfyui_nibble.prompts import domain, expand
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

PLAIN = ["--precision", "16-bit"]
TRAILING = {1: [999], 2: [999, 499], 4: [999, 749, 499, 249]}
STYLE = str(demo.LORAS["style"])


@pytest.fixture(scope="module")
def loaded():
    return pipeline.load_pipeline(demo.MODEL)


@pytest.fixture(autouse=True)
def _load_once(loaded, monkeypatch):
    """The demo model is read from the disk once; every command gets a copy of its own."""
    load = pipeline.load_pipeline

    def copy(folder, *args, **kwargs):
        if folder != demo.MODEL:
            return load(folder, *args, **kwargs)
        return deepcopy(loaded, {id(loaded.tokenizer): loaded.tokenizer})  # a copy of a tokenizer is not quite one

    monkeypatch.setattr(pipeline, "load_pipeline", copy)


@pytest.fixture
def seen(monkeypatch):
    """The timesteps that the UNet is told, one a step."""
    told, forward = [], UNet2DConditionModel.forward

    def listen(self, sample, timestep, *args, **kwargs):
        told.append(float(torch.as_tensor(timestep).flatten()[0]))
        return forward(self, sample, timestep, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", listen)
    return told


@pytest.fixture
def words(monkeypatch):
    """(prompt, negative) of each encoding."""
    told, encode = [], StableDiffusionPipeline.encode_prompt

    def listen(self, prompt, *args, **kwargs):
        negative = args[3] if len(args) > 3 else kwargs.get("negative_prompt")
        told.append((prompt, negative))
        return encode(self, prompt, *args, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", listen)
    return told


@pytest.fixture
def draw(tmp_path, capsys):
    """draw(arguments) -> (pictures, what stderr said), for a run that must end well."""

    def run(*args):
        assert main(["generate", *map(str, args), "--out", str(tmp_path / "out")]) == 0
        said = capsys.readouterr()
        files = [line for line in said.out.split("\n") if line.endswith(".png")]
        return [np.asarray(Image.open(f), np.float32) / 255 for f in files], said.err

    return run


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """lora(name, metadata): the demo's LCM LoRA under another name and word of itself."""
    folder = tmp_path_factory.mktemp("loras")

    def write(name: str, **metadata) -> Path:
        tensors = load_file(demo.LORAS["lcm"])
        save_file(tensors, folder / name, {k: json.dumps(v) for k, v in metadata.items()})
        return folder / name

    return write


@pytest.fixture(scope="module")
def apple(tmp_path_factory):
    """A picture of 128 x 96 pixels."""
    path = tmp_path_factory.mktemp("pictures") / "apple.png"
    Image.open(demo.PICTURES / "1f34e.webp").convert("RGB").resize((128, 96)).save(path)
    return path


# The command line's LoRAs of 0.1.0, and the node's.
def old(way: str, steps: int, writer: str) -> dict:
    key = {"command": "way", "node": "mode"}[writer]
    return {"nibble_distill": {key: way, "steps": steps, "updates": 300}, "nibble": {"method": f"distill {way}"}}


@pytest.mark.parametrize("writer", ["command", "node"])
@pytest.mark.parametrize(
    ("way", "steps", "visits"),
    [("phased", 4, TRAILING[4]), ("reflow", 2, TRAILING[2]), ("one_step", 4, TRAILING[1]),
     ("progressive", 4, TRAILING[4]), ("lcm", 4, [999, 759, 499, 259]), ("lcf", 2, [999, 499])],
)  # fmt: skip
def test_a_distilled_lora_is_sampled_as_it_was_trained(way, steps, visits, writer, lora, draw, seen):
    file = lora(f"mine-{way}-{writer}.safetensors", **old(way, steps, writer))
    draw("red apple", *PLAIN, "--lora", file)
    assert seen == visits


def test_one_step_is_a_picture_and_no_noise(lora, draw):
    """The base's own first guess: leading timesteps have it take noise for a picture."""
    file = lora("zero.safetensors", **old("one_step", 1, "command"))
    guess, _ = draw("red apple", *PLAIN, "--lora", f"{file}:0.0001", "--seed", 7, "--steps", 1, "--cfg", 1)
    pipe = pipeline.load_pipeline(demo.MODEL)
    psnr = mean_psnr(pipeline.sample(pipe, ["red apple"], 12, 3.0, 7), guess)
    assert psnr > 15, f"{psnr:.1f} dB"


def test_steps_and_cfg_are_the_persons(lora, draw, seen):
    file = lora("mine.safetensors", **old("phased", 4, "command"))
    draw("red apple", *PLAIN, "--lora", file, "--steps", 2, "--cfg", 2)
    assert seen == TRAILING[2]


def test_strength_0_changes_nothing_and_says_so(draw):
    (plain,), _ = draw("red apple", *PLAIN, "--steps", 1)
    (off,), said = draw("red apple", *PLAIN, "--lora", f"{STYLE}:0", "--steps", 1)
    assert f"{Path(STYLE).name}: strength 0, nothing is changed" in said and np.array_equal(plain, off)


@pytest.mark.parametrize("name", ["mine.safetensors", "my-lcm-lora.safetensors"])
def test_lcm_adds_nothing_to_a_distillation(name, lora, draw, seen, monkeypatch):
    from comfyui_nibble.headless import draw as work

    added = []
    monkeypatch.setattr(work, "add_lora", lambda pipe, path, strength: added.append(path.name))
    draw("red apple", *PLAIN, "--lcm", "--lora", lora(name, **(old("lcf", 2, "command") if name[:2] == "mi" else {})),
         "--lora", STYLE, "--steps", 2)  # fmt: skip
    assert added == [name, Path(STYLE).name] and seen == [999, 499]
    draw("red apple", *PLAIN, "--lcm", "--lora", STYLE, "--steps", 2)
    assert added[2:] == [Path(STYLE).name, demo.LORAS["lcm"].name]


def test_lcm_beside_another_way_is_left_out_and_said(lora, draw, seen):
    _, said = draw("red apple", *PLAIN, "--lcm", "--lora", lora("mine.safetensors", **old("phased", 2, "command")))
    assert seen == TRAILING[2] and "--lcm is left out: mine.safetensors is a distillation itself" in said


@pytest.mark.parametrize(
    ("preset", "visits", "said"),
    [
        ("none", [501, 1], ""),
        ("hyper_sd15", TRAILING[2], "no file given says that it is one"),
        ("tcd_sd15", [999, 499], "tcd"),
        ("distilled_sd15", TRAILING[2], "chosen by hand"),
        ("rectified_flow_2", [1000, 500], "2-Rectified Flow"),
    ],
)
def test_presets_by_name(preset, visits, said, draw, seen):
    pictures, err = draw("red apple", *PLAIN, "--preset", preset, "--steps", 2)
    assert seen == visits and said in err and np.isfinite(pictures[0]).all()


def test_the_metadata_that_distill_writes(draw, seen, tmp_path, capsys):
    out, prompts = tmp_path / "one.safetensors", tmp_path / "prompts.txt"
    prompts.write_text("red apple\n", encoding="utf-8")
    args = ["--updates", "1", "--batch", "1", "--pairs", "1", "--teacher-steps", "1", "--rank", "4", "--samples", "1"]
    assert main(["distill", "--way", "one_step", "--out", str(out), *args, *PLAIN, "--prompts", str(prompts)]) == 0
    seen.clear()
    _, said = draw("red apple", *PLAIN, "--lora", out)
    assert seen == [999] and "the metadata of one.safetensors says preset distilled_sd15" in said
    from comfyui_nibble.checkpoints import header

    record = json.loads(header.read(out).metadata["nibble"])
    assert record["preset"] == "distilled_sd15"
    assert record["sampling"] == {"sampler": "euler", "schedule": "trailing", "steps": 1, "cfg": 1.0}


def test_a_domain_writes_for_the_encoder_and_what_to_keep_out(draw, words):
    draw("a mug", "an old lamp", *PLAIN, "--domain", "product-photo", "--steps", 1, "--cfg", 3, "--seed", 5)
    found = domain.load("product-photo")
    want = [expand.resolve(found, s, 5 + i, "tags") for i, s in enumerate(("a mug", "an old lamp"))]
    assert words[-1] == ([p.positive for p in want], [p.negative for p in want])
    assert all(p.tokens <= 77 for p in want)


@pytest.mark.parametrize(
    ("more", "negative"),
    [(["--negative", "text"], ["text"]), (["--negative", ""], [""]), (["--cfg", "1"], None)],
)
def test_the_persons_negative_prompt_comes_first(more, negative, draw, words):
    draw("a mug", *PLAIN, "--domain", "product-photo", "--steps", 1, *more)
    assert words[-1][1] == negative


def test_a_negative_prompt_changes_the_picture_or_it_is_said(draw):
    base, _ = draw("red apple", *PLAIN, "--steps", 2)
    other, _ = draw("red apple", *PLAIN, "--steps", 2, "--negative", "red")
    assert mean_psnr(base, other) < 40
    _, said = draw("red apple", *PLAIN, "--steps", 1, "--negative", "red", "--cfg", 1)
    assert "the negative prompt has no effect at cfg 1" in said
    _, said = draw("red apple", *PLAIN, "--steps", 1, "--guidance", 3)
    assert "--guidance has no effect" in said


def test_what_a_domain_names_is_said_or_used(draw, words):
    _, said = draw("apple", *PLAIN, "--domain", "emoji", "--steps", 1)
    assert "suits the LoRA nibble_demo_flat_style.safetensors" in said and "lcm_lora_sd15: 4 steps by --lcm" in said
    assert "flat style" not in words[-1][0][0]
    _, said = draw("apple", *PLAIN, "--domain", "emoji", "--steps", 1, "--lora", STYLE, "--lcm")
    assert "suits" not in said and words[-1][0][0].endswith("flat style")


def test_a_prompt_that_is_cut_is_said(draw):
    _, said = draw(" ".join(["apple"] * 90), *PLAIN, "--steps", 1)
    assert "the prompt has 92 tokens and the text encoder reads 77. Not read: apple apple" in said
    _, said = draw("red apple", *PLAIN, "--steps", 1)
    assert "tokens" not in said


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.txt", "red apple\n# no\n\nfox face\nred apple\n"),
     ("p.csv", 'n,prompt\n1,red apple\n2,fox face\n3,"red apple"\n'),
     ("p.jsonl", '{"prompt": "red apple"}\n"fox face"\n{"text": "red apple"}\n')],
)  # fmt: skip
def test_prompts_from_a_file(name, content, draw, words, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-16")
    pictures, _ = draw("rocket", *PLAIN, "--prompts", tmp_path / name, "--steps", 1, "--batch", 3, "--lcm")
    assert [w[0] for w in words] == [["rocket", "red apple", "fox face"], ["red apple"]]
    assert len(pictures) == 4
    alone, _ = draw("red apple", *PLAIN, "--steps", 1, "--lcm", "--seed", 3)  # each has its own seed, in any batch
    assert mean_psnr(pictures[3:], alone) > 40


def test_sizes(draw):
    pictures, _ = draw("red apple", *PLAIN, "--steps", 1, "--width", 96, "--height", 64)
    assert pictures[0].shape == (64, 96, 3)


def test_from_a_picture(apple, draw, seen):
    """The nodes' steps: the last ones of a longer run, all of those that were asked for."""
    out, _ = draw("green apple", *PLAIN, "--lcm", "--image", apple, "--strength", 0.5, "--steps", 2)
    assert seen == [499, 259] and out[0].shape == (112, 144, 3)  # its shape, in the model's number of pixels
    seen.clear()
    near, _ = draw("red apple", *PLAIN, "--preset", "distilled_sd15", "--image", apple, "--strength", 0.1, "--steps", 2,
                   "--width", 128, "--height", 96)  # fmt: skip
    assert seen == [99, 49]
    assert mean_psnr([np.asarray(Image.open(apple), np.float32) / 255], near) > 18
    seen.clear()
    draw("red apple", "fox face", *PLAIN, "--image", apple, "--strength", 0.5, "--steps", 3)
    assert len(seen) == 6 and max(seen) < 600


def test_a_mask_keeps_what_is_black(apple, draw, tmp_path, seen):
    half = np.zeros((96, 128), np.uint8)
    half[:, :64] = 255
    Image.fromarray(half).save(tmp_path / "mask.png")
    out, _ = draw("fox face", *PLAIN, "--lcm", "--image", apple, "--mask", tmp_path / "mask.png", "--steps", 2,
                  "--width", 128, "--height", 96)  # fmt: skip
    have = np.asarray(Image.open(apple), np.float32) / 255
    assert seen == [999, 499]
    assert mean_psnr([have[:, 80:]], [out[0][:, 80:]]) > mean_psnr([have[:, :48]], [out[0][:, :48]]) + 6


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory, loaded):
    from diffusers import ControlNetModel

    folder = tmp_path_factory.mktemp("controlnet")
    net = ControlNetModel.from_unet(loaded.unet, conditioning_embedding_out_channels=(16, 16, 16, 16))
    for layer in net.controlnet_down_blocks:
        torch.nn.init.normal_(layer.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    net.save_pretrained(folder)
    return folder


def test_a_controlnet_with_words_a_picture_and_a_mask(controlnet, apple, draw, seen, tmp_path):
    Image.new("L", (128, 96), 255).save(tmp_path / "mask.png")
    args = ["--controlnet", controlnet, "--control", apple, "--lcm", "--steps", 2]
    off, _ = draw("red apple", *PLAIN, *args, "--control-strength", 0)
    plain, _ = draw("red apple", *PLAIN, "--lcm", "--steps", 2)
    on, _ = draw("red apple", *PLAIN, *args)
    assert mean_psnr(off, plain) > 40 and mean_psnr(off, on) < 40
    for more in ([], ["--mask", tmp_path / "mask.png"]):
        seen.clear()
        draw("red apple", *PLAIN, *args, "--image", apple, "--strength", 0.5, *more)
        assert seen == [499, 259]


def test_an_ip_adapter_on_4_bit_weights(apple, draw):
    args = ["--ip-adapter", demo.IP_ADAPTERS["plain"], "--ip-picture", apple, "--lcm", "--steps", 1]
    off, _ = draw("red apple", *args, "--ip-strength", 0)
    on, _ = draw("red apple", *args)
    assert mean_psnr(off, on) < 40


WRONG = [
    ([], "there is nothing to draw"),
    (["x", "--width", "100"], "--width 100: this model wants a multiple of 8, such as 96"),
    (["x", "--height", "8192"], "--height 8192: give 64 to 4096 pixels"),
    (["x", "--steps", "0"], "--steps 0: give 1 to 1000"),
    (["x", "--cfg", "0"], "--cfg 0: give 1 to 100; 1 means no guidance"),
    (["x", "--cfg", "nan"], "--cfg nan: give 1 to 100"),
    (["x", "--batch", "0"], "--batch 0"),
    (["x", "--seed", "-1"], "--seed -1"),
    (["x", "--preset", "fast"], "unknown preset 'fast'; this version knows lcm_full_sd15"),
    (["x", "--preset", "lightning_sdxl"], "preset lightning_sdxl is for SDXL and this model is SD 1.5"),
    (["x", "--preset", "instaflow", "--steps", "3"], "draws in one step only, not in 3"),
    (["x", "--preset", "perflow_sd15", "--steps", "2"], "use 4 or more steps"),
    (["x", "--lcm", "--preset", "tcd_sd15"], "--lcm is a preset itself"),
    (["x", "--lcm", "--steps", "60"], "60 steps do not fit into the 50 trained timesteps"),
    (["x", "--mask", "{apple}"], "give --image"),
    (["x", "--strength", "0.5"], "--strength goes with --image"),
    (["x", "--image", "{apple}", "--strength", "0"], "--strength 0: give more than 0, at most 1"),
    (["x", "--image", "{apple}", "--strength", "nan"], "--strength nan"),
    (["x", "--image", "gone.png"], "--image gone.png: there is no such file"),
    (["x", "--image", "{text}"], "bad.png: it cannot be read as a picture"),
    (["x", "--image", "{apple}", "--mask", "{tall}"], "tall.png: it is 32 x 64 pixels and the picture 128 x 96"),
    (["x", "--image", "{apple}", "--mask", "{black}"], "black.png: nothing in it is white"),
    (["x", "--control", "{apple}"], "--controlnet FOLDER and --control PICTURE go together"),
    (["x", "--controlnet", "{folder}", "--control", "{apple}"], "not the folder of a ControlNet"),
    (["x", "--controlnet", "{model}/unet", "--control", "{apple}"], "unet: not the folder of a ControlNet"),
    (["x", "--ip-adapter", "{folder}"], "--ip-adapter FOLDER and --ip-picture PICTURE go together"),
    (["x", "--ip-adapter", "{folder}", "--ip-picture", "{apple}"], "there is no IP-Adapter in it"),
    (["x", "--ip-adapter", "{style}", "--ip-picture", "{apple}"], "holds no IP-Adapter as diffusers reads them"),
    (["x", "--ip-adapter", "{ip}", "--ip-picture", "{apple}"], "2 files are in it"),
    (["x", "--prompts", "gone.txt"], "gone.txt: there is no such file"),
    (["x", "--prompts", "{empty}"], "has no prompt"),
    (["x", "--lora", "{text}"], "bad.png: not a whole safetensors file"),
    (["x", "--lora", "{style}:1e9"], "there is no such LoRA file"),
    (["x", "--domain", "cars"], "unknown domain 'cars'"),
    (["x", "--model", "{folder}"], "not a diffusers pipeline folder"),
    (["x", "--model", "gone"], "--model gone: there is no such folder"),
    (["x", "--out", "{text}"], "nibble.png: it cannot be written (there is a file where its folder should be)"),
]


@pytest.mark.parametrize(("args", "words"), WRONG, ids=[" ".join(a) or "nothing" for a, _ in WRONG])
def test_a_mistake_is_one_sentence(args, words, apple, tmp_path, capsys):
    places = {n: tmp_path / f"{n}.png" for n in ("tall", "black")} | {"text": tmp_path / "bad.png", "apple": apple}
    places |= {"model": demo.MODEL, "style": STYLE, "ip": demo.IP_ADAPTERS["plain"].parent}
    places |= {"folder": tmp_path / "folder", "empty": tmp_path / "empty.txt"}
    Image.new("L", (32, 64), 255).save(places["tall"])
    Image.new("L", (128, 96), 0).save(places["black"])
    places["text"].write_text("no picture", encoding="utf-8")
    places["empty"].write_text("\n", encoding="utf-8")
    places["folder"].mkdir()
    args = [a.format(**places) for a in args]
    out = [] if "--out" in args else ["--out", str(tmp_path / "out")]
    assert main(["generate", *args, *PLAIN, *out]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "nibble: " in error and words in error, error
    assert not list(tmp_path.glob("out/*"))
