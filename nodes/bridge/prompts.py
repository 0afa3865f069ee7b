"""Domains in ComfyUI: where people's own files are, which style a CLIP reads, and what a picture remembers."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import folder_paths

from ...families import SIDES
from ...prompts import bake, batch, expand, graph, record, schema
from ...prompts import domain as domains
from ...prompts.reader import DomainError
from ...prompts.spec import AUTO, PROSE, TAGS, Domain
from ...reading import textfile
from ...reading.names import shown
from ...writing import whole
from .. import files

FOLDER, OWN, ENDING = "nibble_domains", "user/", ".yaml"
CLIP_ALONE = {"l", "g", "h"}  # ComfyUI's names of CLIP-L, CLIP-G and OpenCLIP-H among a text encoder's tokens
CLASSES = ("NibbleDomainPrompt", "NibbleDomain", "NibblePromptList")
OPEN, EXACT = "choices open", "exactly this prompt"
MAX_REMEMBERED, MAX_DEPTH = 256, 100
_remembered: OrderedDict[str, dict] = OrderedDict()  # a node with all that is above it -> what it last recorded


def register() -> None:
    """Makes the folder of people's own domains known, and keeps records in pictures whose domain node was cached."""
    for folder in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(FOLDER, os.path.join(folder, FOLDER))
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(with_records)


def names() -> list[str]:
    """The shipped domains by id, then people's own as user/<file>; these can never take a shipped one's place."""
    own = [n[: -len(ENDING)] for n in files.listed(FOLDER, ENDING) if n.endswith(ENDING)]
    return domains.shipped() + [OWN + n for n in own if "/" not in n and "\\" not in n]


def find(choice: str) -> Domain:
    """The domain of a list entry. Raises DomainError for an entry that is not listed, or that two folders have."""
    if choice not in names():
        raise DomainError(f"there is no domain '{shown(choice)}'; choose one from the list")
    if not choice.startswith(OWN):
        return domains.load(choice)
    name = choice[len(OWN) :] + ENDING
    found = [Path(f) / name for f in folder_paths.get_folder_paths(FOLDER) if (Path(f) / name).is_file()]
    if len(found) != 1:
        raise DomainError(f"{shown(name)} is in {len(found)} {FOLDER} folders; rename all but one")
    return domains.load_file(found[0])


def fingerprint(choice: str) -> str:
    """Changes when the domain does, so that a node that used it runs again."""
    try:
        return find(choice).hash
    except DomainError as e:
        return str(e)


def style_of(clip) -> str:
    """tags for a text encoder of CLIPs alone, prose for one that reads sentences, auto without one."""
    if clip is None:
        return AUTO
    tokens = clip.tokenize("a")
    return TAGS if isinstance(tokens, Mapping) and set(tokens) <= CLIP_ALONE else PROSE


def triggers(domain: Domain, family: str, chosen: Mapping[str, str]) -> str:
    """The words that the domain's LoRAs for ``family`` need."""
    return ", ".join(lora.trigger for lora in expand.loras(domain, family, chosen) if lora.trigger)


def one(choice: str, subject: str, seed: int, style: str, overrides: str, family: str = "") -> expand.Prompt:
    """The prompt for a subject, with the trigger words of ``family``'s LoRAs. Raises DomainError."""
    domain, given = find(choice), expand.parse_overrides(overrides)
    first = expand.resolve(domain, subject, seed, style, given)
    words = triggers(domain, family, first.chosen)
    return expand.resolve(domain, subject, seed, style, given, words) if words else first


def many(choice: str, subjects: str, count: int, seed: int, style: str, overrides: str) -> list[expand.Prompt]:
    """Different prompts for the subjects, one a line, or the domain's own; every combination for a count of 0."""
    domain, given = find(choice), expand.parse_overrides(overrides)
    if len(subjects) > 1 << 20:
        raise DomainError(f"the subjects have {len(subjects)} characters; at most {1 << 20} are allowed")
    lines = textfile.lines(subjects)
    if count == 0:
        return batch.every(domain, lines, style, given)
    return batch.unique(domain, count, seed, style, lines, given)


def note(written: dict, hidden) -> str:
    """``written`` as text; put where Save Image finds it, unless the caller sent nowhere to put it."""
    node, info = str(hidden.unique_id), hidden.extra_pnginfo
    if isinstance(info, dict):
        info.setdefault(record.KEY, {})[node] = written
    _remembered[signature(hidden.prompt or {}, node)] = written
    while len(_remembered) > MAX_REMEMBERED:
        _remembered.popitem(last=False)
    return record.to_text(written)


def with_records(request: dict) -> dict:
    """A request to run a graph, with a place for records, and those of domain nodes that may come from the cache."""
    nodes, extra = request.get("prompt"), request.setdefault("extra_data", {})
    if not isinstance(nodes, dict) or not isinstance(extra, dict):
        return request
    ours = [str(i) for i, n in nodes.items() if isinstance(n, dict) and n.get("class_type") in CLASSES]
    info = extra.get("extra_pnginfo") or {}
    if ours and isinstance(info, dict):
        known = {i: _remembered.get(signature(nodes, i)) for i in ours}
        extra["extra_pnginfo"] = {**info, record.KEY: {i: r for i, r in known.items() if r is not None}}
    return request


def signature(nodes: Mapping, node: str) -> str:
    """A digest of ``node`` and everything above it: equal for the runs in which ComfyUI may take it from its cache."""
    done: dict[str, str] = {}

    def visit(name: str, depth: int) -> str:
        at = nodes.get(name)
        if name in done or not isinstance(at, Mapping) or depth > MAX_DEPTH:
            return done.get(name, f"?{name}")
        done[name] = f"?{name}"  # what a circle comes back to
        inputs = at.get("inputs")
        said = {
            key: [visit(str(v[0]), depth + 1), v[1]] if isinstance(v, list) and len(v) == 2 else _plain(v)
            for key, v in (inputs if isinstance(inputs, Mapping) else {}).items()
        }
        text = json.dumps([at.get("class_type"), said], sort_keys=True)
        done[name] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return done[name]

    return visit(node, 0)


def _plain(value):
    """1.0 as 1: ComfyUI turns a graph's numbers into the types that its nodes want, between the two times we look."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def save(written: str, name: str, title: str, keep: str, family: str, nodes: Mapping) -> str:
    """Writes what a domain node chose, with the graph's LoRAs and size, as a domain of its own; its name in output/.

    ``family``: what LoRAs and size are for. Raises DomainError; nothing is written then.
    """
    told = record.parse(written)
    base = find(str(told.get("choice", told["domain"])))
    data = bake.bake(base, expand.overrides_of(base, told["chosen" if keep == EXACT else "overrides"]))
    version = base.version + 1 if base.name == name else 1
    data |= {"id": f"{name}@{version}", "title": title.strip() or base.title, "based_on": base.id}
    data |= {"example": told["subject"], "style": told["style"]}
    loras, size = graph.loras(nodes), graph.size(nodes) or told.get("size")
    if family == AUTO:
        family = str(told.get("family", ""))
    if family not in SIDES and (loras or size):
        raise DomainError("say which model family this graph's LoRAs and picture size are for; set 'family'")
    if size:
        data["resolution"][family] = list(size)
    there = {entry["file"] for entry in data["loras"]}
    data["loras"] += [dict(file=f, family=family, strength=round(s, 4)) for f, s in loras if f not in there]
    schema.parse(data, f"{name}{ENDING}")
    with whole.named(f"{name}{ENDING}"):
        path = files.new_output(f"{FOLDER}/{name}", ENDING)
    whole.text(Path(path), bake.to_yaml(data))
    return files.below_output(path)
