"""``nibble train`` on the demo model's 4-bit base: it learns, its base does not change, and the file loads anywhere."""

import hashlib
import json
import shutil

import pytest
import torch
from comfyui_nibble import demo
from comfyui_nibble.headless import base, pipeline
from comfyui_nibble.headless.cli import main
from comfyui_nibble.lora.apply import apply
from comfyui_nibble.lora.read import read
from comfyui_nibble.profiling import work
from comfyui_nibble.quant import kernels
from comfyui_nibble.training import checkpointing, data, denoise, eight_bit, job, lora
from comfyui_nibble.training.loop import Plan
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def digest(unet) -> str:
    out = hashlib.sha256()
    for p in unet.parameters():
        for tensor in kernels.tensors(p).values() if kernels.is_ours(p) else [p.detach()]:
            out.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


@pytest.fixture(scope="module")
def pipe():
    out = pipeline.load_pipeline(demo.MODEL)
    pipeline.quantize(out, 16)
    out.unet.requires_grad_(False)
    return out


@pytest.fixture(scope="module")
def found(pipe):
    """The shipped pictures: 40 to train on, 8 held out."""
    rows = base.samples(pipe, demo.PICTURES, base.side_of(pipe))
    return tuple([rows[i] for i in part] for part in data.split(len(rows), 1 / 6, 0))


def fitted(pipe, found, recipe, compress: bool = True):
    """(adapters, outcome)."""
    with eight_bit.wanted(pipe.unet, compress):
        model = base.base_of(pipe)
        loras = job.adapters_of(model, 8, recipe.plan.seed)
        return loras, lora.train_lora(model.denoiser, loras, found, recipe)


@pytest.fixture(scope="module")
def trained(pipe, found):
    before = digest(pipe.unet)
    recipe = lora.Recipe(Plan("lora", 32, 4, 2e-3, warmup=5, weight_decay=0.0, ema=0.9))
    loras, outcome = fitted(pipe, found, recipe)
    assert digest(pipe.unet) == before  # every weight, 4-bit and others, to the last bit
    return loras, outcome, recipe


def test_forty_pictures_lower_the_validation_loss(trained, found):
    loras, outcome, recipe = trained
    assert (len(found[0]), len(found[1])) == (40, 8)
    print(f"validation {outcome.before:.4f} -> {outcome.after:.4f}")
    assert outcome.change <= -0.2
    text = lora.report(recipe, outcome, (40, 8), len(loras.factors))
    assert "8 pictures held out" in text and f"{outcome.change:+.1%}" in text


def bytes_of_training(bits: int, checkpointed: bool) -> int:
    """The model's and the most that two updates add, in bfloat16, at the node's batch and rank."""
    made = pipeline.load_pipeline(demo.MODEL)
    cond = base.encode(made, "red apple", torch.zeros(4, 16, 16))
    unet = made.unet.to(torch.bfloat16).requires_grad_(False)
    if bits == 4:
        pipeline.quantize(made, 16)
    recipe = lora.Recipe(Plan("lora", 2, 1, 1e-3, warmup=1), checkpointing=checkpointed)
    sample = data.Sample(torch.zeros(4, 16, 16), cond, cond)
    with eight_bit.wanted(unet, True):
        weights = kernels.held(unet)
        with work.LiveBytes() as added:
            fitted(made, ([sample], []), recipe, compress=False)  # it is compressed already
    return weights + added.peak


@pytest.mark.parametrize("checkpointed", (True, False))
def test_memory_on_the_4_bit_base_is_below_six_tenths(checkpointed):
    four, sixteen = bytes_of_training(4, checkpointed), bytes_of_training(16, checkpointed)
    print(f"{four / 1e6:.2f} of {sixteen / 1e6:.2f} MB, {four / sixteen:.3f}")
    assert four < 0.6 * sixteen


def test_the_file_changes_both_bases_alike(pipe, trained, found):
    loras, _, _ = trained
    file = loras.state_dict(rename=base.native_names(pipe.unet))
    assert len(file) == 3 * 70 and all(n.startswith("diffusion_model.") for n in file)
    sample, changes = found[1][0], []
    noise = torch.randn(1, *sample.latent.shape, generator=torch.Generator().manual_seed(0))
    for quantized in (False, True):
        fresh = pipeline.load_pipeline(demo.MODEL)
        if quantized:
            pipeline.quantize(fresh, 16)
        denoiser = denoise.diffusers_unet(fresh.unet, fresh.scheduler)
        sigma = denoiser.at(torch.tensor([0.7]))
        x = denoiser.mix(sample.latent[None], noise, sigma)
        with torch.no_grad():
            before = denoiser.predict(x, sigma, [sample.cond])
            report = apply(fresh.unet, read(file))
            after = denoiser.predict(x, sigma, [sample.cond])
        assert len(report.applied) == 70 and not report.unknown
        changes.append((after - before).flatten())
    with torch.no_grad(), loras.attached():
        beside = denoise.diffusers_unet(pipe.unet, pipe.scheduler).predict(x, sigma, [sample.cond])
    # Longer branch or factors beside: the same sum in another order, which may round an activation the other way.
    apart, alike = ((beside - after).norm() / changes[1].norm()).item(), torch.cosine_similarity(*changes, dim=0).item()
    print(f"beside against in the branch {apart:.4f}, cosine of 16 and 4 bits {alike:.4f}")
    assert apart < 0.2 and alike > 0.9


def test_checkpointing_gives_the_same_gradients(pipe, found):
    denoiser = denoise.diffusers_unet(pipe.unet, pipe.scheduler)
    rows, grads = found[0][:2], []
    x0, noise = torch.stack([r.latent for r in rows]), torch.ones(2, 4, 16, 16)
    for checkpointed in (False, True):
        loras = job.adapters_of(base.base_of(pipe), 4, 0)
        with loras.attached():
            if checkpointed:
                with checkpointing.checkpointed(pipe.unet):
                    denoiser.loss(x0, noise, denoiser.at(torch.tensor([0.3, 0.8])), [r.cond for r in rows]).backward()
            else:
                denoiser.loss(x0, noise, denoiser.at(torch.tensor([0.3, 0.8])), [r.cond for r in rows]).backward()
        grads.append(torch.cat([p.grad.flatten() for p in loras.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)
    assert grads[0].abs().max() > 1e-4
    assert not any("forward" in m.__dict__ for m in pipe.unet.modules())


def test_the_command(tmp_path, capsys):
    """A stopped command's state is beside the file; a finished one's file is complete, and is not written over."""
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = (demo.PICTURES / "captions.jsonl").read_text().splitlines()[:3]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    for line in lines:
        shutil.copy(demo.PICTURES / json.loads(line)["file_name"], folder)
    out = tmp_path / "mine.safetensors"
    command = [
        "train",
        str(folder),
        "--out",
        str(out),
        "--steps",
        "2",
        "--batch",
        "1",
        "--rank",
        "4",
        "--base-rank",
        "16",
    ]
    assert main(command) == 0
    assert "2 trained on, 1 held out" in capsys.readouterr().out
    state = load_file(out)
    assert len(state) == 3 * 70 and sorted(p.name for p in tmp_path.iterdir()) == ["mine", "mine.safetensors"]
    with safe_open(out, framework="pt") as f:
        details = json.loads(f.metadata()["nibble_training"])
    assert details["steps"] == 2 and details["pictures"] == 3
    assert main(command) == 1 and "file of this name already" in capsys.readouterr().err
    save_file(state, folder / "no-picture.safetensors")
    (folder / "captions.jsonl").unlink()
    assert main([*command[:3], str(tmp_path / "b.safetensors"), *command[4:]]) == 1
    assert "3 of 3 pictures have no caption" in capsys.readouterr().err
