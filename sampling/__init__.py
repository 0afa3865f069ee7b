"""Few-step sampling in pure torch: the preset table, its schedules, and the samplers that ComfyUI lacks.

A sampler keeps k-diffusion's contract ``sample_x(model, x, sigmas, extra_args, callback, disable)`` with
``model(x, sigma, **extra_args) -> denoised``; sigmas descend and end in 0. ComfyUI's own classes: nodes/bridge.
"""
