"""4-bit files of other packs in a real server, and this pack's files in a ComfyUI without the pack."""

import json
import os
import subprocess
import time
import urllib.error
from functools import partial
from pathlib import Path

import pytest
import torch
from comfyui_nibble.checkpoints.load import load
from comfyui_nibble.headless.cli import main
from comfyui_nibble.quant import parts
from safetensors.torch import load_file, save_file

from . import conftest, nunchaku_files
from .test_tiny_models import nibble, stock, workflow

DATA = conftest.HERE.parent / "data" / "nunchaku"
PUBLISHED = {
    "nunchaku": nunchaku_files.flux_as_nunchaku,
    "nunchaku-fp4": partial(nunchaku_files.flux_as_nunchaku, fp4=True),
    "nf4": nunchaku_files.as_nf4,
}


@pytest.fixture(scope="module")
def published(tiny, tmp_path_factory):
    """published(kind) -> the tiny FLUX.1 as that pack writes it."""
    folder = tmp_path_factory.mktemp("published")

    def get(kind: str):
        path = folder / f"flux-{kind}.safetensors"
        return path if path.exists() else PUBLISHED[kind](tiny("flux"), path)

    return get


def put(server, path, name: str = "") -> str:
    target = server.models("diffusion_models") / (name or path.name)
    if not target.exists():
        target.symlink_to(path)
    return target.name


def cosine(a, b) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def test_mini_files_agree_with_dense_modules_built_from_expected_values(inside):
    """FLUX.1, SDXL, Qwen-Image and Z-Image layers in ComfyUI's own modules."""
    for family, found in inside("formats_forward", DATA).items():
        assert found["exact"] < 2e-2, (family, found)  # the same 4-bit arithmetic, from values that no packer has seen
        assert found["share"] < 0.3, (family, found)
        if family != "z_image":  # a lone feed-forward on noise, without the residual that carries the others
            assert found["dense"] < 5e-2, (family, found)  # 4-bit activations cost no more than this


@pytest.mark.parametrize("kind", PUBLISHED)
def test_samples_like_the_float_model(kind, server, tiny, published):
    reference = server.latent(server.done(workflow("flux", stock(put(server, tiny("flux"))))), "save")
    name = put(server, published(kind))
    got = server.latent(server.done(workflow("flux", nibble(name))), "save")
    assert torch.isfinite(got).all() and not torch.equal(got, reference)
    assert cosine(reference, got) > 0.93


@pytest.mark.parametrize("kind", PUBLISHED)
def test_four_bits_stay_four_bits(kind, server, published):
    path = published(kind)
    graph = {"model": nibble(put(server, path)),
             "size": {"class_type": "NibbleTestModelSize", "inputs": {"model": ["model", 0]}}}  # fmt: skip
    size = int(server.done(graph).text("size"))
    unread = sum(t.nbytes for n, t in load_file(path).items() if n.endswith("smooth_orig"))
    assert size < 1.1 * (path.stat().st_size - unread)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_lora_and_a_saved_copy_work_on_it(kind, server, published, tmp_path):
    """A stock LoRA on a layer of two parts and on stored codes; what Save Model writes samples bit for bit the same."""
    g = torch.Generator().manual_seed(3)
    lora = {}
    for layer, (n, k) in {"single_blocks_0_linear2": (256, 1280), "double_blocks_0_img_attn_proj": (256, 256)}.items():
        down, up = torch.randn(4, k, generator=g) / k**0.5, torch.randn(n, 4, generator=g) / 8
        lora |= {f"lora_unet_{layer}.lora_down.weight": down, f"lora_unet_{layer}.lora_up.weight": up}
    save_file(lora, server.models("loras") / f"two-layers-{kind}.safetensors")
    graph = workflow("flux", nibble(put(server, published(kind))))
    plain = server.latent(server.done(graph), "save")
    graph["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": dict(
        model=["model", 0], lora_name=f"two-layers-{kind}.safetensors", strength_model=1.0)}  # fmt: skip
    graph["sample"]["inputs"]["model"] = ["lora", 0]
    changed = server.latent(server.done(graph), "save")
    assert 0.5 < cosine(plain, changed) < 0.9999
    graph["file"] = {"class_type": "NibbleSaveModel", "inputs": dict(
        model=["lora", 0], filename_prefix=f"diffusion_models/{kind}")}  # fmt: skip
    saved = server.done(graph).text("file").split("/")[1]
    again = server.latent(server.done(workflow("flux", nibble(saved))), "save")
    assert torch.equal(changed, again)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_each_lora_acts_alone_and_after_another(kind, server, published):
    """One on the layer of two parts, one on another layer, queued in turn by ComfyUI's loader and by this pack's."""
    g = torch.Generator().manual_seed(4)
    for name, layer, k in (("one", "single_blocks_0_linear2", 1280), ("two", "double_blocks_0_img_attn_proj", 256)):
        down, up = torch.randn(4, k, generator=g) / k**0.5, torch.randn(256, 4, generator=g) / 4
        lora = {f"lora_unet_{layer}.lora_down.weight": down, f"lora_unet_{layer}.lora_up.weight": up}
        save_file(lora, server.models("loras") / f"{name}-{kind}.safetensors")

    def drawn(loader: str, *names: str):
        graph = workflow("flux", nibble(put(server, published(kind))))
        for i, name in enumerate(names):
            link, strength = graph["sample"]["inputs"]["model"], {"strength_model": 1.0}
            strength |= {"strength_clip": 0.0} if loader == "NibbleApplyLora" else {}
            more = dict(model=link, lora_name=f"{name}-{kind}.safetensors", **strength)
            graph[f"lora{i}"] = {"class_type": loader, "inputs": more}
            graph["sample"]["inputs"]["model"] = [f"lora{i}", 0]
        return server.latent(server.done(graph), "save")

    plain = drawn("")
    for loader in ("LoraLoaderModelOnly", "NibbleApplyLora"):
        two, one, both, two_again = (drawn(loader, *n) for n in (["two"], ["one"], ["one", "two"], ["two"]))
        assert torch.equal(two, two_again) and torch.equal(drawn(""), plain)
        for a, b in ((one, plain), (two, plain), (both, one), (both, two)):
            assert (a - b).norm() / plain.norm() > 0.02, loader


@pytest.mark.parametrize("kind", PUBLISHED)
def test_converted_files_sample_the_same(kind, server, published):
    name = put(server, published(kind))
    result = server.done({"c": {"class_type": "NibbleConvert", "inputs": dict(
        file=f"diffusion_models/{name}", requantize=False, rank=32,
        filename_prefix=f"diffusion_models/converted-{kind}")}})  # fmt: skip
    made, report = result.text("c").split("\n", 1)
    assert "kept their codes" in report and "requantized" not in report
    one = server.latent(server.done(workflow("flux", nibble(name))), "save")
    two = server.latent(server.done(workflow("flux", nibble(made.split("/")[1]))), "save")
    assert torch.equal(one, two)


def test_requantizing_is_done_only_if_asked(server, published):
    name = put(server, published("nf4"))
    result = server.done({"c": {"class_type": "NibbleConvert", "inputs": dict(
        file=f"diffusion_models/{name}", requantize=True, rank=16,
        filename_prefix="diffusion_models/int4")}})  # fmt: skip
    made, report = result.text("c").split("\n", 1)
    assert "13 nf4" in report and "13 requantized" in report
    made = made.split("/")[1]
    one = server.latent(server.done(workflow("flux", nibble(name))), "save")
    two = server.latent(server.done(workflow("flux", nibble(made))), "save")
    assert 0.9 < cosine(one, two) < 1 - 1e-9


def test_an_emulated_model_says_so_in_the_log(server, published):
    server.done(workflow("flux", nibble(put(server, published("nunchaku-fp4")))))
    assert "an nvfp4 model is emulated on it" in server.log.read_text(errors="replace")


def test_inspect_says_who_wrote_it_and_what_to_do(server, published):
    text = server.done({"n": {"class_type": "NibbleInspect", "inputs": {
        "file": f"diffusion_models/{put(server, published('nunchaku'))}"}}}).text("n")  # fmt: skip
    assert "FLUX.1" in text and "written by nunchaku (deepcompressor), as NunchakuFluxTransformer2dModel" in text
    assert "nunchaku_svdq_int4" in text and "native on NVIDIA Ampere, Ada, Blackwell" in text
    assert "CPU does not, comfy-kitchen has no kernels for a CPU: it runs there too, slower" in text


@pytest.mark.parametrize(("name", "sentence"), [
    ("mxfp4", "layer a: it is SVDQuant with MXFP4 codes"),
    ("gptq", "layer a: it is a GPTQ or AutoAWQ layer"),
    ("missing_half", "layer single_transformer_blocks.0.mlp_fc2: this layer is missing"),
])  # fmt: skip
def test_bad_files_get_one_sentence(name, sentence, server, published):
    tensors = {"a.qweight": torch.zeros(128, 64, dtype=torch.int8), "a.wscales": torch.zeros(4, 128, dtype=torch.uint8)}
    if name == "gptq":
        tensors = {
            "a.qweight": torch.zeros(16, 16, dtype=torch.int32),
            "a.qzeros": torch.zeros(1, 2, dtype=torch.int32),
        }
    elif name == "missing_half":
        lost = "single_transformer_blocks.0.mlp_fc2."
        tensors = {k: v for k, v in load_file(published("nunchaku")).items() if not k.startswith(lost)}
    save_file(tensors, server.models("diffusion_models") / f"bad-{name}.safetensors")
    result = server.run({"model": nibble(f"bad-{name}.safetensors"),
                         "size": {"class_type": "NibbleTestModelSize", "inputs": {"model": ["model", 0]}}})  # fmt: skip
    assert result.status == "error" and sentence in result.error
    assert len(result.error.strip().splitlines()) == 1


def test_gguf_is_listed_and_asks_for_its_library(server):
    """ComfyUI's environment of this suite has no gguf library: the sentence says how to get it."""
    (server.models("diffusion_models") / "some.gguf").write_bytes(b"GGUF" + bytes(60))
    listed = server.get("/object_info/NibbleLoadModel")["NibbleLoadModel"]["input"]["required"]["model_name"]
    assert "some.gguf" in json.dumps(listed)
    probe = [conftest.python_of(conftest.COMFYUI), "-c", "import gguf"]
    if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        pytest.skip("this ComfyUI has the gguf library")
    result = server.run({"model": nibble("some.gguf"),
                         "size": {"class_type": "NibbleTestModelSize", "inputs": {"model": ["model", 0]}}})  # fmt: skip
    assert "some.gguf: GGUF files need the library gguf" in result.error and "pip install gguf" in result.error


@pytest.mark.parametrize(("kind", "error", "share"), [("Q8_0", 0.01, 0.54), ("Q4_0", 0.1, 0.29)])
def test_gguf_runs_with_its_own_codes(kind, error, share, inside, tiny, tmp_path):
    library = pytest.importorskip("gguf")
    writer, number = library.GGUFWriter(tmp_path / "flux.gguf", "flux"), library.GGMLQuantizationType[kind]
    for name, value in load_file(tiny("flux")).items():
        quantized = value.dim() == 2 and "blocks." in name
        data = library.quants.quantize(value.numpy(), number) if quantized else value.numpy()
        writer.add_tensor(name, data, raw_dtype=number if quantized else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    home = Path(library.__file__).resolve().parent.parent
    found = inside("formats_gguf", tmp_path / "flux.gguf", tiny("flux"), home)
    assert found["layers"] == 13 and found["share"] < share
    assert 0 < found["error"] < error and found["lora"] > 1e-3


@pytest.fixture(scope="module")
def without_pack(tmp_path_factory):
    """A ComfyUI that has the test nodes and not this pack."""
    base = tmp_path_factory.mktemp("stock")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "nibble_testkit").symlink_to(conftest.HERE / "testkit", target_is_directory=True)
    port, log = conftest.free_port(), base / "server.log"
    command = [
        conftest.python_of(conftest.COMFYUI), str(conftest.COMFYUI / "main.py"), "--cpu", "--port", str(port),
        "--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-auto-launch",
        "--disable-api-nodes", "--disable-all-custom-nodes", "--whitelist-custom-nodes", "nibble_testkit",
    ]  # fmt: skip
    with log.open("w") as f:
        process = subprocess.Popen(command, cwd=base, stdout=f, stderr=f, env={**os.environ, **conftest.QUIET})
    server = conftest.Server(base, port, process, log)
    for _ in range(900):
        assert process.poll() is None, server.tail()
        try:
            server.get("/system_stats")
            break
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    yield server
    process.terminate()
    process.wait(30)


@pytest.mark.parametrize("target", ["nvfp4", "convrot_w4a4", "asym_w4a8_int8"])
def test_core_formats_load_in_stock_comfyui(target, without_pack, tiny, tmp_path):
    server = without_pack
    assert "NibbleLoadModel" not in server.get("/object_info")
    path = server.models("diffusion_models") / f"{target}.safetensors"
    assert main(["quantize", str(tiny("flux")), "--out", str(path), "--target", target]) == 0
    assert any(n.endswith("comfy_quant") for n in load_file(path))
    reference = server.latent(server.done(workflow("flux", stock(put(server, tiny("flux"))))), "save")
    got = server.latent(server.done(workflow("flux", stock(path.name))), "save")
    assert 0.8 < cosine(reference, got) < 1 - 1e-9


def test_converted_codes_are_the_published_ones(published, tmp_path):
    assert main(["convert", str(published("nunchaku")), "--out", str(tmp_path / "c.safetensors")]) == 0
    one, two = load(published("nunchaku")), load(tmp_path / "c.safetensors")
    assert one.layers.keys() == two.layers.keys()
    for name, layer in one.layers.items():
        assert torch.equal(parts.dequantize(layer.weight), parts.dequantize(two.layers[name].weight)), name
