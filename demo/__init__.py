"""The shipped demo model: a small text-to-image latent diffusion model that draws emoji (demo/README.md).

``MODEL`` is an ordinary diffusers folder; ``LORAS`` are ordinary LoRA files in kohya key names. Importing this loads
nothing.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent
MODEL = ROOT / "model"
LORAS = {
    "style": ROOT / "loras" / "nibble_demo_flat_style.safetensors",
    "lcm": ROOT / "loras" / "nibble_demo_lcm.safetensors",
}
# CLIP_VISION in transformers' layout; the same file holds the text projection that pairs with it
VISION = ROOT / "vision"
TEXT_PROJECTION = "text_projection.weight"
# IP-Adapters for it: in full, and in low-rank factors
IP_ADAPTERS = {
    "plain": ROOT / "ipadapter" / "nibble_demo_ip-adapter.safetensors",
    "lora": ROOT / "ipadapter" / "nibble_demo_ip-adapter_lora.safetensors",
}
# 48 emoji in the flat style with captions (captions.jsonl): a folder to try training on
PICTURES = ROOT / "twemoji"
REFERENCES = {"noto": ROOT / "references" / "noto.png", "twemoji": ROOT / "references" / "twemoji.png"}
