"""How much memory a model of Stable Diffusion takes, computed from its configuration alone.

A module on torch's "meta" device has shapes and no numbers. So its parameters can be counted, and
it can be run: what is counted then is every tensor that is alive at once. Attention counts as the
fused kernels have it: its matrix of weights is never held. Kernels' workspaces and the allocator's
gaps come on top; `MARGIN` stands for them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrd_helpers.quiet import quiet_libraries

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

__all__ = [
    "GIB",
    "Needs",
    "Plan",
    "free_memory",
    "needs_of",
    "on_meta",
    "one_sample",
    "peak",
    "plans",
]

GIB = 2**30

MARGIN = GIB
"""For kernels' workspaces and gaps between tensors, in bytes."""

TILE = 512
"""Pixels of a tile's side where a decoder works in tiles."""

LEAST_ROWS = 2
"""Samples that must go through the U-Net at once: with a prompt and without."""


def on_meta(cls: type, config: Mapping[str, Any]) -> nn.Module:
    """A model of diffusers or transformers of this configuration: shapes, and no numbers."""
    with quiet_libraries(), torch.device("meta"):
        if hasattr(cls, "config_class"):  # transformers
            return cls(cls.config_class.from_dict(dict(config))).eval()
        return cls.from_config(dict(config)).eval()


@torch.no_grad()
def peak(call: Callable[[], Any]) -> int:
    """The most bytes of tensors made by a call on the meta device that are alive at once."""
    with _Fused(), _Alive() as alive:
        call()
    return alive.most


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that are made, and of those that are freed again."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # views of weights, too
        for storage in _storages(result):
            if storage._cdata not in given:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _Fused(TorchFunctionMode):
    """Attention whose answer is made without its matrix of weights, as on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Needs:
    """What a pipeline takes, in bytes.

    Attributes:
        weights: of each part, such as "unet".
        row: for one sample through the U-Net.
        decoding: for one picture through the decoder.
        tile: for one picture through the decoder in tiles of `TILE` pixels.
    """

    weights: Mapping[str, int]
    row: int
    decoding: int
    tile: int


def needs_of(
    parts: Mapping[str, nn.Module], dtype: torch.dtype, size: tuple[int, int] | None = None
) -> Needs:
    """What parts on the meta device take in a precision.

    Args:
        parts: "unet", "vae", and text encoders.
        dtype: of all parts; XL's decoder, which overflows in float16, is counted in float32, as it
            works.
        size: height and width of the latents; those that the U-Net was trained for by default.
    """
    unet, vae = parts["unet"], parts["vae"]
    size = size or _size(unet)
    # Other pipelines' autoencoders have the option, too, but work in half precision.
    xl = unet.config.addition_embed_type == "text_time"
    upcast = xl and dtype == torch.float16 and vae.config.get("force_upcast")
    dtypes = dict.fromkeys(parts, dtype) | {"vae": torch.float32 if upcast else dtype}
    cell = 2 ** (len(vae.config.block_out_channels) - 1)
    tile = tuple(min(side, TILE // cell) for side in size)
    return Needs(
        {name: _weights(part, dtypes[name]) for name, part in parts.items()},
        peak(one_sample(unet, size, dtype)),
        _decoding(vae, size, dtypes["vae"]),
        # Beside a tile, all tiles' pixels are held, and then the picture.
        _decoding(vae, tile, dtypes["vae"]) + 2 * 3 * size[0] * size[1] * cell**2 * 4,
    )


def _weights(part: nn.Module, dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(parameter.numel() for parameter in part.parameters())


def one_sample(
    unet: UNet2DConditionModel,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], Any]:
    """The call of a U-Net on the meta device with one sample and its text.

    Args:
        unet: of Stable Diffusion 1.x, 2.x or XL, or an LCM's; it is cast to `dtype`.
        size: height and width of the latents; those that it was trained for by default.
        dtype: of all that it gets.
    """
    config, row = unet.config, {"device": "meta", "dtype": dtype}
    width = config.cross_attention_dim
    more: dict[str, Any] = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        more["added_cond_kwargs"] = {
            "text_embeds": torch.empty(1, pooled, **row),
            "time_ids": torch.empty(1, 6, **row),
        }
    if config.time_cond_proj_dim:
        more["timestep_cond"] = torch.empty(1, config.time_cond_proj_dim, **row)
    latents = torch.empty(1, config.in_channels, *(size or _size(unet)), **row)
    text = torch.empty(1, 77, width if isinstance(width, int) else width[0], **row)
    with quiet_libraries():
        unet.to(dtype)
    return lambda: unet(latents, torch.empty((), device="meta"), text, **more)


def _size(unet: UNet2DConditionModel) -> tuple[int, int]:
    side = unet.config.sample_size
    return (side, side) if isinstance(side, int) else tuple(side)


def _decoding(vae: AutoencoderKL, size: tuple[int, int], dtype: torch.dtype) -> int:
    with quiet_libraries():
        vae = vae.to(dtype)
    latents = torch.empty(1, vae.config.latent_channels, *size, device="meta", dtype=dtype)
    return peak(lambda: vae.decode(latents))


@dataclass(frozen=True)
class Plan:
    """Where a pipeline's parts lie, and how it works.

    Attributes:
        offload: "no": all parts lie on the device; "models": only the one that works does;
            "layers": only the layer that works does, which is slow.
        tiled: the decoder takes one picture at a time, in tiles.
        least: bytes that must be free for it.
        rows: samples that fit through the U-Net at once; may be larger than a method sends.
    """

    offload: str
    tiled: bool
    least: int
    rows: int


def plans(needs: Needs, free: int, *, offload: bool = True) -> list[Plan]:
    """All there are, the quickest first; those with `least` above `free` do not fit.

    Args:
        needs: see `needs_of`.
        free: bytes of the device.
        offload: whether parts can lie elsewhere. On a CPU there is no elsewhere.
    """
    weights = needs.weights
    everything, largest = sum(weights.values()), max(weights.values())
    # What lies on the device: always, while the U-Net works, while the decoder works.
    held = [("no", False, everything, everything, everything), ("no", True) + (everything,) * 3]
    if offload:
        held += [("models", True, largest, weights["unet"], weights["vae"])]
        held += [("layers", True, 0, 0, 0)]  # a layer is little
    found = []
    for name, tiled, least, drawing, decoding in held:
        decoding += needs.tile if tiled else needs.decoding
        least = MARGIN + max(least, drawing + LEAST_ROWS * needs.row, decoding)
        found.append(Plan(name, tiled, least, max(0, free - MARGIN - drawing) // needs.row))
    return found


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available  # of Apple's GPU, too: they share it
