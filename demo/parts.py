"""The demo model's parts as diffusers and transformers modules. Widths: the table below is their only home.

latents (B, 4, 16, 16) for pictures (B, 3, 128, 128) in [-1, 1]; text (B, 77) token ids -> (B, 77, 128);
pictures for the vision tower (B, 3, 48, 48) -> (B, 128).
Every attention and feed-forward width is a multiple of 64, so each of the 70 linears can be 4-bit.
The same weights load in ComfyUI's own classes: nodes/demo.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..writing import whole

UNET = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    block_out_channels=(64, 128, 192),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=4,  # diffusers' name for the number of heads
    cross_attention_dim=128,
)
TEXT = dict(
    hidden_size=128,
    intermediate_size=512,
    projection_dim=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
)
VISION = dict(
    hidden_size=192,
    intermediate_size=768,
    projection_dim=128,  # the text encoder's width, so that CLIP-T is one cosine
    num_hidden_layers=4,
    num_attention_heads=6,
    image_size=48,
    patch_size=8,
    hidden_act="quick_gelu",
)
SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
VOCABULARY = 2048
START, END = "<|startoftext|>", "<|endoftext|>"


def unet():
    """A new UNet2DConditionModel, epsilon prediction, 10.9 M parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET)


def autoencoder():
    """A new AutoencoderTiny (the TAESD architecture), 2.4 M parameters; latents are kept near unit variance."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny()


def text_encoder(tokenizer):
    """A new CLIPTextModel over ``tokenizer``'s vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        **TEXT,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def vision_tower():
    """A new CLIPVisionModelWithProjection, 1.8 M parameters: (B, 3, 48, 48) with CLIP's mean and deviation taken out ->
    ``image_embeds`` (B, 128).
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))


def train_tokenizer(captions: list[str], folder: Path):
    """Learns a CLIP-style byte-pair vocabulary of `VOCABULARY` from ``captions``; written to ``folder``."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    # The same text handling as CLIP's own tokenizer, which both readers apply to vocab.json + merges.txt.
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    word = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(word, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [letter + "</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    # CLIP's order: every byte, every byte at a word's end, the merges, the two marks. So no text is ever unknown.
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")][: VOCABULARY - len(base) - 2]
    tokens = [*base, *(line.replace(" ", "") for line in merges), START, END]
    whole.text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    whole.text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
    config = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=TEXT["max_position_embeddings"],
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )
    whole.text(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")
    return load_tokenizer(folder)


def load_tokenizer(folder: Path):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder))


def token_ids(tokenizer, captions: list[str]):
    """(B, 77) int64 ids, padded with the end token as CLIP does."""
    return tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=TEXT["max_position_embeddings"],
        return_tensors="pt",
    ).input_ids
