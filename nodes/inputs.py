"""What reaches a node, held against its schema. ComfyUI checks what stands in widgets, but its bounds let NaN pass, and
what comes through a link is not checked at all.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping

import torch
from comfy_api.latest import io

from ..reading.names import UNENCODABLE, shown

LISTED = 5  # choices that a sentence names
# What a value of a type has. Types that are neither here nor in `_fits` are not checked.
PARTS = {
    "MODEL": ("model", "clone"),
    "CLIP": ("tokenize",),
    "VAE": ("decode",),
    "CLIP_VISION": ("encode_image",),
    "NIBBLE_LORA": ("path", "strength_model"),
    "NIBBLE_IPADAPTER": ("image_proj", "layers"),
}

Schema = Callable[[], io.Schema]


def checked(schema: io.Schema, given: Mapping, renewed: Schema) -> dict:
    """``given`` in the types of the schema's inputs, without those that are empty and optional.

    ``renewed`` gives the schema with lists as they are now. Raises ValueError in a sentence that names the input.
    """
    return _checked(schema.inputs, given, "", lambda: renewed().inputs)


def _checked(inputs: list[io.Input], given: Mapping, above: str, renewed: Callable[[], list[io.Input]]) -> dict:
    out = dict(given)
    for one in inputs:
        if one.id not in given:
            continue
        name, value = above + one.id, given[one.id]
        if value is None and one.optional:
            del out[one.id]  # its default counts, as where nothing is connected
        elif isinstance(one, io.Autogrow.Input):
            rows = _dict(value, name).items()
            out[one.id] = {k: v if v is None else _value(one.template.input, v, f"{name}.{k}") for k, v in rows}
        elif isinstance(one, io.DynamicCombo.Input):
            chosen = {option.key: option.inputs for option in one.options}
            key = _dict(value, name).get(one.id)
            if key not in chosen:
                raise ValueError(_choose(name, key, list(chosen)))
            out[one.id] = _checked(chosen[key], value, f"{name}.", lambda: [])
        elif isinstance(one, io.Combo.Input):
            if value not in one.options:
                options = next((new.options for new in renewed() if new.id == one.id), one.options)
                if value not in options:
                    raise ValueError(_choose(name, value, options))
        else:
            out[one.id] = _value(one, value, name)
    return out


def _dict(value, name: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: {_seen(value)} is no group of inputs. Connect its single inputs")
    return value


def _choose(name: str, value, options: list) -> str:
    some = ", ".join(shown(o) for o in options[:LISTED])
    more = f" or one of {len(options) - LISTED} others" if len(options) > LISTED else ""
    return f"{name}: {_seen(value)} is not in its list. " + (f"Choose {some}{more}" if some else "The list is empty")


def _seen(value) -> str:
    """A value as a sentence names it: numbers and names by themselves, others by their type."""
    if not isinstance(value, str | int | float):
        return "nothing" if value is None else f"a value of type {shown(type(value).__name__)}"
    try:
        return shown(value) or "an empty text"
    except ValueError:  # Python writes no numbers of more than some thousand digits
        return "an endless number"


def _value(one: io.Input, value, name: str):
    """``value`` in the type of the input ``one``."""
    kind = one.get_io_type()
    if kind in ("INT", "FLOAT"):
        return _number(one, value, name)
    if kind == "BOOLEAN":
        return _boolean(value, name)
    if kind == "STRING":
        return _text(value, name)
    if not _fits(kind, value):
        raise ValueError(f"{name}: what came is no {kind}, but {_seen(value)}. Connect a {kind} output")
    return value


def _number(one: io.Int.Input | io.Float.Input, value, name: str) -> int | float:
    """A finite number within the input's bounds. Texts that are one count, as in ComfyUI."""
    whole = one.get_io_type() == "INT"
    try:
        number = _whole(value) if whole else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several numbers
        number = math.nan
    low, high = (-math.inf if one.min is None else one.min), (math.inf if one.max is None else one.max)
    if low <= number <= high and (whole or math.isfinite(number)):
        return number
    bounds = " and ".join(
        f"{word} {bound if whole else format(bound, 'g')}"
        for word, bound in (("at least", one.min), ("at most", one.max))
        if bound is not None
    )
    kind = "a whole number" if whole else "a number"
    raise ValueError(f"{name} is {_seen(value)}. Set it to {kind}{f' of {bounds}' if bounds else ''}")


def _whole(value) -> int:
    if isinstance(value, str):
        return int(value)
    try:
        return int(operator.index(value))
    except TypeError:
        number = float(value)
    if not number.is_integer():
        raise ValueError("not whole")
    return int(number)


def _boolean(value, name: str) -> bool:
    """True or false, or a number: in ComfyUI 0 is false. A text is refused: "false" would be true."""
    if isinstance(value, bool | int) or type(value).__name__ in ("bool_", "bool"):  # NumPy's
        return bool(value)
    raise ValueError(f"{name}: {_seen(value)} is neither true nor false. Set it to one of them")


def _text(value, name: str) -> str:
    if not isinstance(value, str | int | float):
        raise ValueError(f"{name}: {_seen(value)} is no text. Connect a STRING output")
    text = str(value)
    if found := UNENCODABLE.search(text):
        what = f"half a letter (U+{ord(found[0]):04X}) that no file and no log can hold"
        raise ValueError(f"{name}: character {found.start() + 1} is {what}. Delete it")
    return text


def _fits(kind: str, value) -> bool:
    if kind in PARTS:
        return all(hasattr(value, part) for part in PARTS[kind])
    if kind == "LATENT":
        return isinstance(value, Mapping) and "samples" in value
    if kind == "IMAGE":
        return isinstance(value, torch.Tensor) and value.dim() == 4
    if kind == "MASK":
        return isinstance(value, torch.Tensor)
    if kind == "CONDITIONING":
        return isinstance(value, list) and all(isinstance(e, list | tuple) and len(e) == 2 for e in value)
    return True
