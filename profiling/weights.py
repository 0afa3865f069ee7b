"""Exact bytes of a model's weights, as stored and as each precision would store them.

Bytes are those of tensors that go to the GPU: the small JSON entries that describe quantized layers do not count.
Precisions come from the pack's scheme table, which the caller passes (this folder imports none of the pack).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

STORED = "as stored"
KEEP = "keep"  # the scheme table's word for a layer that stays in 16 bits
WIDE = {"F32": 4, "F64": 8}  # floats that a 16-bit copy halves
FLOATS = {"F16", "BF16", *WIDE}
DESCRIPTION = ".comfy_quant"
FP8_SCALE = 4  # bytes: one float32 scale a layer (ComfyUI's float8_e4m3fn layers)


@dataclass(frozen=True)
class Linear:
    """An (N, K) weight that a precision can shrink. ``nbytes``: everything stored for it now, without its bias.

    ``plan``: the scheme this pack's policy gives it; ``new_bias``: elements of the bias it gains in 4 bits, if any.
    """

    name: str
    n: int
    k: int
    nbytes: int
    plan: str
    new_bias: int = 0


@dataclass(frozen=True)
class Weights:
    """A diffusion model's weights. ``rest``: bytes of what no precision shrinks; ``rest_16``: those with 32-bit floats
    stored in 16. ``text``, ``vae``: bytes of the other models in the same file, if it is a whole checkpoint.
    """

    name: str
    family: str
    linears: tuple[Linear, ...]
    rest: int
    rest_16: int
    text: int = 0
    vae: int = 0
    four_bit: bool = False  # some layer is stored in 4 bits now

    @property
    def stored(self) -> int:
        return sum(x.nbytes for x in self.linears) + self.rest

    def lora(self, rank: int) -> int:
        """Bytes that a LoRA on every shrinkable layer adds to the 16-bit branches beside 4-bit weights."""
        return sum(2 * rank * (x.n + x.k) for x in self.linears)


@dataclass(frozen=True)
class Precision:
    """How weights could be stored. ``nbytes(linear, rank)``: bytes of one; ``rate``: the tensor-core mode that may run
    it (`cards.Card.rate`); ``branch``: a LoRA widens a branch beside the weight instead of being merged into it.
    """

    id: str
    nbytes: Callable[[Linear, int], int]
    rate: str
    branch: bool = False

    def total(self, weights: Weights, rank: int) -> int:
        return weights.rest_16 + sum(self.nbytes(x, rank) for x in weights.linears)


def precisions(schemes: Mapping) -> dict[str, Precision]:
    """16-bit, 8-bit, this pack's 4-bit mix, and every scheme of ``schemes`` on every layer it fits.

    ``schemes``: id -> row with ``bytes(n, k, rank)``, ``fits(n, k)``, ``low_rank``, ``weight_bits`` and ``act_bits``.
    """

    def stored_as(row, x: Linear, rank: int) -> int:
        if row is None:  # stored in a 4-bit scheme that the table does not write, and no plan to change it
            return x.nbytes
        if not row.fits(x.n, x.k):
            return 2 * x.n * x.k
        return row.bytes(x.n, x.k, min(rank, x.n, x.k) if row.low_rank else 0) + 2 * x.new_bias

    out = [
        Precision("16-bit", lambda x, rank: 2 * x.n * x.k, "fp16"),
        Precision("8-bit", lambda x, rank: x.n * x.k + FP8_SCALE, "int8"),
        Precision("4-bit", lambda x, rank: stored_as(schemes.get(x.plan), x, rank), "four_bit", branch=True),
    ]
    for id, row in schemes.items():
        rate = {4: "four_bit", 8: "int8"}.get(row.act_bits, "fp16")
        out.append(Precision(id, lambda x, rank, row=row: stored_as(row, x, rank), rate, row.weight_bits == 4))
    return {p.id: p for p in out}


def split(tensors: Mapping, layers: Mapping[str, tuple[int, int, int, str]], plans: Mapping, **about) -> Weights:
    """`Weights` of a model's ``tensors``: name -> an entry with ``dtype`` (safetensors' name), ``shape``, ``nbytes``.

    ``layers``: linear -> (N, K, bytes of everything stored for its weight, its 4-bit scheme now or "keep");
    ``plans``: linear -> the policy's plan (``scheme``, ``act_unsigned``). ``about``: name, family, text, vae.
    """
    tensors = {name: e for name, e in tensors.items() if not name.endswith(DESCRIPTION)}
    linears = []
    for name, (n, k, nbytes, now) in layers.items():
        plan = plans.get(name)
        scheme = plan.scheme if plan is not None and plan.scheme != KEEP else now  # its maker may have gone further
        if scheme != KEEP:
            gains = n if getattr(plan, "act_unsigned", False) and f"{name}.bias" not in tensors else 0
            linears.append(Linear(name, n, k, nbytes, scheme, gains))
    biases = {f"{x.name}.bias" for x in linears}
    rest = sum(e.nbytes for e in tensors.values()) - sum(x.nbytes for x in linears)
    most = _most(tensors)
    saved = 0
    own = {x.name for x in linears}
    for name, e in tensors.items():
        of_linear = name.rpartition(".")[0] in own and name not in biases
        if e.dtype in WIDE and not of_linear and (most in WIDE or name in biases):
            saved += e.nbytes - e.nbytes * 2 // WIDE[e.dtype]
    four_bit = any(now != KEEP for _, _, _, now in layers.values())
    return Weights(linears=tuple(linears), rest=rest, rest_16=rest - saved, four_bit=four_bit, **about)


def _most(tensors: Mapping) -> str:
    """The float dtype that most elements have."""
    count: dict[str, int] = {}
    for e in tensors.values():
        if e.dtype in FLOATS:
            count[e.dtype] = count.get(e.dtype, 0) + e.nbytes // WIDE.get(e.dtype, 2)
    return max(count, key=count.get) if count else ""
