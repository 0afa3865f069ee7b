"""Image prompts for UNets with cross-attention: IP-Adapter in all its variants, and Uni-ControlNet's global adapter.

Pure torch: the same modules are read from files, run inside ComfyUI and inside diffusers, and trained.
"""

from .adapter import ImagePrompt, attach, describe, from_shapes, load, new, read, sites_for

__all__ = ["ImagePrompt", "attach", "describe", "from_shapes", "load", "new", "read", "sites_for"]
