"""The only files that touch ComfyUI's internals. Everything else in nodes/ uses its public API and these functions."""
