"""Checks a domain file key by key and turns it into a `Domain`. Every error names the place: slots.light.choices[3].

Keys of a domain
  id            name@version; a released version never changes, a change is a new version
  title, description, example (the subject of its example picture)
  style         prose or tags: what "auto" means where no encoder is known
  prose, tags   {positive: [part, ...], negative: [part, ...]}; a part is a text or {text, when}
  slots         name -> {choices | list, chance, when}; a choice is a text or {name, text | prose + tags, weight, when}
  loras         [{file, family, link, strength, trigger, when}]; link says where to get it, for who lacks it
  presets       family -> few-step preset;  resolution: family -> [width, height]
  calibration   subjects for calibrating a quantizer;  based_on: the domain it was made from
``when``: {slot: choice or [choice, ...]}, all must hold.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping

from ..families import SIDES
from . import text as texts
from .reader import DomainError
from .spec import GIVEN, PROSE, STYLES, Choice, Condition, Domain, Lora, Part, Slot, When

ID = re.compile(r"[a-z][a-z0-9-]{0,59}@[1-9][0-9]{0,3}")
LIST = PRESET = re.compile(r"[a-z0-9][a-z0-9_.-]{0,59}")
FILE = re.compile(r"[^./\\:*?\"<>|\x00-\x1f][^/\\:*?\"<>|\x00-\x1f]{0,150}\.safetensors")
LINK = re.compile(r"https://(huggingface\.co|civitai\.com)/[\w./?=&%-]{1,200}|shipped")
WHERE = "a https link to huggingface.co or civitai.com"
MAX_DEPTH = 6  # slots that look at slots that look at slots ...
MAX_TEXT, MAX_PARTS, MAX_SLOTS, MAX_CHOICES, MAX_SUBJECTS = 600, 40, 40, 2000, 1000
KEYS = {"id", "title", "description", "style", "example", *STYLES, "slots", "loras", "presets", "resolution",
        "calibration", "based_on"}  # fmt: skip

ReadList = Callable[[str], tuple[str, ...]]


def no_lists(name: str) -> tuple[str, ...]:
    raise DomainError(f"there is no list {name!r} here")


def parse(data, where: str, read_list: ReadList = no_lists) -> Domain:
    """A Domain from loaded YAML. Raises DomainError with ``where`` and the key that is missing, unknown or wrong."""
    try:
        return _domain(_mapping(data, "the file", KEYS), read_list)
    except DomainError as e:
        raise DomainError(f"{where}: {e}") from None


def _domain(data: dict, read_list: ReadList) -> Domain:
    given = {key: _text(data.get(key), key) for key in ("title", "description", "example")}
    slots = {
        _name(name, "slots"): _slot(name, value, read_list)
        for name, value in _mapping(data.get("slots", {}), "slots", limit=MAX_SLOTS).items()
    }
    chosen = {
        style: {side: _parts(_mapping(data.get(style), style, {"positive", "negative"}), side, style)
                for side in ("positive", "negative")}
        for style in STYLES
    }  # fmt: skip
    loras = tuple(_lora(v, f"loras[{i}]") for i, v in enumerate(_list(data.get("loras", []), "loras", 20), 1))
    style = _one_of(data.get("style", PROSE), STYLES, "style")
    sizes = _mapping(data.get("resolution", {}), "resolution", set(SIDES))
    presets = _mapping(data.get("presets", {}), "presets", set(SIDES))
    subjects = _list(data.get("calibration", []), "calibration", MAX_SUBJECTS)
    domain = Domain(
        id=_matching(data.get("id"), ID, "id", "name@version, such as food@1"),
        **given,
        style=style,
        texts=chosen,
        slots=slots,
        order=ordered(slots),
        loras=loras,
        presets={f: _matching(p, PRESET, f"presets.{f}", "a preset's id") for f, p in presets.items()},
        resolution={f: _size(s, f"resolution.{f}") for f, s in sizes.items()},
        calibration=tuple(_text(t, f"calibration[{i}]") for i, t in enumerate(subjects, 1)),
        based_on=_matching(data["based_on"], ID, "based_on", "a domain's id") if "based_on" in data else "",
        hash=fingerprint(data, {n: [c.name for c in s.choices] for n, s in slots.items()}),
    )
    _check_marks(domain)
    return domain


def fingerprint(data: dict, listed: dict) -> str:
    """16 hex digits of what the file says; comments, key order and line ends do not count, list files do."""
    said = json.dumps([data, listed], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _slot(name: str, value, read_list: ReadList) -> Slot:
    at = f"slots.{name}"
    data = _mapping(value, at, {"choices", "list", "chance", "when"})
    if ("choices" in data) == ("list" in data):
        raise DomainError(f"{at}: give either 'choices' or 'list'")
    if "list" in data:
        try:
            entries = read_list(_matching(data["list"], LIST, f"{at}.list", "a list's name, no path"))
        except DomainError as e:
            raise DomainError(f"{at}.list: {e}") from None
        choices = tuple(Choice(e, dict.fromkeys(STYLES, (e,))) for e in entries)
    else:
        entries = _list(data["choices"], f"{at}.choices", MAX_CHOICES)
        choices = tuple(_choice(v, f"{at}.choices[{i}]") for i, v in enumerate(entries, 1))
    if not 0 < len(choices) <= MAX_CHOICES:
        raise DomainError(f"{at}: needs 1 to {MAX_CHOICES} choices")
    names = [c.name for c in choices]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise DomainError(f"{at}: the choice {twice!r} is there twice")
    return Slot(name, choices, _whole(data.get("chance", 100), f"{at}.chance", 1, 100), _when(data, at))


def _choice(value, at: str) -> Choice:
    if isinstance(value, str):
        return Choice(_text(value, at), dict.fromkeys(STYLES, _pieces(value, at)))
    data = _mapping(value, at, {"name", "text", *STYLES, "weight", "when"})
    if ("text" in data) == any(s in data for s in STYLES):
        raise DomainError(f"{at}: give either 'text', or both 'prose' and 'tags'")
    written = {s: _pieces(data.get("text", data.get(s)), f"{at}.{'text' if 'text' in data else s}") for s in STYLES}
    name = _text(data.get("name", data.get("text")), f"{at}.name")
    return Choice(name, written, _whole(data.get("weight", 1), f"{at}.weight", 1, 1000), _when(data, at))


def _parts(data: Mapping, side: str, style: str) -> tuple[Part, ...]:
    out = []
    for i, value in enumerate(_list(data.get(side, []), f"{style}.{side}", MAX_PARTS), 1):
        at = f"{style}.{side}[{i}]"
        part = _mapping(value, at, {"text", "when"}) if isinstance(value, dict) else {"text": value}
        out.append(Part(_pieces(part.get("text"), at), _when(part, at)))
    return tuple(out)


def _lora(value, at: str) -> Lora:
    data = _mapping(value, at, {"file", "family", "link", "strength", "trigger", "when"})
    strength = data.get("strength", 1.0)
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not -4 <= strength <= 4:
        raise DomainError(f"{at}.strength: must be a number from -4 to 4")
    return Lora(
        file=_matching(data.get("file"), FILE, f"{at}.file", "the name of a .safetensors file, no folder"),
        family=_one_of(data.get("family"), tuple(SIDES), f"{at}.family"),
        link=_matching(data["link"], LINK, f"{at}.link", WHERE) if "link" in data else "",
        strength=float(strength),
        trigger=_text(data["trigger"], f"{at}.trigger") if "trigger" in data else "",
        when=_when(data, at),
    )


def _when(data: Mapping, at: str) -> When:
    given = _mapping(data.get("when", {}), f"{at}.when")
    return tuple(
        Condition(_name(slot, f"{at}.when"), tuple(_text(n, f"{at}.when.{slot}") for n in _as_list(names)))
        for slot, names in given.items()
    )


def _check_marks(domain: Domain) -> None:
    """Every mark and condition names a slot there is, and a choice that it has."""
    places = [(f"slots.{s.name}", s.when, ()) for s in domain.slots.values()]
    for s in domain.slots.values():
        for i, c in enumerate(s.choices, 1):
            named = tuple(m for style in STYLES for m in texts.marks(c.texts[style]))
            places.append((f"slots.{s.name}.choices[{i}]", c.when, named))
            for other in (domain.slots[m] for m in named if m in domain.slots):
                if other.chance < 100 or other.when or all(c.when for c in other.choices):
                    raise DomainError(
                        f"slots.{s.name}.choices[{i}]: slot {other.name!r} may be empty; name it in a part"
                    )
    for style, sides in domain.texts.items():
        for side, parts in sides.items():
            places += [(f"{style}.{side}[{i}]", p.when, texts.marks(p.pieces)) for i, p in enumerate(parts, 1)]
        if not any("subject" in texts.marks(p) for p in _reached(domain, style)):
            raise DomainError(f"{style}.positive: {{subject}} is nowhere in it")
    places += [(f"loras[{i}]", lora.when, ()) for i, lora in enumerate(domain.loras, 1)]
    for at, when, named in places:
        for slot in (*named, *(c.slot for c in when)):
            if slot not in domain.slots and (slot not in GIVEN or slot in {c.slot for c in when}):
                raise DomainError(f"{at}: there is no slot {slot!r}; there are {', '.join(domain.slots) or 'none'}")
        for c in when:
            lost = set(c.names) - {choice.name for choice in domain.slots[c.slot].choices}
            if lost:
                raise DomainError(f"{at}.when: slot {c.slot!r} has no choice {min(lost)!r}")


def _reached(domain: Domain, style: str):
    """Every text that the positive prompt of ``style`` may hold."""
    yield from (p.pieces for p in domain.texts[style]["positive"])
    yield from (c.texts[style] for s in domain.slots.values() for c in s.choices)


def _pieces(value, at: str) -> texts.Pieces:
    try:
        return texts.parse(_text(value, at))
    except DomainError:
        raise
    except ValueError as e:
        raise DomainError(f"{at}: {e}") from None


def _text(value, at: str) -> str:
    if not isinstance(value, str) or not 0 < len(value.strip()) <= MAX_TEXT:
        raise DomainError(f"{at}: must be a text of 1 to {MAX_TEXT} characters; put quotes around a number")
    return texts.clean(value)


def _name(value, at: str) -> str:
    if not isinstance(value, str) or not texts.NAME.fullmatch(value) or value in GIVEN:
        raise DomainError(f"{at}: {str(value)[:40]!r} is no slot name; use small letters, digits and _")
    return value


def _matching(value, pattern: re.Pattern, at: str, what: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise DomainError(f"{at}: {str(value)[:60]!r} is not {what}")
    return value


def _one_of(value, allowed: tuple[str, ...], at: str) -> str:
    if value not in allowed:
        raise DomainError(f"{at}: {str(value)[:40]!r} is none of {', '.join(allowed)}")
    return value


def _whole(value, at: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise DomainError(f"{at}: must be a whole number from {low} to {high}")
    return value


def _size(value, at: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise DomainError(f"{at}: must be [width, height]")
    width, height = (_whole(v, at, 64, 4096) for v in value)
    if width % 8 or height % 8:
        raise DomainError(f"{at}: width and height must be multiples of 8")
    return width, height


def _list(value, at: str, limit: int) -> list:
    if not isinstance(value, list) or len(value) > limit:
        raise DomainError(f"{at}: must be a list of at most {limit} entries")
    return value


def _as_list(value) -> list:
    return value if isinstance(value, list) and value else [value]


def _mapping(value, at: str, allowed: set[str] | None = None, limit: int = 100) -> dict:
    if not isinstance(value, dict):
        kind = "nothing" if value in (None, "") else type(value).__name__
        raise DomainError(f"{at}: must be a mapping of keys, got {kind}")
    if len(value) > limit:
        raise DomainError(f"{at}: at most {limit} keys")
    unknown = [k for k in value if allowed is not None and k not in allowed]
    if unknown:
        raise DomainError(f"{at}: unknown key {str(unknown[0])[:40]!r}; known are {', '.join(sorted(allowed))}")
    return value


def needs(slot: Slot) -> list[str]:
    """The slots that must be known before ``slot``, each once."""
    found = [c.slot for c in slot.when]
    for choice in slot.choices:
        found += [c.slot for c in choice.when]
        found += [name for style in STYLES for name in texts.marks(choice.texts[style])]
    return list(dict.fromkeys(found))


def ordered(slots: Mapping[str, Slot]) -> tuple[str, ...]:
    """All slots, dependencies first, else as in the file. Raises DomainError naming a circle or a chain too long."""
    depth: dict[str, int] = {}

    def visit(name: str, chain: tuple[str, ...]) -> int:
        if name in chain:
            raise DomainError(f"slots.{name}: goes in a circle: {' -> '.join((*chain, name))}")
        if len(chain) >= MAX_DEPTH:
            raise DomainError(f"slots.{chain[0]}: more than {MAX_DEPTH} slots deep: {' -> '.join((*chain, name))}")
        if name not in depth:
            below = [visit(other, (*chain, name)) for other in needs(slots[name]) if other in slots]
            depth[name] = 1 + max(below, default=0)
        return depth[name]

    for name in slots:
        if visit(name, ()) > MAX_DEPTH:
            raise DomainError(f"slots.{name}: more than {MAX_DEPTH} slots deep")
    return tuple(sorted(slots, key=lambda n: depth[n]))
