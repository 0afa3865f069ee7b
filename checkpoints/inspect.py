"""Says what a checkpoint is: family, format, and each linear's scheme, rank, bits and bytes, or why it is not
quantized.

Reads the header and the small JSON entries only, so a 20 GB file takes a moment.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open

from ..quant.policy import plan
from ..quant.schemes import KEEP
from . import foreign, forms, header, load, logical, native, quantized
from .foreign import Row
from .formats import comfy_quant, gguf
from .save import RECORD

WEIGHT = {"weight", *quantized.SIDES}  # what stands for a weight in the count of its bytes


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


def inspect(path: str | Path) -> Inspection:
    """Reads what ``path`` says of itself: a safetensors or GGUF file, or a folder. Raises CheckpointError for a file
    that is neither, and for layers that nothing here can read, which the sentence names.
    """
    path = Path(path)
    if gguf.is_gguf(path):
        return _finish(path.name, *foreign.gguf_file(path))
    files, head = foreign.headers(path)
    configs = _configs(files, head)
    found = foreign.layers(files, head, configs, path)
    shapes = logical.shapes(head.tensors, configs) | {f"{n}.weight": (x.n, x.k) for n, x in found.layers.items()}
    names = native.naming({n: e.shape for n, e in head.tensors.items()} | shapes, found.config, head.name)
    family, prefix = names.family, names.prefix
    end = ".weight"
    layers = {n[: -len(end)]: s for n, s in shapes.items() if n.startswith(prefix) and n.endswith(end) and len(s) == 2}
    sides, several = _sides(head), logical.parts(configs)
    reasons = plan({n[len(prefix) :]: s for n, s in layers.items()}, family.rules, 32)
    rows = []
    for name, (n, k) in layers.items():
        if name in found.layers:
            rows.append(found.layers[name].row(name[len(prefix) :]))
            continue
        config, stored = configs.get(name), [name, *several.get(name, [])]
        nbytes = sum(sum(sides.get(n, {}).values()) for n in stored)
        rank = max(_rank(head, n) for n in stored) if config else 0
        scheme, why = _what(head, name, config, reasons[name[len(prefix) :]])
        rows.append(Row(name[len(prefix) :], scheme, n, k, rank, round(8 * nbytes / max(1, n * k), 2), nbytes, why))
    record = _record(head)
    maker = found.maker or ("this pack" if record else "")
    return _finish(head.name, family, (prefix, tuple(rows), head.nbytes, record, maker))


def _rank(head: header.Header, layer: str) -> int:
    down = head.tensors.get(f"{layer}.proj_down", head.tensors.get(f"{layer}.weight_proj_down"))
    return down.shape[-1] if down is not None and down.shape else 0


def _finish(name: str, family, found: tuple) -> Inspection:
    """The inspection with its advice for this machine's GPU. ``found``: (prefix, rows, bytes, record, maker)."""
    prefix, rows, nbytes, record, maker = found
    advice = forms.advice({r.scheme for r in rows}, foreign.capability(), foreign.amd())
    if family.unsupported:
        advice.append(family.unsupported)
    return Inspection(name, family.title, prefix, rows, nbytes, record, maker, tuple(advice), family.id)


def _what(head: header.Header, name: str, config: dict | None, policy) -> tuple[str, str]:
    if config is not None:
        return config["format"], policy.reason if policy.scheme != KEEP else "quantized by its maker"
    dtype = head.tensors[f"{name}.weight"].dtype
    if dtype in quantized.FP8:
        return quantized.FP8[dtype], "quantized by its maker"
    if dtype in quantized.INTEGERS or dtype.startswith(quantized.NARROW):
        return dtype, "codes, and nothing says what they stand for"
    if policy.scheme != KEEP:
        return KEEP, f"{dtype}; the policy would make it {policy.scheme}"
    return KEEP, policy.reason


def _configs(files: list[Path], head: header.Header) -> dict[str, dict]:
    """Layer -> JSON, from the layers' own entries or from ComfyUI's file-level metadata."""
    out = load.file_level(head.metadata, head.name)
    for path in files:
        with safe_open(path, framework="pt") as f:
            for key, name in header.names(f.keys()).items():
                if name.endswith(comfy_quant.SUFFIX):
                    layer = name.removesuffix(comfy_quant.SUFFIX)
                    out[layer] = comfy_quant.decode_config(f.get_tensor(key), head.name, layer)
    return out


def _sides(head: header.Header) -> dict[str, dict[str, int]]:
    """Layer -> bytes of every tensor that stands for its weight."""
    out: dict[str, dict[str, int]] = {}
    for name, entry in head.tensors.items():
        layer, _, last = name.rpartition(".")
        if last in WEIGHT:
            out.setdefault(layer, {})[last] = entry.nbytes
    return out


def _record(head: header.Header) -> dict:
    try:
        value = json.loads(head.metadata.get(RECORD, "{}"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
