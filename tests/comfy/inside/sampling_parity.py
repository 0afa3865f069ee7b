"""Presets in ComfyUI against diffusers' schedulers: same weights, same noise. ARGS: folder for files.

Prints {check: largest difference of the final latents, in units of the network's latents}.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import args, comfyui, pack, torch  # noqa: F401

sys.argv = ["tiny_models.py", comfyui, "."]
sys.path.insert(0, str(Path(__file__).parent.parent))
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import diffusers  # noqa: E402
import tiny_models  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete  # noqa: E402
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (  # noqa: E402
    LatentConsistencyModelPipeline,
)
from nibble_pack.nodes.bridge import model_sampling, sampling  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
SEED, SHAPE = 11, (2, 4, 8, 8)
OMEGA = 8.0
folder = Path(args[0])
# ComfyUI's configuration of the diffusers UNet below: one level, no middle block
UNET = dict(num_res_blocks=[1], channel_mult=[1], transformer_depth=[1], transformer_depth_output=[1, 1],
            transformer_depth_middle=-2)  # fmt: skip


def networks():
    """(diffusers UNet with a guidance embedding, ComfyUI MODEL with the same weights, the diffusers file)."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(320,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        cross_attention_dim=768, attention_head_dim=8, time_cond_proj_dim=256,
    ).eval()  # fmt: skip
    state = {k: v.clone() for k, v in unet.state_dict().items()}
    names = comfy.utils.unet_to_diffusers(UNET)
    native = {names[k]: v.clone() for k, v in state.items() if k in names}
    left = sorted(set(state) - set(names))
    assert left == ["time_embedding.cond_proj.weight"], left
    path = folder / "lcm_unet.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return unet, comfy.sd.load_diffusion_model_state_dict(native), path


unet, model, lcm_file = networks()
context = torch.randn(1, 5, 768)
COND = [[context, {}]]
LATENT = {"samples": torch.zeros(SHAPE)}
NOISE = comfy.sample.prepare_noise(LATENT["samples"], SEED)
FACTOR = model.get_model_object("latent_format").scale_factor
NOWHERE = sampling.Graph(None, None)


def theirs(scheduler, network, start=None, **kw) -> torch.Tensor:
    """A diffusers denoising loop; steps' noise comes from seed + 1, as ComfyUI's does on a CPU."""
    z, g = NOISE.clone() if start is None else start, torch.Generator().manual_seed(SEED + 1)
    stochastic = {"generator": g} if not isinstance(scheduler, diffusers.DDIMScheduler) else {}
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z, t)
        z = scheduler.step(out, t, z, **stochastic, **kw).prev_sample
    return z


def eps(z, t, condition=None):
    return unet(z, t, context.expand(len(z), -1, -1), timestep_cond=condition).sample


def ours(preset: str, steps: int, patcher=None) -> torch.Tensor:
    run = sampling.Run(preset, steps, SEED, 1.0)
    out, _ = sampling.sample(patcher or model, (COND, COND), LATENT, run, NOWHERE)
    return out["samples"] * FACTOR


def custom(patcher, sampler, sigmas, cfg: float = 1.0) -> torch.Tensor:
    return FACTOR * comfy.sample.sample_custom(
        patcher, NOISE, cfg, sampler, sigmas, COND, [[0.5 * context, {}]], LATENT["samples"], seed=SEED
    )


found: dict[str, float] = {}


def check(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.isfinite(a).all() and a.std() > 0.1, name
    found[name] = float((a - b).abs().max())


def lcm() -> None:
    guided = model_sampling.lcm_guidance(model, str(lcm_file), OMEGA)
    embedding = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    w = embedding(None, torch.tensor([OMEGA - 1.0]), embedding_dim=256)
    for n in range(1, 9):
        scheduler = diffusers.LCMScheduler(**BETAS)
        scheduler.set_timesteps(n)
        plain = theirs(scheduler, eps)
        check(f"lcm n={n}", ours("lcm_lora_sd15", n), plain)
        scheduler.set_timesteps(n)
        with_w = theirs(scheduler, lambda z, t: eps(z, t, w))
        check(f"lcm omega n={n}", ours("lcm_full_sd15", n, guided), with_w)
        found[f"effect of omega n={n}"] = float((with_w - plain).abs().max())


def lcm_v() -> None:
    v_model = ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]
    for n in (1, 2, 4, 8):
        scheduler = diffusers.LCMScheduler(**BETAS, prediction_type="v_prediction")
        scheduler.set_timesteps(n)
        check(f"lcm v n={n}", ours("lcm_lora_sd15", n, v_model), theirs(scheduler, eps))


def lcm_img2img() -> None:
    """Strength below 1 on a picture: the truncated training grid."""
    picture = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    for n, strength in ((4, 0.5), (2, 0.8)):
        scheduler = diffusers.LCMScheduler(**BETAS)
        scheduler.set_timesteps(n, strength=strength)
        start = scheduler.add_noise(picture, NOISE, scheduler.timesteps[:1])
        run = sampling.Run("lcm_lora_sd15", n, SEED, strength)
        out, _ = sampling.sample(model, (COND, COND), {"samples": picture / FACTOR}, run, NOWHERE)
        check(f"lcm image strength={strength}", out["samples"] * FACTOR, theirs(scheduler, eps, start))


def tcd() -> None:
    for n in (1, 2, 4, 8):
        for eta in (0.0, 0.3, 1.0):
            scheduler = diffusers.TCDScheduler(**BETAS)
            scheduler.set_timesteps(n)
            row = sampling.prepare(model, sampling.Run("tcd_sd15", n, SEED, 1.0), (64, 64), NOWHERE)
            mine = custom(row.model, model_sampling.tcd_sampler(eta), row.sigmas)
            check(f"tcd eta={eta} n={n}", mine, theirs(scheduler, eps, eta=eta))
    scheduler = diffusers.TCDScheduler(**BETAS)
    for n in (1, 4):
        scheduler.set_timesteps(n)
        check(f"hyper unified n={n}", ours("hyper_sd15_1step", n), theirs(scheduler, eps, eta=1.0))


def trailing() -> None:
    for n in (2, 3, 4, 8, 12):
        if 1000 % n == 0:  # elsewhere diffusers' DDIM steps to t - 1000 // n, which is not its own next timestep
            scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing="trailing", set_alpha_to_one=True)
            scheduler.set_timesteps(n)
            check(f"ddim trailing n={n}", ours("hyper_sd15", n), theirs(scheduler, eps))
        scheduler = diffusers.EulerDiscreteScheduler(**{k: v for k, v in BETAS.items() if k != "clip_sample"},
                                                     timestep_spacing="trailing")  # fmt: skip
        scheduler.set_timesteps(n)
        # Its start is sigma_max * noise, 0.2 % less than the sqrt(1 + sigma_max^2) of ComfyUI: the start is held equal.
        start = NOISE * (1 + scheduler.sigmas[0] ** 2).sqrt()
        check(f"euler trailing n={n}", ours("hyper_sd15", n), theirs(scheduler, eps, start))


def one_step() -> None:
    """DMD2's [399] and Hyper-SD's [800]: diffusers hands the network the noise itself."""
    for t in (399, 800):
        for name in ("lcm", "euler"):
            scheduler = diffusers.LCMScheduler(**BETAS)
            scheduler.set_timesteps(timesteps=[t])
            patcher, sigmas = sampling.from_timesteps(model, sampling.TYPED, str(t), 1, 1.0)
            mine = custom(patcher, comfy.samplers.sampler_object(name), sigmas)
            check(f"one step {name} t={t}", mine, theirs(scheduler, eps))
    x0_scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing="trailing", prediction_type="sample")
    x0_scheduler.set_timesteps(1)
    patcher = ModelSamplingDiscrete().patch(model, "x0", False)[0]
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", 1)
    x0 = custom(patcher, comfy.samplers.sampler_object("euler"), sigmas)
    check("x0 one step", x0, eps(NOISE, torch.tensor(999)))


def instaflow() -> None:
    """The official pipeline's loop: t = 1000 (1 - i/n), latents + v / n, guidance on velocities."""
    null = 0.5 * context
    for n, g in ((1, 1.0), (2, 1.0), (4, 1.5), (25, 1.5)):
        z = NOISE.clone()
        for i in range(n):
            t = torch.tensor((1.0 - i / n) * 1000.0)
            v = eps(z, t)
            if g > 1:
                u = unet(z, t, null.expand(len(z), -1, -1)).sample
                v = u + g * (v - u)
            z = z + v / n
        row = sampling.prepare(model, sampling.Run("rectified_flow_2", n, SEED, 1.0), (64, 64), NOWHERE)
        check(f"instaflow n={n} g={g}", custom(row.model, row.sampler, row.sigmas, g), z)


def perflow() -> None:
    """One step a window ends exactly at its end: z = lambda z + eta eps."""
    sigmas = model_sampling.noise_table(model.get_model_object("model_sampling")).double()
    a = 1 / (1 + sigmas**2)
    for kind in ("diff_eps", "ddim_eps"):
        z = NOISE.double()
        for t in (1000, 750, 500, 250):
            e = eps(z.float(), torch.tensor(t)).double()
            a_s, a_e = a[t - 1], a[max(t - 251, 0)]
            lam = (a_e / a_s).sqrt()
            eta = -lam * (1 - a_s / a_e).sqrt() if kind == "diff_eps" else (1 - a_e).sqrt() - lam * (1 - a_s).sqrt()
            z = lam * z + eta * e
        row = sampling.prepare(model, sampling.Run("perflow_sd15", 4, SEED, 1.0), (64, 64), NOWHERE)
        check(f"perflow {kind} n=4", custom(row.model, model_sampling.perflow_sampler(kind), row.sigmas), z.float())


def flow() -> None:
    """Flow-match Euler with shift on tiny SD3 and FLUX.1-schnell: their networks inside diffusers' loop."""
    cases = (("sd3", "sd35_large_turbo", 128, 128, 3.0, None), ("flux", "flux_turbo_alpha", 64, 64, None, 3.5))
    for name, preset, width, pooled, shift, guidance in cases:
        patcher = comfy.sd.load_diffusion_model_state_dict(tiny_models.randomised(getattr(tiny_models, name)()))
        text, y = torch.randn(1, 6, width) / 4, torch.randn(1, pooled) / 4
        latent = {"samples": torch.zeros(1, 16, 8, 8)}
        noise, net = comfy.sample.prepare_noise(latent["samples"], SEED), patcher.model.diffusion_model
        cond = [[text, {"pooled_output": y}]]
        run = sampling.Run(preset, 0, SEED, 1.0)
        out, _ = sampling.sample(patcher, (cond, cond), latent, run, NOWHERE)
        mine = patcher.model.process_latent_in(out["samples"])
        if shift is not None:
            scheduler, scale = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), 1.0
            scheduler.set_timesteps(4)
            extra = {}
        else:
            tokens = 4 * 4
            mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
            scheduler, scale = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 1000.0
            scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)], mu=mu)
            extra = {"guidance": torch.tensor([guidance])}
        z = noise.clone()
        for t in scheduler.timesteps:
            v = net(z, t[None].float() / scale, context=text, y=y, **extra)
            z = scheduler.step(v, t, z).prev_sample
        check(f"flow {preset}", mine, z)


for part in (lcm, lcm_v, lcm_img2img, tcd, trailing, one_step, instaflow, perflow, flow):
    part()
print(json.dumps(found))
