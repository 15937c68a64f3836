"""Loading the shipped models, or Stable Diffusion, onto the best device there is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrd_helpers.layerdiff.pipeline import LayerDiffPipeline
from lrd_helpers.layerdiff.unet import LayeredUNet2DConditionModel
from lrd_helpers.messages import excerpt
from lrd_helpers.pipeline import (
    LayeredRenderingMixin,
    LayeredRenderingPipeline,
    LayeredRenderingXLPipeline,
)
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.sampling.model import REFINER, check_kind
from lrd_helpers.style import StyleConditioning, StyleEncoder

with quiet_libraries():
    import diffusers
    import transformers
    from diffusers import DDIMScheduler, UNet2DModel
    from huggingface_hub import hf_hub_download
    from transformers import AutoProcessor, CLIPModel, CLIPTokenizer, PreTrainedConfig

__all__ = [
    "ASSETS",
    "AssetError",
    "best_device",
    "load_clip",
    "load_judge",
    "load_pipeline",
    "load_segmenter",
    "load_style",
    "load_upsampler",
]

ASSETS = Path(__file__).parent / "assets"
"""Where the shipped models lie, a folder each."""

SHIPPED = ("storybook", "storybook-layers")
"""The pipelines among them."""

REVISIONS = {
    "IDEA-Research/grounding-dino-tiny": "a2bb814dd30d776dcf7e30523b00659f4f141c71",
    "facebook/sam-vit-base": "70c1a07f894ebb5b307fd9eaaee97b9dfc16068f",
    "google/owlv2-base-patch16-ensemble": "cfd3195ba4ea9592eec887ded089f4c08eff231d",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    "stabilityai/stable-diffusion-xl-base-1.0": "462165984030d82259a11f4367a4eed129e94a7b",
}
"""The commit on the Hugging Face hub that a model is taken from: so pictures stay the same."""

HUB_NAME = r"\w[\w.-]*/[\w.-]+"
"""A name on the Hugging Face hub: an owner's, and a model's."""

TRAINED_BY = {
    "storybook": "latent_diffusion",
    "storybook-clip": "clip",
    "storybook-layers": "layerdiff",
    "storybook-segmenter": "segmenter",
    "storybook-style": "style",
    "storybook-upsampler": "upsampler",
}
"""The module of `lrd_helpers.training` that makes each shipped model."""


class AssetError(RuntimeError):
    """A model that cannot be loaded: one sentence with its folder and what to do."""


def load_pipeline(
    name_or_folder: str | os.PathLike[str] = "storybook",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> LayeredRenderingPipeline | LayeredRenderingXLPipeline | LayerDiffPipeline:
    """The model as a layered pipeline, ready to draw: in eval mode, no safety checker.

    Args:
        name_or_folder: "storybook" or "storybook-layers" (shipped), a folder of a Stable Diffusion
            pipeline (1.x, 2.x or XL) or of a `LayerDiffPipeline`, or a name on the Hugging Face
            hub such as "stable-diffusion-v1-5/stable-diffusion-v1-5" or
            "stabilityai/stable-diffusion-xl-base-1.0" (at the commit in `REVISIONS`). Only
            safetensors weights are read.
        device: "cuda", "mps", "cpu", …; the best there is by default.
        dtype: of all weights; half precision on CUDA and single elsewhere by default.
        variant: of the weights' files, such as "fp16" for `….fp16.safetensors`; in a folder by
            default the one that it has, if it has no plain ones.

    Raises:
        AssetError: missing, incomplete or damaged, weights of another shape, or no Stable
            Diffusion 1.x, 2.x or XL that draws from text alone.
        ValueError: a device that this machine does not have.
    """
    device = best_device() if device is None else _checked_device(device)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    name = os.fspath(name_or_folder)
    if name in SHIPPED or Path(name).is_dir():
        folder = ASSETS / name if name in SHIPPED else Path(name)
        with _one_sentence(folder), _no_progress_bars():
            index = LayeredRenderingPipeline.load_config(str(folder))
            cls, options = _pipeline_of(index)
            for part in ("unet", "vae", *_text_encoders(index)):
                options[part] = _load_part(folder / part, index[part][1], variant)
            pipe = cls.from_pretrained(str(folder), **options)
            if cls is not LayerDiffPipeline:
                check_kind(pipe)
    elif re.fullmatch(HUB_NAME, name):
        revision = REVISIONS.get(name)
        with _one_sentence(name):
            # Before gigabytes are fetched.
            index = hf_hub_download(name, "model_index.json", revision=revision)
            cls, options = _pipeline_of(json.loads(Path(index).read_text(encoding="utf-8")))
            pipe = cls.from_pretrained(
                name, revision=revision, use_safetensors=True, variant=variant, **options
            )
            check_kind(pipe)
    else:
        raise AssetError(
            f"there is no model {name!r}: give {' or '.join(map(repr, SHIPPED))}, a folder with a "
            "model_index.json, or a name on the Hugging Face hub such as "
            "'stable-diffusion-v1-5/stable-diffusion-v1-5'"
        )
    with quiet_libraries():
        return pipe.to(device, dtype)


def load_clip(device: torch.device | str | None = None) -> tuple[CLIPModel, CLIPTokenizer]:
    """The shipped CLIP (in eval mode, single precision) and its tokenizer.

    Raises:
        AssetError: missing, incomplete or damaged, or weights of another shape.
    """
    device = best_device() if device is None else _checked_device(device)
    folder = ASSETS / "storybook-clip"
    with _one_sentence(folder), _no_progress_bars():
        tokenizer = CLIPTokenizer.from_pretrained(str(folder))
        return _load_weights(CLIPModel, folder).to(device, torch.float32), tokenizer


def load_judge(
    name_or_folder: str | os.PathLike[str],
    kinds: Mapping[str, str],
    device: torch.device | str | None = None,
) -> tuple[nn.Module, Any]:
    """A model of transformers that judges pictures (in eval mode, single precision), its processor.

    Args:
        name_or_folder: a folder with the model and its processor, or a name on the Hugging Face hub
            (at the commit in `REVISIONS`). Only safetensors weights are read.
        kinds: what may be there: `model_type` of a config.json → the class of the model.
        device: as for `load_pipeline`.

    Raises:
        AssetError: missing, incomplete or damaged, or a model of another kind.
        ValueError: a device that this machine does not have.
    """
    device = best_device() if device is None else _checked_device(device)
    name = os.fspath(name_or_folder)
    source = Path(name) if Path(name).is_dir() or not re.fullmatch(HUB_NAME, name) else name
    at = {"revision": None if isinstance(source, Path) else REVISIONS.get(name)}
    with _one_sentence(source), _no_progress_bars():
        wanted = f"a model of transformers of the kind {' or '.join(kinds)} would work"
        if isinstance(source, Path) and not (source / "config.json").is_file():
            raise ValueError(f"it holds a pipeline; {wanted}")
        kind = PreTrainedConfig.get_config_dict(name, **at)[0].get("model_type")
        if kind not in kinds:
            raise ValueError(f"its config.json is of the kind {excerpt(kind)}; {wanted}")
        model = _load_weights(getattr(transformers, kinds[kind]), source, **at)
        return model.to(device, torch.float32), AutoProcessor.from_pretrained(name, **at)


def load_segmenter(device: torch.device | str | None = None) -> UNet2DModel:
    """The shipped segmenter (in eval mode, single precision).

    Raises:
        AssetError: missing, incomplete or damaged, or weights of another shape.
    """
    device = best_device() if device is None else _checked_device(device)
    folder = ASSETS / "storybook-segmenter"
    with _one_sentence(folder), _no_progress_bars():
        return _load_weights(UNet2DModel, folder).to(device, torch.float32)


def load_style(device: torch.device | str | None = None) -> StyleConditioning:
    """The shipped style encoder (in eval mode, single precision) and its part of the U-Net.

    Raises:
        AssetError: missing, incomplete or damaged, or weights of another shape.
    """
    device = best_device() if device is None else _checked_device(device)
    folder = ASSETS / "storybook-style"
    with _one_sentence(folder), _no_progress_bars():
        encoder = _load_weights(StyleEncoder, folder).to(device, torch.float32)
        return StyleConditioning.from_pretrained(folder, encoder)


def load_upsampler(
    device: torch.device | str | None = None,
) -> tuple[UNet2DModel, DDIMScheduler]:
    """The shipped upsampler for `upsampling.upsample`: U-Net (eval, single precision), scheduler.

    It belongs to the autoencoder of `load_pipeline("storybook")`.

    Raises:
        AssetError: missing, incomplete or damaged, or weights of another shape.
    """
    device = best_device() if device is None else _checked_device(device)
    folder = ASSETS / "storybook-upsampler"
    with _one_sentence(folder), _no_progress_bars():
        scheduler = DDIMScheduler.from_pretrained(str(folder / "scheduler"))
        return _load_weights(UNet2DModel, folder).to(device, torch.float32), scheduler


def best_device() -> torch.device:
    """CUDA where there is one, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(
            f"there is no device {str(device)!r} on this machine; {str(best_device())!r} would work"
        ) from None
    return device


def _pipeline_of(
    index: dict[str, Any],
) -> tuple[type[LayeredRenderingMixin] | type[LayerDiffPipeline], dict[str, Any]]:
    """The class for what a model_index.json describes, and its options.

    Raises:
        ValueError: it is of another family.
    """
    if index.get("requires_aesthetics_score"):
        raise ValueError(REFINER)
    if "unet" not in index:
        raise ValueError(
            f"{index.get('_class_name')} is of another family; Stable Diffusion 1.x, 2.x or XL "
            "would work"
        )
    parts = ("unet", "vae", "scheduler", "tokenizer", *_text_encoders(index))
    if absent := [part for part in parts if (index.get(part) or [None])[0] is None]:
        raise ValueError(f"model_index.json names no {', '.join(absent)}")
    if index.get("_class_name") == LayerDiffPipeline.__name__:
        return LayerDiffPipeline, {}
    if "text_encoder_2" in index:
        return LayeredRenderingXLPipeline, {}
    return LayeredRenderingPipeline, {"safety_checker": None, "requires_safety_checker": False}


def _text_encoders(index: dict[str, Any]) -> list[str]:
    return ["text_encoder", *(part for part in index if part == "text_encoder_2")]


def _load_part(folder: Path, kind: str, variant: str | None) -> nn.Module:
    """A model of a pipeline's folder, of the class that its model_index.json says."""
    ours = {LayeredUNet2DConditionModel.__name__: LayeredUNet2DConditionModel}
    cls = ours.get(kind) or getattr(diffusers, kind, None) or getattr(transformers, kind)
    return _load_weights(cls, folder, variant or _variant_in(folder))


def _variant_in(folder: Path) -> str | None:
    """The only variant of weights in a folder that has no plain ones, such as "fp16"."""
    names = [path.name.removesuffix(".safetensors") for path in folder.glob("*.safetensors")]
    # model.fp16.safetensors, or in parts model.fp16-00001-of-00002.safetensors
    variants = {re.sub(r"-\d+-of-\d+$", "", name).partition(".")[2] for name in names}
    return variants.pop() if len(variants) == 1 and "" not in variants else None


def _load_weights(
    cls: Any, folder: Path | str, variant: str | None = None, revision: str | None = None
) -> nn.Module:
    """`cls.from_pretrained(folder)`, but a weight that is missing or not finite is an error.

    Both libraries leave a missing one at random and log a line, and draw black with the other.
    """
    model, info = cls.from_pretrained(
        str(folder),
        use_safetensors=True,
        variant=variant,
        revision=revision,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise AssetError(
            f"{folder}: the weights are not complete, {len(missing)} missing ({missing[0]}, …)"
            f"{_remedy(folder)}"
        )
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise AssetError(f"{folder}: {name} is not finite (NaN or infinite){_remedy(folder)}")
    return model.eval()


def _remedy(folder: Path | str) -> str:
    if not isinstance(folder, Path) or ASSETS not in [folder, *folder.parents]:
        return ""
    asset = folder.relative_to(ASSETS).parts[0]
    return (
        "; clone the repository again, or train the model with "
        f"`python -m lrd_helpers.training.{TRAINED_BY[asset]}`"
    )


@contextmanager
def _one_sentence(folder: Path | str) -> Iterator[None]:
    """Turn whatever the libraries raise while they load `folder` into an `AssetError`."""
    if isinstance(folder, Path) and not (
        (folder / "model_index.json").is_file() or (folder / "config.json").is_file()
    ):
        what = "holds no model_index.json or config.json" if folder.is_dir() else "is missing"
        raise AssetError(f"the model folder {folder} {what}{_remedy(folder)}")
    try:
        with quiet_libraries():
            yield
    except AssetError:
        raise
    except Exception as error:
        if "ignore_mismatched_sizes" in str(error):
            what = "the weights have another shape than config.json says"
        else:
            what = " ".join(str(error).split()) or type(error).__name__
        raise AssetError(f"{folder} cannot be loaded: {what}{_remedy(folder)}") from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """No bars for what takes a blink (a download from the hub keeps its own)."""
    libraries = [diffusers.utils.logging, transformers.utils.logging]
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
