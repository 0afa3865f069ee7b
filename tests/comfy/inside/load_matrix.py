"""ARGS: family, a JSON file {name: path}, the float file. Every file through ComfyUI's own loader and through this
pack's.

Prints {name: {"stock": error against the float model or the exception, "ours": the same, "apart": largest difference
of the two outputs}}. A path in a folder called checkpoints goes through the checkpoint loaders.
"""

import json
from pathlib import Path

from lora_common import args, comfy, load, mm, now, relative

family, listed, float_file = args
reference = now(comfy.sd.load_diffusion_model(float_file), family)


def stock(path: str):
    if Path(path).parent.name == "checkpoints":
        return comfy.sd.load_checkpoint_guess_config(path, output_vae=True, output_clip=True)[0]
    return comfy.sd.load_diffusion_model(path)


def ours(path: str):
    return (
        load.full_checkpoint(path, None)[0] if Path(path).parent.name == "checkpoints" else load.diffusion_model(path)
    )


def outcome(loader, path: str):
    """(what is printed, the output or None)"""
    try:
        out = now(loader(path), family)
    except Exception as e:  # noqa: BLE001
        return f"{type(e).__name__}: {str(e).splitlines()[0][:300] if str(e) else ''}", None
    return relative(out, reference), out


result = {}
for name, path in json.loads(Path(listed).read_text()).items():
    entry, outputs = {}, []
    for label, loader in (("stock", stock), ("ours", ours)):
        entry[label], out = outcome(loader, path)
        outputs.append(out)
    if all(o is not None for o in outputs):
        entry["apart"] = (outputs[0] - outputs[1]).abs().max().item()
    result[name] = entry
    mm.unload_all_models()
print(json.dumps(result))
