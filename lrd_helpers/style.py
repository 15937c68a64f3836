"""Style from a reference picture: a few tokens that join the text's in cross-attention.

    picture → StyleEncoder → μ, σ → z → style tokens ┐
    caption → text encoder → text tokens ────────────┴→ keys and values of every cross-attention

Attention does not care how many tokens there are, or where they come from; so the pipeline and its
U-Net stay what they are. Only some of the U-Net's weights are other ones, fine-tuned by
`lrd_helpers.training.style`: `StyleConditioning.applied_to` puts them in, and takes them out again.

Statistics of features as style: AdaIN (Huang & Belongie 2017). Pictures as tokens beside the
words: IP-Adapter (Ye et al. 2023). The variational code: Kingma & Welling 2013.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lrd_helpers.files import write_atomically
from lrd_helpers.pictures import pixels_of
from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.sampling.model import checked_finite

with quiet_libraries():
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

UNET_FILE = "unet.safetensors"

Images = Float[Tensor, "batch 3 height width"]
Codes = Float[Tensor, "batch code"]
Tokens = Float[Tensor, "batch tokens features"]
Strength = float | Sequence[float] | Tensor


class StyleEncoder(ModelMixin, ConfigMixin):
    """Picture → code N(μ, σ²) of a few numbers → tokens of the text encoder's width.

    The code sees the mean and the spread over the whole picture of its colours, and of the features
    of each convolution: how the picture is drawn, but hardly what stands where. Nothing normalises
    the features on their way, as that would take out the very statistics that are wanted.

    Args:
        widths: features of the convolutions, each of which halves the picture's sides.
        code_size: numbers in a code.
        token_count: tokens that a style adds to the text's.
        token_size: the width of the U-Net's cross-attention (its `cross_attention_dim`).
    """

    @register_to_config
    def __init__(
        self,
        widths: Sequence[int] = (16, 32, 64),
        code_size: int = 2,
        token_count: int = 4,
        token_size: int = 128,
    ) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1)
            for before, after in zip([3, *widths[:-1]], widths, strict=True)
        )
        count = 2 * (3 + sum(widths))
        self.to_code = nn.Sequential(
            # Without it all pictures have nearly the same code at first, and σ drowns the rest.
            nn.LayerNorm(count),
            nn.Linear(count, 64),
            nn.SiLU(),
            nn.Linear(64, 2 * code_size),
        )
        # σ begins at 0.14, not at 1: the tokens must first mean something for anyone to listen.
        nn.init.constant_(self.to_code[-1].bias[code_size:], -4.0)
        self.to_tokens = nn.Sequential(
            nn.Linear(code_size, 64), nn.SiLU(), nn.Linear(64, token_count * token_size)
        )
        self.norm = nn.LayerNorm(token_size)  # the text encoder's last layer is one, too

    def encode(self, images: Images | Image.Image) -> tuple[Codes, Codes]:
        """Mean μ and log-variance log σ² of each picture's code: in [0, 1], or an image of PIL."""
        if isinstance(images, Image.Image):
            images = pixels_of(images)[None].to(self.device, self.dtype)
        features = [2 * images - 1]
        for convolution in self.convolutions:
            features.append(nn.functional.silu(convolution(features[-1])))
        statistics = []
        for each in features:
            variance, mean = torch.var_mean(each.float(), (2, 3))
            statistics += [mean, (variance + 1e-5).sqrt()]
        mean, log_variance = self.to_code(torch.cat(statistics, 1).to(images.dtype)).chunk(2, 1)
        return mean, log_variance.clamp(-20, 10)

    def tokens(self, code: Codes) -> Tokens:
        """The tokens that stand for a code: a picture's, a mixture of two, or any N(0, 1) draw."""
        shape = (-1, self.config.token_count, self.config.token_size)
        return self.norm(self.to_tokens(code).reshape(shape))

    def forward(self, images: Images | Image.Image) -> Tokens:
        """The tokens of each picture's μ, without chance: in [0, 1], or an image of PIL."""
        return self.tokens(self.encode(images)[0])


def join(
    text: Float[Tensor, "texts words features"],
    style: Float[Tensor, "styles tokens width"],
    strength: Strength = 1.0,
) -> Float[Tensor, "rows all_tokens features"]:
    """[text; strength·style]: what the cross-attention layers get to see.

    Strength 0 is no style; the fine-tuned U-Net then draws as it did before. At strength s in
    between it has learned to keep the style with probability s, and to draw without otherwise.

    Args:
        text, style: a row a picture. One row serves for all rows of the others.
        strength: one number, or one for each row.

    Raises:
        ValueError: numbers of rows that do not fit, tokens of different widths, or a style that is
            not finite.
    """
    strengths = torch.as_tensor(strength, dtype=style.dtype, device=style.device).reshape(-1)
    counts = {"texts": len(text), "styles": len(style), "strengths": len(strengths)}
    rows = max(counts.values())
    if not set(counts.values()) <= {1, rows}:
        given = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"{given}: give one of each for every picture, or one for all pictures")
    if text.shape[2] != style.shape[2]:
        raise ValueError(
            f"the text's tokens have {text.shape[2]} features and the style's {style.shape[2]}: "
            "this style encoder belongs to another pipeline"
        )
    scaled = checked_finite(strengths[:, None, None] * style, "the style's tokens").to(text)
    return torch.cat([text.expand(rows, -1, -1), scaled.expand(rows, -1, -1)], 1)


@torch.no_grad()
def styled_prompt(
    pipe: StableDiffusionPipeline,
    prompt: str | list[str],
    style: Tokens,
    strength: Strength = 1.0,
    *,
    negative_prompt: str = "",
    negative_strength: Strength | None = None,
) -> dict[str, Tensor]:
    """`prompt_embeds` and `negative_prompt_embeds` for any Stable Diffusion pipeline.

        with conditioning.applied_to(pipe.unet):
            pipe(**styled_prompt(pipe, "a red car at sea", conditioning.encoder(pictures)))

    Args:
        pipe: whose tokenizer and text encoder read the prompt.
        prompt: one for all styles, or one for each.
        style: from a `StyleEncoder`; one for all prompts, or one for each.
        strength: see `join`.
        negative_prompt: what the unguided half reads.
        negative_strength: of the style in the unguided half. As strong as in the other by default:
            guidance then pushes towards the words alone. 0 lets it push towards the style, too.

    Raises:
        ValueError: see `join`.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    positive = join(_text_tokens(pipe, prompts), style, strength)
    if negative_strength is None:
        negative_strength = strength
    negative = join(_text_tokens(pipe, [negative_prompt]), style, negative_strength)
    return {
        "prompt_embeds": positive,
        "negative_prompt_embeds": negative.expand(len(positive), -1, -1).contiguous(),
    }


def _text_tokens(pipe: StableDiffusionPipeline, prompts: list[str]) -> Tokens:
    read = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    return pipe.text_encoder(read.input_ids.to(pipe.text_encoder.device))[0]


@dataclass(frozen=True, eq=False)
class StyleConditioning:
    """A style encoder, and the weights with which a U-Net understands its tokens.

    Attributes:
        encoder: the style encoder.
        unet_weights: the fine-tuned weights, by the names they have in the U-Net.
        base: `weight_sum` of the U-Net that was fine-tuned. The weights fit no other.
    """

    encoder: StyleEncoder
    unet_weights: dict[str, Tensor]
    base: float

    @contextmanager
    def applied_to(self, unet: UNet2DConditionModel) -> Iterator[None]:
        """Inside, `unet` has the fine-tuned weights; after it, come what may, its own again.

        Raises:
            ValueError: this is not the U-Net that was fine-tuned, or the weights are in it already.
        """
        unet = getattr(unet, "_orig_mod", unet)  # what torch.compile wrapped
        before = {name: tensor.detach() for name, tensor in unet.state_dict().items()}
        for name, tensor in self.unet_weights.items():
            if name not in before or before[name].shape != tensor.shape:
                what = f"has {list(before[name].shape)}" if name in before else "has none"
                raise ValueError(
                    f"the style needs {name} of shape {list(tensor.shape)}, but this U-Net {what}: "
                    "it is not the one that was fine-tuned"
                )
        total = weight_sum(unet)
        if not math.isclose(total, self.base, rel_tol=1e-5):
            raise ValueError(
                f"the style was trained on another U-Net (its weights sum to {self.base:.2f}, "
                f"these to {total:.2f}): either a style is applied already, or the U-Net was "
                "trained again, and the style must follow: python -m lrd_helpers.training.style"
            )
        before = {name: before[name].clone() for name in self.unet_weights}
        try:
            unet.load_state_dict(self.unet_weights, strict=False)
            yield
        finally:
            unet.load_state_dict(before, strict=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the encoder as diffusers does, and the U-Net's weights beside it."""
        self.encoder.save_pretrained(folder)
        weights = {name: tensor.contiguous() for name, tensor in self.unet_weights.items()}
        data = save(weights, metadata={"base": repr(self.base)})
        write_atomically(Path(folder) / UNET_FILE, data)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, encoder: StyleEncoder | None = None
    ) -> StyleConditioning:
        """Reads what `save_pretrained` wrote; `encoder` is taken in place of the folder's."""
        if encoder is None:
            encoder = StyleEncoder.from_pretrained(folder).eval()
        with safe_open(Path(folder) / UNET_FILE, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(encoder, weights, float(file.metadata()["base"]))


@torch.no_grad()
def weight_sum(unet: UNet2DConditionModel) -> float:
    """Σ|w| over all weights: what tells one trained U-Net from another, in any precision."""
    return sum(float(weight.float().abs().sum()) for weight in unet.parameters())
