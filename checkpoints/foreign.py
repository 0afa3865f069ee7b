"""What other packs' files hold, for `inspect`: their layers from the header alone, and who wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from ..quant.gguf_blocks import BLOCKS
from . import folder, header, marks, native
from .errors import CheckpointError
from .formats import bnb, comfy_quant, gguf, nunchaku
from .forms import FORMS

THEIRS = "quantized by its maker"


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
class Found:
    """A quantized layer of another pack."""

    form: str
    n: int
    k: int
    rank: int
    nbytes: int

    def row(self, name: str) -> Row:
        bits = round(8 * self.nbytes / max(1, self.n * self.k), 2)
        return Row(name, self.form, self.n, self.k, self.rank, bits, self.nbytes, THEIRS)


@dataclass(frozen=True)
class Foreign:
    layers: dict[str, Found]
    config: Mapping
    maker: str


def capability() -> int | None:
    """This machine's compute capability as 89 for sm_89; None without an NVIDIA GPU."""
    import torch

    if not torch.cuda.is_available() or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def amd() -> bool:
    """Whether this machine's GPU is AMD's."""
    import torch

    return bool(torch.version.hip) and torch.cuda.is_available()


def headers(path: Path) -> tuple[list[Path], header.Header]:
    """The files of a model and their headers as one. Raises CheckpointError."""
    files = folder.files(path)
    heads = [header.read(f) for f in files]
    tensors = {n: e for h in heads for n, e in h.tensors.items()}
    named = header.names(tensors)
    tensors = {named[n]: e for n, e in tensors.items()}
    return files, header.Header(path.name, tensors, {k: v for h in heads for k, v in h.metadata.items()})


def layers(files: list[Path], head: header.Header, configs: Mapping, path: Path) -> Foreign:
    """Layers of nunchaku and bitsandbytes. Raises CheckpointError for layers that nothing here reads."""
    what = {n: (e.dtype, e.shape) for n, e in head.tensors.items()}
    what |= {n + comfy_quant.SUFFIX: ("U8", ()) for n in configs}
    found = marks.read(head.metadata, folder.config(path), head.name)
    marks.refuse(what, found, head.name)
    out = {}
    for layer, parts in marks.layers_of(what).items():
        if nunchaku.END[1:] in parts:
            own = nunchaku.of_layer(head.tensors, layer)
            n, k = nunchaku.logical(parts)
            nbytes = sum(e.nbytes for e in own.values())
            out[layer] = Found(nunchaku.kind(parts), n, k, nunchaku.rank(parts), nbytes)
    out |= _bnb(files, head)
    return Foreign(out, found.config, _maker(out, found))


def _bnb(files: list[Path], head: header.Header) -> dict[str, Found]:
    out, kinds = {}, bnb.layers(head.tensors)
    for path in files if kinds else ():
        with safe_open(path, framework="pt") as f:
            for key, name in header.names(f.keys()).items():
                if bnb.MARK not in name:
                    continue
                layer = name.split(bnb.MARK)[0]
                try:
                    n, k = bnb.state(f.get_tensor(key))["shape"]
                except (ValueError, RecursionError) as e:
                    raise CheckpointError(head.name, str(e), bnb.REPAIR, layer) from e
                nbytes = sum(e.nbytes for t, e in head.tensors.items() if t.startswith(f"{layer}.weight"))
                out[layer] = Found(kinds[layer], n, k, 0, nbytes)
    return out


def _maker(found: Mapping[str, Found], said: marks.Marks) -> str:
    if not found:
        return ""
    if said.lite:
        return "diffusers (Nunchaku Lite)"
    makers = sorted({FORMS[f.form].written_by for f in found.values()})
    return ", ".join(makers) + (f", as {said.model_class[:80]}" if said.model_class else "")


def gguf_file(path: Path) -> tuple:
    """(family, (prefix, rows, bytes, record, maker)) of a GGUF file. Raises CheckpointError."""
    with gguf.reading(path):
        return _gguf_file(gguf.open_file(path), path)


def _gguf_file(reader, path: Path) -> tuple:
    shapes = {t.name: gguf.shape_of(reader, t) for t in reader.tensors}
    names = native.naming(shapes, {}, path.name)
    family = names.family
    rows = []
    for t in reader.tensors:
        shape, kind = shapes[t.name], gguf.kind(t)
        if len(shape) != 2 or not t.name.endswith(".weight"):
            continue
        n, k = shape
        bits = round(8 * int(t.n_bytes) / max(1, n * k), 2)
        scheme, why = (kind, THEIRS) if kind in BLOCKS else ("keep", f"{kind}, not quantized by its maker")
        name = t.name.removesuffix(".weight")[len(names.prefix) :]
        rows.append(Row(name, scheme, n, k, 0, bits, int(t.n_bytes), why))
    maker = f"a GGUF tool (architecture {gguf.architecture(reader)[:40] or 'not named'})"
    return family, (names.prefix, tuple(rows), sum(int(t.n_bytes) for t in reader.tensors), {}, maker)
