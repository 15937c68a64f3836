"""The layered U-Net: a plain one that draws every slot of a stack, and blocks in which slots talk.

A stack's slots are its background, its layers (furthest back first) and its composite. They are
folded into the batch; what is between them (Huang et al. 2024; all of it a reconstruction) is

- layer-collaborative attention behind every transformer of the plain U-Net: over the slots at each
  position on the finest level, over all positions of all slots below it (keys, values shared);
- a layer embedding, added to the time embedding: which slot this is;
- the prompt enhancer: tokens of all slots' prompts attend to each other, then to the caption's.

Every new block ends in a projection of zeros: untrained, the model is the plain one in each slot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lrd_helpers.layerdiff.alpha import widened
from lrd_helpers.quiet import quiet_libraries

with quiet_libraries():
    from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.attention_processor import Attention
    from diffusers.models.embeddings import get_2d_sincos_pos_embed
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.utils import BaseOutput

MOST_LAYERS = 4
BACKGROUND, COMPOSITE = 0, MOST_LAYERS + 1  # identities of slots; 1 … MOST_LAYERS are layers
HIDDEN = -10_000.0  # a score that softmax makes 0, in half precision too

Stacks = Float[Tensor, "batch slots channels height width"]


def slot_identities(layers: int) -> Int[Tensor, "slots"]:
    """Background, `layers` layers, composite: the identities of a stack's slots, in order.

    Raises:
        ValueError: more layers than the model has embeddings for, or a negative number.
    """
    if not 0 <= layers <= MOST_LAYERS:
        raise ValueError(f"{layers} layers: the layered model was trained for 0 to {MOST_LAYERS}")
    return torch.tensor([BACKGROUND, *range(1, layers + 1), COMPOSITE])


class Slots(NamedTuple):
    """How the rows of a batch are made of slots, for the blocks inside."""

    count: int
    bias: (
        Float[Tensor, "batch slots"] | None
    )  # 0, or HIDDEN for a padded slot; None without padding


class SlotAttention(nn.Module):
    """x + attention of slots to slots; x itself until trained.

    Args:
        everywhere: all positions of all slots are keys; otherwise, at each position, the slots.
    """

    def __init__(self, channels: int, heads: int, *, everywhere: bool) -> None:
        super().__init__()
        self.everywhere = everywhere
        self.norm = nn.LayerNorm(channels)
        self.attention = _silent_attention(channels, heads)

    def forward(
        self, x: Float[Tensor, "rows channels height width"], slots: Slots
    ) -> Float[Tensor, "rows channels height width"]:
        height, width = x.shape[2:]
        stacks = self.norm(x.movedim(1, -1)).unflatten(0, (-1, slots.count))
        bias = slots.bias
        if self.everywhere:
            tokens = stacks + _positions(x)  # (batch, slots, height, width, channels)
            if bias is not None:
                bias = bias.repeat_interleave(height * width, 1)
            answer = self.attention(tokens.flatten(1, 3), attention_mask=_row_bias(bias))
            answer = answer.unflatten(1, (slots.count, height, width)).flatten(0, 1)
        else:
            tokens = stacks.movedim(1, 3)  # (batch, height, width, slots, channels)
            if bias is not None:
                bias = bias.repeat_interleave(height * width, 0)
            answer = self.attention(tokens.flatten(0, 2), attention_mask=_row_bias(bias))
            answer = answer.unflatten(0, tokens.shape[:3]).movedim(3, 1).flatten(0, 1)
        return x + answer.movedim(-1, 1)


class CollaborativeTransformer(nn.Module):
    """A transformer of the plain U-Net, then attention between the slots."""

    def __init__(self, plain: Transformer2DModel, *, everywhere: bool) -> None:
        super().__init__()
        self.plain = plain
        heads = plain.config.num_attention_heads
        self.talk = SlotAttention(plain.config.in_channels, heads, everywhere=everywhere)

    def forward(
        self, hidden_states: Tensor, cross_attention_kwargs: dict[str, Any], **arguments: Any
    ) -> tuple[Tensor]:
        plain = self.plain(hidden_states, **arguments)[0]
        return (self.talk(plain, cross_attention_kwargs["slots"]),)


class PromptEnhancer(nn.Module):
    """Tokens of a stack's prompts that know of each other and of the caption.

    LayerDiff's layer-specific prompt enhancer: self-attention over the tokens of all slots, then
    cross-attention to the caption's. The tokens themselves until trained.
    """

    def __init__(self, width: int, heads: int, identities: int) -> None:
        super().__init__()
        self.identity = nn.Embedding(identities, width)
        nn.init.zeros_(self.identity.weight)
        self.norm, self.caption_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.among, self.to_caption = (_silent_attention(width, heads) for _ in range(2))

    def forward(
        self,
        text: Float[Tensor, "batch slots tokens width"],
        caption: Float[Tensor, "batch tokens width"],
        identities: Int[Tensor, "batch slots"],
        bias: Float[Tensor, "batch slots"] | None,
    ) -> Float[Tensor, "batch slots tokens width"]:
        slots, tokens = text.shape[1:3]
        identity = self.identity(identities)[:, :, None].to(text.dtype)
        if bias is not None:
            bias = bias.repeat_interleave(tokens, 1)
        told = self.norm(text + identity).flatten(1, 2)
        flat = text.flatten(1, 2) + self.among(told, attention_mask=_row_bias(bias))
        flat = flat + self.to_caption(self.caption_norm(flat), caption)
        return flat.unflatten(1, (slots, tokens))


@dataclass
class LayeredUNetOutput(BaseOutput):
    """The predicted noise of every slot; 0 in padded ones."""

    sample: Stacks


class LayeredUNet2DConditionModel(ModelMixin, ConfigMixin):
    """Stacks of noisy latents → the noise of every slot.

    Args:
        unet_config: the configuration of the plain U-Net, as its `config` has it.
        enhancer_heads: of the prompt enhancer's attention.
    """

    @register_to_config
    def __init__(self, unet_config: dict[str, Any], enhancer_heads: int = 4) -> None:
        super().__init__()
        self.composite_heard = True
        # The plain U-Net adds class embeddings to the time's: a layer's identity is such a class.
        config = {**unet_config, "num_class_embeds": MOST_LAYERS + 2}
        self.unet = UNet2DConditionModel.from_config(config)
        nn.init.zeros_(self.unet.class_embedding.weight)
        last = len(self.unet.config.block_out_channels) - 1
        for level, down in enumerate(self.unet.down_blocks):
            _let_talk(down, everywhere=level > 0)
        _let_talk(self.unet.mid_block, everywhere=True)
        for level, up in enumerate(self.unet.up_blocks):
            _let_talk(up, everywhere=level < last)
        self.enhancer = PromptEnhancer(
            self.unet.config.cross_attention_dim, enhancer_heads, MOST_LAYERS + 2
        )

    @classmethod
    def grown(
        cls, unet: UNet2DConditionModel, channels: int | None = None
    ) -> LayeredUNet2DConditionModel:
        """The layered model that is, in every slot, this U-Net, weight for weight.

        Args:
            channels: of the latents, if more than the U-Net's: 4 + 4 for masks beside colours. It
                does not look at the new ones at first, and predicts 0 for them.

        Raises:
            ValueError: the U-Net has parts that a layered one does not know.
        """
        config = {name: x for name, x in unet.config.items() if not name.startswith("_")}
        if channels is not None:
            config |= {"in_channels": channels, "out_channels": channels}
        model = cls(config)
        weights = {
            re.sub(r"(attentions\.\d+)\.", r"\1.plain.", name): weight
            for name, weight in unet.state_dict().items()
        }
        if unknown := weights.keys() - model.unet.state_dict().keys():
            raise ValueError(f"no layered model grows from a U-Net with {min(unknown)}")
        model.unet.load_state_dict(widened(weights, model.unet), strict=False)
        return model

    def forward(
        self,
        sample: Stacks,
        timestep: int | Int[Tensor, "*#batch_and_slots"],
        text: Float[Tensor, "batch slots tokens width"],
        caption: Float[Tensor, "batch tokens width"],
        identities: Int[Tensor, "*#batch slots"] | None = None,
        present: Bool[Tensor, "batch slots"] | None = None,
    ) -> LayeredUNetOutput:
        """The noise in every slot.

        Args:
            timestep: of all, or of each slot: a slot at 0 that is clean is a condition.
            text: the prompts' embeddings; the composite's prompt is the caption.
            identities: `slot_identities` by default, with all slots but two as layers.
            present: False for slots that only fill up the batch: nobody hears them.
        """
        batch, count = sample.shape[:2]
        if identities is None:
            identities = slot_identities(count - 2)
        identities = identities.to(sample.device).expand(batch, count)
        if not self.composite_heard:
            others = identities != COMPOSITE
            present = others if present is None else present & others
        times = torch.as_tensor(timestep, device=sample.device).expand(batch, count)
        bias = None if present is None or present.all() else HIDDEN * (~present).to(sample.dtype)
        text = self.enhancer(text, caption, identities, bias)
        noise = self.unet(
            sample.flatten(0, 1),
            times.flatten(),
            text.flatten(0, 1),
            class_labels=identities.flatten(),
            cross_attention_kwargs={"slots": Slots(count, bias)},
        ).sample.unflatten(0, (batch, count))
        if bias is not None:
            noise = noise * present[:, :, None, None, None]
        return LayeredUNetOutput(sample=noise)


PARTS = ("attention between slots", "layer embedding", "prompt enhancer", "composite slot")
"""What the layered model has beyond the plain one."""


@contextmanager
def switched_off(model: LayeredUNet2DConditionModel, part: str) -> Iterator[None]:
    """Inside, the model is without one of its `PARTS`; after it, come what may, it has it again.

    Without the composite slot nobody hears it, and its own noise is 0: no composite is drawn.

    Raises:
        ValueError: there is no such part.
    """
    if part not in PARTS:
        raise ValueError(f"{part!r} is no part of a layered model; these are: {', '.join(PARTS)}")
    if part == PARTS[3]:
        model.composite_heard = False
        try:
            yield
        finally:
            model.composite_heard = True
        return
    if part == PARTS[0]:
        talks = [
            module.attention for module in model.modules() if isinstance(module, SlotAttention)
        ]
        silenced = [weight for talk in talks for weight in talk.to_out[0].parameters()]
    elif part == PARTS[1]:
        silenced = [model.unet.class_embedding.weight, model.enhancer.identity.weight]
    else:
        both = (model.enhancer.among, model.enhancer.to_caption)
        silenced = [weight for each in both for weight in each.to_out[0].parameters()]
    kept = [weight.detach().clone() for weight in silenced]
    with torch.no_grad():
        for weight in silenced:
            weight.zero_()
        try:
            yield
        finally:
            for weight, before in zip(silenced, kept, strict=True):
                weight.copy_(before)


def _silent_attention(channels: int, heads: int) -> Attention:
    """Attention whose answer is 0 until trained."""
    attention = Attention(channels, heads=heads, dim_head=channels // heads)
    nn.init.zeros_(attention.to_out[0].weight)
    nn.init.zeros_(attention.to_out[0].bias)
    return attention


def _let_talk(block: nn.Module, *, everywhere: bool) -> None:
    if not hasattr(block, "attentions"):
        return  # a block of convolutions alone
    block.attentions = nn.ModuleList(
        CollaborativeTransformer(plain, everywhere=everywhere) for plain in block.attentions
    )


def _row_bias(bias: Float[Tensor, "rows keys"] | None) -> Float[Tensor, "rows 1 keys"] | None:
    return None if bias is None else bias[:, None]


def _positions(x: Float[Tensor, "rows channels height width"]) -> Tensor:
    """Sines and cosines of rows and columns (Vaswani et al. 2017): (height, width, channels)."""
    channels, height, width = x.shape[1:]
    table = get_2d_sincos_pos_embed(channels, (height, width), output_type="pt", device=x.device)
    return table.reshape(height, width, channels).to(x.dtype)
