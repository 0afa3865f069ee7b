"""What a ComfyUI graph says about a picture besides its prompt: LoRAs and size. Reads the API format, runs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

MAX_LORAS = 20


def loras(graph: Mapping) -> list[tuple[str, float]]:
    """(file name without folder, strength) of every LoRA that ``graph`` names, in the order of its nodes."""
    found: dict[str, float] = {}
    for inputs in _inputs(graph):
        for key, value in inputs.items():
            if "lora" in key.lower() and isinstance(value, str) and value.lower().endswith(".safetensors"):
                strength = _strength(inputs, key)
                if strength:
                    found.setdefault(value.replace("\\", "/").rpartition("/")[2], strength)
    return list(found.items())[:MAX_LORAS]


def size(graph: Mapping) -> tuple[int, int] | None:
    """(width, height) of the first empty latent whose size stands in the graph."""
    for inputs in _inputs(graph, "Latent"):
        width, height = inputs.get("width"), inputs.get("height")
        if all(isinstance(v, int) and not isinstance(v, bool) and 64 <= v <= 4096 for v in (width, height)):
            return width // 8 * 8, height // 8 * 8
    return None


def _inputs(graph: Mapping, kind: str = "") -> Iterator[Mapping]:
    for node in graph.values():
        if isinstance(node, Mapping) and kind in str(node.get("class_type")):
            inputs = node.get("inputs")
            if isinstance(inputs, Mapping):
                yield inputs


def _strength(inputs: Mapping, key: str) -> float:
    """The strength that belongs to the LoRA under ``key``: strength_model before others, of the same row of a stack."""
    row = key.rpartition(".")[0]
    beside = [k for k in inputs if k.rpartition(".")[0] == row and "strength" in k.lower()]
    for name in sorted(beside, key=lambda k: ("model" not in k, k)):
        if isinstance(inputs[name], (int, float)) and not isinstance(inputs[name], bool):
            return float(inputs[name])
    return 1.0
