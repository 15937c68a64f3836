"""LoRAs and textual inversions: refused where they belong to another family of models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lrd_helpers.quiet import quiet_libraries

with quiet_libraries():
    from diffusers import DiffusionPipeline
    from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts

__all__ = ["check_lora", "check_textual_inversion"]

TEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "XL"}
"""How wide the text is that each family's U-Net reads."""

ENCODER_WIDTHS = {768: "Stable Diffusion 1.x (or XL's first text encoder)",
                  1024: "Stable Diffusion 2.x", 1280: "XL's second text encoder"}  # fmt: skip


def check_lora(pipe: DiffusionPipeline, lora: Any, **options: Any) -> None:
    """Refuse a LoRA that was made for another family than a pipeline's.

    Diffusers stops in the midst of loading with a page of sizes, or loads nothing without a word.

    Args:
        pipe: the pipeline that it is for.
        lora: what `load_lora_weights` takes: a folder, a file, a name on the hub, or its tensors.
        options: of `load_lora_weights`.

    Raises:
        ValueError: names the family that it fits.
    """
    options = {name: value for name, value in options.items() if name != "hotswap"}
    lora = dict(lora) if isinstance(lora, dict) else lora
    state = pipe.lora_state_dict(lora, unet_config=pipe.unet.config, **options)[0]
    if not any(key.startswith(("unet.", "text_encoder", "lora_unet", "lora_te")) for key in state):
        kinds = ", ".join(sorted({key.split(".")[0] for key in state})[:3]) or "nothing"
        raise ValueError(
            f"this LoRA has weights for {kinds}, but this pipeline has a U-Net and text encoders; "
            f"use a LoRA made for {_family(pipe)}"
        )
    # The matrix that reads the text: A of a LoRA's B·A, under any of its names.
    reads = re.compile(r"attn2\.(processor\.)?to_[kv].*(lora_A|lora[._]down|\.down\.weight)")
    widths = {tensor.shape[1] for key, tensor in state.items() if reads.search(key)}
    if widths and pipe.unet.config.cross_attention_dim not in widths:
        width = min(widths)
        raise ValueError(
            f"this LoRA was made for {TEXT_WIDTHS.get(width, 'another model')} (it reads text of "
            f"{width} features), but this is {_family(pipe)}; use a LoRA made for that"
        )


def check_textual_inversion(encoder: nn.Module, inversion: Any, **options: Any) -> None:
    """Refuse learnt words that were made for another text encoder.

    Args:
        encoder: the text encoder that they are for.
        inversion: what `load_textual_inversion` takes.
        options: of `load_textual_inversion`.

    Raises:
        ValueError: names the text encoder that they fit.
    """
    width = encoder.get_input_embeddings().weight.shape[-1]
    given = inversion if isinstance(inversion, list) else [inversion]
    widths = {
        tensor.shape[-1]
        for state in load_textual_inversion_state_dicts(given, **options)
        for tensor in _tensors(state)
    }
    if widths and widths != {width}:
        made_for = " and ".join(ENCODER_WIDTHS.get(w, f"{w} features") for w in sorted(widths))
        raise ValueError(
            f"this textual inversion was made for {made_for}, but this text encoder has {width} "
            "features; use one that was made for it"
        )


def _family(pipe: DiffusionPipeline) -> str:
    width = pipe.unet.config.cross_attention_dim
    return TEXT_WIDTHS.get(width, f"a U-Net that reads text of {width} features")


def _tensors(state: Any) -> Iterator[Tensor]:
    """The embeddings in a state: a tensor, diffusers' {word: tensor}, or A1111's."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for each in (state.get("string_to_param") or state).values():
            yield from _tensors(each)
