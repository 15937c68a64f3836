"""Looking into cross-attention: where does the model look when it draws "car"?

    prompt = "a red car and a blue car"
    with capture_attention(pipe, prompt) as attention:
        pipe(prompt)
    attention["car"]            # (batch, height, width): mean over steps, layers and heads
    attention["car", 2]         # the second car only
    attention["red car"]        # a phrase

A map is what softmax(QKᵀ/√d) gives to the word's tokens: between 0 and 1 at each position, and the
maps of all tokens ("<start>", the words, "<end>", "<padding>") sum to 1 there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lrd_helpers.quiet import quiet_libraries
from lrd_helpers.words import PromptTokens, Word, WordError

with quiet_libraries():
    from diffusers.models.attention_processor import Attention

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DConditionModel
    from torch.utils.hooks import RemovableHandle
    from transformers import CLIPTokenizer

SCORES_AT_ONCE = 2**20
"""Attention scores held at one time (4 MB): so a large picture costs no more memory than that."""

Layers = str | Callable[[str], bool]
"""Which cross-attention layers: "all", "paper", "unofficial", or a function of a layer's name."""

Control = Callable[
    [Float[Tensor, "rows heads height width tokens"], str, Any],
    Float[Tensor, "rows heads height width tokens"] | None,
]
"""(logits, name of the layer, timestep) → other logits, or None to leave the layer as it is."""

Compose = Callable[
    [Float[Tensor, "texts height width features"], Float[Tensor, "texts height width"]],
    Float[Tensor, "height width features"],
]
"""(a layer's answers to several texts, what some of their words get of its attention) → one answer;
the attention is 0 to 1, and 0 where no word is asked for."""


# ------------------------------------------------------------------ the maps


@dataclass
class _Record:
    """What one layer showed for one prompt."""

    size: tuple[int, int]
    maps: list[Float[Tensor, "rows heads positions tokens"]]
    """The sum over all calls, or one entry a call where steps are kept."""
    calls: int = 0


class AttentionMaps:
    """The maps of a prompt's words, as `capture_attention` collects them.

    `attention["car"]` is `attention.pooled("car")`, `attention["car", 2]` is
    `attention.pooled("car", 2)`. A word of several tokens, a phrase, and a word that stands at
    several places get the *sum* of their tokens' maps: shares of one softmax add up like
    probabilities, so that what a word gets does not depend on how many pieces it is spelled in.

    The batch of a map is the conditional rows of the U-Net's batch in their order: one for each
    picture, those of one prompt side by side.
    """

    def __init__(
        self,
        prompts: Sequence[PromptTokens],
        columns: Sequence[int],
        layers: Sequence[str],
        *,
        steps: bool = False,
        heads: bool = False,
    ) -> None:
        self.prompts, self.layers = tuple(prompts), tuple(layers)
        self._columns, self._steps, self._heads = list(columns), steps, heads
        self._records: dict[tuple[str, int], _Record] = {}

    def __getitem__(self, word: Word) -> Float[Tensor, "batch height width"]:
        if isinstance(word, str):
            return self.pooled(word)
        match word:
            case (str(), int()):
                return self.pooled(*word)
        raise TypeError(
            f'{word!r} is no word; ask for attention["car"], or attention["car", 2] for the second'
        )

    def pooled(
        self,
        word: str,
        occurrence: int | None = None,
        *,
        prompt: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "batch height width"]:
        """Mean over steps, layers and heads, in [0, 1]; each layer counts the same.

        Args:
            word: a word or phrase of the prompt, or `START`, `END` or `PADDING`.
            occurrence: 1 for the first place it stands at, …; None for all together.
            prompt: the number of one prompt (from 0), where several were given; None for all.
            size: height and width to bring all layers to (bilinear); that of the layer with the
                most positions by default.

        Raises:
            WordError: the word is not in the prompt, or was not captured.
            RuntimeError: the U-Net has not been called yet.
        """
        return self._at_one_size(word, occurrence, prompt, size).mean(dim=0)

    def per_step(
        self,
        word: str,
        occurrence: int | None = None,
        *,
        prompt: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "steps batch height width"]:
        """Mean over layers and heads, step by step (a step is a U-Net call); see `pooled`.

        Raises:
            ValueError: without `steps=True`.
        """
        if not self._steps:
            raise ValueError(
                "the steps were added up; keep them with capture_attention(steps=True)"
            )
        return self._at_one_size(word, occurrence, prompt, size)

    def per_layer(
        self, word: str, occurrence: int | None = None, *, prompt: int | None = None
    ) -> dict[str, Float[Tensor, "batch height width"]]:
        """Mean over steps and heads: each layer's name → its map at its own size; see `pooled`."""
        every = self.detailed(word, occurrence, prompt=prompt)
        return {name: maps.mean(dim=(0, 2)) for name, maps in every.items()}

    def per_head(
        self, word: str, occurrence: int | None = None, *, prompt: int | None = None
    ) -> dict[str, Float[Tensor, "batch heads height width"]]:
        """Mean over steps: each layer's name → the maps of its heads; see `pooled`.

        Raises:
            ValueError: without `heads=True`.
        """
        if not self._heads:
            raise ValueError(
                "the heads were added up; keep them with capture_attention(heads=True)"
            )
        every = self.detailed(word, occurrence, prompt=prompt)
        return {name: maps.mean(dim=0) for name, maps in every.items()}

    def detailed(
        self, word: str, occurrence: int | None = None, *, prompt: int | None = None
    ) -> dict[str, Float[Tensor, "steps batch heads height width"]]:
        """All that was kept; steps and heads are axes of length 1 (a mean) where they were not.

        Raises as `pooled` does.
        """
        numbers = range(len(self.prompts))
        numbers = numbers if prompt is None else [numbers[prompt]]
        chosen = [(number, self._chosen(word, occurrence, number)) for number in numbers]
        every = {}
        for layer in self.layers:
            parts = []
            for number, columns in chosen:
                record = self._records.get((layer, number))
                if record is None:
                    raise RuntimeError(
                        f'no U-Net call with the prompt "{self.prompts[number].text}" was '
                        "seen; draw the picture inside the with block"
                    )
                maps = torch.stack([maps[..., columns].sum(dim=-1) for maps in record.maps])
                parts.append(
                    (maps if self._steps else maps / record.calls).unflatten(-1, record.size)
                )
            if len({len(part) for part in parts}) > 1:
                raise ValueError(
                    "the prompts were drawn in different numbers of steps "
                    f"({', '.join(str(len(part)) for part in parts)}); ask for one with prompt=0, …"
                )
            every[layer] = torch.cat(parts, dim=1)
        return every

    def tokens(self, word: str, occurrence: int | None = None, *, prompt: int = 0) -> list[int]:
        """The numbers of a word's tokens, which a `control` needs; see `PromptTokens.positions`."""
        return self.prompts[prompt].positions(word, occurrence)

    def clear(self) -> None:
        """Forget all maps, for example between two steps of a guidance by gradients."""
        self._records.clear()

    def _chosen(self, word: str, occurrence: int | None, prompt: int) -> list[int]:
        tokens = self.prompts[prompt].positions(word, occurrence)
        if missing := set(tokens) - set(self._columns):
            raise WordError(
                f"{word!r} was not captured: capture_attention(words=…) does not name it "
                f"(of its {len(tokens)} tokens {len(missing)} are missing)"
            )
        return [self._columns.index(token) for token in tokens]

    def _at_one_size(
        self, word: str, occurrence: int | None, prompt: int | None, size: tuple[int, int] | None
    ) -> Float[Tensor, "steps batch height width"]:
        layers = [
            maps.mean(dim=2) for maps in self.detailed(word, occurrence, prompt=prompt).values()
        ]
        size = size or max((maps.shape[-2:] for maps in layers), key=lambda s: s[0] * s[1])
        return torch.stack([_resized(maps, size) for maps in layers]).mean(dim=0)

    def _add(
        self,
        layer: str,
        prompt: int,
        size: tuple[int, int],
        maps: Float[Tensor, "rows heads positions tokens"],
    ) -> None:
        record = self._records.setdefault((layer, prompt), _Record(size, []))
        if record.maps and (record.size != size or len(record.maps[0]) != len(maps)):
            raise ValueError(
                f'{layer}: the prompt "{self.prompts[prompt].text}" had '
                f"{len(record.maps[0])} rows of {record.size} positions, and now has {len(maps)} "
                f"of {size}, which have no mean; capture them one by one, or clear() between"
            )
        record.calls += 1
        if self._steps or not record.maps:
            record.maps.append(maps)
        else:
            record.maps[0] += maps


def _resized(
    maps: Float[Tensor, "*batch height width"], size: tuple[int, int]
) -> Float[Tensor, "*batch new_height new_width"]:
    """Bilinear; where the size shrinks each new cell is the mean of what it covers."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    shrinks = size[0] < maps.shape[-2] or size[1] < maps.shape[-1]
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    flat = F.interpolate(flat, size=tuple(size), mode="bilinear", antialias=shrinks)
    return flat.reshape(*maps.shape[:-2], *size)


# ------------------------------------------------------------------ capture


@contextlib.contextmanager
def capture_attention(
    model: DiffusionPipeline | UNet2DConditionModel,
    prompt: str | Sequence[str],
    *,
    words: Sequence[Word] | None = None,
    layers: Layers = "all",
    tokenizer: CLIPTokenizer | None = None,
    guided: bool | None = None,
    steps: bool = False,
    heads: bool = False,
    gradients: bool = False,
    control: Control | None = None,
) -> Iterator[AttentionMaps]:
    """Watch the cross-attention of all U-Net calls in the block; nothing remains of it afterwards.

    The picture stays what it was, bit for bit: whatever processor is set (PyTorch's fused
    attention, sliced, with LoRA, …) computes it, and hooks look at the queries and keys it makes.
    Compiled code passes hooks over: a compiled U-Net runs uncompiled inside the block.

        A = softmax(QKᵀ/√d)            of each cross-attention layer and head (LDM, section 3.3)

    Only the conditional rows of the batch are looked at, and of A only the sum over calls and heads
    is kept for each layer, so memory does not grow with the steps. Captures can be nested.

    Args:
        model: a pipeline with a U-Net (Stable Diffusion 1.x, 2.x, XL, ours), or such a U-Net.
        prompt: what will be drawn, or one for each picture of the batch. A batch with more rows has
            several pictures a prompt, side by side, as `num_images_per_prompt` makes them.
        words: what can be asked for afterwards ("car", ("red", 2), "<padding>"), each in one of the
            prompts at least; all tokens by default. Few words take less memory.
        layers: which of them: "all"; "paper": the first cross-attention block after each
            down-sampling (our reading of LRDiff, section 3.2: "the block following the
            down-sampling in each stage"); "unofficial": all up blocks; or a function that says yes
            or no to a layer's name, such as "up_blocks.1.attentions.0.transformer_blocks.0.attn2".
        tokenizer: the pipeline's own by default.
        guided: whether the batch is [unconditional, conditional]. A pipeline is asked at each
            call; without one it must be said, unless the batch has as many rows as prompts. A
            pipeline may also have an attribute `prompts_of_rows`, the prompt of each row of the
            batch it is computing (None for an unconditional one): then the rows with `prompt`
            count, and calls without one are passed over. With `pictures_of_rows`, the number of
            the picture each row is a part of, rows of one picture are averaged.
        steps: keep each U-Net call's maps apart (memory grows with the steps).
        heads: keep the heads apart (as many times the memory).
        gradients: keep the graph, so that a loss on the maps has a gradient with respect to the
            latents (layout guidance). The maps of several calls add up, graphs and all: `clear()`
            between them.
        control: changes the attention, and so the picture: called for each of `layers` as
            f(logits, layer, timestep) with the scaled QKᵀ of the conditional rows, it returns new
            logits of the same shape, or None to leave the layer as it is. `control_words` makes
            them. The maps are those of the changed attention.

    Yields:
        The maps, to be asked inside the block or after it.

    Raises:
        WordError: a word that is in no prompt.
        ValueError: no tokenizer, no such layers, a compiled U-Net and a PyTorch before 2.6, or (at
            the U-Net call) a batch that does not fit.
        RuntimeError: `gradients` where the call computes none, or a processor with keys of its own.
    """
    modules = _modules(getattr(model, "unet", model))
    watched = _cross_attention(model, modules, layers)
    unet = modules[""]
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            "a U-Net knows no words: give the tokenizer, capture_attention(tokenizer=…)"
        )
    if gradients and getattr(unet, "is_gradient_checkpointing", False):
        raise ValueError(
            "gradients=True keeps what gradient checkpointing throws away; call "
            "unet.disable_gradient_checkpointing() first"
        )
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts:
        raise ValueError("prompt is an empty list; give at least one prompt")
    # Textual inversion spells one learnt word as several; the pipeline encodes them so.
    convert = getattr(model, "maybe_convert_prompt", lambda text, _: text)
    prompts = [PromptTokens.encode(tokenizer, convert(text, tokenizer)) for text in texts]
    columns = _columns(prompts, words)

    attention = AttentionMaps(prompts, columns, list(watched), steps=steps, heads=heads)
    calls = _Calls(model, texts, guided, gradients)
    with _uncompiled(model), contextlib.ExitStack() as stack:
        for handle in calls.watch(unet):
            stack.callback(handle.remove)
        for name, module in watched.items():
            layer = _Layer(name, module, attention, calls, columns, heads, control)
            for handle in layer.watch(modules[name.rsplit(".transformer_blocks.", 1)[0]]):
                stack.callback(handle.remove)
        yield attention


def _modules(unet: Any) -> dict[str, nn.Module]:
    """The parts of a U-Net by the names they have in a plain U-Net; "" is the U-Net itself.

    `torch.compile` wraps a module, which is then the wrapper's `_orig_mod`.
    """
    modules = unet.named_modules() if isinstance(unet, nn.Module) else []
    return {
        ".".join(part for part in name.split(".") if part != "_orig_mod"): module
        for name, module in modules
    }


def _uncompiled(model: Any) -> contextlib.AbstractContextManager:
    """While it lasts, compiled parts of the U-Net run as they were written, hooks and all."""
    unet = getattr(model, "unet", model)
    if not any(
        "_orig_mod" in module._modules  # torch.compile(unet)
        or module._compiled_call_impl is not None  # unet.compile()
        or hasattr(module.forward, "_torchdynamo_orig_callable")  # torch.compile(unet.forward)
        for module in unet.modules()
    ):
        return contextlib.nullcontext()
    if not hasattr(torch.compiler, "set_stance"):
        raise ValueError(
            "the U-Net is compiled, and compiled code cannot be watched; load it without "
            f"torch.compile, or use PyTorch 2.6 or later (this is {torch.__version__})"
        )
    return torch.compiler.set_stance("force_eager")


def _columns(prompts: list[PromptTokens], words: Sequence[Word] | None) -> list[int]:
    """The tokens to keep: those of `words` in any prompt, or all."""
    if words is None:
        return list(range(len(prompts[0].spans)))
    columns: set[int] = set()
    for word in [words] if isinstance(words, str) else words:
        occurrence = (word,) if isinstance(word, str) else word
        tokens: list[int] = []
        for prompt in prompts:
            with contextlib.suppress(WordError):
                tokens += prompt.positions(*occurrence)
        columns.update(tokens or prompts[0].positions(*occurrence))  # which says why there is none
    return sorted(columns)


def _cross_attention(
    model: Any, modules: dict[str, nn.Module], layers: Layers
) -> dict[str, Attention]:
    """The cross-attention layers of `layers`, by name, in the order they are called in."""
    # down_blocks, mid_block, up_blocks
    in_order = sorted(modules.items(), key=lambda item: item[0].split(".")[0])
    every = {
        name: module
        for name, module in in_order
        if isinstance(module, Attention)
        and module.is_cross_attention
        and ".transformer_blocks." in name
    }
    if not every:
        raise ValueError(f"{type(model).__name__} has no U-Net with cross-attention to look into")
    if layers == "all":
        return every
    if layers == "paper":
        blocks = _after_down_sampling(modules[""])
        chosen = [name for name in every if name.startswith(blocks)]
    elif layers == "unofficial":
        chosen = [name for name in every if name.startswith("up_blocks.")]
    elif callable(layers):
        chosen = [name for name in every if layers(name)]
    else:
        raise ValueError(
            f"layers is {layers!r}, but should be 'all', 'paper', 'unofficial' or a function of a "
            "layer's name"
        )
    if not chosen:
        blocks = dict.fromkeys(name.split(".transformer_blocks.")[0] for name in every)
        raise ValueError(
            f"layers={layers if isinstance(layers, str) else 'function'} matches none of the "
            f"{len(every)} cross-attention layers; they are in: {', '.join(blocks)}"
        )
    return {name: every[name] for name in chosen}


def _after_down_sampling(unet: nn.Module) -> tuple[str, ...]:
    """Where the names of the first cross-attention block after each down-sampling begin.

    That is one block for each size below the first that has cross-attention on the way down:
    down_blocks.1, down_blocks.2 and (down_blocks.3 has none) the middle of Stable Diffusion 1.5;
    down_blocks.1 and down_blocks.2 of XL.
    """
    stages = [(f"down_blocks.{number}", block) for number, block in enumerate(unet.down_blocks)]
    blocks, waiting = [], False
    for name, block in [*stages, ("mid_block", unet.mid_block)]:
        if waiting and getattr(block, "has_cross_attention", False):
            blocks.append(f"{name}.attentions.0.")
            waiting = False
        waiting = waiting or bool(getattr(block, "downsamplers", None))
    return tuple(blocks)


class _Calls:
    """Follows the U-Net's calls: which rows of the batch are which prompt's."""

    def __init__(self, model: Any, texts: list[str], guided: bool | None, gradients: bool) -> None:
        self.gradients = gradients
        self.running = False
        self.rows: list[list[int]] = []
        """For each prompt, its rows in the batch of the call that is running, or ran last."""
        self.pictures: list[int] | None = None
        """The picture that each row is a part of; None where each is one of its own."""
        self.timestep: Any = None
        self._model, self._texts, self._guided = model, texts, guided

    def watch(self, unet: nn.Module) -> Iterator[RemovableHandle]:
        yield unet.register_forward_pre_hook(self._begin, with_kwargs=True)
        yield unet.register_forward_hook(self._end)

    def _begin(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        self.timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if self.gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                "gradients=True, but the U-Net was called without (torch.no_grad(), as inside a "
                "pipeline); call it under torch.enable_grad()"
            )
        self.rows = self._rows(len(sample))
        self.pictures = getattr(self._model, "pictures_of_rows", None)
        prompts = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        for text, rows in zip(self._texts, self.rows, strict=True):
            if any(not torch.equal(prompts[row], prompts[rows[0]]) for row in rows[1:]):
                raise ValueError(
                    f"rows {', '.join(map(str, rows))} of the U-Net's batch should all be the "
                    f'prompt "{text}", but were given different texts; give one prompt for '
                    "each picture"
                )
        self.running = True

    def _end(self, unet: nn.Module, args: tuple, output: Any) -> None:
        # Gradient checkpointing calls the layers again after the U-Net is done: not to be counted.
        self.running = False

    def _rows(self, batch: int) -> list[list[int]]:
        texts = getattr(self._model, "prompts_of_rows", None)
        if texts is not None:
            if len(texts) != batch:
                raise ValueError(f"prompts_of_rows has {len(texts)} entries for {batch} rows")
            return [[row for row in range(batch) if texts[row] == text] for text in self._texts]
        prompts = len(self._texts)
        guided = self._guided
        if guided is None:
            guided = getattr(self._model, "do_classifier_free_guidance", None)
        if guided is None and batch != prompts:
            raise ValueError(
                f"the U-Net was called with {batch} rows for {prompts} prompts; say "
                "capture_attention(guided=True) if they are [unconditional, conditional], or "
                "guided=False if they are as many pictures"
            )
        parts = 2 if guided else 1
        pictures, rest = divmod(batch, parts * prompts)
        if rest or not pictures:
            raise ValueError(
                f"the U-Net was called with {batch} rows, which cannot be {prompts} prompts with "
                f"equally many pictures {'with' if guided else 'without'} unconditional rows; give "
                "one prompt for each picture"
            )
        first = batch - prompts * pictures
        return [list(range(start, start + pictures)) for start in range(first, batch, pictures)]


@dataclass
class _Layer:
    """Follows one cross-attention layer: the queries and keys its processor makes."""

    name: str
    layer: Attention
    attention: AttentionMaps
    calls: _Calls
    columns: list[int]
    heads: bool
    control: Control | None
    size: tuple[int, int] = (0, 0)
    query: Float[Tensor, "batch positions inner"] | None = None
    key: Float[Tensor, "batch tokens inner"] | None = None

    def watch(self, transformer: nn.Module) -> Iterator[RemovableHandle]:
        yield transformer.register_forward_pre_hook(self._note_size, with_kwargs=True)
        yield self.layer.to_q.register_forward_hook(self._note_query)
        yield self.layer.to_k.register_forward_hook(self._note_key)
        if hasattr(self.layer, "to_kv"):  # fuse_qkv_projections()
            yield self.layer.to_kv.register_forward_hook(self._note_key_and_value)
        if self.control is not None:
            yield self.layer.register_forward_pre_hook(self._before, with_kwargs=True)
        yield self.layer.register_forward_hook(self._after, with_kwargs=True)

    def _note_size(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        image = args[0] if args else kwargs["hidden_states"]
        self.size = (image.shape[-2], image.shape[-1])

    def _note_query(self, projection: nn.Module, args: tuple, output: Tensor) -> None:
        self.query = output

    def _note_key(self, projection: nn.Module, args: tuple, output: Tensor) -> None:
        self.key = output

    def _note_key_and_value(self, projection: nn.Module, args: tuple, output: Tensor) -> None:
        self.key = output.chunk(2, dim=-1)[0]

    def _after(self, layer: Attention, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        query, key, self.query, self.key = self.query, self.key, None, None
        if not self.calls.running:
            return
        if query is None or key is None:
            raise RuntimeError(
                f"{self.name}: {type(layer.processor).__name__} makes its queries and keys in a "
                "way of its own, which cannot be watched; set another attention processor"
            )
        tokens = len(self.attention.prompts[0].spans)
        if key.shape[1] != tokens:
            raise ValueError(
                f"the U-Net was given {key.shape[1]} text tokens, but the tokenizer makes "
                f'{tokens}; encode prompts with it, and with padding="max_length"'
            )
        mask = _mask_for_all_heads(layer, kwargs.get("attention_mask"), key)
        with torch.set_grad_enabled(self.calls.gradients):
            for number, rows in enumerate(self.calls.rows):
                if not rows:
                    continue
                parts: dict[int, list[Tensor]] = {}  # picture → the maps of its rows
                for row in rows:
                    picture = self.calls.pictures[row] if self.calls.pictures else row
                    maps = _maps(layer, query, key, mask, row, self.columns, heads=self.heads)
                    parts.setdefault(picture, []).append(maps)
                maps = torch.stack([torch.stack(group).mean(0) for group in parts.values()])
                self.attention._add(self.name, number, self.size, maps)

    def _before(
        self, layer: Attention, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Let `control` change the logits, as a mask that any processor adds to them."""
        rows = sum(self.calls.rows, [])
        if not rows:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        if isinstance(text, tuple):  # an IP-Adapter's tokens come behind the text
            text = text[0]
        query, key = layer.to_q(hidden), layer.to_k(text)
        mask = _mask_for_all_heads(layer, kwargs.get("attention_mask"), key)
        logits = torch.stack([_logits(layer, query, key, mask, row) for row in rows])
        grid = logits.unflatten(2, self.size)
        changed = self.control(grid, self.name, self.calls.timestep)
        if changed is None:
            return None
        if changed.shape != grid.shape:
            raise ValueError(
                f"control returned logits of shape {tuple(changed.shape)} for {self.name}, but "
                f"should return {tuple(grid.shape)}: rows, heads, height, width, tokens"
            )
        # softmax(QKᵀ/√d + (changed − QKᵀ/√d)) = softmax(changed)
        shape = (len(hidden), *logits.shape[1:])
        added = logits.new_zeros(shape) if mask is None else mask.to(logits).expand(shape).clone()
        added[rows] = added[rows] + changed.flatten(2, 3) - logits
        return args, kwargs | {"attention_mask": added.flatten(0, 1).to(query.dtype)}


def _maps(
    layer: Attention,
    query: Float[Tensor, "batch positions inner"],
    key: Float[Tensor, "batch tokens inner"],
    mask: Float[Tensor, "batch heads #positions tokens"] | None,
    row: int,
    columns: Sequence[int],
    *,
    heads: bool = False,
) -> Float[Tensor, "kept positions columns"]:
    """softmax(QKᵀ/√d) of one picture, of some tokens: all heads, or their mean as one."""
    positions, tokens = query.shape[1], key.shape[1]
    at_once = max(1, SCORES_AT_ONCE // (positions * tokens))
    every = len(columns) == tokens
    parts = []
    for first in range(0, layer.heads, at_once):
        some = slice(first, first + at_once)
        weights = _logits(layer, query, key, mask, row, some).softmax(dim=-1)
        weights = weights if heads else weights.sum(dim=0, keepdim=True) / layer.heads
        parts.append(weights if every else weights[..., columns])
    return torch.cat(parts) if heads else sum(parts[1:], start=parts[0])


def _logits(
    layer: Attention,
    query: Float[Tensor, "batch positions inner"],
    key: Float[Tensor, "batch tokens inner"],
    mask: Float[Tensor, "batch heads #positions tokens"] | None,
    row: int,
    some: slice = slice(None),
) -> Float[Tensor, "heads positions tokens"]:
    """QKᵀ/√d + mask of one picture and of `some` heads, in single precision at least."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads = query[row].unflatten(-1, (layer.heads, -1)).transpose(0, 1)[some].to(dtype)
    keys = key[row].unflatten(-1, (layer.heads, -1)).permute(1, 2, 0)[some].to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        logits = heads @ (keys * layer.scale)
    return logits if mask is None else logits + mask[row, some]


def _mask_for_all_heads(
    layer: Attention, mask: Tensor | None, key: Float[Tensor, "batch tokens inner"]
) -> Float[Tensor, "batch heads #positions tokens"] | None:
    """The mask that a processor adds to the logits, as the processor would shape it."""
    if mask is None:
        return None
    batch, tokens = key.shape[:2]
    mask = layer.prepare_attention_mask(mask, tokens, batch)
    return mask.view(batch, layer.heads, -1, tokens)


# ------------------------------------------------------------------ several texts


@contextlib.contextmanager
def composed_attention(
    pipe: DiffusionPipeline,
    prompt: str,
    texts: Float[Tensor, "texts tokens features"],
    compose: Compose,
    *,
    columns: Sequence[Sequence[int]] | None = None,
) -> Iterator[None]:
    """In the block each cross-attention reads several texts, and `compose` makes one answer of it.

        R_i = softmax(Q K_iᵀ/√d) V_i, projected             for text i

    Only the rows that ask for `prompt` change, and nothing remains afterwards. Whatever processor
    is set computes R_i. What `capture_attention` sees meanwhile is the attention to `prompt`.

    Args:
        pipe: a pipeline with a U-Net; `capture_attention` says how the rows are told apart.
        prompt: what these rows ask for.
        texts: embeddings, as cross-attention reads them.
        compose: makes the answer of a layer, at one row, from those to the texts.
        columns: of each text, the tokens whose attention `compose` wants to see.

    Raises:
        ValueError: as `capture_attention`.
    """
    modules = _modules(pipe.unet)
    calls = _Calls(pipe, [prompt], None, False)
    with _uncompiled(pipe), contextlib.ExitStack() as stack:
        for handle in calls.watch(modules[""]):
            stack.callback(handle.remove)
        for name, module in _cross_attention(pipe, modules, "all").items():
            layer = _Composed(calls, texts, columns or [[]] * len(texts), compose)
            transformer = modules[name.rsplit(".transformer_blocks.", 1)[0]]
            noted = transformer.register_forward_pre_hook(layer.note_size, with_kwargs=True)
            stack.callback(noted.remove)
            stack.callback(module.register_forward_hook(layer.answer, with_kwargs=True).remove)
        yield


@dataclass
class _Composed:
    """Lets one cross-attention layer read several texts."""

    calls: _Calls
    texts: Float[Tensor, "texts tokens features"]
    columns: Sequence[Sequence[int]]
    compose: Compose
    size: tuple[int, int] = (0, 0)

    note_size = _Layer._note_size

    def answer(self, layer: Attention, args: tuple, kwargs: dict[str, Any], own: Tensor) -> Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        read = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        others = {"hidden_states", "encoder_hidden_states", "attention_mask"}
        options = {name: value for name, value in kwargs.items() if name not in others}
        count, answers = len(self.texts), own.clone()
        for row in self.calls.rows[0]:
            texts = self.texts.to(hidden)
            if isinstance(read, tuple):  # an IP-Adapter's tokens come behind the text
                images = [image[row : row + 1] for image in read[1]]
                texts = texts, [image.expand(count, *image.shape[1:]) for image in images]
            seen = hidden[row : row + 1]
            each = layer.forward(seen.expand(count, -1, -1), texts, **options)
            composed = self.compose(each.unflatten(1, self.size), self._attention(layer, seen))
            answers[row] = composed.flatten(0, 1)
        return answers

    def _attention(
        self, layer: Attention, seen: Float[Tensor, "1 positions features"]
    ) -> Float[Tensor, "texts height width"]:
        """What the tokens of `columns` get of each text's attention: the mean over heads."""
        query, maps = layer.to_q(seen), []
        for text, columns in zip(self.texts.to(seen), self.columns, strict=True):
            if columns:
                key = layer.to_k(text[None])
                maps.append(_maps(layer, query, key, None, 0, columns)[0].sum(dim=-1))
            else:
                maps.append(torch.zeros(seen.shape[1], device=seen.device))
        return torch.stack(maps).unflatten(1, self.size)


# ------------------------------------------------------------------ control


def control_words(
    logits: Float[Tensor, "rows heads height width tokens"],
    tokens: Sequence[int],
    mask: Tensor,
    *,
    add: float | Tensor = 0.0,
    scale: float = 1.0,
) -> Float[Tensor, "rows heads height width tokens"]:
    """logits·(1 + (scale − 1)·M) + add·M for `tokens`: their word is drawn to where M is 1.

    Paint-with-words (eDiff-I, section 4.3) is `add` = w·log(1 + σ)·max(QKᵀ).

    Args:
        logits: what a `control` is given.
        tokens: those of the word, from `AttentionMaps.tokens`.
        mask: M, (height, width) of any size, 0 to 1 or yes and no; brought to the layer's size,
            where a cell gets the share of it that M covers.
        add: what is added inside M.
        scale: what the logits are multiplied by inside M.
    """
    inside = _resized(mask.to(logits), logits.shape[2:4])[..., None]
    changed = logits.clone()
    changed[..., tokens] = logits[..., tokens] * (1 + (scale - 1) * inside) + add * inside
    return changed
