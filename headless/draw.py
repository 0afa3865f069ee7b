"""The work of ``nibble generate``: the pipeline with its LoRAs, the prompts, how they are sampled, the pictures."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from .. import demo as shipped
from ..families import PRESETS, SIDES
from ..lora.apply import apply
from ..lora.read import read_file
from ..prompts import expand, sets, text
from ..prompts.spec import AUTO, PROSE, TAGS, Domain
from ..reading.names import shown
from ..sampling.detect import Match
from ..sampling.schedules import total_of
from ..writing import whole
from ..writing.room import check_room
from . import conditions, few_steps, pipeline, sheet
from .prompts import load as load_domain

Say = Callable[[str], None]
Lora = tuple[Path, float]


def draw(args: Namespace, start: Callable[[int], None], on_step: Callable[[], None], say: Say) -> Iterator[Path]:
    """Writes one PNG per prompt with the seed in its name, and yields its path. ``args``: the command line's, checked
    by `generate.check`; ``start`` hears how many steps there are; ``say`` hears what a person should know.

    Raises ValueError in one sentence for whatever does not fit.
    """
    wish = conditions.Wish(**{name: getattr(args, name) for name in conditions.Wish.__dataclass_fields__})
    wish.check()
    check_room(args.out / "nibble.png", 0)
    loras = [split_strength(given) for given in args.lora]
    texts = prompts_of(args)
    domain = load_domain(args.domain) if args.domain else None
    folder = args.model or shipped.MODEL
    pipe = pipeline.load_pipeline(folder, args.device)
    conditions.sized(pipe, wish)
    plan, loras = planned(args, pipe, folder, loras)
    if args.quantized is not None:
        pipeline.install_file(pipe, args.quantized)
    elif args.precision == "4-bit" and not pipeline.quantize(pipe, args.rank):
        say("no layer of this model can be in 4 bits: its widths are no multiples of 64. It is drawn in 16")
    for path, strength in loras:
        if left := add_lora(pipe, path, strength):
            say(left)
    positive, negative, notes = worded(texts, args, domain, pipe, [path.name for path, _ in loras], plan)
    ready = conditions.ready(pipe, wish, usual_size(domain, pipe))
    few_steps.set_up(ready.pipe, plan, wish.denoise, ready.size)
    for sentence in (*plan.notes, *notes, *overlong(pipe, positive)):
        say(sentence)
    yield from sampled(args, ready, plan, wish, (positive, negative), start, on_step)


def sampled(args: Namespace, ready: conditions.Ready, plan: few_steps.Sampling, wish: conditions.Wish, words,
            start: Callable[[int], None], on_step: Callable[[], None]) -> Iterator[Path]:  # fmt: skip
    """The pictures, batch by batch; each is written as soon as it is drawn."""
    positive, negative = words
    batch = 1 if wish.pictures else args.batch  # not every pipeline can repeat a picture for several prompts
    begins = range(0, len(positive), batch)
    start(plan.steps * len(begins))
    steps = plan.steps if plan.row is not None else total_of(plan.steps, wish.denoise)
    for i in begins:
        seed, part = args.seed + i, slice(i, i + batch)
        try:
            drawn = pipeline.sample(ready.pipe, positive[part], steps, plan.cfg, seed, negative[part], *ready.size,
                                    on_step, plan.guidance, ready.more)  # fmt: skip
        except RuntimeError as e:
            if (sentence := failed(e, wish)) is None:
                raise
            raise ValueError(sentence) from e
        for j, picture in enumerate(drawn):
            yield _save(picture, args.out, seed + j)


def failed(error: RuntimeError, wish: conditions.Wish) -> str | None:
    """A sentence for what a person can mend; None for the rest."""
    why = " ".join(str(error).split())[:120]
    if isinstance(error, torch.OutOfMemoryError):
        return "there is not enough memory on the device: give --batch 1, or fewer pixels by --width and --height"
    parts = [shown(p.name) for p in (wish.controlnet, wish.ip_adapter) if p is not None]
    return f"{' or '.join(parts)} does not fit this model ({why}): take one that is made for it" if parts else None


def prompts_of(args: Namespace) -> list[str]:
    """What was typed, then what is in the file. Raises ValueError for a file that cannot be read."""
    typed = [text.clean(prompt) for prompt in args.prompt]
    return typed + (sets.texts(args.prompts) if args.prompts is not None else [])


def split_strength(given: str) -> Lora:
    """'file.safetensors:0.8' -> (file, 0.8); the strength may be left out. A PEFT adapter's folder is a file, too.
    Raises ValueError for a missing one.
    """
    name, colon, number = given.rpartition(":")
    path, strength = Path(given), 1.0
    if colon and not path.exists() and (value := _number(number)) is not None:
        path, strength = Path(name), value
    if not path.exists():
        raise ValueError(f"{shown(path.name)}: there is no such LoRA file")
    return path, strength


def _number(given: str) -> float | None:
    try:
        value = float(given)
    except ValueError:
        return None
    return value if abs(value) <= 100 else None  # neither is "nan"


def planned(args: Namespace, pipe, folder: Path, loras: list[Lora]) -> tuple[few_steps.Sampling, list[Lora]]:
    """(how to draw, the LoRAs with the shipped one where --lcm adds it)."""
    known = few_steps.facts(pipe, folder, loras, args.quantized)
    notes = []
    if args.lcm:
        own = few_steps.distillation(known)
        match = own or Match(few_steps.lcm_row(known), 0, "chosen by --lcm")
        if own is not None and own.preset.prediction != "lcm":
            notes.append(f"--lcm is left out: {shown(own.file.name)} is a distillation itself, sampled in its own way")
        if own is None and few_steps.of_domain(pipe) == few_steps.DEMO:
            loras = [*loras, (shipped.LORAS["lcm"], 1.0)]
            match = replace(match, file=few_steps.file_of(*loras[-1]))
    else:
        match = few_steps.match_of(args.preset, known)
    plan = few_steps.sampling(match, few_steps.usual(pipe), args.steps, args.cfg, args.guidance)
    return replace(plan, notes=(*notes, *plan.notes)), loras


def add_lora(pipe, path: Path, strength: float) -> str:
    """A sentence where only a part of the file is applied, or nothing at strength 0, else "". Raises ValueError for no
    LoRA of this model.
    """
    report = apply(pipeline.denoiser(pipe), read_file(path), strength)
    if not report.applied:
        raise ValueError(f"{path.name}: no layer of this model is in it ({report.summary()})")
    if strength == 0:
        return f"{shown(path.name)}: strength 0, nothing is changed"
    return "" if report.whole else f"{shown(path.name)}: {report.summary()}"


def worded(texts: list[str], args: Namespace, domain: Domain | None, pipe, loras: list[str],
           plan: few_steps.Sampling):  # fmt: skip
    """(positive, negative, notes): one prompt of each kind a picture, expanded where there is a domain."""
    negative, notes = [args.negative or ""] * len(texts), []
    if domain is not None:
        found = expanded(texts, args.seed, domain, pipe, loras)
        texts = [p.positive for p in found]
        if args.negative is None:
            negative = [p.negative for p in found]
        notes += suited(domain, found[0], few_steps.of_domain(pipe), loras, plan)
    takes = conditions.takes(pipe)
    if args.negative and plan.cfg <= 1:
        notes.append(f"the negative prompt has no effect at cfg {plan.cfg:g}: give --cfg above 1")
    elif any(negative) and plan.cfg > 1 and "negative_prompt" not in takes:
        notes.append(f"{type(pipe).__name__} takes no negative prompt in diffusers: it has no effect")
    if plan.cfg > 1 and "true_cfg_scale" not in takes and pipeline.has_guidance(pipe):
        notes.append("cfg has no effect: this model's guidance is built in, and --guidance sets it")
    if args.guidance is not None and not pipeline.has_guidance(pipe):
        notes.append("--guidance has no effect: this model has none built in, and --cfg sets it")
    return texts, negative, notes


def expanded(texts: list[str], seed: int, domain: Domain, pipe, loras: list[str]) -> list[expand.Prompt]:
    """Each subject by the template, in the style that the text encoders read, with the words that ``loras`` need."""
    style, family, out = style_of(pipe), few_steps.of_domain(pipe) or "", []
    given = {name.casefold() for name in loras}
    for i, subject in enumerate(texts):
        first = expand.resolve(domain, subject, seed + i, style)
        suits = (x for x in expand.loras(domain, family, first.chosen) if x.file.casefold() in given)
        words = ", ".join(x.trigger for x in suits if x.trigger)
        out.append(expand.resolve(domain, subject, seed + i, style, trigger=words) if words else first)
    return out


def style_of(pipe) -> str:
    """tags for CLIPs alone, prose for an encoder that reads sentences; without any, what is usual for the model."""
    kinds = [type(part).__name__ for name, part in pipe.components.items() if name.startswith("text_encoder") and part]
    if not kinds:
        found = few_steps.variant(pipe)
        return found.style if found else AUTO
    return TAGS if all(kind.startswith("CLIPText") for kind in kinds) else PROSE


def suited(domain: Domain, first: expand.Prompt, family: str | None, loras: list[str], plan) -> list[str]:
    """What the domain names and this run does not have: its LoRAs, and its preset."""
    given, notes = {name.casefold() for name in loras}, []
    ours = {path.name: path for path in shipped.LORAS.values()}
    for lora in expand.loras(domain, family or "", first.chosen):
        if lora.file.casefold() not in given:
            where = ours.get(lora.file, lora.link)
            notes.append(f"{domain.id} suits the LoRA {lora.file} ({where}): give it with --lora")
    row = PRESETS.get(domain.presets.get(family or "", ""))
    if plan.row is None and row is not None and row.lora:
        how = "--lcm" if family == few_steps.DEMO else f"--lora with its LoRA, {row.lora} ({row.source})"
        notes.append(f"{domain.id} suits the preset {row.id}: {row.steps} steps by {how}")
    return notes


def usual_size(domain: Domain | None, pipe) -> tuple[int, int] | None:
    """The domain's size for the model's family, in steps that the model can draw."""
    family = few_steps.of_domain(pipe)
    if domain is None or family not in SIDES:
        return None
    step = conditions.multiple_of(pipe)
    return tuple(side // step * step for side in domain.size(family))


def overlong(pipe, texts: list[str]) -> list[str]:
    """A sentence where CLIPs alone read the prompts and do not read all of them."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None or style_of(pipe) != TAGS:
        return []
    most = min(tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings)
    found = [(len(ids), ids) for ids in (tokenizer(t).input_ids for t in texts) if len(ids) > most]
    if not found:
        return []
    count, ids = found[0]
    rest = tokenizer.decode(ids[most - 1 : -1]).strip()
    if len(texts) == 1:
        return [f"the prompt has {count} tokens and the text encoder reads {most}. Not read: {shown(rest)}"]
    many = f"{len(found)} of {len(texts)} prompts are longer than the {most} tokens that the text encoder reads"
    return [f"{many}. Not read of the first: {shown(rest)}"]


def _save(picture, folder: Path, seed: int) -> Path:
    number = 0
    while (path := folder / f"nibble_{seed}_{number:03}.png").exists():
        number += 1
    whole.picture(path, sheet.to_image(picture))
    return path
