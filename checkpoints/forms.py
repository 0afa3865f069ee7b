"""Every form a quantized layer comes in: one row each, for what a file is, who wrote it, and which GPU runs it.

`inspect` reads this table, and so does docs/formats/README.md: ``python -m comfyui_nibble.checkpoints.forms`` prints
it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..quant.gguf_blocks import BLOCKS

INT4, ROTATED, W4, INT8 = ((80, 89), (100, 129)), ((75, 89), (100, 129)), ((80, 129),), ((75, 129),)
FP8, FP4, ANY = ((89, 129),), ((100, 129),), ((0, 999),)
CARDS = {
    INT4: "NVIDIA Ampere, Ada, Blackwell",
    ROTATED: "NVIDIA Turing, Ampere, Ada, Blackwell",
    W4: "NVIDIA Ampere and newer",
    INT8: "NVIDIA Turing and newer",
    FP8: "NVIDIA Ada, Hopper, Blackwell",
    FP4: "NVIDIA Blackwell",
    ANY: "any: computes in 16 bits",
}
DENSE, SLOWER = "it runs there too, at 16-bit speed", "it runs there too, slower"
EMULATED = "it is emulated there at 16-bit speed, with a warning"
CORE = "ComfyUI makes it 16-bit there"
HOPPER, AMPERE = (90, 99), (80, 89)
ASYM, TAKE_INT4 = "an asym_w4a8_int8 file of the model is faster", "the model's int4 file is faster"
WEIGHTS = "4-bit weights save memory, not time"


@dataclass(frozen=True)
class Form:
    """``lossless``: what conversion to this pack's contract keeps. ``sm``: capabilities that run it natively;
    ``otherwise``: what happens on others; ``instead``: (capabilities, what is better for those).
    """

    id: str
    title: str
    written_by: str
    sm: tuple[tuple[int, int], ...]
    otherwise: str
    lossless: str = "codes and scales, byte for byte"
    write: bool = True
    read: bool = True
    instead: tuple[tuple[tuple[int, int], str], ...] = ()

    @property
    def native(self) -> str:
        return CARDS[self.sm]

    def runs_on(self, capability: int) -> bool:
        """Whether compute capability ``capability`` (89 for sm_89) has the instructions."""
        return any(low <= capability <= high for low, high in self.sm)


OURS, COMFY, NUNCHAKU = "this pack, comfy-quants", "ComfyUI, this pack", "nunchaku (deepcompressor)"
SAME = "is it already"
OF_INT4 = ((HOPPER, ASYM),)
OF_FP4 = ((AMPERE, TAKE_INT4), (HOPPER, ASYM))
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
        Form("asym_w4a8_int8", "4-bit codebook or 6-bit codes, int8 activations", COMFY, W4, DENSE, SAME),
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
    ("kitchen svdquant_w4a4, NVFP4 or integer weights without a `comfy_quant` entry", "nothing says how to run them"),
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


def advice(ids, capability: int | None, amd: bool = False) -> list[str]:
    """A line for each form in ``ids``: where it runs natively, and what happens on this machine, whose NVIDIA GPU has
    ``capability`` (None: it has no such GPU). For an AMD GPU comfy-kitchen decides, and no verdict is given.
    """
    out = []
    for form in (FORMS[i] for i in sorted(ids) if i in FORMS):
        line = f"{form.id} ({form.title}): native on {form.native}"
        if form.sm != ANY and not amd:
            gpu = "this machine" if capability is None else f"this GPU (sm_{capability})"
            if capability is not None and form.runs_on(capability):
                line += f"; {gpu} runs it natively"
            else:
                better = (w for (low, high), w in form.instead if capability is not None and low <= capability <= high)
                line += ": ".join([f"; {gpu} does not: {form.otherwise}", *better])
        out.append(line)
    return out


if __name__ == "__main__":
    import sys

    sys.stdout.write(table() + "\n")
