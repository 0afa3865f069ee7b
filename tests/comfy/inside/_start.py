"""First import of every script in this folder: ComfyUI on a CPU, and this pack loaded as ComfyUI would load it.

``python script.py COMFYUI PACK ARGS...``; afterwards ``args`` are ARGS and ``pack`` is the loaded package, named
``nibble_pack``. Everything runs in inference mode, as nodes do.
"""

import importlib.util
import sys
from pathlib import Path

comfyui, root, args = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
sys.path.insert(0, comfyui)
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import torch  # noqa: E402

torch.set_num_threads(1)
inference = torch.inference_mode()
inference.__enter__()

import nodes as comfy_nodes  # noqa: E402, F401

spec = importlib.util.spec_from_file_location(
    "nibble_pack", root / "__init__.py", submodule_search_locations=[str(root)]
)
pack = importlib.util.module_from_spec(spec)
sys.modules["nibble_pack"] = pack
spec.loader.exec_module(pack)
