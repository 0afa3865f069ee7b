"""Every hyper-parameter of what is trained here, one row a job, for node and command line alike. Without torch: the
command line's help shows these defaults.

``updates``, ``batch``, ``rate``   updates of what is trained, pictures or states in each, the learning rate at its peak
``warmup``                         updates until the rate is there; of a short run no more than a tenth
``ema``                            decay of the moving average that is kept in the end; 0: the last values
"""

from __future__ import annotations

from dataclasses import dataclass

COSINE, CONSTANT = "cosine", "constant"
SCHEDULES = (COSINE, CONSTANT)
OPTIMIZERS = ("adamw", "adafactor", "galore")
WAYS = {  # of distilling
    "lcm": "LCM-LoRA: 1-8 steps with the LCM sampler at cfg 1",
    "lcf": "consistency fine-tuning on your pictures: LCM sampler at cfg 1",
    "phased": "consistency in phases: Euler or DDIM, steps steps, cfg 1",
    "reflow": "straight trajectories: few Euler steps at cfg 1",
    "one_step": "one Euler step at cfg 1",
    "progressive": "steps halved again and again: Euler at cfg 1",
}
PRECISIONS = ("4-bit", "16-bit")  # of a base that is made now
DEMO_RATE, DEMO_RATES = 1e-3, {"lcf": 3e-3}  # what the demo model wants; by way of distilling


@dataclass(frozen=True)
class Lora:
    """A LoRA on pictures. ``side``: pixels; ``dropout``: share of captions left empty; ``hold_out``: of the pictures;
    ``compress``: see eight_bit.py.
    """

    updates: int = 500
    batch: int = 1
    rank: int = 8
    rate: float = 1e-4
    side: int = 512
    seed: int = 0
    optimizer: str = OPTIMIZERS[0]
    schedule: str = COSINE
    accumulate: int = 1
    dropout: float = 0.1
    ema: float = 0.99
    hold_out: float = 0.1
    checkpointing: bool = True
    compress: bool = True
    warmup: int = 100
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Distill:
    """A LoRA for few steps. ``cfg``: of the teacher. ``steps``: what progressive halves down to, from ``start``; how
    many phases there are; what lcm is measured at. ``pairs``: how many the teacher makes, each in ``teacher_steps``.
    """

    way: str = "lcm"
    updates: int = 300
    batch: int = 4
    rank: int = 16
    rate: float = 1e-4
    cfg: float = 3.0
    steps: int = 4
    start: int = 16
    pairs: int = 64
    teacher_steps: int = 25
    seed: int = 0
    warmup: int = 50
    ema: float = 0.95
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Refine:
    """A 4-bit model against its teacher. ``stops``: states of each prompt's trajectory."""

    updates: int = 200
    batch: int = 4
    rate: float = 5e-4
    stops: int = 10
    cfg: float = 3.0
    seed: int = 0
    warmup: int = 20
    ema: float = 0.95
    weight_decay: float = 0.0


@dataclass(frozen=True)
class LoftQ:
    """Ranks of the LoRA and of the base's own branch, rounds of both."""

    rank: int = 16
    base_rank: int = 16
    rounds: int = 5


LORA, DISTILL, REFINE, LOFTQ = Lora(), Distill(), Refine(), LoftQ()
