"""Pages made from the domains: docs/domains.md, and the table of examples in the nodes' help pages.

``python -m comfyui_nibble.prompts.page`` writes them anew; a test fails while they differ from the domains.
"""

from __future__ import annotations

from pathlib import Path

from . import domain as domains
from .expand import resolve
from .spec import PROSE, STYLES, TAGS, Domain, Slot, When

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "domains.md"
HELP = (ROOT / "web" / "docs" / "NibbleDomainPrompt.md", ROOT / "web" / "docs" / "NibbleDomain.md")
BEGIN, END = "<!-- domains: made from the YAML files -->", "<!-- end of domains -->"
SEED = 1  # of the example prompts
NAMES = {TAGS: "Tags (SD1.5, SDXL)", PROSE: "Prose (Flux, SD3, Qwen-Image)"}

INTRO = """# Domains

A domain turns a few words into a full prompt: a template with choices, texts for two kinds of text encoder, negative
prompts, LoRAs that suit, a few-step preset, a picture size, and subjects for calibration. This page is made from the
files in `prompts/domains/`.

| Domain | For | Example subject |
|---|---|---|
"""

WRITING = """
## Write your own

Put a YAML file into `models/nibble_domains` (or save one with the node **Save Domain**). It is listed as `user/<file>`
and can never take the place of a shipped one. `nibble prompts check my-domain.yaml` says what is wrong with it.

```yaml
id: tea-shop@1                 # name@version; raise the version instead of changing a domain that others use
title: Tea shop
description: A cup or a pot of tea in a quiet shop.
style: prose                   # what "auto" means when the encoder is not known
example: a cup of green tea    # the subject of the example
prose:                         # for Flux, SD3, Qwen-Image ...
  positive:                    # parts; one whose slot is empty is left out
    - "A photograph of {subject} {table}"
    - ", with {steam}."
    - {text: "The shop is empty.", when: {light: [evening]}}
  negative: [people, text]
tags:                          # for SD1.5 and SDXL, 77 tokens; parts are joined with commas
  positive: ["photo of {subject}", "{table}", "{steam}", "{light}"]
  negative: ["lowres, people, text"]
slots:
  light:
    choices:
      - {name: morning, prose: Soft morning light, tags: soft morning light, weight: 3}   # three times as often
      - {name: evening, text: lamp light}                                                 # the same text in both
  table:
    choices: [on a wooden table, on a woven mat]
  steam:
    chance: 40                 # filled in 40 of 100 pictures
    when: {light: [morning]}   # and only then
    list: steam                # one choice a line in lists/steam.txt beside this file
loras:
  - {file: tea.safetensors, family: sdxl, link: "https://huggingface.co/you/tea", strength: 0.8, trigger: teaphoto}
presets: {sdxl: lightning_sdxl}
resolution: {sd15: [512, 640], sdxl: [896, 1152]}
calibration: [a cup of green tea, a pot of black tea]
```

`{subject}` is what the person types and `{trigger}` the words a LoRA needs; every other name in braces is a slot.
Braces themselves are written `{{` and `}}`. A text is never read twice and nothing is executed: no expressions, no
`{a|b}`, no wildcards in what people type. Each slot draws from the seed and its own name, so a slot that you add leaves
the others as they were.
"""


def page() -> str:
    """docs/domains.md."""
    found = [domains.load(i) for i in domains.shipped()]
    rows = "".join(f"| [{d.title}](#{_anchor(d)}) | {d.description} | {d.example} |\n" for d in found)
    return INTRO + rows + WRITING + "".join(section(d) for d in found)


def table() -> str:
    """The table of examples for help pages, with the marks around it."""
    rows = []
    for d in map(domains.load, domains.shipped()):
        text = resolve(d, d.example, SEED).positive
        rows.append(f"| `{d.id}` | {d.description} | {d.example} | {text} |\n")
    head = "| Domain | What it is for | Subject | Its prompt with seed 1 |\n|---|---|---|---|\n"
    return f"{BEGIN}\n{head}{''.join(rows)}{END}"


def _anchor(d: Domain) -> str:
    return d.title.lower().replace("'", "").replace(" ", "-")


def section(d: Domain) -> str:
    """One domain: example prompts, slots, sizes, presets and LoRAs."""
    lines = [f"\n## {d.title}\n", f"`{d.id}` · {d.description}\n"]
    for style in STYLES:
        prompt = resolve(d, d.example, SEED, style)
        lines.append(f"**{NAMES[style]}**, “{d.example}”, seed {SEED}:\n\n> {prompt.positive}\n")
        if prompt.negative:
            lines.append(f"Negative: {prompt.negative}\n")
    lines.append("| Slot | May become |\n|---|---|")
    lines += [f"| {s.name}{_often(s)} | {_choices(s)} |" for s in d.slots.values()]
    lines.append("")
    sizes = ", ".join(f"{f} {w} x {h}" for f, (w, h) in d.resolution.items())
    lines.append(f"Size: {sizes}. Few-step presets: {', '.join(f'{f} {p}' for f, p in d.presets.items())}.\n")
    for lora in d.loras:
        where = "ships with this pack" if lora.link == "shipped" else f"[{lora.file}]({lora.link})"
        words = f", trigger words “{lora.trigger}”" if lora.trigger else ""
        lines.append(f"LoRA for {lora.family}: {where}, strength {lora.strength:g}{words}{_when(lora.when)}.\n")
    lines.append(f"Calibration: {len(d.calibration)} subjects, such as {'; '.join(d.calibration[:4])}.\n")
    return "\n".join(lines)


def _often(slot: Slot) -> str:
    chance = f" ({slot.chance} %)" if slot.chance < 100 else ""
    return chance + _when(slot.when)


def _choices(slot: Slot) -> str:
    return " · ".join(f"{c.name}{f' x{c.weight}' if c.weight > 1 else ''}" for c in slot.choices)


def _when(when: When) -> str:
    return "".join(f", when {c.slot} is {' or '.join(c.names)}" for c in when)


def with_table(text: str) -> str:
    """A help page with the table between its marks made anew."""
    before, _, rest = text.partition(BEGIN)
    return before + table() + rest.partition(END)[2]


def write() -> None:
    """Writes docs/domains.md and the tables in the help pages."""
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
    for path in HELP:
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write()
