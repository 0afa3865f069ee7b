"""Will it fit, and how long will it take: memory by part, seconds, and which card takes which precision.

    memory = max(text encoder; diffusion weights + LoRA + activations; VAE weights + VAE activations) + driver
    time   = once + evaluations x (per evaluation + FLOPs / speed)

The max stands for ComfyUI's way of unloading what the next part has no room beside; "all resident" is the sum. Weights
are exact, activations and seconds calibrated (`calibrate`); the report shows every number it used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from .calibrate import Constants
from .cards import CARDS, CONTEXT, Card
from .tables import seconds, size, table
from .weights import STORED, Precision, Weights
from .work import Work

YES, OFFLOAD, NO = "yes", "offload", "no"
SPAN = 1.5  # how far from what was measured a task may be without a word
STREAM = 0.1  # of the card: room for the layers that are passing through while weights stay in RAM


@dataclass(frozen=True)
class Task:
    """What is to be run. ``rank``: of the 16-bit branch beside 4-bit weights; ``lora_rank``: 0 for no LoRA."""

    width: int
    height: int
    batch: int
    steps: int
    cfg: float
    precision: str = STORED
    rank: int = 32
    lora_rank: int = 0

    def __post_init__(self):
        if min(self.width, self.height, self.batch, self.steps) < 1 or self.rank < 0 or self.lora_rank < 0:
            raise ValueError("width, height, batch and steps must be 1 or more, ranks 0 or more")

    @property
    def rows(self) -> int:
        """Pictures in one model evaluation: guidance runs the prompt and its negative together."""
        return self.batch * (2 if self.cfg > 1 else 1)

    @property
    def pixels(self) -> int:
        """Of all pictures together."""
        return self.batch * self.width * self.height


@dataclass(frozen=True)
class Known:
    """What is known before the estimate. ``activation``: bytes when there is no ``work`` to simulate (an architecture
    this version cannot build empty), with ``activation_how``. ``vae_activation``: bytes of decoding, 0 if unknown.
    """

    weights: Weights
    work: Work | None
    constants: Constants | None
    constants_how: str
    activation: int = 0
    activation_how: str = ""
    vae_activation: int = 0


@dataclass(frozen=True)
class Estimate:
    """Bytes by part, and seconds (None: not known on this machine). ``formula``: lines with the numbers put in."""

    task: Task
    weights: int
    lora: int
    activation: int
    text: int
    vae: int
    vae_activation: int
    context: int
    seconds: float | None
    calibrated: bool
    formula: tuple[str, ...]

    @property
    def phases(self) -> dict[str, int]:
        """Bytes of each part of a run while the others are not on the card."""
        sampling = self.weights + self.lora + self.activation
        return {"text encoder": self.text, "sampling": sampling, "VAE": self.vae + self.vae_activation}

    @property
    def peak(self) -> int:
        return max(self.phases.values()) + self.context

    @property
    def resident(self) -> int:
        """The peak when nothing is unloaded in between."""
        models = self.weights + self.lora + self.text + self.vae
        return models + max(self.activation, self.vae_activation) + self.context

    def fits(self, limit: int) -> str:
        """yes; offload: only with weights streamed from RAM, slower; no: not even then."""
        if self.peak <= limit:
            return YES
        least = max(self.activation, self.vae_activation) + self.context
        return OFFLOAD if least <= (1 - STREAM) * limit else NO


def estimate(task: Task, known: Known, precisions: Mapping[str, Precision], gpu: bool = True) -> Estimate:
    """The estimate of one task. ``gpu``: count the driver's memory, which a CPU has not."""
    w = known.weights
    chosen = precisions.get(task.precision)
    if chosen is None and task.precision != STORED:
        raise ValueError(f"unknown precision {task.precision!r}; there are {STORED}, {', '.join(precisions)}")
    weights = w.stored if chosen is None else chosen.total(w, task.rank)
    lora = w.lora(task.lora_rank) if is_4bit(task, w, precisions) else 0
    activation = known.activation
    c = known.constants
    if known.work is not None:
        activation = c.activation(known.work.live) if c is not None else known.work.live
    context = ((c.context if c is not None else 0) or CONTEXT) if gpu else 0
    time = c.seconds(task.pixels, known.work.flops, task.steps) if c is not None and known.work is not None else None
    out = Estimate(
        task, weights, lora, activation, w.text, w.vae, known.vae_activation, context, time, c is not None, ()
    )
    return Estimate(**{**out.__dict__, "formula": tuple(_formula(out, known, chosen))})


def is_4bit(task: Task, weights: Weights, precisions: Mapping[str, Precision]) -> bool:
    """Whether the task's weights are 4-bit ones with a 16-bit branch beside them."""
    chosen = precisions.get(task.precision)
    return chosen.branch if chosen is not None else weights.four_bit


def _formula(e: Estimate, known: Known, chosen: Precision | None) -> list[str]:
    w, c, t = known.weights, known.constants, e.task
    how = "sum of its tensors" if chosen is None else f"{len(w.linears)} layers as {chosen.id}, the rest in 16 bits"
    lines = [f"weights = {e.weights:,} B ({how})"]
    if t.lora_rank:
        pairs = sum(x.n + x.k for x in w.linears)
        merged = "0 B: merged into the weights" if not e.lora else f"2 B x {t.lora_rank} x {pairs:,} = {e.lora:,} B"
        lines.append(f"LoRA = {merged}")
    if known.work is None:
        lines.append(f"activations = {e.activation:,} B ({known.activation_how})")
    else:
        live = f"{known.work.live:,} B live at once, {t.rows} x {t.width} x {t.height}"
        fitted = f"{c.activation_fixed:,.0f} B + {c.activation_factor:.3f} x {live}" if c else f"{live}, as simulated"
        lines.append(f"activations = {fitted} = {e.activation:,} B")
    lines.append(f"text encoder = {e.text:,} B; VAE = {e.vae:,} B + {e.vae_activation:,} B to decode")
    lines.append(f"driver = {e.context:,} B" + ("" if c and c.context else " (assumed)" if e.context else ""))
    parts = "; ".join(f"{n} {b:,}" for n, b in e.phases.items())
    lines.append(f"memory = max({parts}) + {e.context:,} = {e.peak:,} B; all resident {e.resident:,} B")
    if e.seconds is not None:
        work, speed = f"{known.work.flops / 1e9:,.1f} GFLOP", f"{c.flops_per_second / 1e9:,.1f} GFLOP/s"
        once = f"{c.run_fixed:.3f} s + {1e6 * c.run_per_pixel:.4f} s x {t.pixels / 1e6:.3f} megapixels"
        one = f"{c.evaluation_fixed:.4f} s + {work} / {speed}"
        lines.append(f"time = {once} + {t.steps} x ({one}) = {e.seconds:.2f} s")
    return lines


def at_best(card: Card, work: Work, weights: Weights, precision: Precision, task: Task, nbytes: int) -> float:
    """Seconds that ``card`` cannot beat: its tensor cores and memory at their printed limits. Real runs are slower."""
    shrunk = sum(work.layers.get(x.name, 0) for x in weights.linears)
    compute = shrunk / card.rate(precision.rate) + (work.flops - shrunk) / card.rate("fp16")
    return task.steps * max(compute, nbytes / (card.bandwidth * 1e9))


def fit_table(task: Task, known: Known, precisions: Mapping[str, Precision]) -> list[str]:
    """Markdown: does it fit, card by card and precision by precision, with the memory each precision needs.

    ``known.work`` must be simulated in the 16-bit dtype that cards run.
    """
    each = {p: estimate(with_precision(task, p), known, precisions) for p in precisions}
    head = ["card", *(f"{p} ({size(e.peak)})" for p, e in each.items()), "at best"]
    rows = []
    for card in CARDS.values():
        cells = [e.fits(card.nbytes) for e in each.values()]
        best = "-"
        if known.work is not None:
            fast = (
                min(
                    at_best(card, known.work, known.weights, p, task, p.total(known.weights, task.rank))
                    for id, p in precisions.items()
                    if each[id].fits(card.nbytes) == YES
                )
                if YES in cells
                else None
            )
            best = "-" if fast is None else seconds(fast)
        rows.append((card.name, *cells, best))
    return table(head, rows)


def with_precision(task: Task, precision: str) -> Task:
    """The same task with its weights stored otherwise."""
    return Task(**{**asdict(task), "precision": precision})


def markdown(e: Estimate, known: Known, machine: str, limit: int, tables: list[str]) -> str:
    """The whole estimate in words. ``machine``, ``limit``: what it was asked for; ``tables``: the fit table."""
    t, w = e.task, known.weights
    verdict = {YES: "It fits", OFFLOAD: "It fits with weights offloaded to RAM (slower)", NO: "It does not fit"}
    lines = [f"**{verdict[e.fits(limit)]}**: {size(e.peak)} of {size(limit)} on {machine}.", ""]
    lines.append(f"{w.name} ({w.family}), {t.width} x {t.height}, batch {t.batch}, {t.steps} steps, cfg {t.cfg:g}, "
                 f"weights {t.precision}.")  # fmt: skip
    parts = {"diffusion weights": e.weights, "LoRA": e.lora, "activations": e.activation, "text encoder": e.text,
             "VAE": e.vae, "VAE decoding": e.vae_activation, "driver": e.context}  # fmt: skip
    lines += ["", *table(("part", "memory"), [(n, size(b)) for n, b in parts.items() if b])]
    time = f"about {seconds(e.seconds)}" if e.seconds is not None else "not known"
    lines += ["", f"Seconds: {time} ({known.constants_how})." + far(known)]
    if not e.calibrated:
        lines.append("Not calibrated: activations are simulated bytes without what kernels add. Run `nibble profile` "
                     "on this machine, or record a run with Profile this Model.")  # fmt: skip
    lines += ["", "```", *e.formula, "```"]
    lines += ["", "Does it fit? (offload: only with weights in RAM. At best: a bound from the card's printed limits "
              "for the fastest precision that fits; nobody measured it.)", "", *tables]  # fmt: skip
    return "\n".join(lines)


def far(known: Known) -> str:
    """A sentence where the task's evaluations are much larger or smaller than those that were measured, else ""."""
    c, work = known.constants, known.work
    if c is None or work is None or not c.flops_most:
        return ""
    above, below = work.flops / c.flops_most, work.flops / max(1, c.flops_least)
    if above <= SPAN and below >= 1 / SPAN:
        return ""
    ratio, which = (above, "largest") if above > SPAN else (below, "smallest")
    return f" An evaluation of it is {ratio:.2g} times the {which} one measured: record a run of its size to be sure."


def to_json(e: Estimate, known: Known) -> str:
    data = asdict(e) | {"phases": e.phases, "peak": e.peak, "resident": e.resident}
    data |= {"model": known.weights.name, "family": known.weights.family, "how": known.constants_how}
    if known.work is not None:
        data |= {"flops_per_evaluation": known.work.flops, "live_bytes": known.work.live}
    return json.dumps(data, indent=1)
