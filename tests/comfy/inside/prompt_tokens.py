"""Counts tokens of prompts with ComfyUI's own tokenizers. ARGS: none; prints maxima and any count that is too low."""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _start import pack  # noqa: F401
from comfy.sd1_clip import SDTokenizer
from comfy.text_encoders.sd3_clip import T5XXLTokenizer
from nibble_pack.prompts import batch, domain, expand, tokens
from nibble_pack.prompts.spec import STYLES, TAGS

PUNCTUATION = " '-.,()[]{}:;!?/\\_*&#\"\t\n"
OTHER = "\u00e9\u00df\u0111\u1ea1\u4e2d\u6587\u0430\u05d0\u0e01\u2019\u2026\u00bd\u2460\ufb01\u0130\u023a\u0958\u3000"
OTHER += "\u00a0\U0001f34e\u200d\u0301"


def count(tokenizer, text: str) -> int:
    """With both end marks, however many windows they are cut into."""
    return len(tokenizer.tokenizer(text)["input_ids"])


def samples(rng: random.Random, words: list[str]):
    """Texts of every kind: vocabulary words, letters and punctuation, anything that Unicode has."""
    for i in range(6000):
        kind, n = i % 4, rng.randint(1, 40)
        if kind == 0:
            yield " ".join(rng.choice(words) for _ in range(n))
        elif kind == 1:
            yield "".join(rng.choice(PUNCTUATION + OTHER + "abcxyzABCXYZ019") for _ in range(2 * n))
        elif kind == 2:
            yield "".join(
                chr(rng.choice([rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x1FFFF)])) for _ in range(n)
            )
        else:
            yield "".join(rng.choice("abcdefghijklmnopqrstuvwxyz' ") for _ in range(3 * n))


clip, t5 = SDTokenizer(), T5XXLTokenizer()
words = [w.removesuffix("</w>") for w in clip.tokenizer.get_vocab() if w.isascii()]
low = [t for t in samples(random.Random(1), words) if count(clip, t) > tokens.clip_bound(t)]
longest, excess = {}, []
for id in domain.shipped():
    d = domain.load(id)
    triggers = [f", {lora.trigger}" for lora in d.loras if lora.trigger] or [""]
    for style in STYLES:
        tokenizer = clip if style == TAGS else t5
        prompts = list(batch.samples(d, [], 1000, 0, style))
        long = [p.positive + t for p in prompts for t in triggers]
        longest[f"{id} {style}"] = max(count(tokenizer, t) for t in long)
        longest[f"{id} {style} negative"] = max(count(tokenizer, t) for t in {p.negative for p in prompts})
        for t in long:
            real, bound = count(clip, t), tokens.clip_bound(t)
            low += [t] if real > bound else []
            excess.append(bound / real)
golden = expand.expand(domain.load("food"), "a pear", 3)
print(json.dumps({"low": low, "longest": longest, "excess": sum(excess) / len(excess), "golden": golden}))
