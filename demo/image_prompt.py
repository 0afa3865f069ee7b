"""The demo's two IP-Adapters (2308.06721), trained on the frozen denoiser with the demo's vision tower.

Pictures of both vendors with their captions; the embedding is that of a view of the picture, augmented half the time.
The denoiser has only ever drawn the first vendor's pictures and the captions do not say which is meant, so the style
is what the adapter must carry. It starts as a reader: its tokens are the caption's states, guessed from the embedding.

IP-Adapter leaves out the text 5 % of the time. A denoiser that knows its pictures by their captions has little to gain
from the picture then; here the text is left out three times in four. Recipes tried: docs/benchmarks.md, Picture
prompts.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch

from .. import image_prompt
from ..training.loop import Plan, train
from . import dataset, evaluate, parts, stages, tower

PLANS = {
    "plain": Plan("ip_adapter", steps=250, batch=32, lr=3e-4, warmup=30, ema=0.98, seed=6),
    "lora": Plan("ip_adapter_lora", steps=250, batch=32, lr=3e-4, warmup=30, ema=0.98, seed=7),
}
TOKENS = 4
RANKS = {"plain": 0, "lora": 16}  # 0: keys and values in full
NO_TEXT, NO_PICTURE, NEITHER = 0.75, 0.05, 0.05
HEARD = (16, 36, 56, 76)  # positions behind every caption's end: padding, whose states hold the whole caption
AUGMENTED = 3  # views of each picture beside the clean one, which is drawn half the time


@torch.no_grad()
def views(model, pictures: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """(n, 1 + AUGMENTED, 128) embeddings of pictures (n, 3, H, W) in [-1, 1]: the clean one first."""
    clean = (pictures + 1) / 2
    stored, g = tower.resized(clean, tower.STORED), torch.Generator().manual_seed(seed)
    seen = [tower.embeddings(model, clean)]
    seen += [tower.embeddings(model, tower.augmented(stored, g)) for _ in range(AUGMENTED)]
    return torch.stack(seen, 1)


def dropped(n: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) whether the text is left out, and whether the picture is."""
    u = torch.rand(n, generator=g)
    picture = u < NO_PICTURE + NEITHER
    text = ((u >= NO_PICTURE) & picture) | ((u >= NO_PICTURE + NEITHER) & (u < NO_PICTURE + NEITHER + NO_TEXT))
    return text, picture


class Batches:
    """Draws (latents, token ids, embeddings), each a function of the generator alone. ``latents`` (n, 4, 16, 16) and
    ``seen`` (n, views, d) hold one vendor's emoji after the other's.
    """

    def __init__(self, emoji: list[dataset.Emoji], tokenizer, latents: torch.Tensor, seen: torch.Tensor):
        self.emoji, self.tokenizer, self.latents, self.seen = emoji, tokenizer, latents, seen

    def __call__(self, n: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pick = torch.randint(len(self.latents), (n,), generator=g)
        view = torch.randint(1, 2 * AUGMENTED + 1, (n,), generator=g)
        view = torch.where(view > AUGMENTED, 0, view)
        no_text, no_picture = dropped(n, g)
        rng = random.Random(int(torch.randint(2**62, (), generator=g)))
        texts = [dataset.phrase(self.emoji[i % len(self.emoji)], rng) for i in pick.tolist()]
        ids = parts.token_ids(self.tokenizer, ["" if no else t for t, no in zip(texts, no_text, strict=True)])
        return self.latents[pick], ids, self.seen[pick, view] * ~no_picture[:, None]


@torch.no_grad()
def start(adapter, text, batches: Batches, device: str, ridge: float = 1.0) -> None:
    """Sets the projection to the least-squares map from a picture's embedding to its caption's states at `HEARD`, and
    of the zero embedding to those of the empty text.
    """
    texts = ["", *(e.captions[0] for e in batches.emoji)]
    states = text(parts.token_ids(batches.tokenizer, texts).to(device)).last_hidden_state[:, HEARD]
    norm = next(m for name, m in text.named_modules() if name.endswith("final_layer_norm"))
    states = ((states - norm.bias) / norm.weight).flatten(1)
    x = batches.seen.transpose(0, 1).flatten(0, 1).to(device)
    y = (states[1:] - states[:1]).repeat(len(x) // len(batches.emoji), 1)
    fit = torch.linalg.solve(x.t() @ x + ridge * torch.eye(x.shape[1], device=device), x.t() @ y)
    image = adapter.image_proj
    image.proj.weight.copy_(fit.t())
    image.proj.bias.copy_(states[0])
    image.norm.weight.copy_(norm.weight)
    image.norm.bias.copy_(norm.bias)


def learn(which: str, unet, text, batches: Batches, work: Path, device: str):
    """(adapter, seconds): a new adapter of the kind ``which``, trained while ``unet`` and ``text`` stay as they are."""
    plan, model = PLANS[which], stages.view(unet)
    torch.manual_seed(plan.seed)
    unet.requires_grad_(False)
    adapter = image_prompt.new(unet, batches.seen.shape[-1], TOKENS, RANKS[which]).to(device).train()
    image_prompt.attach(unet, adapter)
    start(adapter, text, batches, device)

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        clean, ids, seen = batches(plan.batch, g)
        noise, sigma = stages.drawn(model, clean, g)
        with torch.no_grad():
            context = text(ids.to(device)).last_hidden_state
        cond = stages.conds(context, ip_hidden_states=adapter(seen.to(device)))
        with torch.autocast(device, dtype=torch.bfloat16):
            return model.loss(clean.to(device), noise, sigma, cond)

    seconds = train(plan, list(adapter.parameters()), loss, work).seconds
    return adapter.eval(), seconds


@torch.no_grad()
def draw(pipe, adapter, prompts: list[str], embeddings: torch.Tensor, weight: float):
    """(n, H, W, 3) pictures of ``prompts`` with picture prompt i's embedding (n, d), at the demo's steps and guidance;
    ``adapter`` is attached to ``pipe.unet``. The unguided half gets the tokens of an empty picture.
    """

    def tokens(rows: slice) -> dict:
        some = embeddings[rows].to(pipe.device, pipe.unet.dtype)
        both = torch.cat([adapter(torch.zeros_like(some)), adapter(some)])
        return {"cross_attention_kwargs": {"ip_hidden_states": both, "ip_weight": weight}}

    return evaluate.draw(pipe, prompts, evaluate.STEPS, evaluate.GUIDANCE, more=tokens)
