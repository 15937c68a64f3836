"""What a method is given (`Run`), and what it yields at each step (`State`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lrd_helpers.attention import AttentionMaps
from lrd_helpers.layout import Layout, Overlap
from lrd_helpers.messages import excerpt
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.sampling.memory import Memory
from lrd_helpers.sampling.model import Model, model_of
from lrd_helpers.sampling.regions import Regions
from lrd_helpers.sampling.steps import Generators, Steps, learned_steps

with quiet_libraries():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
    from diffusers.utils.torch_utils import randn_tensor

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

Pictures = Float[Tensor, "pictures channels height width"]
Rows = Float[Tensor, "rows channels height width"]


@dataclass
class State:
    """One step that was made. Whoever iterates over a method may record it, change it, or stop.

    Attributes:
        i: number of the step among its `timesteps`.
        t: the timestep.
        x: x_{t−1}, in the scheduler's units: of the pictures, or, where `alone`, of the regions.
        regions: what was asked.
        seen: x_t as the U-Net saw it, a row a region, without ξ; None where nothing was asked.
        scores: the guided predictions, a row a region.
        alone: whether each region still runs by itself.
        sketch: whether this step belongs to the sketches and not to the picture.
        xi: ξ of each layer of each picture, in layered steps.
        collage: the clean latents that the picture goes on from, after the sketches.
    """

    i: int
    t: Tensor
    x: Tensor
    regions: Regions
    seen: Rows | None = None
    scores: Rows | None = None
    alone: bool = False
    sketch: bool = False
    xi: Sequence[Sequence[Tensor | None]] | None = None
    collage: Pictures | None = None

    @property
    def latents(self) -> Pictures:
        """x_{t−1} of the pictures; where the regions run alone, put together by their masks.

        Setting it sets `x`: the pictures are then what every region goes on from.
        """
        return self.regions.composed(self.x) if self.alone else self.x

    @latents.setter
    def latents(self, latents: Pictures) -> None:
        self.x = latents[self.regions.picture] if self.alone else latents


def returned_latents(changed: object, latents: Tensor) -> Tensor:
    """The latents that a callback returned; those of before, if it returned none.

    Raises:
        ValueError: no dict, or latents of another shape.
    """
    if not isinstance(changed, Mapping):
        raise ValueError(
            f"the callback returned {excerpt(changed)}, but should return None or a dict, such as "
            '{"latents": …}'
        )
    new = changed.get("latents", latents)
    if not isinstance(new, Tensor) or new.shape != latents.shape:
        given = tuple(new.shape) if isinstance(new, Tensor) else excerpt(new)
        raise ValueError(
            f"the callback returned latents {given}, but should return a tensor of the shape that "
            f"it was given, {tuple(latents.shape)}"
        )
    return new.to(latents)


@dataclass
class Run:
    """One drawing: what every method is given.

    Attributes:
        model: texts, U-Net and autoencoder.
        steps: the timesteps and the scheduler.
        layouts: what each picture should show.
        negatives: the negative prompt of each picture, "" for none.
        x_T: the initial noise, in the scheduler's units.
        guidance_scale: γ; no guidance where γ ≤ 1. It may be changed between steps.
        guidance_rescale: φ of Lin et al. 2024, Eq. 16; 0 = off.
        generator: where noise comes from; a list has one for each picture.
        canvas: pictures in [0, 1] that objects are put onto, instead of the background's.
        first_picture: the number of the first picture, where the run has a part of them.
        memory: what earlier runs have left, for methods that ask the same again (the collage's
            sketches); None: everything is asked.
    """

    model: Model
    steps: Steps
    layouts: Sequence[Layout]
    negatives: Sequence[str]
    x_T: Pictures
    guidance_scale: float = 5.0
    guidance_rescale: float = 0.0
    generator: Generators = None
    canvas: Float[Tensor, "pictures 3 height_ width_"] | None = None
    first_picture: int = 0
    memory: Memory | None = None

    @classmethod
    def begin(
        cls,
        pipe: StableDiffusionPipeline | StableDiffusionXLPipeline,
        layouts: Sequence[Layout],
        size: tuple[int, int],
        steps: Steps,
        *,
        negatives: Sequence[str] | None = None,
        guidance_scale: float = 5.0,
        guidance_rescale: float = 0.0,
        canvas: Sequence[Image.Image] | None = None,
        **options: Any,
    ) -> Run:
        """A run of a pipeline's model; x_T is empty until `draw_noise`.

        Args:
            pipe: holds the models.
            layouts: one a picture.
            size: height and width of the pictures in pixels.
            steps: with the generator that noise comes from.
            options: of `Model`.

        The others are those of `Run`.

        Raises:
            ValueError: a model of a kind that is not supported, embeddings that do not fit it, or
                guidance of a distilled model.
        """
        if learned_steps(steps.scheduler) and guidance_scale > 1:
            raise ValueError(
                f"guidance_scale is {guidance_scale:g}, but guidance was distilled into this "
                "model; 1 would work"
            )
        options |= {"at_once": len(layouts), "guidance_scale": guidance_scale}
        model = model_of(pipe, size, **options)
        x_T = model.like.new_empty((len(layouts), *model.like.shape[1:]))
        if canvas is not None:
            canvas = pipe.image_processor.preprocess(list(canvas)) / 2 + 0.5
        return cls(
            model,
            steps,
            layouts,
            [""] * len(layouts) if negatives is None else negatives,
            x_T,
            guidance_scale,
            guidance_rescale,
            steps.generator,
            canvas,
        )

    def draw_noise(self, latents: Pictures | None = None) -> None:
        """x_T ~ N(0, I), given or drawn, times the scheduler's `init_noise_sigma`."""
        noise = self.noise(self.x_T.shape) if latents is None else latents.to(self.x_T)
        self.x_T = noise * self.steps.scheduler.init_noise_sigma

    @property
    def guided(self) -> bool:
        """Whether there is classifier-free guidance."""
        return self.guidance_scale > 1 and not self.model.distilled

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return tuple(self.x_T.shape[-2:])

    @property
    def layout(self) -> Layout:
        """The only picture's layout, for methods that draw one picture at a time."""
        (layout,) = self.layouts
        return layout

    def only(self, number: int) -> Run:
        """This run with one of its pictures; the scheduler begins anew."""
        part = slice(number, number + 1)
        generator = self.generator
        if isinstance(generator, Sequence):
            generator = generator[number]
        return replace(
            self,
            steps=self.steps.renewed(generator),
            layouts=self.layouts[part],
            negatives=self.negatives[part],
            x_T=self.x_T[part],
            generator=generator,
            canvas=None if self.canvas is None else self.canvas[part],
            first_picture=self.first_picture + number,
        )

    # -------------------------------------------------------------- one step

    def seen(self, x: Tensor, t: Tensor, regions: Regions | None = None) -> Rows:
        """x_t as the U-Net knows it, a row a region; of rows that are regions, without `regions`.

        `model_input` brings the latents of every scheduler to α² + σ² = 1. So a ξ that is added
        after it is as strong with Euler, whose latents are x_0 + (σ/α) ε, as with DDIM.
        """
        x = self.steps.model_input(x, t)
        return x if regions is None else x[regions.picture]

    def scores(self, seen: Rows, t: Tensor, regions: Regions, memory: Memory | None = None) -> Rows:
        """s(x_t + ξ^i) + γ (s(x_t + ξ^i, y^i) − s(x_t + ξ^i)) for each region i  (LRDiff, Eq. 8b).

        Ordinary classifier-free guidance is the case of one region with M = 1 and ξ = 0. A memory
        has the answers that need not be asked for again.
        """
        shift = None if regions.field is None else self.steps.shift_of_input(t)
        x = seen if shift is None else seen + regions.field
        prompts = [region.prompt for region in regions.entries]
        pictures = [self.first_picture + region.picture for region in regions.entries]
        yes = [True] * len(prompts)
        if not self.guided:
            score = self.model(x, t, prompts, pictures, yes, memory=memory)
        else:
            rows = list(regions.region_of_row)
            negatives = [regions.entries[row].negative for row in rows]
            score = self.model(
                torch.cat([x[rows], x]),
                t,
                negatives + prompts,
                [pictures[row] for row in rows] + pictures,
                [False] * len(rows) + yes,
                memory=memory,
            )
            unconditional, conditional = score[: len(rows)], score[len(rows) :]
            unconditional = unconditional[regions.unconditional_of]
            score = unconditional + self.guidance_scale * (conditional - unconditional)
            if self.guidance_rescale > 0:
                score = rescale_noise_cfg(score, conditional, self.guidance_rescale)
        return score if shift is None else score + shift * regions.field

    def step(
        self, prediction: Tensor, t: Tensor, x: Tensor, regions: Regions | None = None
    ) -> Tensor:
        """x_{t−1}; of rows that are regions, with `regions`."""
        pictures = None if regions is None else [region.picture for region in regions.entries]
        return self.steps.step(prediction, t, x, pictures)

    def merged(self, rows: Rows, regions: Regions) -> Pictures:
        """Σ_i M^i ⊙ x^i, from where the pictures go on; so does what the scheduler remembers."""
        self.steps.merge_memory(regions.composed)
        return regions.composed(rows)

    # -------------------------------------------------------------- chance

    def noise(self, shape: Sequence[int]) -> Tensor:
        """N(0, 1) from the generator, or from each picture's."""
        return randn_tensor(tuple(shape), self.generator, self.x_T.device, self.x_T.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Random numbers in [0, 1), for methods that draw one picture at a time."""
        device = None if self.generator is None else self.generator.device
        return torch.rand(shape, generator=self.generator, device=device).to(self.x_T.device)

    # -------------------------------------------------------------- attention

    def descended(
        self,
        x: Float[Tensor, "1 channels height width"],
        t: Tensor,
        loss: Callable[[AttentionMaps], Float[Tensor, ""]],
        rate: float,
        **options: Any,
    ) -> tuple[float, Float[Tensor, "1 channels height width"]]:
        """L and x_t − rate · ∇L, for a loss on the attention maps of the caption's words.

        The gradient is with respect to what the U-Net looks at, x_t = α x_0 + σ ε with
        α² + σ² = 1, so that a rate means the same with every scheduler.
        """
        caption = self.layout.caption
        with torch.enable_grad(), self.model.watched(caption, gradients=True, **options) as maps:
            seen = self.seen(x, t).detach().requires_grad_()
            self.model(seen, t, [caption], [self.first_picture], [True])
            value = loss(maps)
            (gradient,) = torch.autograd.grad(rate * value, seen)
        return value.item(), x - gradient / self.steps.unit(t)


class Method(ABC):
    """A way to draw layouts. It knows the steps; progress, callbacks and traces are not its matter.

    Attributes:
        overlap: whose a cell is that several layers cover; see `Layout.masks`.
        batched: whether `sample` draws all pictures of a run at once; if not, it gets one by one.
        traces: whether its states tell what each layer predicted.
        translucent: whether it heeds a layer's opacity; if not, `check_opacity` refuses it.
    """

    overlap: ClassVar[Overlap] = "over"
    batched: ClassVar[bool] = False
    traces: ClassVar[bool] = False
    translucent: ClassVar[bool] = False

    @abstractmethod
    def check(self, run: Run) -> None:
        """Raise a `ValueError` of one sentence for what cannot work, before the first U-Net call.

        Warn of what will not do what it seems to. Pictures come as `batched` says.
        """

    @abstractmethod
    def sample(self, run: Run) -> Iterator[State]:
        """The steps, one state each; the last one's `latents` are the picture.

        A step goes on from `state.x` as whoever iterates has left it.
        """

    def parts(self, run: Run, every: int = 1) -> Iterator[Run]:
        """What `sample` draws at once: all pictures, or each (of `every` so many) by itself."""
        if self.batched:
            yield run
        else:
            yield from map(run.only, range(0, len(run.x_T), every))

    def count(self, run: Run) -> tuple[int, int]:
        """How many sketching states and how many other states `sample` yields."""
        return 0, len(run.steps)
