"""Steps and pictures at Stable Diffusion's full size, with random weights: time and memory.

    python benchmarks/full_size.py --family sd-1.5                       # any machine
    python benchmarks/full_size.py --family sdxl --pixels 512 1024       # a GPU: half precision
    python benchmarks/full_size.py --family sd-1.5 --compile inductor

Random weights take the same time and memory as trained ones. The shapes are those that were
published (`published.json`). A layered step of n layers is held against a step of diffusers' own
pipeline, in turn and in one process, so that a machine's moods cancel out. It ends within
`--minutes`: what there was no time for is named.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from lrd_helpers.benchmark.cost import peak_memory
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.machine import describe_machine
from lrd_helpers.methods import LayeredRendering
from lrd_helpers.models import best_device
from lrd_helpers.pipeline import LayeredRenderingPipeline, LayeredRenderingXLPipeline
from lrd_helpers.storybook import STICKERS, WORDS
from lrd_helpers.words import word_tokenizer

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
"""The shapes of each family's parts, and how many parameters each has."""

WIDTHS = [
    "addition_time_embed_dim",
    "block_out_channels",
    "cross_attention_dim",
    "hidden_size",
    "intermediate_size",
    "norm_num_groups",
    "projection_class_embeddings_input_dim",
    "projection_dim",
]
"""What `narrow` divides: numbers of channels. Depth, heads and kinds of blocks stay."""

# ------------------------------------------------------------------ the models


def part(family: str, name: str, narrow: int = 1) -> Any:
    """A part of a family's pipeline with random weights, `narrow` times as narrow as published."""
    config = {key: value for key, value in PUBLISHED[family][name].items() if key != "parameters"}
    for key in WIDTHS:
        if key in config:
            widths = config[key]
            several = isinstance(widths, list)
            config[key] = [width // narrow for width in widths] if several else widths // narrow
    kind = config.pop("class")
    if "text_encoder" not in name:
        return getattr(diffusers, kind)(**config)
    tokenizer = tokenizer_of_words()
    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos")}
    config |= marks | {"pad_token_id": tokenizer.pad_token_id}
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**config))


def tokenizer_of_words() -> transformers.CLIPTokenizer:
    """Storybook's words, padded to CLIP's 77 tokens: what a prompt says does not matter here."""
    return word_tokenizer(WORDS, length=77)


def pipelines(
    family: str,
    *,
    narrow: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[LayeredRenderingPipeline, StableDiffusionPipeline]:
    """A layered pipeline with random weights, and diffusers' own, with the same parts."""
    parts: dict[str, Any] = {}
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        for name in PUBLISHED[family]:
            if name in ("unet", "vae") or "text_encoder" in name:
                with torch.device(device):
                    parts[name] = part(family, name, narrow).eval()
    finally:
        torch.set_default_dtype(usual)
    for name in [name for name in parts if "text_encoder" in name]:
        parts[name.replace("text_encoder", "tokenizer")] = tokenizer_of_words()
    parts["scheduler"] = part(family, "scheduler")
    kinds = (LayeredRenderingXLPipeline, StableDiffusionXLPipeline)
    if "text_encoder_2" not in parts:
        kinds = (LayeredRenderingPipeline, StableDiffusionPipeline)
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    pipes = [kind(**parts) for kind in kinds]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes[0], pipes[1]


# ------------------------------------------------------------------ what is measured


def layout(layers: int) -> Layout:
    """`layers` boxes in a row, each with a ξ of its own."""
    boxes = [(i / layers, 0.25, (i + 1) / layers, 0.75) for i in range(layers)]
    return Layout(
        "a red car and a yellow star at night",
        background="at night",
        layers=[Layer(f"a red {STICKERS[i]}", box) for i, box in enumerate(boxes)],
    )


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def step(pipe: StableDiffusionPipeline, layers: int, pixels: int) -> tuple[float, float]:
    """Seconds from the U-Net's first call to the end of the step, and peak MB beyond what is held.

    Args:
        pipe: diffusers' own pipeline for no layers, the layered one for any.
        layers: how many.
        pixels: the side of the picture.
    """
    began: list[float] = []
    took: list[float] = []

    def ended(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        took.append(now() - began[0])
        return tensors

    asked: dict[str, Any] = {"prompt": layout(1).caption}
    if layers:
        method = LayeredRendering(layered_fraction=1.0)
        asked = {"layouts": layout(layers), "method": method}
    hook = pipe.unet.register_forward_pre_hook(lambda *_: began.append(now()))
    try:
        peak = peak_memory()
        pipe(
            **asked,
            num_inference_steps=1,
            guidance_scale=5.0,
            height=pixels,
            width=pixels,
            output_type="latent",
            callback_on_step_end=ended,
        )
        return took[0], peak()
    finally:
        hook.remove()


def rows_of_steps(
    pipes: tuple[Any, Any], layers: list[int], pixels: int, repeats: int, end: float
) -> Iterator[str]:
    """A line a number of layers: samples, seconds, how many plain steps that is, and memory."""
    layered, plain = pipes
    bases: list[tuple[float, float]] = []
    warm = pixels if torch.cuda.is_available() else 64  # kernels are chosen for each size
    step(plain, 0, warm)
    for count in layers:
        pairs: list[tuple[float, float]] = []
        memory = 0.0
        if end > time.monotonic():
            step(layered, count, warm)
        while len(pairs) < repeats and end > time.monotonic():
            bases.append(step(plain, 0, pixels))
            seconds, peak = step(layered, count, pixels)
            pairs.append((seconds, seconds / bases[-1][0]))
            memory = max(memory, peak)
        if not pairs:
            yield f"| {count} | {2 * count + 2} | no time was left | – | – |"
            continue
        seconds, ratio = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = [each for _, each in pairs]
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(pairs) > 1 else ""
        yield f"| {count} | {2 * count + 2} | {seconds:.3g} | {ratio:.2f}{spread} | {memory:.0f} |"
    if bases:
        seconds, memory = (statistics.median(column) for column in zip(*bases, strict=True))
        yield f"| plain | 2 | {seconds:.3g} | 1 | {memory:.0f} |"


def rows_of_pictures(
    pipe: Any, methods: list[str], layers: int, pixels: int, steps: int, end: float
) -> Iterator[str]:
    """A line a method: seconds and memory of a whole picture, the autoencoder included."""
    for method in methods:
        if end < time.monotonic():
            yield f"| {method} | no time was left | – |"
            continue
        peak, began = peak_memory(), now()
        pipe(
            layout(layers),
            method=method,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            height=pixels,
            width=pixels,
        )
        yield f"| {method} | {now() - began:.3g} | {peak():.0f} |"


# ------------------------------------------------------------------ the command


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--family", choices=PUBLISHED, default="sd-1.5", help="(%(default)s)")
    add("--pixels", type=int, nargs="+", help="sides of the picture (that of the family)")
    add("--layers", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6], help="(%(default)s)")
    add("--repeats", type=int, default=3, help="pairs a row (%(default)s)")
    add("--pictures", nargs="*", metavar="METHOD", help="whole pictures, too (on a GPU: plain, "
        "lrdiff and collage; on a CPU none)")  # fmt: skip
    add("--steps", type=int, default=25, help="of a whole picture (%(default)s)")
    add("--device", help="cuda, mps, cpu (the best there is)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="(on CUDA float16)")
    add("--compile", metavar="BACKEND", help="of torch.compile, such as inductor (not compiled)")
    add("--minutes", type=float, default=9.0, help="no measurement begins later (%(default)s)")
    add("--narrow", type=int, default=1, help="divides all widths: 8 tries the script in seconds")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    device = torch.device(options.device or best_device())
    half = "float16" if device.type == "cuda" else "float32"
    dtype = options.dtype or half
    diffusers.logging.set_verbosity_error()
    pipes = pipelines(
        options.family, narrow=options.narrow, device=device, dtype=getattr(torch, dtype)
    )
    if options.compile:
        compiled = torch.compile(pipes[0].unet, backend=options.compile)
        for pipe in pipes:
            pipe.unet = compiled
    threads = torch.get_num_threads()
    how = f"compiled by {options.compile}" if options.compile else "not compiled"
    print(f"{options.family}, {dtype}, {how}; {describe_machine()}; {threads} CPU threads")
    pictures = options.pictures
    if pictures is None:
        pictures = ["plain", "lrdiff", "collage"] if device.type == "cuda" else []
    for pixels in options.pixels or [PUBLISHED[options.family]["pixels"]]:
        print(f"\n{pixels} pixels, a step\n")
        print("| layers | samples | seconds | × plain | peak memory beyond the weights (MB) |")
        print("| --- | --- | --- | --- | --- |")
        for line in rows_of_steps(pipes, options.layers, pixels, options.repeats, end):
            print(line, flush=True)
        if pictures:
            print(f"\n{pixels} pixels, a picture of {options.steps} steps and 3 layers\n")
            print("| method | seconds | peak memory beyond the weights (MB) |\n| --- | --- | --- |")
            for line in rows_of_pictures(pipes[0], pictures, 3, pixels, options.steps, end):
                print(line, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
