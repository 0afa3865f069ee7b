"""Image prompts in ComfyUI: against diffusers' own IP-Adapters, on the 4-bit base, and as workflows in a server."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "image_prompt"))
import adapter_shapes  # noqa: E402
import image_prompt_files as tiny_files  # noqa: E402

KINDS = {"sd15": ("plain", "plus", "full", "lora"), "sdxl": ("plain", "plus", "lora")}
LAYERS = {"sd15": (16, 1), "sdxl": (70, 10)}


def stored(shape: str) -> dict[str, torch.Tensor]:
    """Weights, inputs and diffusers' results, in one dict."""
    clip, x = tiny_files.tower(), tiny_files.inputs(shape)
    g = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (2, tiny_files.SIZE, tiny_files.SIZE, 3), generator=g) / 255
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((image - mean) / std).movedim(-1, 1)
    model = tiny_files.unet(shape)
    out = {f"unet.{k}": v for k, v in model.state_dict().items()} | {
        f"tower.{k}": v for k, v in clip.state_dict().items()
    }
    added = {k: x[k] for k in ("text_embeds", "time_ids") if k in x}
    out["out.none"] = model(x["x"], x["t"], x["text"], added_cond_kwargs=added).sample
    files = {kind: tiny_files.adapter_file(model, kind, seed) for seed, kind in enumerate(KINDS[shape], 10)}
    given = {kind: tiny_files.features(clip, pixels, kind).repeat_interleave(2, 0) for kind in files}

    def drawn(kinds: list[str], images: int = 1) -> torch.Tensor:
        chosen = [given[k][:, :images] for k in kinds]
        return tiny_files.drawn(tiny_files.unet(shape), x, [files[k] for k in kinds], chosen)

    for kind in [k for k in files if k != "lora"]:
        out[f"out.{kind}"] = drawn([kind])
    out["out.lora"] = tiny_files.drawn_by_ours(tiny_files.unet(shape), x, files["lora"], given["lora"])
    out["out.two"], out["out.two images"] = drawn(["plain", "plus"]), drawn(["plain"], images=2)
    if shape == "sdxl":
        times = model.add_time_proj(x["time_ids"].flatten()).reshape(len(x["x"]), -1)
        x["y"] = torch.cat([x["text_embeds"], times], -1)
    out |= {f"in.{k}": v for k, v in x.items()} | {"image": image}
    return out | {f"{kind}.{k}": v for kind, file in files.items() for k, v in file.items()}


TOWER = dict(
    hidden_size=tiny_files.HIDDEN, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_channels=3,
    image_size=tiny_files.SIZE, patch_size=8, projection_dim=tiny_files.EMBED, hidden_act="quick_gelu",
    layer_norm_eps=1e-5, model_type="clip_vision_model",
)  # fmt: skip


@pytest.fixture(scope="module")
def parity(inside, tmp_path_factory) -> dict[str, dict]:
    """What the nodes' code makes of the same weights, shape by shape."""
    torch.set_num_threads(1)
    folder, given = tmp_path_factory.mktemp("parity"), []
    for shape in KINDS:
        with torch.no_grad():
            tensors = {k: v.contiguous().clone() for k, v in stored(shape).items()}
        save_file(tensors, folder / f"{shape}.safetensors")
        unet = tiny_files.COMFYUI[shape] | {"context_dim": tiny_files.CONTEXT}
        given += [folder / f"{shape}.safetensors", json.dumps({"unet": unet, "tower": TOWER, "kinds": KINDS[shape]})]
    found = dict(zip(KINDS, inside("image_prompt_parity", *given), strict=True))
    print(json.dumps(found))
    return found


@pytest.mark.parametrize("shape", KINDS)
def test_the_same_as_diffusers_in_every_cross_attention(parity, shape):
    r = parity[shape]
    for name in ("base", *KINDS[shape], "two", "two images", "plain 0.3 + 0.7", "lora 0.3 + 0.7", "white mask"):
        assert r[name] <= 1e-5, name
    assert all(r[f"{kind} effect"] > 0.05 for kind in KINDS[shape]) and r["average differs"] > 1e-3
    assert r["fired"] == {kind: list(LAYERS[shape]) for kind in KINDS[shape]}


@pytest.mark.parametrize("shape", KINDS)
def test_what_is_not_prompted_is_not_changed(parity, shape):
    r = parity[shape]
    assert r["weight 0"] and r["range"] == {"before": True, "inside": False, "after": True}
    assert r["black mask"] == 0 and r["mask of the batch"][0] <= 1e-5 and r["mask of the batch"][1] == 0
    assert r["after another replacer"] == 0 and r["it counts"] > 0.01


@pytest.mark.parametrize("shape", KINDS)
def test_style_and_composition_are_the_deepest_level(parity, shape):
    """As InstantStyle does for SD1.5; these are no SDXL by their text width, which has blocks of its own."""
    style, composition = {"sd15": ((3, 4, 5), (7, 8)), "sdxl": ((0, 1, 2), (7, 8))}[shape]
    assert parity[shape]["style"] == [["output", n] for n in style]
    assert parity[shape]["composition"] == [["input", n] for n in composition] + [["middle", 0]]


@pytest.fixture(scope="module")
def uni_file(tmp_path_factory) -> Path:
    """A global adapter for the demo model: its tower and its text are 128 wide."""
    path = tmp_path_factory.mktemp("uni") / "uni-demo.safetensors"
    save_file(tiny_files.randomised(adapter_shapes.uni(128, 4), 3), path)
    return path


def test_the_demo_adapters_do_the_same_on_the_4_bit_base(inside, uni_file):
    r = inside("image_prompt_demo", uni_file)
    print(json.dumps(r))
    assert r["same codes"]
    for name in ("plain", "lora"):
        one = r[name]
        assert one["moved"] > 0.05, name
        assert one["error with it"] <= 1.25 * r["4-bit error"], name
        assert one["cosine of the move"] > 0.85, name
        assert one["weight 0"] and one["16 bits after use"] and one["dtypes"] == ["torch.float16"], name
    uni = r["uni"]
    assert uni["tokens"] == [4, 4] and uni["text kept"] and uni["given back"] and uni["error"] <= 1e-6
    assert r["pickle"].startswith("adapter.bin: only safetensors files are loaded. Convert it")


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def graph_of(model: list | None = None, name="nibble_demo_ip-adapter.safetensors", **apply) -> dict:
    """A workflow on the 4-bit demo model; the image prompt is a red square, ``apply`` changes the node's inputs."""
    more = dict(weight=1.0, start_percent=0.0, end_percent=1.0, blocks="all", combine="concatenate") | apply
    return {
        "model": node("NibbleLoadDemo", precision="4-bit", rank=16),
        "adapter": node("NibbleLoadIPAdapter", ipadapter_name=name),
        "red": node("EmptyImage", width=96, height=64, batch_size=1, color=0xCC2211),
        "apply": node("NibbleApplyIPAdapter", model=model or ["model", 0], ipadapter=["adapter", 0],
                      clip_vision=["model", 3], image=["red", 0], **more),
        "text": node("CLIPTextEncode", clip=["model", 1], text=""),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        **{f"sample {k}": node("KSampler", model=[source, 0], positive=["text", 0], negative=["text", 0], seed=1,
                               latent_image=["latent", 0], steps=3, cfg=2.0, sampler_name="ddim",
                               scheduler="ddim_uniform", denoise=1.0)
           for k, source in (("with", "apply"), ("without", "model"))},
        **{f"save {k}": node("SaveLatent", samples=[f"sample {k}", 0], filename_prefix=f"ip/{k}")
           for k in ("with", "without")},
    }  # fmt: skip


def test_the_workflow(server):
    """A heart takes the colour of the apple that is its image prompt."""
    result = server.done(json.loads((ROOT / "workflows" / "api" / "image-prompt.json").read_text()))
    assert "- for: the demo model (7 cross-attentions" in result.text("9")
    apple, prompted, alone = (server.image(result, save) for save in ("15", "16", "17"))
    assert apple.shape == prompted.shape == alone.shape == (128, 128, 3)

    def colour(picture):
        return picture[picture.min(-1) < 0.9].mean(0)

    near, far = (abs(colour(p) - colour(apple)).max() for p in (prompted, alone))
    print("distance of the mean colour to the apple's: with the picture", near, "without", far)
    assert near < far


@pytest.mark.parametrize(
    ("inputs", "same"),
    [
        ({"weight": 0.0}, True),
        ({"start_percent": 0.9, "end_percent": 0.9}, True),
        ({"blocks": "style"}, False),
        ({}, False),
    ],
    ids=["weight 0", "no steps", "style", "all"],
)
def test_weight_and_range_in_the_server(server, inputs, same):
    result = server.done(graph_of(**inputs))
    assert torch.equal(server.latent(result, "save with"), server.latent(result, "save without")) == same


def test_what_does_not_go_together_is_said_in_a_sentence(server, tiny, uni_file):
    """A model without attn2, a file of another kind, and a pickle, which is not even listed."""
    target = server.models("diffusion_models") / "ip-flux.safetensors"
    if not target.exists():
        target.symlink_to(tiny("flux"))
    graph = graph_of(["flux", 0])
    graph["flux"] = node("UNETLoader", unet_name=target.name, weight_dtype="default")
    error = server.run(graph).error
    assert "Flux has no cross-attention to text (attn2)" in error and "Use a UNet, such as SD1.5" in error
    folder = server.models("ipadapter")
    (folder / "uni.safetensors").write_bytes(uni_file.read_bytes())
    (folder / "pickled.bin").write_bytes(b"anything")
    assert "Use the node Uni-ControlNet Global" in server.run(graph_of(name="uni.safetensors")).error
    listed = json.dumps(server.get("/object_info/NibbleLoadIPAdapter"))
    assert "nibble_demo_ip-adapter.safetensors" in listed and "pickled.bin" not in listed


def test_uni_controlnets_tokens_in_the_server(server, uni_file):
    (server.models("controlnet") / uni_file.name).write_bytes(uni_file.read_bytes())
    graph = graph_of()
    graph["uni"] = node("NibbleUniControlGlobal", positive=["text", 0], negative=["text", 0], clip_vision=["model", 3],
                        image=["red", 0], adapter_name=uni_file.name, strength=1.0)  # fmt: skip
    graph["sample with"]["inputs"] |= {"model": ["model", 0], "positive": ["uni", 0], "negative": ["uni", 1]}
    result = server.done(graph)
    assert not torch.equal(server.latent(result, "save with"), server.latent(result, "save without"))
