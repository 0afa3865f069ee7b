"""Says what a checkpoint is: family, format, and each linear's scheme, rank, bits and bytes, or why it is not
quantized.

Reads the header and the small JSON entries only, so a 20 GB file takes a moment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ..quant import machine
from ..quant.gguf_blocks import BLOCKS
from ..quant.policy import LayerPlan, plan
from ..quant.schemes import KEEP
from . import folder, forms, header, load, logical, marks, native
from .errors import naming
from .formats import bnb, comfy_quant, gguf, nunchaku
from .save import RECORD

WEIGHT = {"weight", *marks.SIDES}  # what stands for a weight in the count of its bytes
THEIRS = "quantized by its maker"


@dataclass(frozen=True)
class Row:
    """One linear. ``nbytes`` counts everything stored for its weight; ``why`` is the policy's reason."""

    layer: str
    scheme: str
    n: int
    k: int
    rank: int
    bits: float
    nbytes: int
    why: str


def _row(layer: str, scheme: str, shape: tuple[int, int], rank: int, nbytes: int, why: str = THEIRS) -> Row:
    n, k = shape
    return Row(layer, scheme, n, k, rank, round(8 * nbytes / max(1, n * k), 2), nbytes, why)


@dataclass(frozen=True)
class Inspection:
    name: str
    family: str
    prefix: str
    rows: tuple[Row, ...]
    nbytes: int
    record: dict
    maker: str = ""
    advice: tuple[str, ...] = ()
    family_id: str = ""

    @property
    def quantized(self) -> tuple[Row, ...]:
        return tuple(r for r in self.rows if r.scheme != KEEP)

    def totals(self) -> dict[str, dict]:
        """Scheme -> how many linears, their bytes, and mean bits per weight."""
        out: dict[str, dict] = {}
        for r in self.rows:
            t = out.setdefault(r.scheme, {"layers": 0, "bytes": 0, "weights": 0})
            t["layers"] += 1
            t["bytes"] += r.nbytes
            t["weights"] += r.n * r.k
        for t in out.values():
            t["bits"] = round(8 * t["bytes"] / max(1, t.pop("weights")), 2)
        return out

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "totals": self.totals()}, indent=1)

    def table(self, limit: int = 400) -> str:
        """Markdown: a line about the file, totals per scheme, then a row per linear (at most ``limit``)."""
        lines = [f"**{self.name}**: {self.family}, {self.nbytes / 2**20:.1f} MiB"]
        if self.maker:
            lines.append(f"written by {self.maker}")
        lines += [f"- {line}" for line in self.advice]
        if self.record:
            keys = ("tool", "scheme", "rank", "calibration", "source_sha256")
            lines.append("made by " + ", ".join(f"{k} {_short(self.record[k])}" for k in keys if k in self.record))
        lines += ["", "| scheme | linears | bits per weight | MiB |", "|---|---|---|---|"]
        for scheme, t in sorted(self.totals().items()):
            lines.append(f"| {_label(scheme)} | {t['layers']} | {t['bits']:.2f} | {t['bytes'] / 2**20:.2f} |")
        lines += ["", "| layer | scheme | N x K | rank | bits | KiB | why |", "|---|---|---|---|---|---|---|"]
        for r in self.rows[:limit]:
            size = f"{r.n} x {r.k} | {r.rank or '-'} | {r.bits:.2f} | {r.nbytes / 2**10:.1f}"
            lines.append(f"| {r.layer} | {_label(r.scheme)} | {size} | {r.why} |")
        if len(self.rows) > limit:
            lines.append(f"\n{len(self.rows) - limit} more layers; ask for JSON to see all.")
        return "\n".join(lines)


def _label(scheme: str) -> str:
    return "not quantized" if scheme == KEEP else scheme


def _short(value) -> str:
    if isinstance(value, dict):
        value = ", ".join(
            [str(value.get("method", "")), *(f"{k} {v}" for k, v in value.items() if k in ("seed", "prompts"))]
        )
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 48 else text[:16] + "..."


def headers(path: Path) -> tuple[list[Path], header.Header]:
    """The files of a model and their headers as one. Raises CheckpointError."""
    files = folder.files(path)
    head = header.merged(path.name, map(header.read, files))
    named = header.names(head.tensors)
    return files, replace(head, tensors={named[n]: e for n, e in head.tensors.items()})


def inspect(path: str | Path) -> Inspection:
    """Reads what ``path`` says of itself: a safetensors or GGUF file, or a folder. Raises CheckpointError for a file
    that is neither, and for layers that nothing here can read, which the sentence names.
    """
    path = Path(path)
    if gguf.is_gguf(path):
        with gguf.reading(path):
            return _gguf(gguf.open_file(path), path)
    files, head = headers(path)
    configs = _configs(files, head)
    declared, packed = _packed(files, head, configs, path)
    shapes = logical.shapes(head.tensors, configs) | {f"{n}.weight": (x.n, x.k) for n, x in packed.items()}
    names = native.naming({n: e.shape for n, e in head.tensors.items()} | shapes, declared.config, head.name)
    start, end = len(names.prefix), ".weight"
    layers = {n[: -len(end)]: s for n, s in shapes.items() if n.startswith(names.prefix) and n.endswith(end)}
    layers = {n: s for n, s in layers.items() if len(s) == 2}
    sides, several = _sides(head), logical.parts(configs)
    plans = plan({n[start:]: s for n, s in layers.items()}, names.family.rules, 32)
    rows = []
    for name, shape in layers.items():
        if name in packed:
            rows.append(replace(packed[name], layer=name[start:]))
            continue
        config, stored = configs.get(name), [name, *several.get(name, [])]
        nbytes = sum(sum(sides.get(n, {}).values()) for n in stored)
        rank = max(_rank(head, n) for n in stored) if config else 0
        scheme, why = _what(head, name, config, plans[name[start:]])
        rows.append(_row(name[start:], scheme, shape, rank, nbytes, why))
    record = marks.object_of(head.metadata, RECORD)
    maker = _maker(packed, declared) or ("this pack" if record else "")
    return _inspection(head.name, names, rows, head.nbytes, record, maker)


def _packed(files: list[Path], head: header.Header, configs: Mapping, path: Path) -> tuple[marks.Marks, dict[str, Row]]:
    """(what the file says of itself, its layers of nunchaku and bitsandbytes). Raises CheckpointError for layers that
    nothing here reads.
    """
    what = {n: (e.dtype, e.shape) for n, e in head.tensors.items()}
    what |= {n + comfy_quant.SUFFIX: ("U8", ()) for n in configs}
    declared = marks.read(head.metadata, folder.config(path), head.name)
    marks.refuse(what, declared, head.name)
    out = {}
    for layer, parts in marks.layers_of(what).items():
        if nunchaku.END[1:] in parts:
            nbytes = sum(e.nbytes for e in nunchaku.of_layer(head.tensors, layer).values())
            out[layer] = _row(layer, nunchaku.kind(parts), nunchaku.logical(parts), nunchaku.rank(parts), nbytes)
    kinds = bnb.layers(head.tensors)
    for name, read in _small(files if kinds else (), lambda name: bnb.MARK in name):
        layer = name.split(bnb.MARK)[0]
        with naming(head.name, bnb.REPAIR, layer, (ValueError, RecursionError)):
            shape = bnb.state(read())["shape"]
        nbytes = sum(e.nbytes for t, e in head.tensors.items() if t.startswith(f"{layer}.weight"))
        out[layer] = _row(layer, kinds[layer], shape, 0, nbytes)
    return declared, out


def _small(files: Iterable[Path], wanted: Callable[[str], bool]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, what reads it) of the tensors that ``wanted`` takes."""
    for path in files:
        with safe_open(path, framework="pt") as f:
            for key, name in header.names(f.keys()).items():
                if wanted(name):
                    yield name, partial(f.get_tensor, key)


def _maker(packed: Mapping[str, Row], declared: marks.Marks) -> str:
    if not packed:
        return ""
    if declared.lite:
        return "diffusers (Nunchaku Lite)"
    makers = sorted({forms.FORMS[row.scheme].written_by for row in packed.values()})
    return ", ".join(makers) + (f", as {declared.model_class[:80]}" if declared.model_class else "")


def _gguf(reader, path: Path) -> Inspection:
    shapes = {t.name: gguf.shape_of(reader, t) for t in reader.tensors}
    names = native.naming(shapes, {}, path.name)
    rows = []
    for t in reader.tensors:
        if len(shapes[t.name]) == 2 and t.name.endswith(".weight"):
            kind, layer = gguf.kind(t), t.name.removesuffix(".weight")[len(names.prefix) :]
            scheme, why = (kind, THEIRS) if kind in BLOCKS else (KEEP, f"{kind}, not quantized by its maker")
            rows.append(_row(layer, scheme, shapes[t.name], 0, int(t.n_bytes), why))
    maker = f"a GGUF tool (architecture {gguf.architecture(reader)[:40] or 'not named'})"
    return _inspection(path.name, names, rows, sum(int(t.n_bytes) for t in reader.tensors), {}, maker)


def _rank(head: header.Header, layer: str) -> int:
    named = ("proj_down", "weight_proj_down", comfy_quant.FOREIGN_UP)  # (K, R), or (N, R)
    found = (head.tensors[f"{layer}.{n}"] for n in named if f"{layer}.{n}" in head.tensors)
    return next((e.shape[-1] for e in found if e.shape), 0)


def _inspection(name: str, names: native.Naming, rows: list[Row], nbytes: int, record: dict, maker: str) -> Inspection:
    """With advice for this machine's GPU."""
    family = names.family
    advice = forms.advice({r.scheme for r in rows}, machine.here())
    if family.unsupported:
        advice.append(family.unsupported)
    return Inspection(
        name, family.title, names.prefix, tuple(rows), nbytes, record, maker, tuple(advice), family_id=family.id
    )


def _what(head: header.Header, name: str, config: dict | None, policy: LayerPlan) -> tuple[str, str]:
    if config is not None:
        stored = config["base"] if config["format"] == comfy_quant.LOW_RANK else config  # the branch shows as a rank
        return stored["format"], policy.reason if policy.scheme != KEEP else THEIRS
    dtype = head.tensors[f"{name}.weight"].dtype
    if dtype in marks.FP8:
        return marks.FP8[dtype], THEIRS
    if dtype in marks.INTEGERS or dtype.startswith(marks.NARROW):
        return dtype, "codes, and nothing says what they stand for"
    if policy.scheme != KEEP:
        return KEEP, f"{dtype}; the policy would make it {policy.scheme}"
    return KEEP, policy.reason


def _configs(files: list[Path], head: header.Header) -> dict[str, dict]:
    """Layer -> JSON, from the layers' own entries or from ComfyUI's file-level metadata."""
    out = load.file_level(head.metadata, head.name)
    for name, read in _small(files, lambda name: name.endswith(comfy_quant.SUFFIX)):
        layer = name.removesuffix(comfy_quant.SUFFIX)
        out[layer] = comfy_quant.decode_config(read(), head.name, layer)
    return out


def _sides(head: header.Header) -> dict[str, dict[str, int]]:
    """Layer -> bytes of every tensor that stands for its weight."""
    out: dict[str, dict[str, int]] = {}
    for name, entry in head.tensors.items():
        layer, _, last = name.rpartition(".")
        if last in WEIGHT:
            out.setdefault(layer, {})[last] = entry.nbytes
    return out
