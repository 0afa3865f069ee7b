"""Scores through ComfyUI's own CLIP and CLIP_VISION of a tiny model, against transformers with the same weights.

Prints both, and the sentences for encoders that must be refused.
"""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))
from _start import args, torch

sys.path.insert(0, sys.path[1])
import comfy.clip_vision
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import folder_paths
from nibble_pack.nodes.bridge import clip as encoders
from nibble_pack.nodes.bridge import pictures as folders
from nibble_pack.nodes.bridge import scores
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

out = Path(args[0])
folder_paths.set_output_directory(str(out))
folder_paths.set_input_directory(str(out))
WIDTH, SIZE = 64, 32
shared = dict(hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
              hidden_act="quick_gelu")  # fmt: skip
text_config = dict(shared, vocab_size=49408, max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407)
vision_config = dict(shared, image_size=SIZE, patch_size=8, num_channels=3, projection_dim=WIDTH,
                     model_type="clip_vision_model")  # fmt: skip

torch.manual_seed(0)
with torch.inference_mode(False):
    text, vision = CLIPTextConfig(**text_config, projection_dim=WIDTH), CLIPVisionConfig(**vision_config)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    oracle = CLIPModel(config).eval()
    weights = {k: v.clone() for k, v in oracle.state_dict().items()}


def text_encoder(projection):
    """A ComfyUI CLIP whose text projection is ``projection``: a tensor, or None for a checkpoint without one."""

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(device=device, dtype=dtype, textmodel_json_config=dict(text_config),
                             return_projected_pooled=False, model_options={"model_name": "clip_l"})  # fmt: skip

    target = comfy.supported_models_base.ClipTarget(
        comfy.sd1_clip.SD1Tokenizer, partial(comfy.sd1_clip.SD1ClipModel, clip_model=Encoder)
    )
    sd = {k: v for k, v in weights.items() if k.startswith("text_model.")}
    if projection is not None:
        sd["text_projection.weight"] = projection
    return comfy.sd.CLIP(target, state_dict=[sd])


def picture_encoder(width=WIDTH, project=True):
    vision = comfy.clip_vision.ClipVisionModel(dict(vision_config, projection_dim=width))
    sd = {k: v for k, v in weights.items() if k.startswith("vision_model.")}
    if project:
        sd["visual_projection.weight"] = weights["visual_projection.weight"][:width]
    vision.load_sd(sd)
    return vision


def refusal(call):
    try:
        call()
    except ValueError as e:
        return str(e)
    return ""


prompts = ["a red apple", "fox"]
pictures = torch.rand(2, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(1))
clip, vision = text_encoder(weights["text_projection.weight"]), picture_encoder()


def given(**changes):
    values = dict(images=pictures, folder="none", references=None, reference_folder="none", prompts="\n".join(prompts),
                  clip=clip, vision=vision, image_reward=False)  # fmt: skip
    return scores.Given(**values | changes)


tokens = torch.tensor([[t[0] for t in clip.tokenize(p)["l"][0]] for p in prompts])
mean, std = torch.tensor(vision.image_mean), torch.tensor(vision.image_std)
seen = oracle.get_image_features(pixel_values=((pictures - mean) / std).permute(0, 3, 1, 2))
read = oracle.get_text_features(input_ids=tokens)
seen, read = (torch.nn.functional.normalize(getattr(x, "pooler_output", x), dim=-1) for x in (seen, read))
ours = scores.score(given(references=pictures.flip(0)))
every = scores.score(given(references=pictures.flip(0), clip_i="all pairs"))
single = scores.score(given(prompts="fox"))
pair = SimpleNamespace(
    cond_stage_model=torch.nn.ModuleList([clip.cond_stage_model, text_encoder(None).cond_stage_model])
)
folder = out / "captioned"
folder.mkdir()
for name, encoding in (("a", "cp1252"), ("b", "utf-16")):
    (folder / f"{name}.png").touch()
    (folder / f"{name}.txt").write_bytes("café\r\ncrème\x0c\r\n".encode(encoding))
identity, wrong = torch.eye(WIDTH), torch.full((WIDTH, WIDTH), float("nan"))
print(json.dumps({
    "captions": folders.of_folder("input/captioned").captions,
    "clip_t": list(ours.each["CLIP-T"]), "clip_i": every.overall["CLIP-I"], "kid": ours.overall["KID"],
    "clip_i_each": list(ours.each["CLIP-I"]), "oracle_paired": (seen * seen.flip(0)).sum(1).tolist(),
    "notes": list(ours.notes), "one_prompt": list(single.each["CLIP-T"]),
    "oracle_t": (seen * read).sum(1).tolist(), "oracle_i": (seen @ seen.t()).mean().item(),
    "oracle_one": (seen * read[1]).sum(1).tolist(),
    "identity": refusal(lambda: scores.score(given(clip=text_encoder(identity)))),
    "zeros": refusal(lambda: scores.score(given(clip=text_encoder(torch.zeros(WIDTH, WIDTH))))),
    "garbage": refusal(lambda: scores.score(given(clip=text_encoder(torch.full((WIDTH, WIDTH), 1e-20))))),
    "nan": refusal(lambda: scores.score(given(clip=text_encoder(wrong)))),
    "two": refusal(lambda: encoders.projecting(pair)),
    "missing": encoders.wrong_with(None),
    "trained": encoders.wrong_with(weights["text_projection.weight"]),
    "no_projection": refusal(lambda: scores.score(given(vision=picture_encoder(project=False)))),
    "other_width": refusal(lambda: scores.score(given(vision=picture_encoder(48)))),
    "three_prompts": refusal(lambda: scores.score(given(prompts="a\nb\nc"))),
    "nothing": refusal(lambda: scores.score(given(prompts="", vision=None))),
    "both": refusal(lambda: scores.score(given(folder="output"))),
    "outside": refusal(lambda: scores.score(given(images=None, folder="output/../.."))),
}))  # fmt: skip
