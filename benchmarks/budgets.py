"""Time against the budgets: medians of ratios within one run, since machines are noisy."""

import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.methods import LayeredRendering, Method
from lrd_helpers.models import load_pipeline
from lrd_helpers.sampling.memory import Memory
from lrd_helpers.widgets.layout_studio import QUICK_STEPS, Settings, render

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
ALGORITHM_1 = LayeredRendering(layered_fraction=LAYERED / STEPS)


def seconds(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def bare_forwards(pipe) -> None:
    """Just the U-Net calls that Algorithm 1 needs: 4 regions guided, then the caption guided.

    On noise, as there: zeros are computed faster.
    """
    tokens = pipe.tokenizer.model_max_length
    # With ξ each region asks its own unconditional question: 4 + 4 samples.
    for batch in [8] * LAYERED + [2] * (STEPS - LAYERED):
        pipe.unet(
            torch.randn(batch, 4, 16, 16),
            500,
            torch.randn(batch, tokens, pipe.unet.config.cross_attention_dim),
        )


def dragging(pipe) -> None:
    """A box is dragged in the studio, picture after picture; then the full picture."""
    memory, places = Memory(), iter(range(1000))

    def dragged(steps: int, **options) -> None:
        left = 0.05 + 0.005 * (next(places) % 80)
        car = replace(LAYOUT.layers[0], box=(left, 0.55, left + 0.4, 0.90))
        layout = replace(LAYOUT, layers=[car, *LAYOUT.layers[1:]])
        render(layout, pipe, Settings(steps=steps), memory=memory, **options)

    def plain() -> None:
        render(LAYOUT, pipe, Settings(method="plain"), attention=False)

    dragged(25)
    for what, budget, steps, options in (
        (f"dragging one of three boxes, {QUICK_STEPS[0]} steps", 0.25, QUICK_STEPS[0], False),
        (f"the same, {QUICK_STEPS[1]} steps", 0.25, QUICK_STEPS[1], False),
        ("letting it go, 25 steps and the words' maps", 0.5, 25, True),
    ):
        ratios = [
            seconds(lambda s=steps, o=options: dragged(s, attention=o)) / seconds(plain)
            for _ in range(7)
        ]
        print(
            f"{what}, picture after picture, over a plain picture of 25 steps: "
            f"{statistics.median(ratios):.2f}× (budget {budget:.2f})"
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

    def picture(
        method: str | Method = ALGORITHM_1, steps: int = STEPS, output_type: str = "pil"
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": steps, "output_type": output_type}
        pipe(LAYOUT, method=method, generator=generator, **options)

    def latents() -> None:
        picture(output_type="latent")

    latents()
    bare_forwards(pipe)
    ratios = [seconds(latents) / seconds(lambda: bare_forwards(pipe)) for _ in range(9)]
    print(
        f"layered rendering, 3 layers, {STEPS} steps, to the latents, against its bare U-Net "
        f"calls: {statistics.median(ratios):.2f}× (budget 1.03)"
    )
    whole = statistics.median(seconds(picture) for _ in range(5))
    print(f"a re-render ({STEPS} steps, 3 layers): {whole:.2f} s (budget 3)")
    for method, budget in {"collage": 1.8, "lrdiff": 2.2}.items():
        ratios = [
            seconds(lambda name=method: picture(name, 25)) / seconds(lambda: picture("plain", 25))
            for _ in range(5)
        ]
        print(
            f"{method}, 3 layers, 25 steps, over the plain caption: "
            f"{statistics.median(ratios):.2f}× (budget {budget:.2f})"
        )
    dragging(pipe)


if __name__ == "__main__":
    main()
