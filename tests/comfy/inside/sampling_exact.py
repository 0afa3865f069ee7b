"""What the network is handed, and S(Z) of fields with a known value. ARGS: tiny sd15 file, tiny sdxl file, folder.

Prints figures; the test says what they must be.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import args, comfy_nodes, pack, torch  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import latent_preview
from nibble_pack.nodes.bridge import model_sampling, sampling, straightness
from safetensors.torch import load_file, save_file

path, sdxl_path, folder = args
COND = [[torch.randn(1, 5, 768), {}]]
LATENT = {"samples": torch.zeros(1, 4, 32, 32)}
NOISE = comfy.sample.prepare_noise(LATENT["samples"], 3)
EULER = comfy.samplers.sampler_object("euler")


def seen_by(model, sigmas, cond=COND) -> dict:
    """Deviation of the network's first input, and its difference from the noise itself."""
    inputs = []
    network = model.model.diffusion_model
    hook = network.register_forward_pre_hook(lambda _, a: inputs.append(a[0].clone()))
    try:
        comfy.sample.sample_custom(model, NOISE, 1.0, EULER, sigmas, cond, cond, LATENT["samples"], seed=3)
    finally:
        hook.remove()
    return {"std": float(inputs[0].std() / NOISE.std()), "difference": float((inputs[0] - NOISE).abs().max())}


def noise_scale() -> dict:
    model = comfy.sd.load_diffusion_model(path)
    out = {}
    for t in (399, 800, 999):
        patched, sigmas = sampling.from_timesteps(model, sampling.TYPED, str(t), 1, 1.0)
        out[f"{t}"] = seen_by(patched, sigmas)
        out[f"{t} stock"] = seen_by(model, sigmas)
    sdxl = comfy.sd.load_diffusion_model(sdxl_path)
    cond = [[torch.randn(1, 5, 2048), {"pooled_output": torch.randn(1, 1280)}]]
    for id in ("dmd2_sdxl_1step", "hyper_sdxl_1step_unet", "lightning_sdxl_1step"):
        ready = sampling.prepare(sdxl, sampling.Run(id, 0, 0, 1.0), (256, 256), sampling.Graph(None, None))
        out[id] = seen_by(ready.model, ready.sigmas, cond)
    picture, sigmas = sampling.from_timesteps(model, sampling.TYPED, "999, 399", 1, 0.5)
    out["image to image is left alone"] = picture is model and len(sigmas) == 2
    # A later step that adds noise again (sampler lcm) must not be scaled as a start.
    patched, _ = sampling.from_timesteps(model, sampling.TYPED, "800, 399", 1, 1.0)
    own, new = (m.get_model_object("model_sampling") for m in (model, patched))
    low = own.sigma(torch.tensor(399))
    zero = torch.zeros_like(NOISE)
    same = torch.equal(own.noise_scaling(low, NOISE.clone(), zero), new.noise_scaling(low, NOISE.clone(), zero))
    out["later noise is left alone"] = same
    out["the table is shared, the object is not"] = own is not new and torch.equal(own.sigmas, new.sigmas)
    return out


def guidance() -> dict:
    """A file with a guidance embedding is a full LCM: found, applied, and the model that came in is as it was."""
    state = load_file(path)
    state["time_embedding.cond_proj.weight"] = torch.randn(320, 256, generator=torch.Generator().manual_seed(0)) / 16
    file = Path(folder) / "unnamed.safetensors"
    save_file(state, file)
    model = comfy.sd.load_diffusion_model(str(file))
    ready = sampling.prepare(model, sampling.Run("auto", 0, 0, 1.0), (256, 256), sampling.Graph(None, None))
    key = "diffusion_model.time_embed.0.bias"
    once = model_sampling.lcm_guidance(model, str(file), 3.0)
    again = sampling.prepare(once, sampling.Run("auto", 0, 0, 1.0), (256, 256), sampling.Graph(None, None))
    lora = model.clone()
    lora.add_patches({"diffusion_model.time_embed.0.weight": ("diff", (torch.ones(1280, 320),))}, 0.5)
    plain = model_sampling.lcm_guidance(model, str(file), 8.0).patches[key][0][1][1][0]
    moved = model_sampling.lcm_guidance(lora, str(file), 8.0).patches[key][0][1][1][0]
    embedded = state["time_embedding.cond_proj.weight"] @ pack_embedding(8.0)
    return {
        "text": ready.text,
        "patches": len(ready.model.patches.get(key, [])),
        "came in": len(model.patches),
        "not twice": len(again.model.patches.get(key, [])),
        "a LoRA below counts": float((moved - plain - 0.5 * embedded.sum()).abs().max()),
    }


def pack_embedding(scale: float) -> torch.Tensor:
    from nibble_pack.sampling.samplers import omega_embedding

    return omega_embedding(scale)


def fields() -> dict:
    """S(Z) by the node's function, the network's output replaced by a known velocity (data - noise)."""
    base = model_sampling.rectified_flow(comfy.sd.load_diffusion_model(path))

    def of(velocity, steps: int):
        model = base.clone()

        def wrapped(_apply, a):
            sigma = a["timestep"].view(-1, 1, 1, 1)
            return a["input"] + sigma * velocity(a["input"])

        model.set_model_unet_function_wrapper(wrapped)
        return straightness.straightness(model, (COND, COND), LATENT, steps, 1.0, 3)

    omega = 1.5

    def turn(z):
        a, b = z.chunk(2, 1)
        return omega * torch.cat([-b, a], 1)

    constant = of(lambda z: torch.full_like(z, 0.7), 25)
    rotating = of(turn, 500)
    image = straightness.drawn(constant)
    return {
        "constant": constant.value,
        "rotating": rotating.value,
        "analytic": float(NOISE.square().mean()) * (omega**2 - 4 * math.sin(omega / 2) ** 2),
        "steps": len(rotating.steps),
        "chart": list(image.shape),
    }


def progress() -> dict:
    """Every report of progress, and whether it carries a preview: this pack's samplers and the stock KSampler's."""
    model = comfy.sd.load_diffusion_model(path)
    latent_preview.set_preview_method("latent2rgb")
    nowhere, seen = sampling.Graph(None, None), []
    comfy.utils.set_progress_bar_global_hook(lambda now, of, preview, **_: seen.append((now, of, preview is not None)))

    def reports(run) -> list:
        seen.clear()
        run()
        return list(seen)

    def few(id: str):
        return lambda: sampling.sample(model, (COND, COND), LATENT, sampling.Run(id, 4, 3, 1.0), nowhere)

    def stock():
        comfy_nodes.common_ksampler(model, 3, 4, 1.0, "euler", "simple", COND, COND, LATENT)

    return {"euler": reports(few("hyper_sd15")), "tcd": reports(few("tcd_sd15")), "stock": reports(stock)}


print(json.dumps({"noise": noise_scale(), "guidance": guidance(), "fields": fields(), "progress": progress()}))
