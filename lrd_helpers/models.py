"""Loading the shipped models, or Stable Diffusion, onto the best device there is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lrd_helpers import hub
from lrd_helpers.layerdiff.pipeline import LayerDiffPipeline
from lrd_helpers.layerdiff.unet import LayeredUNet2DConditionModel
from lrd_helpers.messages import LONGEST, excerpt, sentence
from lrd_helpers.model_memory import (
    GIB,
    TILE,
    Plan,
    free_memory,
    needs_of,
    on_meta,
    plans,
)
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
    revision: str | None = None,
) -> LayeredRenderingPipeline | LayeredRenderingXLPipeline | LayerDiffPipeline:
    """The model as a layered pipeline, ready to draw: in eval mode, no safety checker.

    For a model that is not shipped, its configuration is read first: what cannot work, and what is
    too large, is refused before weights are fetched or read. Then it is put where it fits (see
    `lrd_helpers.model_memory`): wholly on the device; or with a decoder that works in tiles; or
    part by part; or layer by layer. One printed line says so. Methods that take gradients need more
    than is counted. A few-step model (Turbo, LCM) gets its own number of steps and guidance as
    defaults.

    Args:
        name_or_folder: "storybook" or "storybook-layers" (shipped), a folder of a Stable Diffusion
            pipeline (1.x, 2.x or XL) or of a `LayerDiffPipeline`, or a name on the Hugging Face
            hub such as "stable-diffusion-v1-5/stable-diffusion-v1-5" or
            "stabilityai/stable-diffusion-xl-base-1.0". Only safetensors weights are read.
        device: "cuda", "mps", "cpu", …; the best there is by default.
        dtype: of all weights; half precision on CUDA and single elsewhere by default.
        variant: of the weights' files, such as "fp16" for `….fp16.safetensors`; by default the
            only one that a folder has, and "fp16" from the hub for half precision.
        revision: the commit, tag or branch on the hub; by default the one in `hub.REVISIONS`, else
            the newest. The printed line says which commit it was.

    Raises:
        AssetError: missing, gated, incomplete or damaged, weights of another shape, no Stable
            Diffusion 1.x, 2.x or XL that draws from text alone, or too little memory.
        ValueError: a device that this machine does not have, or float16 on a CPU.
    """
    device = best_device() if device is None else _checked_device(device)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    if device.type == "cpu" and dtype == torch.float16:
        raise ValueError("a CPU is slow in float16; use float32, or bfloat16 to save memory")
    name = os.fspath(name_or_folder)
    if name in SHIPPED or Path(name).is_dir():
        folder = ASSETS / name if name in SHIPPED else Path(name)
        with _one_sentence(folder), no_progress_bars():
            return _from_folder(folder, device, dtype, variant, said=name not in SHIPPED)
    if re.fullmatch(HUB_NAME, name):
        with _one_sentence(name):
            return _from_hub(name, device, dtype, variant, revision or hub.REVISIONS.get(name))
    raise AssetError(
        f"there is no model {name!r}: give {' or '.join(map(repr, SHIPPED))}, a folder with a "
        "model_index.json, or a name on the Hugging Face hub such as "
        "'stable-diffusion-v1-5/stable-diffusion-v1-5'"
    )


def _from_folder(
    folder: Path, device: torch.device, dtype: torch.dtype, variant: str | None, said: bool
) -> LayeredRenderingMixin | LayerDiffPipeline:
    index = LayeredRenderingPipeline.load_config(str(folder))
    cls, options = _pipeline_of(index)
    shapes = None
    if said and cls is not LayerDiffPipeline:
        shapes = _shapes(cls, index, lambda part, file: folder / part / file)
    placing = shapes and _placed(shapes, device, dtype)
    for part in ("unet", "vae", *_text_encoders(index)):
        options[part] = _load_part(folder / part, index[part][1], variant)
    pipe = cls.from_pretrained(str(folder), **options)
    if placing is None:  # shipped, or layered: small
        return pipe.to(device, dtype)
    return _put(pipe.to(dtype=dtype), folder.name, shapes, placing, device)


def _from_hub(
    name: str, device: torch.device, dtype: torch.dtype, variant: str | None, revision: str | None
) -> LayeredRenderingMixin:
    index_file = hub.hub_file(name, "model_index.json", revision)
    commit = index_file.parent.name if revision is None else revision
    index = json.loads(index_file.read_text(encoding="utf-8"))
    cls, options = _pipeline_of(index)
    shapes = _shapes(cls, index, lambda part, file: hub.hub_file(name, f"{part}/{file}", commit))
    placing = _placed(shapes, device, dtype)
    files = hub.files_of(name, commit)
    if variant is None and dtype.itemsize == 2:
        models = ("unet", "vae", *_text_encoders(index))
        variant = _half_in(index_file.parent, files, models)
    pipe = cls.from_pretrained(
        name,
        revision=commit,
        use_safetensors=True,
        variant=variant,
        local_files_only=files is None,
        **options,
    )
    return _put(pipe.to(dtype=dtype), f"{name} at {commit[:7]}", shapes, placing, device)


def _half_in(snapshot: Path, files: list[str] | None, parts: tuple[str, ...]) -> str | None:
    """ "fp16" where all parts have such weights, which are half as large; else None."""
    there = [path.relative_to(snapshot).as_posix() for path in snapshot.glob("*/*.safetensors")]
    half = [file for file in files or there if file.endswith(".fp16.safetensors")]
    return "fp16" if all(any(f.startswith(f"{part}/") for f in half) for part in parts) else None


def load_clip(device: torch.device | str | None = None) -> tuple[CLIPModel, CLIPTokenizer]:
    """The shipped CLIP (in eval mode, single precision) and its tokenizer.

    Raises:
        AssetError: missing, incomplete or damaged, or weights of another shape.
    """
    device = best_device() if device is None else _checked_device(device)
    folder = ASSETS / "storybook-clip"
    with _one_sentence(folder), no_progress_bars():
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
            (at the commit in `hub.REVISIONS`). Only safetensors weights are read.
        kinds: what may be there: `model_type` of a config.json → the class of the model.
        device: as for `load_pipeline`.

    Raises:
        AssetError: missing, incomplete or damaged, or a model of another kind.
        ValueError: a device that this machine does not have.
    """
    device = best_device() if device is None else _checked_device(device)
    name = os.fspath(name_or_folder)
    source = Path(name) if Path(name).is_dir() or not re.fullmatch(HUB_NAME, name) else name
    at = {"revision": None if isinstance(source, Path) else hub.REVISIONS.get(name)}
    with _one_sentence(source), no_progress_bars():
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
    with _one_sentence(folder), no_progress_bars():
        return _load_weights(UNet2DModel, folder).to(device, torch.float32)


def load_style(device: torch.device | str | None = None) -> StyleConditioning:
    """The shipped style encoder (in eval mode, single precision) and its part of the U-Net.

    Raises:
        AssetError: missing, incomplete or damaged, or weights of another shape.
    """
    device = best_device() if device is None else _checked_device(device)
    folder = ASSETS / "storybook-style"
    with _one_sentence(folder), no_progress_bars():
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
    with _one_sentence(folder), no_progress_bars():
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


def _shapes(
    cls: type, index: Mapping[str, Any], file_of: Callable[[str, str], Path]
) -> SimpleNamespace:
    """A pipeline without weights, as its configuration says: models on the meta device.

    Raises:
        ValueError: a part without a configuration, or of a kind that is not supported.
    """
    shapes = type(cls.__name__, (SimpleNamespace,), {})()
    for part in ("scheduler", "unet", "vae", *_text_encoders(index)):
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        try:
            config = json.loads(file_of(part, file).read_text(encoding="utf-8"))
        except (FileNotFoundError, hub.EntryNotFoundError):
            raise ValueError(
                f"{part}/{file} is missing; copy the folder {part} from the model that this one "
                "was made from, or load it again"
            ) from None
        made = config if part == "scheduler" else on_meta(_class_named(index[part][1]), config)
        setattr(shapes, part, made)
    check_kind(shapes)
    return shapes


def _placed(shapes: SimpleNamespace, device: torch.device, dtype: torch.dtype) -> Plan:
    """Where a pipeline's parts will lie.

    Raises:
        ValueError: too little memory.
    """
    models = {name: part for name, part in vars(shapes).items() if name != "scheduler"}
    free = free_memory(device)
    possible = plans(needs_of(models, dtype), free, offload=device.type == "cuda")
    if fitting := [each for each in possible if each.least <= free]:
        return fitting[0]
    least = min(each.least for each in possible)
    remedy = "dtype=torch.bfloat16 takes half" if dtype.itemsize == 4 else "take a smaller model"
    raise ValueError(
        f"too little memory: on {device} it takes at least {least / GIB:.1f} GiB in "
        f"{str(dtype).removeprefix('torch.')}, and {free / GIB:.1f} GiB are free; {remedy}, or "
        "close other programs"
    )


def _put(
    pipe: LayeredRenderingMixin,
    name: str,
    shapes: SimpleNamespace,
    placing: Plan,
    device: torch.device,
) -> LayeredRenderingMixin:
    """The pipeline where it will work; says so."""
    said = [f"{name}: {device}, {str(pipe.unet.dtype).removeprefix('torch.')}"]
    if placing.offload == "no":
        pipe = pipe.to(device)
    elif placing.offload == "models":
        pipe.enable_model_cpu_offload(device=device)
        said.append("only the part that works lies there")
    else:
        pipe.enable_sequential_cpu_offload(device=device)
        said.append("only the layer that works lies there, which is slow")
    if placing.tiled:
        pipe.vae.enable_slicing()
        pipe.vae.enable_tiling()
        cells = TILE // pipe.vae_scale_factor  # XL's own tile would be the whole picture
        pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = TILE, cells
        said.append(f"decoded in tiles of {TILE} pixels")
    cells = pipe.unet.config.sample_size
    cells = cells**2 if isinstance(cells, int) else cells[0] * cells[1]
    if placing.rows * cells < pipe.cells_at_once:
        pipe.cells_at_once = placing.rows * cells
        said.append(f"{placing.rows} samples at once")
    if few := _few_steps(shapes):
        pipe.default_steps, pipe.default_guidance_scale = few
        said.append("{} steps and guidance {:g} by default".format(*few))
    if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes speaks for all
        print(", ".join(said))
    return pipe


def _few_steps(shapes: SimpleNamespace) -> tuple[int, float] | None:
    """Steps and guidance scale of a model that is distilled to few steps, else None."""
    scheduler = shapes.scheduler
    kind = scheduler.get("_class_name", "")
    if shapes.unet.config.time_cond_proj_dim is not None:  # LCM: γ is an input of the U-Net
        return 4, 8.5
    if kind in ("LCMScheduler", "TCDScheduler"):
        return 4, 1.0
    trailing = scheduler.get("timestep_spacing") == "trailing"
    if trailing and kind.startswith("Euler") and scheduler.get("prediction_type") == "epsilon":
        return 4, 1.0  # Turbo: guidance is off
    return None


def _load_part(folder: Path, kind: str, variant: str | None) -> nn.Module:
    """A model of a pipeline's folder, of the class that its model_index.json says."""
    return _load_weights(_class_named(kind), folder, variant or _variant_in(folder))


def _class_named(kind: str) -> type:
    """A model's class by its name in a model_index.json."""
    if kind == LayeredUNet2DConditionModel.__name__:
        return LayeredUNet2DConditionModel
    return getattr(diffusers, kind, None) or getattr(transformers, kind)


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
        what = isinstance(folder, str) and hub.explained(error, folder)
        what = what or _what_is_wrong(error, folder)
        begin, end = f"{folder} cannot be loaded: ", _remedy(folder)
        what = sentence(what, max(100, LONGEST - len(begin + end)))
        raise AssetError(f"{begin}{what}{end}") from error


def _what_is_wrong(error: Exception, folder: Path | str) -> str:
    if "ignore_mismatched_sizes" in str(error):
        return "the weights have another shape than config.json says"
    for path in folder.glob("*/*.safetensors") if isinstance(folder, Path) else ():
        with path.open("rb") as file:
            if file.read(11) == b"version htt":
                return (
                    f"{path.parent.name}/{path.name} is a pointer of Git LFS and no weights; run "
                    "`git lfs pull` there"
                )
    # The name of a missing part comes last, in a long text that names the folder again.
    if part := re.search(r"containing a (?:file named )?(\S+?\.json)", str(error)):
        return f"it has no {part[1]}"
    return str(error).replace(f"{folder}{os.sep}", "") or type(error).__name__


@contextmanager
def no_progress_bars() -> Iterator[None]:
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
