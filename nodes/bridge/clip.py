"""Features of ComfyUI's own CLIP and CLIP_VISION in one space, and a refusal where there is none.

A text encoder that came with a checkpoint usually lacks CLIP's text projection. ComfyUI loads it all the same and
leaves the projection empty or as memory happened to be; a cosine with such features looks like a score and is noise.
"""

from __future__ import annotations

import comfy.sd1_clip
import torch

WHERE = "Load a whole CLIP model (with its text_projection) for both the CLIP and the CLIP_VISION input"


def text_features(clip, prompts: list[str]) -> torch.Tensor:
    """(n, d) projected text features. Raises ValueError for an encoder without a real text projection."""
    encoder = projecting(clip)
    weight = encoder.transformer.text_projection.weight.detach().float().cpu()
    out = []
    for prompt in prompts:
        # The unprojected state and our own product: ComfyUI's switch for it is off for SD1 text encoders.
        _, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled="unprojected")
        if pooled is None or pooled.shape[-1] != weight.shape[1]:
            raise ValueError(f"CLIP-T: this text encoder gives no pooled text feature. {WHERE}")
        out.append(pooled.float().cpu() @ weight.t())
    return torch.cat(out)


def projecting(clip):
    """The one CLIP text transformer in ``clip`` whose projection is real. Raises ValueError in one sentence."""
    kind = comfy.sd1_clip.SDClipModel
    encoders = [m for m in clip.cond_stage_model.modules() if isinstance(m, kind)]
    found = [m for m in encoders if getattr(m.transformer, "text_projection", None) is not None]
    if not found:
        raise ValueError(f"CLIP-T: this text encoder is not a CLIP model and has no text projection. {WHERE}")
    if len(found) > 1:
        raise ValueError(f"CLIP-T: this holds {len(found)} CLIP text encoders; no picture encoder fits both. {WHERE}")
    problem = wrong_with(found[0].transformer.text_projection.weight)
    if problem:
        raise ValueError(f"CLIP-T: the text projection of this encoder {problem}, so it has none of its own. {WHERE}")
    return found[0]


def wrong_with(weight: torch.Tensor | None) -> str:
    """Why a projection matrix cannot be a trained one, or "". Trained ones are dense, with entries near d^-1/2."""
    if weight is None:
        return "is missing"
    w = weight.detach().float().cpu()
    if not torch.isfinite(w).all():
        return "is not finite"
    if w.shape[0] == w.shape[1] and torch.equal(w, torch.eye(w.shape[0])):
        return "is the identity"
    expected = w.shape[1] ** -0.5
    if (w == 0).float().mean() > 0.5:
        return "is empty"
    spread = float(w.std())
    return "" if 0.02 * expected < spread < 50 * expected else "is uninitialised memory"


def picture_features(vision, picture: torch.Tensor) -> torch.Tensor:
    """(n, d) projected features of pictures (n, H, W, 3). Raises ValueError for an encoder that does not project."""
    if not hasattr(getattr(vision.model, "visual_projection", None), "weight"):
        raise ValueError(f"CLIP-T and CLIP-I need a CLIP_VISION model with a visual projection; this has none. {WHERE}")
    return vision.encode_image(picture, crop=True)["image_embeds"].float().cpu()


def same_space(vision, text: torch.Tensor) -> None:
    """Raises ValueError when text and picture features cannot be of one CLIP model."""
    width = vision.model.visual_projection.weight.shape[0]
    if width != text.shape[1]:
        raise ValueError(
            f"CLIP-T: the text features have {text.shape[1]} numbers and the picture features {width}. {WHERE}"
        )
