"""What becomes of hostile requests to run a graph. Prints what the handler made of each."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import pack  # noqa: F401
from nibble_pack.nodes.bridge import prompts

node = {"class_type": "NibbleDomainPrompt", "inputs": {}}
# A hundred nodes, each linked twice to the next: 2^100 ways down.
diamond = {str(i): {"class_type": "X", "inputs": {"a": [str(i + 1), 0], "b": [str(i + 1), 1]}} for i in range(100)}
circle = {"a": {"class_type": "X", "inputs": {"x": ["b", 0]}}, "b": {"class_type": "X", "inputs": {"x": ["a", 0]}}}
chain = {str(i): {"class_type": "X", "inputs": {"a": [str(i + 1), 0]}} for i in range(5000)}
for graph in (diamond, circle, chain):
    graph["n"] = {"class_type": "NibbleDomainPrompt", "inputs": {"clip": [next(iter(graph)), 0]}}
requests = [
    {"prompt": diamond}, {"prompt": circle}, {"prompt": chain}, {"prompt": {"n": node}},
    {"prompt": {"n": node}, "extra_data": {"extra_pnginfo": {"workflow": {"id": 1}}}},
    {"prompt": {"n": node}, "extra_data": {"extra_pnginfo": {"nibble": 7}}},
    {"prompt": {"n": node}, "extra_data": {"extra_pnginfo": None}},
    {"prompt": {"n": node}, "extra_data": {"extra_pnginfo": "y"}}, {"prompt": {"n": node}, "extra_data": "x"},
    {"prompt": []}, {"prompt": None}, {"prompt": {"n": 7, "m": {"class_type": ["x"]}, "k": {"inputs": 3}}}, {},
]  # fmt: skip
places = []
for request in requests:
    extra = prompts.with_records(request).get("extra_data")
    places.append(extra.get("extra_pnginfo") if isinstance(extra, dict) else extra)
same = prompts.signature({"n": {"class_type": "A", "inputs": {"x": 1, "y": 2.5}}}, "n")
also = prompts.signature({"n": {"inputs": {"y": 2.5, "x": 1.0}, "class_type": "A", "is_changed": "z"}}, "n")
other = prompts.signature({"n": {"class_type": "A", "inputs": {"x": 2, "y": 2.5}}}, "n")
print(json.dumps({"places": places, "same": same == also, "other": same == other}))
