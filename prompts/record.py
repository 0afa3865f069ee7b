"""What a picture remembers of its prompt: written into the PNG under the key ``nibble``, read back from there."""

from __future__ import annotations

import json
from pathlib import Path

from ..reading import picture
from .expand import Prompt
from .reader import DomainError

KEY = "nibble"
MAX_RESOLVED = 64  # prompts of a batch that a picture remembers


def of(prompt: Prompt, **more) -> dict:
    """The record of one prompt; ``more``: what else was chosen (LoRAs, preset, size)."""
    return {
        "domain": prompt.domain,
        "hash": prompt.hash,
        "seed": prompt.seed,
        "style": prompt.style,
        "subject": prompt.subject,
        "chosen": prompt.chosen,
        "overrides": prompt.overrides,
        "positive": prompt.positive,
        "negative": prompt.negative,
        "tokens": prompt.tokens,
        **({"note": prompt.over} if prompt.over else {}),
        **more,
    }


def of_list(prompts: list[Prompt], **more) -> dict:
    """The record of a batch: the first `MAX_RESOLVED` prompts, and how many there were."""
    first = prompts[0]
    return {
        "domain": first.domain,
        "hash": first.hash,
        "style": first.style,
        "overrides": first.overrides,
        "count": len(prompts),
        "prompts": [p.positive for p in prompts[:MAX_RESOLVED]],
        **more,
    }


def to_text(record: dict) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False)


def read(png: Path) -> dict[str, dict]:
    """node id -> record, of a picture that ComfyUI saved. Raises DomainError when it has none."""
    try:
        written = picture.info(png).get(KEY)
    except picture.PictureError as e:
        raise DomainError(str(e)) from None
    try:
        found = json.loads(written) if written else {}
    except ValueError:
        found = {}
    if not isinstance(found, dict) or not found:
        raise DomainError(f"{png.name}: no domain prompt is recorded in it; save it with Save Image, metadata on")
    return found


def parse(text: str) -> dict:
    """A record from the text that a node put out: ``domain``, ``overrides``, ``chosen``, ``subject``, ``seed``.

    Raises DomainError when it is something else; nothing in it is trusted to be more than text and numbers.
    """
    try:
        data = json.loads(text) if len(text) <= 1 << 20 else None
    except (ValueError, RecursionError):
        data = None
    texts = ("domain", "subject", "style")
    tables = ("overrides", "chosen")
    good = (
        isinstance(data, dict)
        and all(isinstance(data.get(key), str) for key in texts)
        and all(isinstance(data.get(key), dict) for key in tables)
        and all(isinstance(v, str) for key in tables for v in data[key].values())
    )
    if not good:
        raise DomainError("this is no record of a domain prompt; connect the 'chosen' output of a domain node")
    return data
