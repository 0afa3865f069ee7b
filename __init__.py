"""ComfyUI-Nibble: 4-bit diffusion in ComfyUI. Outside ComfyUI it is the package ``comfyui_nibble`` (headless/)."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls to get the nodes. Imported late, so that the core works without ComfyUI."""
    from .nodes import NibbleExtension

    return NibbleExtension()
