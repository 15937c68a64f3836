"""What capture and layers cost on Stable Diffusion 1.5's geometry, in ratios of one run.

    python benchmarks/speed.py [--pixels 256] [--repeats 3] [--other FOLDER]

The U-Net has Stable Diffusion 1.5's shape and random weights, which cost the same time as trained
ones. Each ratio is the median over pairs measured in turn, so that a machine's moods cancel out.
--other is a folder with attention-map-diffusers in it:
    pip install --no-deps --target FOLDER attention-map-diffusers
Memory is the process's peak beyond what it held before (Linux with glibc only).
"""

import argparse
import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lrd_helpers.attention import capture_attention
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.methods import LayeredRendering
from lrd_helpers.models import load_pipeline
from lrd_helpers.pipeline import LayeredRenderingPipeline
from lrd_helpers.storybook import STICKERS, WORDS
from lrd_helpers.words import word_tokenizer

PROMPT = "a red car and a yellow star at night"


def stable_diffusion() -> LayeredRenderingPipeline:
    """Stable Diffusion 1.5's U-Net with random weights; the rest small, since it is not timed."""
    tokenizer = word_tokenizer(WORDS, length=77)
    marks = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=768,
        num_hidden_layers=1,
        num_attention_heads=8,
        max_position_embeddings=77,
        pad_token_id=tokenizer.pad_token_id,
        **marks,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    pipe = LayeredRenderingPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def ratio(one: Callable[[], object], other: Callable[[], object], repeats: int) -> str:
    """Median, smallest and largest of time(one) / time(other), measured in turn."""
    one(), other()
    ratios = [seconds(one) / seconds(other) for _ in range(repeats)]
    return f"{statistics.median(ratios):.3f}× ({min(ratios):.3f} to {max(ratios):.3f})"


def peak(function: Callable[[], object]) -> float:
    """MB that the process held at most beyond what it held before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed, but kept, would hide what is needed
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    (line,) = (
        one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(name)
    )
    return int(line.split()[1]) / 1024


def layout(layers: int) -> Layout:
    """`layers` boxes in a row."""
    boxes = [(i / layers, 0.25, (i + 1) / layers, 0.75) for i in range(layers)]
    return Layout(
        PROMPT,
        background="at night",
        layers=[Layer(f"a red {STICKERS[i]}", box) for i, box in enumerate(boxes)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--other", type=Path, help="folder with attention-map-diffusers")
    options = parser.parse_args()
    diffusers.logging.set_verbosity_error()
    pipe = stable_diffusion()
    # Not from_pipe: that casts the shared models to float32.
    plain = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    threads = torch.get_num_threads()
    print(f"{threads} threads, {pipe.unet.dtype}, {options.pixels} px, {options.repeats} pairs")

    def draw(steps: int = 2, pixels: int = options.pixels) -> None:
        plain(PROMPT, num_inference_steps=steps, height=pixels, width=pixels, output_type="latent")

    def captured(steps: int = 2) -> None:
        with capture_attention(plain, PROMPT, words=["car", "star"]) as attention:
            draw(steps)
        attention["car"]

    print("\ncapture_attention, two words, all layers, against the plain pipeline (budget 1.05×)")
    print(f"  time {ratio(captured, draw, options.repeats)}")
    for steps in (2, 6):
        without, with_ = peak(lambda s=steps: draw(s)), peak(lambda s=steps: captured(s))
        print(f"  peak memory, {steps} steps: {with_ - without:+.0f} MB (budget +20)")
    if options.other:
        sys.path.insert(0, str(options.other))
        from attention_map_diffusers import AttentionCapture

        def by_other(steps: int = 2) -> None:
            with AttentionCapture(plain, relations=["image->text"]) as capture:
                draw(steps)
            capture.compute()

        print("\nattention-map-diffusers, the same")
        print(f"  time {ratio(by_other, draw, options.repeats)}")
        for steps in (2, 6):
            without, with_ = peak(lambda s=steps: draw(s)), peak(lambda s=steps: by_other(s))
            print(f"  peak memory, {steps} steps: {with_ - without:+.0f} MB")

    print("\nlayers: time of a layered step against the bare U-Net call on as many samples")
    size = options.pixels // 8
    for layers in (1, 2, 4, 8):
        samples = 2 * (layers + 1)
        dtype = pipe.unet.dtype
        x = torch.zeros(samples, 4, size, size, dtype=dtype)
        text = torch.zeros(samples, 77, 768, dtype=dtype)

        def bare(x=x, text=text) -> None:
            with torch.no_grad():
                pipe.unet(x, 500, text)

        def layered(layers=layers) -> None:
            pipe(
                layout(layers),
                method=LayeredRendering(),
                num_inference_steps=1,
                layered_fraction=1.0,
                height=options.pixels,
                width=options.pixels,
                output_type="latent",
            )

        print(f"  {layers} layers: {ratio(layered, bare, options.repeats)}", flush=True)

    print(
        "\nsize: a layered step of 3 layers against a step of the plain pipeline (4 × the samples)"
    )
    for pixels in (128, 256, 512):
        step = lambda pixels=pixels: pipe(  # noqa: E731
            layout(3),
            method=LayeredRendering(),
            num_inference_steps=1,
            layered_fraction=1.0,
            height=pixels,
            width=pixels,
            output_type="latent",
        )
        plainly = lambda pixels=pixels: draw(1, pixels)  # noqa: E731
        print(f"  {pixels} px: {ratio(step, plainly, 1)}, peak {peak(step):.0f} MB", flush=True)

    print("\nsteps: the storybook model, 3 layers, against the plain pipeline with as many steps")
    small = load_pipeline("storybook", "cpu")
    simple = StableDiffusionPipeline.from_pipe(small)
    for one in (small, simple):
        one.set_progress_bar_config(disable=True)
    for steps in (10, 30, 100):
        render = lambda steps=steps: small(layout(3), num_inference_steps=steps)  # noqa: E731
        once = lambda steps=steps: simple(PROMPT, num_inference_steps=steps)  # noqa: E731
        print(
            f"  {steps} steps: {ratio(render, once, options.repeats)}, peak {peak(render):.0f} MB"
        )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
