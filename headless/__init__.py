"""Without ComfyUI: the command line and the diffusers adapter. Never imports ComfyUI."""
