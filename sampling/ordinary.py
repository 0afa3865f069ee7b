"""How a model that is not distilled is sampled, as its makers or ComfyUI's templates do."""

from __future__ import annotations

# family -> (ComfyUI's sampler, its scheduler, steps, cfg)
RUNS = {
    "demo": ("ddim", "ddim_uniform", 25, 3.0),
    "sd15": ("dpmpp_2m", "karras", 25, 7.0),
    "sd2": ("dpmpp_2m", "karras", 25, 7.0),
    "sdxl": ("dpmpp_2m", "karras", 25, 6.0),
    "sd3": ("dpmpp_2m", "sgm_uniform", 28, 4.5),
    "qwen_image": ("euler", "simple", 20, 2.5),
}
OTHER = ("euler", "simple", 25, 1.0)


def run(family: str | None) -> tuple[str, str, int, float]:
    """(sampler, scheduler, steps, cfg) for a model of ``family``."""
    return RUNS.get(family, OTHER)
