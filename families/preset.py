"""What a few-step preset is: how one distilled model or LoRA wants to be sampled. The rows are in the families' files.

Timesteps count 999 ... 0 on the 1000-point noise schedule of Stable Diffusion; flow models have sigmas 1 ... 0 instead.
A row is sampled by sampling/ in diffusers, by nodes/bridge in ComfyUI.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# What several families' rows say: where their sources are, and parts of the patterns of file names
HF = "https://huggingface.co/"
HYPER = f"{HF}ByteDance/Hyper-SD"
TEMPLATES = "https://github.com/Comfy-Org/workflow_templates/blob/main/templates/"
NEVER = r"(?!)"  # no name says it
WORD = r"(?:^|[^a-z])"  # the start of a word in a file name
# prediction -> what the network's output means, and so what is done to the MODEL before it samples
PREDICTIONS = {
    "epsilon": "as the model was trained (epsilon, or v for a v-prediction model)",
    "lcm": "consistency model: c_skip x + c_out x0, 50-step grid",
    "x0": "the picture itself",
    "flow": "velocity noise - data",
    "rectified_flow": "velocity data - noise",
    "diff_eps": "PeRFlow epsilon, difference form",
    "ddim_eps": "PeRFlow epsilon, DDIM form",
    "velocity": "PeRFlow velocity",
}
PERFLOW = ("diff_eps", "ddim_eps", "velocity")
# sampler -> True where it is one of sampling/samplers.py; the others are ComfyUI's own names
SAMPLERS = {
    "euler": False,
    "euler_ancestral": False,
    "lcm": False,
    "res_multistep": False,
    "tcd": True,
    "perflow": True,
}
SCHEDULES = {
    "lcm": "every 20th timestep, n of them evenly",
    "tcd": "every 20th timestep, n of them evenly",
    "trailing": "n timesteps evenly from 999",
    "tenths": "999, 899, 799 ...",
    "listed": "fixed timesteps",
    "windows": "even in 4 windows of 250",
    "uniform": "1 - i/n",
    "simple": "1 - i/n, shifted",
    "normal": "even from first to last timestep, shifted",
    "sgm_uniform": "even in timesteps, last left out",
    "flux2": "1 - i/n, shifted by size and n",
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One row. ``family``: the `Variant` that it is for.

    steps, made_for   the usual number, and those the model was distilled for
    cfg, cfg_at       guidance scale as ComfyUI counts it (1 = one pass); (from steps, scale) pairs where it depends
    shown             timesteps (or sigmas of a flow model, at 1024 x 1024) of the usual number of steps, without the 0
    names             pattern of file names, case ignored, with a group ``steps`` where the name says it
    shift             of a flow model, where it is not the one ComfyUI loads the model with; size_shift: FLUX.1's by
    size
    eta               stochasticity of TCD; guidance: distilled guidance put into the conditioning; omega: guidance
                      scale embedded by a full LCM; lora, lora_strength: the LoRA that makes the model, if it is one
    of_class          taken when nothing but the model's class is known
    distilled         what this pack's own distillations are sampled by, see sampling/distilled.py
    """

    id: str
    title: str
    family: str
    prediction: str
    schedule: str
    steps: int
    made_for: tuple[int, ...]
    sampler: str
    shown: tuple[float, ...]
    names: str
    source: str
    cfg: float = 1.0
    cfg_at: tuple[tuple[int, float], ...] = ()
    timesteps: tuple[int, ...] = ()
    shift: float | None = None
    size_shift: bool = False
    eta: float | None = None
    guidance: float | None = None
    omega: float | None = None
    lora: str = ""
    lora_strength: float = 1.0
    of_class: bool = False
    distilled: bool = False

    def __post_init__(self):
        for value, table, what in (
            (self.prediction, PREDICTIONS, "prediction"),
            (self.schedule, SCHEDULES, "schedule"),
            (self.sampler, SAMPLERS, "sampler"),
        ):
            if value not in table:
                raise ValueError(f"preset {self.id}: unknown {what} {value!r}; there are {', '.join(table)}")
        problems = (
            (not re.fullmatch(r"[a-z0-9_]+", self.id), "its id must be lower case letters, digits and _"),
            (self.steps not in self.made_for, "its usual number of steps is not among those it is made for"),
            (len(self.shown) != self.steps, f"it shows {len(self.shown)} values for {self.steps} steps"),
            (list(self.shown) != sorted(set(self.shown), reverse=True), "the values it shows do not descend"),
            (not self.source.startswith("https://"), "its source is not a link"),
            ((self.schedule == "listed") != bool(self.timesteps), "only the schedule 'listed' has timesteps"),
            ((self.sampler == "tcd") != (self.eta is not None), "only the sampler 'tcd' has an eta"),
            ((self.sampler == "perflow") != (self.prediction in PERFLOW), "PeRFlow needs its own sampler"),
            (min(self.cfg, *(c for _, c in self.cfg_at), 1.0) < 1.0, "its cfg is below 1"),
        )
        for wrong, why in problems:
            if wrong:
                raise ValueError(f"preset {self.id}: {why}")
        re.compile(self.names)

    @property
    def fixed(self) -> bool:
        """Whether it draws in one step from pure noise and in no other way."""
        return self.made_for == (1,)

    @property
    def has_sigmas(self) -> bool:
        """Whether ``shown`` are sigmas rather than timesteps."""
        return self.prediction in ("flow", "rectified_flow")

    def cfg_for(self, steps: int) -> float:
        """The guidance scale for a number of steps: of the largest one listed that is not above it."""
        below = [c for n, c in sorted(self.cfg_at) if n <= steps]
        return below[-1] if below else self.cfg
