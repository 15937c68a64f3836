"""Answers to the exercises as people write them: right ones in other forms, and wrong ones.

The mistakes that a check names are not here: `test_checks.py` tries each of them. Here are wrong
answers without a name, and mistakes that are written in another way than the check does.
"""

import pytest
import torch
from test_checks import assert_rejected
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from lrd_helpers.checks import (
    autoencoder,
    codebooks,
    conditioning,
    cross_attention,
    ddpm,
    editing,
    evaluation,
    image_tasks,
    latent_diffusion,
    layerdiff,
    layered_rendering,
    quickstart,
    stable_diffusion,
    style,
    vision_guidance,
)
from lrd_helpers.layout_json import box_from_xywh

# ------------------------------------------------------------------ notebooks 00 to 03


def seed_by_loop(ious):
    best, most = None, -1.0
    for seed, values in ious.items():
        if min(values) > most:
            best, most = seed, min(values)
    return best


def jump_without_reshape(x0, t, noise, bars):
    return bars[t].sqrt() * x0 + (1 - bars[t]).sqrt() * noise


def ddim_along_epsilon(x, epsilon, bar, bar_to):
    """Song et al. 2021, Eq. 13: x/√ᾱ goes along ε from one σ to the other."""
    sigma, sigma_to = (((1 - b) / b) ** 0.5 for b in (bar, bar_to))
    return bar_to**0.5 * (x / bar**0.5 + (sigma_to - sigma) * epsilon)


def kl(mean, log_variance):
    return -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).flatten(1).sum(1).mean()


def standardised(z):
    return (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)


def cut_anew(codes, codebook):
    batch, rows, columns = codes.shape
    return codebook[codes].view(batch, -1, rows, columns)


def quantised(latents, codebook):
    """Without the package: all distances, position by position."""
    difference = latents[:, None] - codebook[None, :, :, None, None]
    return codebook[difference.square().sum(2).argmin(1)].permute(0, 3, 1, 2)


def straight_through(latents, codebook):
    return latents + (quantised(latents, codebook) - latents).detach()


def straight_through_from_the_code(latents, codebook):
    return quantised(latents, codebook).detach() + latents - latents.detach()


def half_a_gradient(latents, codebook):
    return 0.5 * latents + (quantised(latents, codebook) - 0.5 * latents).detach()


def loss_without_sample(unet, z, text, t, noise, bars, factor):
    bar = bars[t][:, None, None, None]
    return functional.mse_loss(unet(bar.sqrt() * factor * z + (1 - bar).sqrt() * noise, t, text), z)


def guided_in_pairs(unet, x, t, text, empty, scale):
    """Another order of the batch, kept to the end."""
    texts = torch.stack([empty.expand_as(text), text], 1).flatten(0, 1)
    both = unet(x.repeat_interleave(2, 0), t, texts).sample
    return torch.lerp(both[::2], both[1::2], scale)


def guided_in_two_calls(unet, x, t, text, empty, scale):
    without, with_caption = (
        unet(x, t, each).sample for each in (empty.expand(len(x), -1, -1), text)
    )
    return with_caption + (scale - 1) * (with_caption - without)


def guided_by_zeros(unet, x, t, text, empty, scale):
    """Nothing is not a row of zeros: the U-Net was trained with the empty caption's vectors."""
    return guided_in_pairs(unet, x, t, text, torch.zeros_like(empty), scale)


# ------------------------------------------------------------------ notebooks 04 to 06


def heads_by_loop(q, k, v, heads):
    parts = zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True)
    return torch.cat([functional.scaled_dot_product_attention(*part) for part in parts], 1)


def heads_with_one_softmax(q, k, v, heads):
    return functional.scaled_dot_product_attention(q, k, v)


def attention_scaled_by_tokens(x, c, to_q, to_k, to_v):
    return ((x @ to_q.T) @ (c @ to_k.T).T / len(c) ** 0.5).softmax(1) @ (c @ to_v.T)


def statistics_as_in_adain(features):
    variance, mean = torch.var_mean(features, (2, 3))
    return torch.cat([mean, (variance + 1e-5).sqrt()], 1)


def statistics_with_variances(features):
    return torch.cat([features.mean((2, 3)), features.var((2, 3), correction=0)], 1)


def two_parts(noise, prediction, mean, log_variance, kl_weight):
    code = Normal(mean, (log_variance / 2).exp())
    rate = kl_divergence(code, Normal(0.0, 1.0)).sum(1).mean()
    return functional.mse_loss(prediction, noise) + kl_weight * rate


def two_parts_with_wrong_sign(noise, prediction, mean, log_variance, kl_weight):
    return functional.mse_loss(prediction, noise) - kl_weight * kl(mean, log_variance)


def blended_by_choice(x, z, noise, mask, bar):
    return torch.where(mask > 0, x, bar.sqrt() * z + (1 - bar).sqrt() * noise)


def map_head_by_head(query, key, heads, token):
    shares = [
        torch.exp(q @ k.T / q.shape[1] ** 0.5)
        for q, k in zip(query.chunk(heads, 1), key.chunk(heads, 1), strict=True)
    ]
    return sum(s[:, token] / s.sum(1) for s in shares) / heads


def map_of_one_head(query, key, heads, token):
    return (query @ key.T / query.shape[1] ** 0.5).softmax(1)[:, token]


def iou_of_region(attention, mask, share):
    region = attention >= share * attention.max()
    return (region * mask).sum() / ((region + mask) > 0).sum()


# ------------------------------------------------------------------ notebooks 07 to 10


def xi_by_choice(delta, mask, inside, outside):
    return torch.einsum("c,hw->chw", delta, torch.where(mask > 0, inside, -outside))


def xi_without_a_channel(delta, mask, inside, outside):
    return xi_by_choice(delta * (delta != delta[-1]), mask, inside, outside)


def delta_by_sorting(x, attention, k):
    order = sorted(range(attention.numel()), key=lambda n: -float(attention.flatten()[n]))
    return torch.stack([x.flatten(1)[:, n] for n in order[:k]]).mean(0)


def masks_by_loops(boxes, height, width):
    masks = torch.zeros(len(boxes) + 1, height, width)
    for row in range(height):
        for column in range(width):
            x, y = (column + 0.5) / width, (row + 0.5) / height
            inside = [x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes]
            owner = len(boxes) - inside[::-1].index(True) if any(inside) else 0
            masks[owner, row, column] = 1
    return masks


def masks_by_slices(boxes, height, width, to_cell=round):
    owner = torch.zeros(height, width, dtype=torch.long)
    for number, box in enumerate(boxes, start=1):
        left, right = (to_cell(x * width) for x in box[::2])
        top, bottom = (to_cell(y * height) for y in box[1::2])
        owner[top:bottom, left:right] = number
    return functional.one_hot(owner, len(boxes) + 1).permute(2, 0, 1).float()


def masks_cut_off(boxes, height, width):
    return masks_by_slices(boxes, height, width, to_cell=int)


def masks_of_booleans(boxes, height, width):
    return masks_by_loops(boxes, height, width).bool()


def fields_by_loop(deltas, shapes, inside, outside):
    fields = torch.zeros(len(deltas) + 1, deltas.shape[1], *shapes.shape[1:])
    for number, (delta, shape) in enumerate(zip(deltas, shapes, strict=True), start=1):
        fields[number] = xi_by_choice(delta, shape, inside, outside)
    return fields


def noises_layer_by_layer(ask, x, t, fields, empty, prompts, scale):
    rows = []
    for field, prompt in zip(fields, prompts, strict=True):
        s = ask((x + field)[None], t, empty[None])[0]
        rows.append((1 - scale) * s + scale * ask((x + field)[None], t, prompt[None])[0])
    return torch.stack(rows)


def composed_by_choice(noises, masks):
    return noises.gather(0, masks.argmax(0).expand(1, *noises.shape[1:]))[0]


def algorithm_in_two_parts(x, times, fraction, layered, general, step):
    count = round(fraction * len(times))
    for t in times[:count]:
        x = step(layered(x, t), t, x)
    for t in times[count:]:
        x = step(general(x, t), t, x)
    return x


def algorithm_without_its_last_step(x, times, *rest):
    return algorithm_in_two_parts(x, times[:-1], *rest)


def iou_on_a_grid(a, b):
    """By counting: the boxes of the cases have one or two decimals."""
    y, x = torch.meshgrid(*[(torch.arange(200) + 0.5) / 200] * 2, indexing="ij")
    inside = [(x > c[0]) & (x < c[2]) & (y > c[1]) & (y < c[3]) for c in (a, b)]
    return (inside[0] & inside[1]).sum() / (inside[0] | inside[1]).sum()


def share_by_counting(ious, count):
    wrong = [any(iou < 0.5 for iou in picture) for picture in ious if len(picture) == count]
    return wrong.count(False) / len(wrong)


def p_by_trying(wins, losses):
    """All sequences of coins."""
    n, far = wins + losses, abs(wins - losses)
    heads = [bin(number).count("1") for number in range(2**n)]
    return sum(abs(2 * h - n) >= far for h in heads) / 2**n


def way_by_recursion(z, score, move, times, bars):
    if len(times) == 1:
        return z[None]
    before = way_by_recursion(z, score, move, times[:-1], bars[:-1])
    last = move(before[-1], score(before[-1], times[-1]), bars[-2], bars[-1])
    return torch.cat([before, last[None]])


def way_of_noise_alone(z, score, move, times, bars):
    return torch.stack([move(z, torch.zeros_like(z), bars[0], bar) for bar in bars])


def cells_by_views(mask, factor):
    height, width = mask.shape
    return mask.view(height // factor, factor, width // factor, factor).any(3).any(1)


def share_of_cells(mask, factor):
    return functional.avg_pool2d(mask[None].float(), factor)[0]


def inside_by_recursion(step, pages, changing, noise):
    x = torch.where(changing, noise, pages[-1])
    if len(pages) == 1:
        return x
    x = torch.where(changing, step(x, len(pages) - 1), pages[-2])
    return inside_by_recursion(step, pages[:-1], changing, x)


# ------------------------------------------------------------------ notebook 11


def flattened_front_to_back(background, layers):
    """What each layer lets through counts for all that is below it."""
    picture, through = torch.zeros_like(background), torch.ones_like(background[:1])
    for layer in layers.flip(0):
        picture = picture + through * layer[3:] * layer[:3]
        through = through * (1 - layer[3:])
    return picture + through * background


def slots_by_loops(x, to_q, to_k, to_v):
    answer = torch.empty_like(x)
    for row in range(x.shape[2]):
        for column in range(x.shape[3]):
            q, k, v = (x[:, :, row, column] @ matrix.T for matrix in (to_q, to_k, to_v))
            scores = (q[:, None] * k).sum(2) / q.shape[1] ** 0.5
            answer[:, :, row, column] = scores.softmax(1) @ v
    return answer


def slots_in_the_batch(x, *matrices):
    """The slots stay rows of a batch: nobody hears anybody."""
    return slots_by_loops(x[:1], *matrices).expand_as(x)


def step_of_noisy_slots_alone(ask, x, clean, given, t, bar, bar_to):
    shown, times = x.clone(), t.repeat(len(x))
    shown[given], times[given] = clean[given], 0
    after = ddim_along_epsilon(x, ask(shown, times), bar, bar_to)
    after[given] = clean[given]
    return after


def given_slots_under_noise(ask, x, clean, given, t, bar, bar_to):
    """As in inpainting: the given slots get as much noise as the others have."""
    shown = torch.where(given[:, None, None, None], bar.sqrt() * clean + (1 - bar).sqrt() * x, x)
    after = ddim_along_epsilon(x, ask(shown, t.repeat(len(x))), bar, bar_to)
    return torch.where(given[:, None, None, None], clean, after)


def share_by_counting_pixels(composite, back, front):
    yes = both = 0
    for row in range(composite.shape[1]):
        for column in range(composite.shape[2]):
            if min(back[3, row, column], front[3, row, column]) > 0.5:
                colour = composite[:, row, column]
                far = [float((colour - each[:3, row, column]).norm()) for each in (back, front)]
                both, yes = both + 1, yes + (far[1] < far[0])
    return yes / both


# ------------------------------------------------------------------ notebook 12


def tokens_by_loop(pieces, number):
    word, mask = 0, []
    for piece in pieces:
        mask.append(word == number and not piece.startswith("<|"))
        word += piece.endswith("</w>")
    return torch.tensor(mask)


def tokens_that_begin_a_word(pieces, number):
    return torch.tensor([False, *(piece.endswith("</w>") for piece in pieces[:-1])])


def bytes_by_the_time_line(weights, row, rows, decoding):
    there = sum(weights.values())
    return max(there, there + row * rows, there + decoding)


# ------------------------------------------------------------------ right answers

RIGHT = [
    (quickstart.check_corners, lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]]),
    (quickstart.check_corners, box_from_xywh),
    (quickstart.check_best_seed, seed_by_loop),
    (ddpm.check_ddim_step, ddim_along_epsilon),
    (autoencoder.check_kl, kl),
    (codebooks.check_quantise, straight_through),
    (codebooks.check_quantise, straight_through_from_the_code),
    (autoencoder.check_scaled, lambda z: z / float(z.std(correction=0))),
    (codebooks.check_vectors_of, lambda codes, e: torch.einsum("bhwc->bchw", e[codes])),
    (latent_diffusion.check_guided_answer, guided_in_pairs),
    (latent_diffusion.check_guided_answer, guided_in_two_calls),
    (conditioning.check_many_heads, heads_by_loop),
    (style.check_style_statistics, statistics_as_in_adain),
    (style.check_two_part_loss, two_parts),
    (style.check_two_part_loss, lambda *case: two_parts(*case).item()),
    (image_tasks.check_blended, blended_by_choice),
    (cross_attention.check_word_map, lambda w, i, h, n: w.mean(0)[:, i].sum(1).view(h, n)),
    (cross_attention.check_mended_map, map_head_by_head),
    (cross_attention.check_mask_iou, iou_of_region),
    (vision_guidance.check_snr_of_mean, lambda bar, v, n: torch.tensor(n * v * bar / (1 - bar))),
    (vision_guidance.check_xi, xi_by_choice),
    (vision_guidance.check_xi, lambda d, m, a, b: d[:, None, None] * ((a + b) * m - b)),
    (vision_guidance.check_delta_from_attention, delta_by_sorting),
    (layered_rendering.check_visible_masks, masks_by_loops),
    (layered_rendering.check_visible_masks, masks_by_slices),
    (layered_rendering.check_visible_masks, masks_of_booleans),
    (layered_rendering.check_fields_of, fields_by_loop),
    (layered_rendering.check_layer_noises, noises_layer_by_layer),
    (layered_rendering.check_composed, composed_by_choice),
    (layered_rendering.check_algorithm_1, algorithm_in_two_parts),
    (evaluation.check_iou, iou_on_a_grid),
    (evaluation.check_share_right, share_by_counting),
    (evaluation.check_p_value, p_by_trying),
    (editing.check_way_there, way_by_recursion),
    (editing.check_touched_cells, cells_by_views),
    (editing.check_touched_cells, lambda mask, factor: share_of_cells(mask, factor) > 0),
    (editing.check_redraw_inside, inside_by_recursion),
    (layerdiff.check_flattened, flattened_front_to_back),
    (layerdiff.check_slots_attend, slots_by_loops),
    (layerdiff.check_step_with_given, step_of_noisy_slots_alone),
    (layerdiff.check_front_share, share_by_counting_pixels),
    (stable_diffusion.check_word_mask, tokens_by_loop),
    (stable_diffusion.check_level_for_cells, lambda bar, n, m: 1 / (1 + m * (1 / bar - 1) / n)),
    (stable_diffusion.check_bytes_needed, bytes_by_the_time_line),
]


@pytest.mark.parametrize(("check", "answer"), RIGHT)
def test_a_right_answer_passes_however_written(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("✓ ")


# ------------------------------------------------------------------ wrong answers

WRONG = [
    (quickstart.check_best_seed, lambda ious: max(ious, key=ious.get), "the first layer alone"),
    (quickstart.check_best_seed, lambda ious: ious[seed_by_loop(ious)], "a list"),
    (quickstart.check_corners, lambda box: (*box[:2], box[0] + box[2], 1), "1 at place 3"),
    (quickstart.check_corners, lambda box: box[:2], "the shape (2,)"),
    (quickstart.check_corners, lambda box: "left", "it raised"),
    (ddpm.check_jump, jump_without_reshape, "it raised RuntimeError"),
    (ddpm.check_step_back, lambda x, t, e, z, betas: x - betas[t] * e, "at grain"),
    (autoencoder.check_kl, lambda m, v: kl(m, v) / 4, "from one number, ½·Σ"),
    (autoencoder.check_kl, lambda m, v: kl(m, v)[None], "the shape (1,)"),
    (autoencoder.check_sampled, lambda m, v, e: torch.normal(m, v.exp().sqrt()), "from μ + σ·ε"),
    (autoencoder.check_sampled, lambda m, v, e: m + v.sqrt() * e, "nan"),
    (codebooks.check_quantise, quantised, "the gradient goes to the codebook, none"),
    (codebooks.check_quantise, torch.no_grad()(quantised), "no gradient reaches the encoder"),
    (codebooks.check_quantise, half_a_gradient, "from at each position"),
    (autoencoder.check_scaled, lambda z: 0.18215 * z, "from latents/σ̂"),
    (autoencoder.check_scaled, lambda z: 1 / z.std(), "the shape (4, 4, 5, 5)"),
    (autoencoder.check_scaled, standardised, "the colleague's code"),
    (codebooks.check_vectors_of, lambda codes, e: e[codes].flip(1).movedim(-1, 1), "from the"),
    (codebooks.check_vectors_of, cut_anew, "the mosaic's code"),
    (latent_diffusion.check_latent_loss, loss_without_sample, "it raised"),
    (latent_diffusion.check_guided_answer, guided_by_zeros, "for each picture of x"),
    (conditioning.check_many_heads, heads_with_one_softmax, "in head h softmax"),
    (conditioning.check_cross_attention, attention_scaled_by_tokens, "from softmax(QKᵀ/√d)·V"),
    (style.check_style_statistics, statistics_with_variances, "square root is missing"),
    (style.check_two_part_loss, two_parts_with_wrong_sign, "the KL is subtracted"),
    (image_tasks.check_noisier, lambda x, e, bar, more: (bar - more).sqrt() * e, "from √r·x"),
    (vision_guidance.check_xi, lambda d, m, a, b: a * m - b * (1 - m), "the shape (4, 5, 6)"),
    (cross_attention.check_mended_map, map_of_one_head, " at position "),
    (vision_guidance.check_xi, xi_without_a_channel, "at channel 3, row 0, column 0\n"),
    (layered_rendering.check_visible_masks, masks_cut_off, "at mask "),
    (
        layered_rendering.check_algorithm_1,
        algorithm_without_its_last_step,
        ": call 5 is general(x, 900) where layered(x, 900) is due\n",
    ),
    (
        layered_rendering.check_layer_noises,
        lambda ask, x, t, xi, y0, y, g: ask(x, t, y),
        "ask wants a batch",
    ),
    (evaluation.check_iou, lambda a, b: 1 - iou_on_a_grid(a, b), "from the area"),
    (evaluation.check_share_right, lambda ious, count: 0.5, "from among the pictures with"),
    (editing.check_way_there, way_of_noise_alone, ", picture 0, channel "),
    (editing.check_touched_cells, lambda *case: share_of_cells(*case).round(), "at least half"),
    (editing.check_touched_cells, lambda *case: share_of_cells(*case) > 0.5, "at least half"),
    (layerdiff.check_flattened, lambda below, layers: layers[-1, :3], "from x of shape"),
    (layerdiff.check_slots_attend, lambda x, *matrices: x, "from at each position"),
    (layerdiff.check_slots_attend, slots_in_the_batch, "from at each position"),
    (layerdiff.check_step_with_given, given_slots_under_noise, "from the slots at level bar_to"),
    (layerdiff.check_front_share, lambda *case: share_by_counting_pixels(*case) > 0.5, "from a nu"),
    (stable_diffusion.check_word_mask, lambda pieces, number: [number + 1], "a list"),
    (stable_diffusion.check_word_mask, tokens_that_begin_a_word, "at token 2\n"),
    (stable_diffusion.check_level_for_cells, lambda bar, n, m: bar, "from the ᾱ'"),
    (stable_diffusion.check_bytes_needed, lambda w, *rest: sum(w.values()), "from all weights"),
]


@pytest.mark.parametrize(("check", "answer", "message"), WRONG)
def test_a_wrong_answer_is_rejected(check, answer, message, capsys):
    check(answer)
    assert_rejected(capsys.readouterr().out, message)
