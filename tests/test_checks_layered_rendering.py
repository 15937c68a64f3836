"""The checks of notebook 08: a right answer passes however written, each mistake is recognised."""

import pytest
import torch
from test_checks import assert_diagnosed

from lrd_helpers import Layer, Layout
from lrd_helpers.checks import layered_rendering as checks

NAMES = ["visible_masks", "fields_of", "layer_noises", "composed", "algorithm_1"]


# ------------------------------------------------------------------ exercise 1


def masks_by_loops(boxes, height, width, front=max, background=True):
    masks = torch.zeros(len(boxes) + 1, height, width)
    for row in range(height):
        for column in range(width):
            x, y = (column + 0.5) / width, (row + 0.5) / height
            owners = [
                number
                for number, (x0, y0, x1, y1) in enumerate(boxes, start=1)
                if x0 <= x < x1 and y0 <= y < y1
            ]
            masks[front(owners) if owners else 0, row, column] = 1
    return masks if background else masks[1:]


def masks_by_rounding(boxes, height, width):
    owner = torch.zeros(height, width, dtype=torch.long)
    for number, (x0, y0, x1, y1) in enumerate(boxes, start=1):
        owner[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = (
            number
        )
    return torch.nn.functional.one_hot(owner, len(boxes) + 1).permute(2, 0, 1).float()


def masks_by_cutting(boxes, height, width):
    owner = torch.zeros(height, width, dtype=torch.long)
    for number, (x0, y0, x1, y1) in enumerate(boxes, start=1):
        owner[int(y0 * height) : int(y1 * height), int(x0 * width) : int(x1 * width)] = number
    return torch.nn.functional.one_hot(owner, len(boxes) + 1).permute(2, 0, 1).float()


def masks_overlapping(boxes, height, width):
    one_by_one = [masks_by_loops([box], height, width)[1] for box in boxes]
    return torch.stack([1 - torch.stack(one_by_one).amax(0), *one_by_one])


def masks_over_everything(boxes, height, width):
    masks = masks_by_loops(boxes, height, width)
    masks[0] = 1
    return masks


# ------------------------------------------------------------------ exercises 2 to 5


def fields_by_loop(deltas, shapes, inside, outside):
    fields = torch.zeros(len(deltas) + 1, deltas.shape[1], *shapes.shape[1:])
    for number, (delta, shape) in enumerate(zip(deltas, shapes, strict=True), start=1):
        fields[number] = torch.einsum("c,hw->chw", delta, torch.where(shape > 0, inside, -outside))
    return fields


def fields_at_once(deltas, shapes, inside, outside):
    strengths = inside * shapes - outside * (1 - shapes)
    fields = deltas[:, :, None, None] * strengths[:, None]
    return torch.cat([torch.zeros_like(fields[:1]), fields])


def fields_without_background(deltas, shapes, inside, outside):
    return fields_at_once(deltas, shapes, inside, outside)[1:]


def fields_like(rule):
    def answer(deltas, shapes, inside, outside):
        fields = deltas[:, :, None, None] * rule(shapes, inside, outside)[:, None]
        return torch.cat([torch.zeros_like(fields[:1]), fields])

    return answer


def noises_one_by_one(ask, x, t, fields, empty, prompts, scale):
    rows = []
    for field, prompt in zip(fields, prompts, strict=True):
        s = ask((x + field)[None], t, empty[None])[0]
        rows.append((1 - scale) * s + scale * ask((x + field)[None], t, prompt[None])[0])
    return torch.stack(rows)


def noises_in_one_batch(ask, x, t, fields, empty, prompts, scale):
    texts = torch.cat([empty.expand_as(prompts), prompts])
    s, s_y = ask(torch.cat([x + fields] * 2), t, texts).chunk(2)
    return s + scale * (s_y - s)


def noises_like(combine, unconditional=lambda x, fields: x + fields):
    def answer(ask, x, t, fields, empty, prompts, scale):
        s = ask(unconditional(x, fields), t, empty.expand_as(prompts))
        return combine(s, ask(x + fields, t, prompts), scale)

    return answer


def noises_without_a_batch(ask, x, t, fields, empty, prompts, scale):
    return ask(x, t, prompts)


def noises_in_place(ask, x, t, fields, empty, prompts, scale):
    fields += x
    s, s_y = ask(fields, t, empty.expand_as(prompts)), ask(fields, t, prompts)
    return s + scale * (s_y - s)


def composed_by_choice(noises, masks):
    owner = masks.argmax(0)
    return noises.gather(0, owner.expand(1, *noises.shape[1:]))[0]


def composed_without_channels(noises, masks):
    return (masks * noises).sum(0)


def loop_in_two_parts(x, times, fraction, layered, general, step):
    count = round(fraction * len(times))
    for t in times[:count]:
        x = step(layered(x, t), t, x)
    for t in times[count:]:
        x = step(general(x, t), t, x)
    return x


def loop_like(rule):
    def answer(x, times, fraction, layered, general, step):
        for number, t in enumerate(times):
            ask = layered if rule(number, t, len(times), fraction) else general
            x = step(ask(x, t), t, x)
        return x

    return answer


def loop_without_steps(x, times, fraction, layered, general, step):
    for number, t in enumerate(times):
        x = layered(x, t) if number < round(fraction * len(times)) else general(x, t)
    return x


ANSWERS = [
    ("visible_masks", masks_by_loops, "✓"),
    ("visible_masks", masks_by_rounding, "✓"),
    ("visible_masks", lambda b, h, w: masks_by_loops(b, h, w, min), "is in front"),
    ("visible_masks", masks_overlapping, "belongs to both layers"),
    ("visible_masks", masks_over_everything, "the background keeps the cells"),
    (
        "visible_masks",
        lambda b, h, w: masks_by_loops([(y, x, v, u) for x, y, u, v in b], h, w),
        "x and y have changed places",
    ),
    ("visible_masks", lambda b, h, w: masks_by_loops(b, h, w).roll(-1, 0), "the last mask"),
    ("visible_masks", masks_by_cutting, "as number"),
    ("visible_masks", lambda b, h, w: masks_by_loops(b, w, h), "the shape (3, 9, 6)"),
    (
        "visible_masks",
        lambda b, h, w: masks_by_loops(b, h, w, background=False),
        "the shape (2, 6, 9)",
    ),
    ("fields_of", fields_by_loop, "✓"),
    ("fields_of", fields_at_once, "✓"),
    ("fields_of", fields_without_background, "the shape (2, 4, 5, 6)"),
    ("fields_of", lambda d, m, a, b: fields_at_once(d, m, a, b).roll(-1, 0), "is the last"),
    ("fields_of", fields_like(lambda m, a, b: a * m), "nothing outside"),
    ("fields_of", fields_like(lambda m, a, b: a * m + b * (1 - m)), "the sign of inside"),
    ("fields_of", fields_like(lambda m, a, b: b * (1 - m) - a * m), "the signs have changed"),
    ("fields_of", fields_like(lambda m, a, b: b * m - a * (1 - m)), "the two strengths"),
    ("fields_of", fields_like(lambda m, a, b: a * (2 * m - 1)), "`outside` has no effect"),
    ("fields_of", lambda d, m, a, b: fields_at_once(d[[0] * len(d)], m, a, b), "first layer's δ"),
    ("fields_of", fields_like(lambda m, a, b: 2 * a * m - b * (1 - m)), "zeros for the background"),
    ("layer_noises", noises_one_by_one, "✓"),
    ("layer_noises", noises_in_one_batch, "✓"),
    (
        "layer_noises",
        noises_like(lambda s, s_y, g: s + g * (s_y - s), lambda x, xi: x.expand_as(xi)),
        "without a prompt does not see ξ",
    ),
    ("layer_noises", noises_like(lambda s, s_y, g: s_y), "without guidance"),
    ("layer_noises", noises_like(lambda s, s_y, g: g * (s_y - s)), "s is missing"),
    ("layer_noises", noises_like(lambda s, s_y, g: s_y + g * (s_y - s)), "one scale too much"),
    ("layer_noises", noises_like(lambda s, s_y, g: s + g * (s - s_y)), "away from the prompt"),
    ("layer_noises", noises_like(lambda s, s_y, g: s + g * s_y), "a row a layer"),
    ("layer_noises", noises_without_a_batch, "ask wants a batch"),
    ("layer_noises", noises_in_place, "changed its arguments in place"),
    ("composed", lambda noises, masks: torch.einsum("nchw,nhw->chw", noises, masks), "✓"),
    ("composed", composed_by_choice, "✓"),
    ("composed", composed_without_channels, "it raised RuntimeError"),
    ("composed", lambda noises, masks: noises.mean(0), "the mean over the layers"),
    ("composed", lambda noises, masks: noises.sum(0), "the sum over the layers"),
    ("composed", lambda noises, masks: (noises * masks[:, None]).mean(0), "divided by the number"),
    ("composed", lambda noises, masks: (noises * masks[:, None])[1:].sum(0), "nothing where"),
    ("composed", lambda noises, masks: (noises * (1 - masks[:, None])).sum(0), "its mask is 0"),
    ("composed", lambda noises, masks: noises * masks[:, None], "the shape (3, 4, 6, 7)"),
    ("algorithm_1", loop_in_two_parts, "✓"),
    ("algorithm_1", loop_like(lambda n, t, steps, f: n < round(f * steps)), "✓"),
    ("algorithm_1", loop_like(lambda n, t, steps, f: n <= round(f * steps)), "too many"),
    ("algorithm_1", loop_like(lambda n, t, steps, f: n >= round(f * steps)), "general first"),
    ("algorithm_1", loop_like(lambda n, t, steps, f: n >= steps - round(f * steps)), "last part"),
    ("algorithm_1", loop_like(lambda n, t, steps, f: t > 1000 * (1 - f)), "of the time t"),
    ("algorithm_1", loop_like(lambda n, t, steps, f: n < int(f * steps)), "cut off"),
    ("algorithm_1", loop_like(lambda *_: True), "every step is layered"),
    ("algorithm_1", loop_like(lambda *_: False), "no step is layered"),
    ("algorithm_1", lambda x, times, *rest: loop_in_two_parts(x, times[:1], *rest), "stops after"),
    ("algorithm_1", loop_without_steps, "each followed by x = step"),
]


@pytest.mark.parametrize(("exercise", "answer", "said"), ANSWERS)
def test_every_answer_of_notebook_08_is_diagnosed(exercise, answer, said, capsys):
    assert_diagnosed(getattr(checks, f"check_{exercise}"), answer, said, capsys)


@pytest.mark.parametrize("exercise", NAMES)
def test_an_untouched_stub_is_no_mistake(exercise, capsys):
    def stub(*arguments): ...

    getattr(checks, f"check_{exercise}")(stub)
    assert capsys.readouterr().out == "not implemented yet: stub\n"


# ------------------------------------------------------------------ the machine


def stub(*arguments): ...


def test_for_what_is_not_written_ours_stands_in(capsys):
    pieces = checks.assembled(stub, stub, stub, stub, stub)
    assert capsys.readouterr().out == f"yours: none yet\nours:  {', '.join(NAMES)}\n"
    boxes = [(0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 1.0, 0.5)]
    layout = Layout("x", layers=[Layer("x", box=box) for box in boxes])
    assert torch.equal(pieces.visible_masks(boxes, 8, 8), layout.masks(8, 8))


def test_what_is_right_is_used_and_what_is_wrong_is_not(capsys):
    pieces = checks.assembled(
        masks_by_loops,
        fields_without_background,
        noises_in_one_batch,
        composed_without_channels,
        loop_in_two_parts,
    )
    said = capsys.readouterr().out.splitlines()
    assert said == ["yours: visible_masks, layer_noises, algorithm_1", "ours:  fields_of, composed"]
    assert pieces.visible_masks is masks_by_loops
    assert pieces.layer_noises is noises_in_one_batch
    assert pieces.algorithm_1 is loop_in_two_parts
    noises, masks = torch.ones(2, 4, 3, 3), torch.full((2, 3, 3), 0.5)
    assert torch.equal(pieces.composed(noises, masks), torch.ones(4, 3, 3))


def test_with_five_right_pieces_nothing_is_ours(capsys):
    checks.assembled(
        masks_by_loops, fields_by_loop, noises_one_by_one, composed_by_choice, loop_in_two_parts
    )
    assert capsys.readouterr().out.splitlines()[1] == "ours:  none"
