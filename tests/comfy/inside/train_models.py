"""ARGS: family=file ... Three training steps on tiny models of every precision, under inference mode as nodes run."""

import json

from lora_common import FORWARD, args, load, mm, ours, torch

adapters, denoise = ours("training.adapters"), ours("nodes.bridge.train_model")
job, loop, ordinary, data, lora = (
    ours("training.job"),
    ours("training.loop"),
    ours("training.ordinary"),
    ours("training.data"),
    ours("training.lora"),
)
result = {}


def cond(width: int, vector: int, seed: int) -> list:
    g = torch.Generator().manual_seed(seed)
    pooled = {"pooled_output": torch.randn(1, vector, generator=g)} if vector else {}
    return [[torch.randn(1, 12, width, generator=g), pooled]]


def state(model) -> dict:
    """What may not change: every tensor and its kind."""
    named = model.model.diffusion_model.named_parameters()
    plain = {n: getattr(p, "_qdata", p) for n, p in named}
    return {n: (p.is_inference(), p.dtype, float(p.double().sum()), p.data_ptr()) for n, p in plain.items()}


for arg in args:
    name, file = arg.split("=")
    family = name.split(" ")[0]
    model = load.diffusion_model(file)
    target = denoise.resident(model)
    channels, width, vector, _ = FORWARD[family]
    width, vector = (width, 2816 if family == "sdxl" else vector)
    before = state(target)
    with denoise.placed(target, compress=True):
        module = target.model.diffusion_model
        g = torch.Generator().manual_seed(0)
        latents = [torch.randn(channels, 8, 8, generator=g) for _ in range(2)]
        encoded = [[denoise.condition(target, cond(width, vector, seed), z) for seed in (i, 9)]
                   for i, z in enumerate(latents)]  # fmt: skip
        rows = [data.Sample(z, *conds) for z, conds in zip(latents, encoded, strict=True)]
        names = job.usual(list(adapters.linears(module)))
        found = []
        for checkpointing in (False, True):
            plan = loop.Plan("x", 3, 2, 0.02, warmup=0, ema=0.0)
            fresh = adapters.Adapters(module, names, 4)
            outcome = lora.train_lora(
                denoise.denoiser(target), fresh, (rows, []), lora.Recipe(plan, 0.0, checkpointing)
            )
            moved = sum(bool(f.up.any()) for f in fresh.factors.values())
            found.append((outcome, moved, fresh))
    as_it_was = [state(target) == before]
    mm.load_models_gpu([target], force_full_load=True)  # as after sampling: what is loaded is compressed where it is
    with denoise.placed(target, compress=True):
        again = lora.validate(denoise.denoiser(target), rows)
    as_it_was.append(state(target) == before)
    result[name] = {
        "losses": found[0][0].result.losses,
        "before, after": [found[0][0].before, found[0][0].after],
        "moved": found[0][1] / len(names),
        "checkpointing differs by": max(
            abs(a / b - 1) for a, b in zip(found[0][0].result.losses, found[1][0].result.losses, strict=True)
        ),
        "as it was": all(as_it_was),
        "loaded before, differs by": abs(again / found[0][0].before - 1),
        "forwards left": sum("forward" in m.__dict__ for m in target.model.modules()),
    }
    mm.unload_all_models()
print(json.dumps(result))
