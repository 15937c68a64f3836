"""Stable Diffusion 1.5, 2.1 and XL in their published shapes: narrow here, whole in benchmarks/."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch

from lrd_helpers.layout import Layer, Layout

FAMILIES = ("sd-1.5", "sd-2.1", "sdxl")
SCHEDULERS = (
    "PNDMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
WHOLE = Layout("a red car", layers=[Layer("a red car", (0, 0, 1, 1))])


@pytest.fixture(scope="module")
def full_size() -> Iterator[ModuleType]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    try:
        import full_size
    finally:
        sys.path.pop(0)
    return full_size


@pytest.fixture(scope="module")
def narrow(full_size) -> dict[str, tuple[Any, Any]]:
    """Pipelines an eighth as wide, by family; made once."""
    torch.manual_seed(0)
    return {family: full_size.pipelines(family, narrow=8) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_shapes_have_as_many_parameters_as_was_published(full_size, family) -> None:
    for name, config in full_size.PUBLISHED[family].items():
        if isinstance(config, dict) and "parameters" in config:
            with torch.device("meta"):
                model = full_size.part(family, name)
            assert sum(weights.numel() for weights in model.parameters()) == config["parameters"]


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_over_the_canvas_is_diffusers_own(
    narrow, family, scheduler, guidance_scale
) -> None:
    """Bit for bit, by what the family's own model predicts: v in 2.1."""
    layered, plain = narrow[family]
    for pipe in (layered, plain):
        config = pipe.scheduler.config
        pipe.scheduler = getattr(diffusers, scheduler).from_config(config, skip_prk_steps=True)
    assert (plain.scheduler.config.prediction_type == "v_prediction") == (family == "sd-2.1")
    options = {"num_inference_steps": 2, "guidance_scale": guidance_scale, "output_type": "latent"}
    options |= {"height": 64, "width": 64}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = plain("a red car", latents=noise, **options).images
    assert torch.equal(layered(WHOLE, latents=noise, **options).images, wanted)


def test_the_script_at_an_eighth_of_the_width(full_size, capsys) -> None:
    arguments = ["--narrow", "8", "--pixels", "64", "--layers", "1", "2", "--repeats", "1"]
    arguments += ["--pictures", "plain", "--steps", "2", "--device", "cpu"]
    full_size.main(arguments)
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert [row[:2] for row in rows[2:5]] == [["1", "4"], ["2", "6"], ["plain", "2"]]
    assert all(float(row[2]) > 0 and float(row[4]) >= 0 for row in rows[2:5])
    assert all(float(row[3]) > 0 for row in rows[2:4])
    assert rows[-1][0] == "plain"
    assert float(rows[-1][1]) > 0
    full_size.main([*arguments, "--minutes", "0"])
    assert capsys.readouterr().out.count("no time was left") == 3
