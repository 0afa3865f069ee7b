"""Every form a quantized layer comes in: one row each, for what a file is, who wrote it, and which GPU runs it.

`inspect` reads this table, and so does docs/formats/README.md: ``python -m comfyui_nibble.checkpoints.forms`` prints
it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..quant.gguf_blocks import BLOCKS

INT4, INT8, FP8, FP4, ANY = ((80, 89), (100, 129)), ((75, 129),), ((89, 129),), ((100, 129),), ((0, 999),)
CARDS = {
    INT4: "NVIDIA Ampere, Ada, Blackwell",
    INT8: "NVIDIA Turing and newer",
    FP8: "NVIDIA Ada, Hopper, Blackwell",
    FP4: "NVIDIA Blackwell",
    ANY: "any: computes in 16 bits",
}
EMULATED = "it runs there too, at 16-bit speed"
INT4_ELSE = "it runs there too, slower: for Hopper an asym_w4a8_int8 file is faster"
FP4_ELSE = "it is emulated there at 16-bit speed, with a warning: take the model's int4 file"
WEIGHTS = "4-bit weights save memory, not time"


@dataclass(frozen=True)
class Form:
    """``lossless``: what conversion to this pack's contract keeps. ``sm``: capabilities that run it natively."""

    id: str
    title: str
    written_by: str
    sm: tuple[tuple[int, int], ...]
    otherwise: str
    lossless: str = "codes and scales, byte for byte"
    write: bool = True
    read: bool = True

    @property
    def native(self) -> str:
        return CARDS[self.sm]

    def runs_on(self, capability: int) -> bool:
        """Whether compute capability ``capability`` (89 for sm_89) has the instructions."""
        return any(low <= capability <= high for low, high in self.sm)


OURS, COMFY, NUNCHAKU = "this pack, comfy-quants", "ComfyUI, this pack", "nunchaku (deepcompressor)"
SAME = "is it already"
FORMS: dict[str, Form] = {
    f.id: f
    for f in (
        Form("svdquant_w4a4", "SVDQuant int4, natural or tile-packed", OURS, INT4, INT4_ELSE, SAME),
        Form("awq_w4a16", "AWQ int4 weights", OURS, INT8, EMULATED, SAME),
        Form("svdquant_nvfp4", "SVDQuant nvfp4", "this pack", FP4, FP4_ELSE, SAME),
        Form("nibble_parts", "a layer of several 4-bit ones", "this pack", INT4, INT4_ELSE, SAME),
        Form("weight_only", "GGUF or bitsandbytes codes in a safetensors file", "this pack", ANY, WEIGHTS, SAME),
        Form("nvfp4", "NVFP4", COMFY, FP4, "ComfyUI makes it 16-bit there", SAME),
        Form("convrot_w4a4", "rotated int4", COMFY, INT4, EMULATED, SAME),
        Form("asym_w4a8_int8", "4-bit codebook, int8 activations", COMFY, INT8, EMULATED, SAME),
        Form("int8_tensorwise", "int8", COMFY, INT8, EMULATED, SAME),
        Form("mxfp8", "MXFP8", "ComfyUI", FP4, "ComfyUI makes it 16-bit there", SAME, write=False),
        Form("float8_e4m3fn", "fp8", "ComfyUI and many others", FP8, "ComfyUI makes it 16-bit there", SAME, False),
        Form("float8_e5m2", "fp8 (e5m2)", "ComfyUI and many others", FP8, "ComfyUI makes it 16-bit there", SAME, False),
        Form("nunchaku_svdq_int4", "SVDQuant int4, packed for nunchaku", NUNCHAKU, INT4, INT4_ELSE),
        Form("nunchaku_svdq_nvfp4", "SVDQuant nvfp4, packed for nunchaku", NUNCHAKU, FP4, FP4_ELSE),
        Form("nunchaku_awq_w4a16", "AWQ int4 weights, packed for nunchaku", NUNCHAKU, INT8, EMULATED,
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
    ("kitchen svdquant_w4a4 or NVFP4 without a `comfy_quant` entry", "nothing says how to run them"),
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


def advice(ids, capability: int | None) -> list[str]:
    """A line for each form in ``ids``: where it runs natively, and what to do on a GPU of ``capability`` (None: no
    GPU).
    """
    out = []
    for form in (FORMS[i] for i in sorted(ids) if i in FORMS):
        line = f"{form.id} ({form.title}): native on {form.native}"
        if form.sm != ANY:
            here = capability is not None and form.runs_on(capability)
            gpu = "this machine" if capability is None else f"this GPU (sm_{capability})"
            line += f"; {gpu} runs it natively" if here else f"; {gpu} does not: {form.otherwise}"
        out.append(line)
    return out


if __name__ == "__main__":
    import sys

    sys.stdout.write(table() + "\n")
