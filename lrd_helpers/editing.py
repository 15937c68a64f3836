"""Editing a picture: insert, replace, remove or move an object, fill a hole, keep the rest.

LRDiff shows edits, but not how they are made. Here is the natural way. DDIM inversion gives the
picture's own latents at every noise level. A hole is drawn anew; a new object is a sketch, pasted
onto the picture and finished by the last steps; and after each step everything else is put back to
the picture's own latents (blended latent diffusion: Avrahami, Fried, Lischinski 2023, Algorithm 1).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.mask import Box, Mask, tight_box
from lrd_helpers.measure import Detector
from lrd_helpers.methods import Choices, Method, check_opacity, named
from lrd_helpers.methods.placement import REFERENCE_PIXELS, moved, scaled
from lrd_helpers.methods.plain import caption_step
from lrd_helpers.methods.regions import phases, times_wider
from lrd_helpers.pictures import picture_of, pixels_of
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.sampling.model import model_of
from lrd_helpers.sampling.regions import Region, Regions, batched
from lrd_helpers.sampling.run import Run
from lrd_helpers.sampling.steps import Steps, ddim_like, derived

with quiet_libraries():
    from diffusers import DDIMInverseScheduler

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionPipeline

DIFFERENT = 0.15
"""A pixel belongs to an object if removing that changed a channel by more than this, of 1."""

SEAM = 2
"""Half of the pixels (of 128; no fewer of less) over which the new picture fades into the old one,
where it may change."""

LEAST = 16.0
"""Fewer pixels (of 128 × 128) are no object."""

SMOOTHINGS = 60
"""How often the colours that fill a hole are averaged with their neighbours."""


class EditError(ValueError):
    """What is asked for cannot be done with this picture."""


@dataclass(frozen=True, eq=False)
class Inversion:
    """A picture, and the latents that DDIM draws it from.

    Attributes:
        image: the picture, of the size the model draws.
        latents: x_0 … x_T, steps + 1 noise levels, the picture itself first.
        prompt: what the U-Net was told the picture shows.
    """

    image: Image.Image
    latents: Float[Tensor, "levels channels height width"]
    prompt: str


@dataclass(frozen=True, eq=False)
class Edited:
    """An edited picture.

    Attributes:
        image: the new picture.
        before: the old one, of the same size.
        changed: the pixels that were allowed to change.
    """

    image: Image.Image
    before: Image.Image
    changed: Bool[Tensor, "height width"]

    @property
    def kept(self) -> float:
        """PSNR in dB between old and new where nothing was to change; inf if nothing did."""
        outside = ~self.changed
        if not outside.any():
            return math.nan
        error = (pixels_of(self.image) - pixels_of(self.before)).square()[:, outside].mean()
        return float(-10 * error.log10())


# ------------------------------------------------------------------ there and back


@torch.no_grad()
def invert(
    pipe: StableDiffusionPipeline,
    image: Image.Image,
    prompt: str = "",
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
) -> Inversion:
    """DDIM backwards: the noise that DDIM would draw `image` from (Song et al. 2021, Eq. 14).

        x_{t+1} = √ᾱ_{t+1}·x̂_0 + √(1−ᾱ_{t+1})·ε_θ(x_t),  x̂_0 = (x_t − √(1−ᾱ_t)·ε_θ(x_t)) / √ᾱ_t

    Each step takes ε_θ at x_t for that at x_{t+1}, which is not yet known. The errors add up, the
    more the fewer steps there are, and far more with guidance.

    Args:
        pipe: any pipeline of Stable Diffusion 1.x, 2.x or XL; its scheduler may be another one and
            stays as it is.
        image: resized to the model's size where it has another one, with a warning.
        prompt: what the picture shows.
        num_inference_steps: T.
        guidance_scale: γ; 1 for no guidance.

    Raises:
        EditError: a picture of another shape than the model's.
    """
    image = fitted(pipe, image)
    return Inversion(
        image, _levels(pipe, image, prompt, num_inference_steps, guidance_scale), prompt
    )


@torch.no_grad()
def redraw(
    pipe: StableDiffusionPipeline,
    inversion: Inversion,
    prompt: str | None = None,
    *,
    changing: Bool[Tensor, "height width"] | None = None,
    noise: Float[Tensor, "channels height width"] | None = None,
    negative_prompt: str = "",
    share: float = 1.0,
    guidance_scale: float = 1.0,
) -> Image.Image:
    """DDIM forwards again, from the inverted latents.

    Args:
        inversion: where to begin, and what to keep.
        prompt: what the picture should show; by default what it was inverted with.
        changing: the cells of the latents that may change; all by default. After each step the
            others are put back to the inversion's.
        noise: begin with this instead of x_T where the picture may change.
        negative_prompt: what it should not show.
        share: which part of the steps, in (0, 1]; the last ones.
        guidance_scale: γ.

    Raises:
        ValueError: an invalid share.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, but should be above 0, at most 1")
    levels = inversion.latents.flip(0)  # x_T … x_0
    steps = len(levels) - 1
    first = steps - max(1, round(share * steps))
    everywhere = torch.ones(levels.shape[-2:], dtype=torch.bool, device=levels.device)
    changing = everywhere if changing is None else changing.to(levels.device)
    x = levels[first : first + 1]
    if noise is not None:
        x = torch.where(changing, noise.to(x), x)
    prompt = inversion.prompt if prompt is None else prompt
    scheduler = ddim_like(pipe.scheduler)
    run, regions = _asking(pipe, x, scheduler, steps, prompt, negative_prompt, guidance_scale)
    with run.model.drawing():
        for i, t in enumerate(pipe.progress_bar(run.steps.timesteps[first:]), start=first):
            x = caption_step(run, regions, i, t, x).x
            x = torch.where(changing, x, levels[i + 1])
    return _decoded(pipe, x)


# ------------------------------------------------------------------ edits


def find(detector: Detector, image: Image.Image, prompt: str) -> Mask:
    """Where the thing that `prompt` names is in the picture: its pixels, or its box.

    Raises:
        EditError: it is not there.
    """
    (things,) = detector(image, [prompt])
    if not things:
        raise EditError(f"{prompt!r} was not found in the picture; draw a box around it instead")
    best = max(things, key=lambda thing: thing.score)
    if best.mask is not None:
        return Mask.of(best.mask)
    return Mask.of(Layer(prompt, best.box).cells(image.height, image.width))


def insert(
    pipe: StableDiffusionPipeline,
    image: Image.Image,
    layer: Layer,
    *,
    background: str,
    **options: Any,
) -> Edited:
    """Draw an object into its box or mask; everything outside of it stays.

    Args:
        pipe: draws it, and stays as it is.
        image: as for `invert`.
        layer: what, and where.
        background: what the place shows, "on grass".
        options: as for `replace_object`.
    """
    return replace_object(pipe, image, None, layer, background=background, **options)


@torch.inference_mode(False)  # no method could take a gradient there
@torch.no_grad()
def replace_object(
    pipe: StableDiffusionPipeline,
    image: Image.Image,
    old: Box | Mask | None,
    layer: Layer,
    *,
    background: str,
    method: str | Method = "collage",
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    generator: torch.Generator | None = None,
    keep_pixels: bool = True,
) -> Edited:
    """Draw an object in the place of another one; everything outside of the two stays.

    The old one is removed first. With a collage, as by default, a sketch of the new one is then
    pasted into the picture, which is noised and denoised where it may change.

    Args:
        pipe: draws it, and stays as it is.
        image: as for `invert`.
        old: where the old object is, such as `find` gives; None: nothing is removed first.
        layer: the new one, and where; with an opacity the picture shines through it, if the method
            is translucent, such as the collage.
        background: what the place shows, "on grass".
        method: any of `METHODS`; see `LayeredRenderingPipeline`.
        num_inference_steps: T.
        guidance_scale: γ; the inversion goes without guidance.
        generator: where the noise of the new object comes from.
        keep_pixels: put the old pixels back outside, so that the autoencoder's loss does not show.

    Raises:
        EditError: a picture of another shape than the model's.
        ValueError: what the method refuses.
    """
    method = named(method)
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    image, removed = fitted(pipe, image), None
    layout = Layout(f"{layer.prompt} {background}".strip(), background=background, layers=[layer])
    steps = Steps(
        ddim_like(pipe.scheduler),
        num_inference_steps,
        device=pipe._execution_device,
        generator=generator,
    )
    size = image.height, image.width
    run = Run.begin(pipe, [layout], size, steps, guidance_scale=float(guidance_scale))
    check_opacity(run, method)
    method.check(run)  # before anything is drawn
    if old is not None:
        # With the old pixels put back: through the autoencoder the picture goes only once.
        removed = remove(pipe, image, old, background=background, generator=generator, **options)
        image = removed.image
    phase = phases(run, method) if isinstance(method, Choices) else None
    # While a layer draws alone, anywhere, there is nothing yet to be kept.
    alone = phase.alone if phase else 0
    levels = _levels(pipe, image, background, num_inference_steps, count=len(steps) - alone)
    inside = _grown(layer.cells(*levels.shape[-2:]) > 0).to(levels.device)
    noise = _noise(pipe, levels, generator)
    run.x_T = noise if alone else torch.where(inside, noise, levels[-1:])
    if alone and phase.fuse == "collage":
        run.canvas = pixels_of(image)[None]
    with run.model.drawing(), pipe.progress_bar(total=sum(method.count(run))) as progress_bar:
        for state in method.sample(run):
            if not (state.alone or state.sketch):
                state.latents = torch.where(inside, state.latents, levels[len(steps) - state.i - 1])
            latents = state.latents
            progress_bar.update()
    edited = _edited(_decoded(pipe, latents), image, inside, keep_pixels)
    if removed is None:
        return edited
    return replace(edited, before=removed.before, changed=edited.changed | removed.changed)


def remove(
    pipe: StableDiffusionPipeline,
    image: Image.Image,
    old: Box | Mask,
    *,
    background: str,
    negative_prompt: str = "",
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    generator: torch.Generator | None = None,
    keep_pixels: bool = True,
) -> Edited:
    """Draw the background where an object was.

    Args:
        pipe: draws it, and stays as it is.
        image: as for `invert`.
        old: where the object is, such as `find` gives.
        background: what the place shows, "on grass".
        negative_prompt: what was there, "a red car".
        num_inference_steps: T.
        guidance_scale: γ; the inversion goes without guidance.
        generator: where the new noise comes from.
        keep_pixels: put the old pixels back outside.

    Raises:
        EditError: a picture of another shape than the model's, or a box of no area.
    """
    inversion = invert(pipe, image, background, num_inference_steps=num_inference_steps)
    changing = _touched(_region(old), *inversion.latents.shape[-2:], pipe.vae_scale_factor)
    new = redraw(
        pipe,
        inversion,
        changing=changing,
        noise=_noise(pipe, inversion.latents, generator)[0],
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
    )
    return _edited(new, inversion.image, changing, keep_pixels)


def fill(
    pipe: StableDiffusionPipeline,
    image: Image.Image,
    hole: Box | Mask,
    *,
    prompt: str,
    share: float = 0.8,
    num_inference_steps: int = 10,
    guidance_scale: float = 3.0,
) -> Edited:
    """Draw what a thing hides: the place behind it, and the rest of what stands there.

    The colours around the hole are spread over it, this picture is inverted, and the last `share`
    of the steps draws the hole again: lines go on, and a thing that was hidden in part gets whole.
    Where `remove` begins with new noise, and so invents, this begins with the picture's own colours
    (after SDEdit: Meng et al. 2022). There is no noise in it: the same picture gives the same.

    Args:
        pipe: draws it, and stays as it is.
        image: as for `invert`.
        hole: what is drawn anew, where that thing is, such as `find` gives.
        prompt: what is there without it, "a red car on grass".
        share: which part of the steps, in (0, 1].
        num_inference_steps: T.
        guidance_scale: γ; the inversion goes without guidance.

    Raises:
        EditError: a picture of another shape than the model's, or a box of no area.
        ValueError: an invalid share.
    """
    image = fitted(pipe, image)
    pixels, covered = pixels_of(image), _region(hole).cells(image.height, image.width)
    seam = _seam(covered.shape)
    # Its edge is a mixture of both: its colours are not to be spread.
    edge = functional.max_pool2d(covered[None].float(), 2 * seam + 1, 1, seam)[0] > 0
    rough = picture_of(_spread(pixels, edge))
    inversion = invert(pipe, rough, prompt, num_inference_steps=num_inference_steps)
    cells = _touched(Mask.of(covered), *inversion.latents.shape[-2:], pipe.vae_scale_factor)
    new = redraw(pipe, inversion, changing=cells, share=share, guidance_scale=guidance_scale)
    around = functional.max_pool2d(covered[None].float(), 4 * seam + 1, 1, 2 * seam)[0] > 0
    return _edited(new, image, around, True)


def _spread(
    pixels: Float[Tensor, "3 height width"], hole: Bool[Tensor, "height width"]
) -> Float[Tensor, "3 height width"]:
    """The picture with each pixel of the hole in the nearest colour outside, then smoothed."""
    if hole.all():
        return pixels
    rows, columns = ndimage.distance_transform_edt(
        hole.numpy(), return_distances=False, return_indices=True
    )
    spread = pixels[:, rows, columns]
    for _ in range(SMOOTHINGS):
        padded = functional.pad(spread[None], (1, 1, 1, 1), mode="replicate")
        spread = torch.where(hole, functional.avg_pool2d(padded, 3, 1)[0], spread)
    return spread


def move(
    pipe: StableDiffusionPipeline,
    image: Image.Image,
    old: Box | Mask,
    box: Box,
    *,
    prompt: str,
    background: str,
    touch_up: float = 0.0,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    generator: torch.Generator | None = None,
) -> Edited:
    """Move an object into another box: it is cut out, the hole is filled, and it is put down there.

    With `touch_up` the last part of the steps draws it again, with everything around it kept, so
    that it belongs there. The storybook's flat stickers need none, and lose small things by it.

    Args:
        pipe: draws, and stays as it is.
        image: as for `invert`.
        old: where the object is: its mask, such as `find` gives, or a box around it.
        box: where it should be; it is stretched to fill it.
        prompt: the object, "a red car".
        background: what the place shows, "on grass".
        touch_up: which part of the steps is drawn again, 0 to 1; 0: none.
        num_inference_steps: T.
        guidance_scale: γ.
        generator: where the noise of the hole comes from.

    Raises:
        EditError: a picture of another shape than the model's, or nothing in the box.
    """
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    empty = remove(
        pipe,
        image,
        old,
        background=background,
        negative_prompt=prompt,
        generator=generator,
        **options,
    )
    before, after = pixels_of(empty.before), pixels_of(empty.image)
    region = _region(old)
    thing = region.cells(*before.shape[-2:])
    if not isinstance(old, Mask):
        thing = thing & ((before - after).abs().amax(0) > DIFFERENT)
    if thing.float().mean() * REFERENCE_PIXELS**2 < LEAST:
        raise EditError(
            f"there is nothing to move in {tuple(round(side, 2) for side in region.box)}: without "
            "it the picture is the same; draw the box around an object"
        )
    source, target = tight_box(thing), Layer(prompt, box)
    cover = moved(thing[None].float(), source, target.box) * target.cells(*thing.shape)
    crude = picture_of(after * (1 - cover) + moved(before, source, target.box) * cover)
    changing = _grown(target.cells(*(side // pipe.vae_scale_factor for side in thing.shape)) > 0)
    if touch_up:
        caption = f"{prompt} {background}".strip()
        inversion = invert(pipe, crude, caption, num_inference_steps=num_inference_steps)
        new = redraw(
            pipe, inversion, changing=changing, share=touch_up, guidance_scale=guidance_scale
        )
        crude = _edited(new, crude, changing, True).image
    return replace(empty, image=crude, changed=empty.changed | _enlarged(changing, thing.shape))


# ------------------------------------------------------------------ pictures and latents


def fitted(pipe: StableDiffusionPipeline, image: Image.Image) -> Image.Image:
    """The picture as RGB, of the size that the model draws; a warning says what was changed.

    Raises:
        EditError: it has another shape, and would be distorted.
        ValueError: as for `picture_of`.
    """
    if not isinstance(image, Image.Image):
        raise EditError(
            f"image is of type {type(image).__name__}, but should be a PIL image; "
            "lrd_helpers.pictures.picture_of makes one of a tensor or an array"
        )
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    height, width = height * pipe.vae_scale_factor, width * pipe.vae_scale_factor
    if image.mode != "RGB":
        warnings.warn(f"the picture's mode is {image.mode}; it was made RGB", stacklevel=3)
    image = picture_of(image)
    if image.size == (width, height):
        return image
    if abs(image.width * height / (image.height * width) - 1) > 0.02:
        raise EditError(
            f"the picture is {image.width} × {image.height}, but should have the ratio of the "
            f"model's own {width} × {height}; crop it first"
        )
    warnings.warn(
        f"the picture is {image.width} × {image.height}; it was resized to {width} × {height}",
        stacklevel=3,
    )
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _region(old: Box | Mask) -> Mask:
    if isinstance(old, Mask):
        return old
    # A layer's box has all the checks that a box needs.
    return Mask.of(Layer("what is there", old).cells(256, 256))


def _seam(size: Sequence[int]) -> int:
    return max(SEAM, scaled(SEAM, size))


def _touched(old: Mask, height: int, width: int, factor: int) -> Bool[Tensor, "height width"]:
    """The cells that an old object has a part in, with so much around it that no pixel of it lies
    where the new picture fades into the old one.
    """
    pixels = old.cells(height * factor, width * factor)[None].float()
    seam = _seam(pixels.shape[-2:])
    around = functional.max_pool2d(pixels, 4 * seam + 1, 1, 2 * seam)
    return functional.adaptive_max_pool2d(around, (height, width))[0] > 0


def _grown(cells: Bool[Tensor, "height width"]) -> Bool[Tensor, "height width"]:
    """One cell (of 16) more on all sides: outlines and shadows reach over the edge."""
    more = round(times_wider(cells.shape))
    return functional.max_pool2d(cells[None].float(), 2 * more + 1, 1, more)[0] > 0


def _enlarged(
    cells: Bool[Tensor, "height width"], shape: torch.Size
) -> Bool[Tensor, "height_ width_"]:
    return functional.interpolate(cells[None, None].float(), tuple(shape))[0, 0] > 0


def _edited(
    new: Image.Image, before: Image.Image, changing: Bool[Tensor, "height width"], keep: bool
) -> Edited:
    """The new picture, faded into the old one at the inner edge of what may change."""
    changed = _enlarged(changing.cpu(), torch.Size((before.height, before.width)))
    if keep:
        seam = _seam(changed.shape)
        around = {"kernel_size": 2 * seam + 1, "stride": 1, "padding": seam}
        # Far enough inside is 1, outside is exactly 0, and between it rises in equal steps.
        core = -functional.max_pool2d(-changed[None].float(), **around)
        # Beyond the picture's edge there is nothing old that could show through.
        share = functional.avg_pool2d(core, **around, count_include_pad=False)
        new = picture_of(pixels_of(new) * share + pixels_of(before) * (1 - share))
    return Edited(new, before, changed)


def _noise(
    pipe: StableDiffusionPipeline,
    levels: Float[Tensor, "steps channels height width"],
    generator: torch.Generator | None,
) -> Float[Tensor, "1 channels height width"]:
    device = levels.device if generator is None else generator.device
    return torch.randn(levels[:1].shape, generator=generator, device=device).to(levels)


@torch.no_grad()
def _levels(
    pipe: StableDiffusionPipeline,
    image: Image.Image,
    prompt: str,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    count: int | None = None,
) -> Float[Tensor, "levels channels height width"]:
    """x_0 and the latents after the first `count` steps of DDIM backwards; by default all."""
    x = _encoded(pipe, image)
    scheduler = derived(DDIMInverseScheduler, ddim_like(pipe.scheduler))
    run, regions = _asking(pipe, x, scheduler, num_inference_steps, prompt, "", guidance_scale)
    latents = [x]
    with run.model.drawing():
        for i, t in enumerate(pipe.progress_bar(run.steps.timesteps[:count])):
            x = caption_step(run, regions, i, t, x).x
            latents.append(x)
    return torch.cat(latents)


@torch.no_grad()
def _encoded(pipe: StableDiffusionPipeline, image: Image.Image) -> Tensor:
    model = model_of(pipe, (image.height, image.width))
    with model.drawing():
        return model.encode((2 * pixels_of(image) - 1)[None].to(pipe._execution_device))


@torch.no_grad()
def _decoded(pipe: StableDiffusionPipeline, latents: Tensor) -> Image.Image:
    model = model_of(pipe, _pixels(pipe, latents))
    with model.drawing():
        return picture_of(model.decode(latents)[0] / 2 + 0.5)


def _pixels(pipe: StableDiffusionPipeline, latents: Tensor) -> tuple[int, int]:
    """Height and width of the latents' picture."""
    height, width = latents.shape[-2:]
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def _asking(
    pipe: StableDiffusionPipeline,
    x: Float[Tensor, "1 channels height width"],
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    prompt: str,
    negative_prompt: str,
    guidance_scale: float,
) -> tuple[Run, Regions]:
    """A run in which the whole picture is asked for one prompt."""
    model = model_of(pipe, _pixels(pipe, x), guidance_scale=guidance_scale)
    steps = Steps(scheduler, num_inference_steps, device=x.device)
    whole = torch.ones(x.shape[-2:])
    regions = batched([Region(0, 0, prompt, negative_prompt, whole)], x)
    return Run(model, steps, [], [], x, guidance_scale), regions
