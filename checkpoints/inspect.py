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
from . import families, header
from .formats import comfy_quant
from .save import RECORD

SIDE_NAMES = {
    "weight", "weight_scale", "weight_scale_2", "weight_zero", "weight_s_rel", "weight_s_channel", "weight_codebook",
    "smooth_factor", "proj_down", "proj_up", "input_scale", "pre_quant_scale",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One linear. ``bits`` counts everything stored for its weight; ``why`` is the policy's reason."""

    layer: str
    scheme: str
    n: int
    k: int
    rank: int
    bits: float
    nbytes: int
    why: str


@dataclass(frozen=True)
class Inspection:
    name: str
    family: str
    prefix: str
    rows: tuple[Row, ...]
    nbytes: int
    record: dict

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
            t["bits"] = round(8 * t["bytes"] / t.pop("weights"), 2)
        return out

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "totals": self.totals()}, indent=1)

    def table(self, limit: int = 400) -> str:
        """Markdown: a line about the file, totals per scheme, then a row per linear (at most ``limit``)."""
        lines = [f"**{self.name}**: {self.family}, {self.nbytes / 2**20:.1f} MiB"]
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
    """Reads what ``path`` says of itself. Raises CheckpointError for a file that is no whole safetensors file."""
    path = Path(path)
    head = header.read(path)
    configs = _configs(path, head)
    logical = _logical_shapes(head, configs)
    family, prefix = families.detect(logical)
    end = ".weight"
    layers = {n[: -len(end)]: s for n, s in logical.items() if n.startswith(prefix) and n.endswith(end) and len(s) == 2}
    sides = _sides(head)
    reasons = plan({n[len(prefix) :]: s for n, s in layers.items()}, family.rules, 32)
    rows = []
    for name, (n, k) in layers.items():
        config = configs.get(name)
        nbytes = sum(sides.get(name, {}).values())
        rank = next((e.shape[1] for s in ("proj_down",) if (e := head.tensors.get(f"{name}.{s}"))), 0) if config else 0
        scheme, why = _what(head, name, config, reasons[name[len(prefix) :]])
        rows.append(Row(name[len(prefix) :], scheme, n, k, rank, round(8 * nbytes / max(1, n * k), 2), nbytes, why))
    return Inspection(path.name, family.title, prefix, tuple(rows), head.nbytes, _record(head))


def _what(head: header.Header, name: str, config: dict | None, policy) -> tuple[str, str]:
    if config is not None:
        return config["format"], policy.reason if policy.scheme != KEEP else "quantized by its maker"
    if policy.scheme != KEEP:
        return KEEP, f"{head.tensors[f'{name}.weight'].dtype}; the policy would make it {policy.scheme}"
    return KEEP, policy.reason


def _configs(path: Path, head: header.Header) -> dict[str, dict]:
    """Layer -> JSON, from the layers' own entries or from ComfyUI's file-level metadata."""
    out = {}
    if "_quantization_metadata" in head.metadata:
        try:
            out |= json.loads(head.metadata["_quantization_metadata"])["layers"]
        except (ValueError, KeyError, TypeError) as e:
            raise comfy_quant.CheckpointError(
                head.name, f"its _quantization_metadata is not valid ({e})", header.AGAIN
            ) from e
    keys = [k for k in head.tensors if k.endswith(comfy_quant.SUFFIX)]
    if keys:
        with safe_open(path, framework="pt") as f:
            for key in keys:
                layer = key.removesuffix(comfy_quant.SUFFIX)
                out[layer] = comfy_quant.decode_config(f.get_tensor(key), head.name, layer)
    return out


def _logical_shapes(head: header.Header, configs: dict[str, dict]) -> dict[str, tuple[int, ...]]:
    """Tensor shapes with each quantized weight's as (N, K), whatever its storage."""
    shapes = {n: e.shape for n, e in head.tensors.items()}
    for layer, config in configs.items():
        shape = shapes.get(f"{layer}.weight")
        if shape is None:
            continue
        if len(shape) == 4:
            shapes[f"{layer}.weight"] = (shape[0] * 128, shape[1] * 64)
        elif (
            len(shape) == 2
            and head.tensors[f"{layer}.weight"].dtype in ("I8", "U8")
            and config.get("format") != "int8_tensorwise"
        ):
            shapes[f"{layer}.weight"] = (shape[0], shape[1] * 2)
    return shapes


def _sides(head: header.Header) -> dict[str, dict[str, int]]:
    """Layer -> bytes of every tensor that stands for its weight."""
    out: dict[str, dict[str, int]] = {}
    for name, entry in head.tensors.items():
        layer, _, last = name.rpartition(".")
        if last in SIDE_NAMES:
            out.setdefault(layer, {})[last] = entry.nbytes
    return out


def _record(head: header.Header) -> dict:
    try:
        value = json.loads(head.metadata.get(RECORD, "{}"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
