"""Graphs and tiny models for the few-step tests: stock samplers and this pack's, in API format."""

import pytest

TINY = {
    "sd15": ("tiny", 768, 0),
    "sd2": ("further", 1024, 0),
    "sdxl": ("tiny", 2048, 1280),
    "sd3": ("tiny", 128, 128),
    "flux": ("tiny", 64, 64),
    "flux_schnell": ("further", 64, 64),
    "flux2": ("further", 64, 0),
    "qwen_image": ("further", 3584, 0),
    "mage_flow": ("further", 2560, 0),
    "lens": ("further", 64, 0),
    "krea2": ("further", 160, 0),
}
FURTHER = [name for name, (maker, *_) in TINY.items() if maker == "further"]
SEED = 7


@pytest.fixture(scope="module")
def further(inside, tmp_path_factory):
    """further(name): a tiny model of a family that the shared tiny models lack."""
    folder = tmp_path_factory.mktemp("further")
    inside("sampling_models", folder, *FURTHER)
    return lambda name: folder / f"{name}.safetensors"


@pytest.fixture(scope="module")
def installed(server, tiny, further):
    """installed(family, as) -> the tiny model's name in the server, where it may be called something else."""

    def put(family: str, name: str = "") -> str:
        source = {"tiny": tiny, "further": further}[TINY[family][0]](family)
        target = server.models("diffusion_models") / (name or f"few-{family}.safetensors")
        if not target.exists():
            target.symlink_to(source)
        return target.name

    return put


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def base(family: str, name: str) -> dict:
    """Loader, conditioning and latent of a family's tiny model; the model is node "model"."""
    _, width, pooled = TINY[family]
    return {
        "model": node("UNETLoader", unet_name=name, weight_dtype="default"),
        "pos": node("NibbleTestConditioning", tokens=8, width=width, pooled=pooled, seed=1),
        "neg": node("NibbleTestConditioning", tokens=8, width=width, pooled=pooled, seed=2),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
    }


def save(of: list, name: str) -> dict:
    return node("SaveLatent", samples=of, filename_prefix=f"few/{name}")


def few(preset: str, steps: int = 0, denoise: float = 1.0, latent="latent", model="model", positive="pos") -> dict:
    return node(
        "NibbleFewStepSampler", model=[model, 0], positive=[positive, 0], negative=["neg", 0], preset=preset,
        latent_image=[latent, 0], steps=steps, seed=SEED, denoise=denoise,
    )  # fmt: skip


def ksampler(steps, sampler, scheduler, cfg=1.0, denoise=1.0, latent="latent", model="model", positive="pos") -> dict:
    return node(
        "KSampler", model=[model, 0], positive=[positive, 0], negative=["neg", 0], latent_image=[latent, 0], seed=SEED,
        steps=steps, cfg=cfg, sampler_name=sampler, scheduler=scheduler, denoise=denoise,
    )  # fmt: skip


def custom(sigmas: str, cfg=1.0, model="model", sampler="sampler", latent="latent") -> dict:
    return node(
        "SamplerCustom", model=[model, 0], add_noise=True, noise_seed=SEED, cfg=cfg, positive=["pos", 0],
        negative=["neg", 0], sampler=[sampler, 0], sigmas=[sigmas, 0], latent_image=[latent, 0],
    )  # fmt: skip
