"""Tiny judges of the open world, in folders: OWLv2, Grounding DINO, SAM and CLIP, random."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPTokenizer

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def spelling_tokenizer() -> CLIPTokenizer:
    """Letters as tokens; none of the marks is token 0, by which OWL-ViT knows an absent text."""
    letters = string.ascii_lowercase
    pieces = ["!", "<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def text_and_vision() -> dict[str, Any]:
    tokenizer = spelling_tokenizer()
    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos")}
    text = SMALL | marks | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    return {
        "text_config": text | {"pad_token_id": tokenizer.pad_token_id},
        "vision_config": SMALL | {"image_size": 32, "patch_size": 8},
        "projection_dim": 16,
    }


def save_owlv2(folder: Path) -> None:
    config = transformers.Owlv2Config(**text_and_vision())
    transformers.Owlv2ForObjectDetection(config).save_pretrained(folder)
    images = transformers.Owlv2ImageProcessorPil(size={"height": 32, "width": 32})
    transformers.Owlv2Processor(images, spelling_tokenizer()).save_pretrained(folder)


def save_clip(folder: Path) -> None:
    config = transformers.CLIPConfig(**text_and_vision())
    transformers.CLIPModel(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    transformers.CLIPProcessor(images, spelling_tokenizer()).save_pretrained(folder)


def save_sam(folder: Path) -> None:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16}
    vision |= {"output_channels": 8, "image_size": 32, "patch_size": 8, "num_pos_feats": 4}
    vision |= {"window_size": 2, "global_attn_indexes": [0]}
    prompts = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "mask_input_channels": 8}
    masks = {"hidden_size": 8, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    masks |= {"iou_head_hidden_dim": 8}
    config = transformers.SamConfig(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks
    )
    transformers.SamModel(config).save_pretrained(folder)
    images = transformers.SamImageProcessorPil(
        size={"longest_edge": 32},
        pad_size={"height": 32, "width": 32},
        mask_size={"longest_edge": 8},
        mask_pad_size={"height": 8, "width": 8},
    )
    transformers.SamProcessor(images).save_pretrained(folder)


def save_grounding_dino(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "a", "car", "boat", "ball"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = transformers.BertTokenizer(vocab=vocabulary, model_max_length=16)
    backbone = transformers.SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone,
        text_config=SMALL | {"model_type": "bert", "vocab_size": len(words)},
        d_model=32,  # it has 32 groups
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_n_points=2,
        decoder_n_points=2,
        num_queries=4,
        max_text_len=16,
    )
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    images = transformers.GroundingDinoImageProcessorPil(
        size={"shortest_edge": 64, "longest_edge": 128}  # 32 would leave a single cell
    )
    transformers.GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)


SAVE = {
    "owlv2": save_owlv2,
    "grounding-dino": save_grounding_dino,
    "sam": save_sam,
    "clip": save_clip,
}


def save_judge(kind: str, folder: Path) -> Path:
    """A random judge of a kind, and its processor, in a new folder; the same at every call."""
    torch.manual_seed(0)
    SAVE[kind](folder / kind)
    return folder / kind
