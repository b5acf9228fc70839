"""Stable Diffusion pipelines of the real classes with random weights, written to a directory: no network is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fbl_flower.config import RunConfig, parse_config
from fbl_flower.data.datasets import DataParts, load_parts
from fbl_flower.generation.loading import load_generator
from fbl_flower.generation.text_to_image import TextToImageGenerator


def configure(folder: Path | str, **keys: Any) -> tuple[RunConfig, DataParts]:
    """Return a configuration with the generator in `folder`, quick settings, and its data."""
    settings = {
        "data.name": "digits", "data.num-private": 500, "generator.name": "text-to-image", "generator.path": str(folder),
        "generator.steps": 2, "generator.batch-size": 4,
    }  # fmt: skip
    config = parse_config(settings | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()})
    return config, load_parts(config.data)


def load(folder: Path | str, **keys: Any) -> TextToImageGenerator:
    """Load the generator in `folder` with the settings of `configure`."""
    generator = load_generator(*configure(folder, **keys))
    assert isinstance(generator, TextToImageGenerator)
    return generator


def save_tokenizer(folder: Path) -> dict[str, int]:
    """Write a CLIPTokenizer whose vocabulary is the bytes, each also as the end of a word; return the vocabulary."""
    from transformers import CLIPTokenizer

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)
    return vocabulary


def save_index(folder: Path, *, vae: str = "AutoencoderKL", scheduler: str = "DDIMScheduler", **more: Any) -> None:
    """Write the model_index.json of a pipeline whose components lie in `folder`."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", vae],
        "scheduler": ["diffusers", scheduler],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index | more))


def save_scheduler(folder: Path) -> None:
    from diffusers import DDIMScheduler

    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    ).save_pretrained(folder)  # fmt: skip


def save_small_pipeline(folder: Path, *, seed: int = 0) -> Path:
    """Write a pipeline of about a million weights that makes images of 16 x 16 pixels."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary = save_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                projection_dim=64, bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1,
                pad_token_id=len(vocabulary) - 1,
            )
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=64, attention_head_dim=8,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4, sample_size=16,
        )  # fmt: skip
    # Random weights ignore texts and draw a flat grey: louder ones make images that differ visibly.
    nn.init.normal_(text_encoder.get_input_embeddings().weight, std=1.0, generator=torch.Generator().manual_seed(seed))
    nn.init.normal_(vae.decoder.conv_out.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    unet.save_pretrained(folder / "unet")
    text_encoder.save_pretrained(folder / "text_encoder")
    vae.save_pretrained(folder / "vae")
    save_scheduler(folder / "scheduler")
    save_index(folder)
    return folder


def save_tiny_decoder(folder: Path, *, seed: int = 0) -> Path:
    """Write an AutoencoderTiny that halves images once, as the small pipeline's own autoencoder does."""
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoencoderTiny(
            encoder_block_out_channels=(32, 32), decoder_block_out_channels=(32, 32), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
        ).save_pretrained(folder)  # fmt: skip
    return folder
