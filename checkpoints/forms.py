"""Every form a quantized layer comes in: one row each, for what a file is, who wrote it, and which GPU runs it.

`inspect` reads this table, and so does docs/formats/README.md: ``python -m comfyui_nibble.checkpoints.forms`` prints
it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..quant import machine
from ..quant.gguf_blocks import BLOCKS

# The kernel that a form's layers want (quant/machine.py), "" for weights that are made dense
INT4, ROTATED, W4, W4A8, INT8, FP8, FP4, ANY = (*machine.KERNELS, "")
DENSE, SLOWER = "it runs there too, at 16-bit speed", "it runs there too, slower"
EMULATED = "it is emulated there at 16-bit speed, with a warning"
CORE = "ComfyUI makes it 16-bit there"
HOPPER, AMPERE = (90, 99), (80, 89)
ASYM = HOPPER, "asym_w4a8_int8", "an asym_w4a8_int8 file of the model"
TAKE_INT4 = AMPERE, "svdquant_w4a4", "the model's int4 file"
WEIGHTS = "4-bit weights save memory, not time"


@dataclass(frozen=True)
class Form:
    """``kernel``: what runs it natively; ``otherwise``: what happens on a machine that lacks it; ``instead``:
    (capabilities, the form that is better for those, what it is called). ``lossless``: what conversion to this pack's
    contract keeps.
    """

    id: str
    title: str
    written_by: str
    kernel: str
    otherwise: str
    lossless: str = "codes and scales, byte for byte"
    write: bool = True
    read: bool = True
    instead: tuple[tuple[tuple[int, int], str, str], ...] = ()

    @property
    def native(self) -> str:
        return machine.KERNELS[self.kernel].cards if self.kernel else "any: computes in 16 bits"

    def better(self, here: machine.Machine) -> list[str]:
        """What runs natively on the machine ``here``, where this form does not."""
        if not self.kernel or not here.lacks(self.kernel) or here.sm is None:
            return []
        fit = ((other, words) for (low, high), other, words in self.instead if low <= here.sm <= high)
        return [f"{words} is faster" for other, words in fit if not here.lacks(FORMS[other].kernel)]


OURS, COMFY, NUNCHAKU = "this pack, comfy-quants", "ComfyUI, this pack", "nunchaku (deepcompressor)"
SAME = "is it already"
OF_INT4, OF_FP4 = (ASYM,), (TAKE_INT4, ASYM)
FORMS: dict[str, Form] = {
    f.id: f
    for f in (
        Form("svdquant_w4a4", "SVDQuant int4, natural or tile-packed", OURS, INT4, SLOWER, SAME, instead=OF_INT4),
        Form("awq_w4a16", "AWQ int4 weights", OURS, W4, DENSE, SAME),
        Form("svdquant_nvfp4", "SVDQuant nvfp4", "this pack", FP4, EMULATED, SAME, instead=OF_FP4),
        Form("nibble_parts", "a layer of several 4-bit ones", "this pack", INT4, SLOWER, SAME, instead=OF_INT4),
        Form("weight_only", "GGUF or bitsandbytes codes in a safetensors file", "this pack", ANY, WEIGHTS, SAME),
        Form("nvfp4", "NVFP4", COMFY, FP4, CORE, SAME),
        Form("convrot_w4a4", "rotated int4", COMFY, ROTATED, DENSE, SAME),
        Form("asym_w4a8_int8", "4-bit codebook or 6-bit codes, int8 activations", COMFY, W4A8, DENSE, SAME),
        Form("int8_tensorwise", "int8", COMFY, INT8, DENSE, SAME),
        Form("mxfp8", "MXFP8", "ComfyUI", FP4, CORE, SAME, write=False),
        Form("float8_e4m3fn", "fp8", "ComfyUI and many others", FP8, CORE, SAME, False),
        Form("float8_e5m2", "fp8 (e5m2)", "ComfyUI and many others", FP8, CORE, SAME, False),
        Form("nunchaku_svdq_int4", "SVDQuant int4, packed for nunchaku", NUNCHAKU, INT4, SLOWER, instead=OF_INT4),
        Form("nunchaku_svdq_nvfp4", "SVDQuant nvfp4, packed for nunchaku", NUNCHAKU, FP4, EMULATED, instead=OF_FP4),
        Form("nunchaku_awq_w4a16", "AWQ int4 weights, packed for nunchaku", NUNCHAKU, W4, DENSE,
             "codes and scales; zero points rounded once more to 16 bits"),
        Form("nf4", "NF4", "bitsandbytes", ANY, WEIGHTS, "codes; nested scales become float32, exactly", write=False),
        Form("fp4", "FP4", "bitsandbytes", ANY, WEIGHTS, "codes; nested scales become float32, exactly", write=False),
        *(
            Form(b, f"GGUF {b.upper()}", "llama.cpp, ComfyUI-GGUF, stable-diffusion.cpp", ANY, WEIGHTS, write=False)
            for b in BLOCKS
        ),
    )
}  # fmt: skip
REFUSED = (
    ("SVDQuant MXFP4 (auto-round)", "its scales lie in an order that is not described"),
    ("diffuse-compressor, layout `logical`", "same names and shapes as packed layers, other numbers"),
    (
        "kitchen svdquant_w4a4, NVFP4, integer or scaled fp8 weights without a `comfy_quant` entry",
        "nothing says how to run them",
    ),
    ("8-bit low-rank branches", "not described"),
    ("tinychat W4A16 (nunchaku's T5), GPTQ, AutoAWQ", "language models"),
    ("SDNQ, HQQ", "other packs' own"),
)


def table() -> str:
    """The markdown table of docs/formats/README.md."""
    lines = [
        "| form | what | written by | read | write | native GPU | lossless conversion |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in FORMS.values():
        yes = ["yes" if x else "no" for x in (f.read, f.write)]
        lines.append(f"| `{f.id}` | {f.title} | {f.written_by} | {yes[0]} | {yes[1]} | {f.native} | {f.lossless} |")
    lines += [
        "",
        "Refused, with a sentence that says what the file is and what to do:",
        "",
        "| what | why |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| {what} | {why} |" for what, why in REFUSED)])


def advice(ids, here: machine.Machine) -> list[str]:
    """A line for each form in ``ids``: where it runs natively, and whether it does on the machine ``here``; where not,
    why, what happens, and what is better there.
    """
    out = []
    for form in (FORMS[i] for i in sorted(ids) if i in FORMS):
        line = f"{form.id} ({form.title}): native on {form.native}"
        if form.kernel:
            why = here.lacks(form.kernel)
            line += (
                f"; {here.title} runs it natively" if not why else f"; {here.title} does not, {why}: {form.otherwise}"
            )
            line += "".join(f"; {words}" for words in form.better(here))
        out.append(line)
    return out


if __name__ == "__main__":
    import sys

    sys.stdout.write(table() + "\n")
