"""Time against the budgets: medians of ratios within one run, since machines are noisy."""

import statistics
import subprocess
import sys
import time

import torch

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.models import load_pipeline

LAYOUT = Layout(
    caption="a red car and a yellow star and a blue boat at night",
    background="at night",
    layers=[
        Layer("a red car", box=(0.05, 0.55, 0.45, 0.90)),
        Layer("a yellow star", box=(0.55, 0.05, 0.95, 0.45)),
        Layer("a blue boat", box=(0.55, 0.55, 0.95, 0.95)),
    ],
)
STEPS, LAYERED = 20, 12


def seconds(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def bare_forwards(pipe) -> None:
    """Just the U-Net calls that the layout needs.

    That is 4 regions guided, once more the 3 layers without their objects, the caption guided.
    """
    tokens = pipe.tokenizer.model_max_length
    # Three layers ask their own unconditional question, the background one: 4 + 4 samples.
    for batch in [8] * LAYERED + [6] + [2] * (STEPS - LAYERED):
        pipe.unet(
            torch.zeros(batch, 4, 16, 16),
            500,
            torch.zeros(batch, tokens, pipe.unet.config.cross_attention_dim),
        )


@torch.no_grad()
def main() -> None:
    started = (
        "import time; t = time.perf_counter(); import lrd_helpers; print(time.perf_counter() - t)"
    )
    imports = [
        float(
            subprocess.run(
                [sys.executable, "-c", started], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(5)
    ]
    print(f"import lrd_helpers: {statistics.median(imports):.3f} s (budget 0.3)")

    pipe = load_pipeline("storybook", "cpu")
    pipe.set_progress_bar_config(disable=True)

    def picture() -> None:
        pipe(LAYOUT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))

    picture()
    bare_forwards(pipe)
    pairs = [(seconds(picture), seconds(lambda: bare_forwards(pipe))) for _ in range(9)]
    ratio = statistics.median(whole / bare for whole, bare in pairs)
    print(
        f"layered rendering, 3 layers, {STEPS} steps, against its bare U-Net calls: "
        f"{ratio:.2f}× (budget 1.10)"
    )
    print(
        f"a re-render ({STEPS} steps, 3 layers): "
        f"{statistics.median(whole for whole, _ in pairs):.2f} s (budget 3)"
    )


if __name__ == "__main__":
    main()
