"""The checks of notebook 10: a right answer passes however written, each mistake is recognised."""

import math

import pytest
import torch
from test_checks import assert_diagnosed
from torch.nn import functional

from lrd_helpers.checks import editing as checks
from lrd_helpers.ddpm import NoiseSchedule
from lrd_helpers.editing import Edited
from lrd_helpers.pictures import picture_of, pixels_of


def kept_by_weights(before, after, changed):
    outside = (~changed).float()
    error = ((after - before) ** 2).mean(0) * outside
    return -10 * math.log10(error.sum() / outside.sum())


def kept_by_root(before, after, changed):
    return -20 * (after - before)[:, ~changed].square().mean().sqrt().log10()


def move_in_three_lines(x, epsilon, bar, bar_to):
    """Song et al. 2021, Eq. 13: x/√ᾱ goes along ε from one σ to the other."""
    sigma, sigma_to = (((1 - b) / b) ** 0.5 for b in (bar, bar_to))
    return bar_to**0.5 * (x / bar**0.5 + (sigma_to - sigma) * epsilon)


def move_clean(x, epsilon, bar, bar_to):
    return (x - (1 - bar).sqrt() * epsilon) / bar.sqrt()


def touched_by_views(mask, factor):
    height, width = mask.shape
    cells = mask.view(height // factor, factor, width // factor, factor)
    return cells.any(3).any(1)


def share_of_cell(mask, factor):
    return functional.avg_pool2d(mask[None].float(), factor)[0]


def inside_by_recursion(step, known, changing, noise):
    x = torch.where(changing, noise, known[-1])
    if len(known) == 1:
        return x
    x = torch.where(changing, step(x, len(known) - 1), known[-2])
    return inside_by_recursion(step, known[:-1], changing, x)


def inside(step, known, changing, noise, *, begin=None, shift=1, last=0, back=True):
    x = torch.where(changing, noise, known[-1]) if begin is None else begin
    for level in range(len(known) - 1, last, -1):
        x = step(x, level)
        if back:
            x = torch.where(changing, x, known[level - shift])
    return x


def put_back_before(step, known, changing, noise):
    x = noise
    for level in range(len(known) - 1, 0, -1):
        x = step(torch.where(changing, x, known[level]), level)
    return x


def put_back_at_the_end(*case):
    return torch.where(case[2], inside(*case, back=False), case[1][0])


def put_back_clean(step, known, changing, noise):
    x = torch.where(changing, noise, known[-1])
    for level in range(len(known) - 1, 0, -1):
        x = torch.where(changing, step(x, level), known[0])
    return x


def upwards(step, known, changing, noise):
    x = torch.where(changing, noise, known[-1])
    for level in range(1, len(known)):
        x = torch.where(changing, step(x, level), known[level - 1])
    return x


def square(before, after):
    return (after - before).square()


ANSWERS = [
    ("kept", lambda b, a, c: -10 * square(b, a)[:, ~c].mean().log10(), "✓"),
    ("kept", kept_by_weights, "✓"),
    ("kept", kept_by_root, "✓"),
    ("kept", lambda b, a, c: -10 * square(b, a).mean().log10(), "the whole picture"),
    ("kept", lambda b, a, c: -10 * square(b, a)[:, c].mean().log10(), "the PSNR inside"),
    ("kept", lambda b, a, c: -10 * (square(b, a) * ~c).mean().log10(), "set to 0"),
    ("kept", lambda b, a, c: 10 * square(b, a)[:, ~c].mean().log10(), "wrong sign"),
    ("kept", lambda b, a, c: -10 * square(b, a)[:, ~c].mean().sqrt().log10(), "half as many"),
    ("kept", lambda b, a, c: -20 * square(b, a)[:, ~c].mean().log10(), "twice as many"),
    ("kept", lambda b, a, c: -10 * square(b, a)[:, ~c].mean().log(), "natural logarithm"),
    ("kept", lambda b, a, c: -10 * (a - b)[:, ~c].abs().mean().log10(), "absolute differences"),
    ("kept", lambda b, a, c: square(b, a)[:, ~c].mean(), "mean squared error itself"),
    ("kept", lambda b, a, c: -10 * square(b, a)[:, ~c].sum().log10(), "`changed` is not set"),
    ("kept", lambda b, a, c: square(b, a)[:, ~c], "a Tensor"),
    ("ddim_move", move_in_three_lines, "✓"),
    ("ddim_move", lambda x, e, a, b: b.sqrt() * move_clean(x, e, a, b) + (1 - b).sqrt() * e, "✓"),
    ("ddim_move", move_clean, "stops at x̂_0"),
    ("ddim_move", lambda x, e, a, b: b.sqrt() * x + (1 - b).sqrt() * e, "treated as a clean"),
    ("ddim_move", lambda x, e, a, b: move_in_three_lines(x, e, b, a), "changed places"),
    ("ddim_move", lambda x, e, a, b: x.clone(), "nothing moves"),
    (
        "ddim_move",
        lambda x, e, a, b: b.sqrt() * (x - (1 - a).sqrt() * e) + (1 - b).sqrt() * e,
        "not divided by √bar",
    ),
    (
        "ddim_move",
        lambda x, e, a, b: b * (x - (1 - a) * e) / a + (1 - b) * e,
        "no square roots",
    ),
    (
        "ddim_move",
        lambda x, e, a, b: b.sqrt() * move_clean(x, -e, a, b) + (1 - b).sqrt() * e,
        "ε is added",
    ),
    ("ddim_move", lambda x, e, a, b: b.sqrt() * move_clean(x, e, a, b), "gets no noise"),
    ("ddim_move", lambda x, e, a, b: x - e, "√bar_to·x̂_0"),
    ("ddim_move", lambda x, e, a, b: x[0], "the shape"),
    ("touched_cells", touched_by_views, "✓"),
    ("touched_cells", lambda m, f: functional.max_pool2d(m[None].float(), f)[0] > 0, "✓"),
    ("touched_cells", lambda m, f: share_of_cell(m, f) > 0, "✓"),
    ("touched_cells", lambda m, f: share_of_cell(m, f) >= 0.5, "at least half"),
    ("touched_cells", lambda m, f: share_of_cell(m, f) > 0.5, "more than half"),
    ("touched_cells", lambda m, f: share_of_cell(m, f).round(), "more than half"),
    ("touched_cells", lambda m, f: share_of_cell(m, f) == 1, "covered wholly"),
    ("touched_cells", share_of_cell, "not yes or no"),
    ("touched_cells", lambda m, f: m[::f, ::f], "upper left"),
    ("touched_cells", lambda m, f: m[f // 2 :: f, f // 2 :: f], "middle one"),
    ("touched_cells", lambda m, f: ~touched_by_views(m, f), "changed places"),
    ("touched_cells", lambda m, f: m, "the shape (16, 24)"),
    ("touched_cells", lambda m, f: functional.max_pool2d(m[None].float(), f) > 0, "the shape (1,"),
    ("touched_cells", lambda m, f: functional.max_pool2d(m, f), "it raised"),
    ("redraw_inside", inside, "✓"),
    ("redraw_inside", inside_by_recursion, "✓"),
    ("redraw_inside", lambda *case: inside(*case, shift=0), "as noisy as before"),
    ("redraw_inside", put_back_clean, "clean picture is put back"),
    ("redraw_inside", lambda *case: inside(*case, back=False), "nothing is put back"),
    ("redraw_inside", put_back_at_the_end, "only once, at the end"),
    ("redraw_inside", put_back_before, "not after the last one"),
    ("redraw_inside", lambda s, k, c, n: inside(s, k, ~c, n), "inside and outside"),
    (
        "redraw_inside",
        lambda s, k, c, n: inside(s, k, ~c, n, begin=torch.where(c, n, k[-1])),
        "after the steps",
    ),
    ("redraw_inside", lambda s, k, c, n: inside(s, k, c, n, begin=k[-1]), "noise is not used"),
    ("redraw_inside", lambda s, k, c, n: inside(s, k, c, n, begin=n), "new noise everywhere"),
    ("redraw_inside", upwards, "upwards"),
    ("redraw_inside", lambda *case: inside(*case, last=1), "one step is missing"),
    ("redraw_inside", lambda s, k, c, n: k[0], "noise inside and known[-1] outside"),
]


@pytest.mark.parametrize(("exercise", "answer", "said"), ANSWERS)
def test_every_answer_of_notebook_10_is_diagnosed(exercise, answer, said, capsys):
    assert_diagnosed(getattr(checks, f"check_{exercise}"), answer, said, capsys)


@pytest.mark.parametrize("exercise", ["kept", "ddim_move", "touched_cells", "redraw_inside"])
def test_an_untouched_stub_is_no_mistake(exercise, capsys):
    def stub(*arguments): ...

    getattr(checks, f"check_{exercise}")(stub)
    assert capsys.readouterr().out == "not implemented yet: stub\n"


def test_what_exercise_1_accepts_is_the_package_s_figure():
    """A second source for the check's own solution: `Edited.kept`."""
    generator = torch.Generator().manual_seed(0)
    before, after = (picture_of(torch.rand(3, 8, 8, generator=generator)) for _ in range(2))
    changed = torch.zeros(8, 8, dtype=torch.bool)
    changed[2:5, 3:] = True
    ours = kept_by_weights(pixels_of(before), pixels_of(after), changed)
    assert ours == pytest.approx(Edited(after, before, changed).kept, abs=1e-4)


def test_what_exercise_2_accepts_is_diffusers_step():
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    bars = NoiseSchedule.scaled_linear().alphas_cumprod
    x, epsilon = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    options = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    down, up = DDIMScheduler(**options), DDIMInverseScheduler(**options)
    for scheduler, t, start, goal in ((down, 601, 601, 561), (up, 601, 561, 601)):
        scheduler.set_timesteps(25)
        theirs = scheduler.step(epsilon, t, x).prev_sample
        ours = move_in_three_lines(x, epsilon, bars[start], bars[goal])
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
