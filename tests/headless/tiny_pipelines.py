"""Pipelines of diffusers' own classes with small random weights, as folders: what `nibble generate --model` gets."""

from __future__ import annotations

from pathlib import Path

import torch
from comfyui_nibble import demo
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WIDTH = 64
UNET = dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=WIDTH,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2)  # fmt: skip
TRAINED = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(demo.MODEL / "tokenizer", local_files_only=True)


def clip(kind=CLIPTextModel, width: int = WIDTH):
    return kind(CLIPTextConfig(vocab_size=2048, hidden_size=width, intermediate_size=64, num_hidden_layers=1,
                               num_attention_heads=2, projection_dim=32, bos_token_id=2046, eos_token_id=2047
    ))  # fmt: skip


def t5():
    """(encoder, tokenizer) that read sentences."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate(("<pad>", "</s>", "<unk>", "red", "apple", "a", "mug"))}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = T5Config(vocab_size=8, d_model=WIDTH, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config), fast


def vae(channels: int = 4, **more) -> AutoencoderKL:
    """Eight pixels to a latent's, as the real ones."""
    return AutoencoderKL(latent_channels=channels, block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
                         down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                         sample_size=64, **more)  # fmt: skip


def sd(cross: int = WIDTH, prediction: str = "epsilon", **more) -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(**{**UNET, "cross_attention_dim": cross, **more})
    scheduler = DDIMScheduler(**TRAINED, prediction_type=prediction)
    return StableDiffusionPipeline(
        vae(), clip(width=cross), tokenizer(), unet, scheduler, None, None, requires_safety_checker=False
    )


def sdxl() -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(**{**UNET, "cross_attention_dim": 2 * WIDTH}, addition_embed_type="text_time",
                                addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32
    )  # fmt: skip
    return StableDiffusionXLPipeline(vae(), clip(), clip(CLIPTextModelWithProjection), tokenizer(), tokenizer(), unet,
                                     DDIMScheduler(**TRAINED), add_watermarker=False)  # fmt: skip


def sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=32, pooled_projection_dim=64, out_channels=16,
        pos_embed_max_size=32,
    )  # fmt: skip
    one, two = (clip(CLIPTextModelWithProjection) for _ in range(2))
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae(16, shift_factor=0.06, use_quant_conv=False,
                                                                     use_post_quant_conv=False),
        one, tokenizer(), two, tokenizer(), None, None,
    )  # fmt: skip


def flux(guidance: bool) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance,
    )  # fmt: skip
    encoder, words = t5()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance)
    return FluxPipeline(scheduler, vae(4, shift_factor=0.1), clip(), tokenizer(), encoder, words, transformer)


MAKERS = {"sd15": sd, "sd2": lambda: sd(1024, "v_prediction"), "sdxl": sdxl, "sd3": sd3, "flux": lambda: flux(True),
          "full_lcm": lambda: sd(time_cond_proj_dim=32), "flux_schnell": lambda: flux(False)}  # fmt: skip


def write(kind: str, folder: Path) -> Path:
    """The folder of a pipeline."""
    torch.manual_seed(0)
    MAKERS[kind]().save_pretrained(folder)
    return folder
