"""The checks of notebook 09: a right answer passes however written, each mistake is recognised."""

import math

import numpy
import pytest
import torch
from PIL import Image
from test_checks import assert_diagnosed

from lrd_helpers.benchmark import estimate
from lrd_helpers.checks import evaluation as checks
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.measure import Detection, average_precision, box_iou


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def both(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def union(a, b):
    return area(a) + area(b) - both(a, b)


def iou_on_a_grid(a, b):
    """By counting: the boxes of the cases have one or two decimals."""
    y, x = torch.meshgrid(*[(torch.arange(200) + 0.5) / 200] * 2, indexing="ij")
    inside = [(x > c[0]) & (x < c[2]) & (y > c[1]) & (y < c[3]) for c in (a, b)]
    return (inside[0] & inside[1]).sum() / (inside[0] | inside[1]).sum()


def iou_not_cut_off(a, b):
    shared = (min(a[2], b[2]) - max(a[0], b[0])) * (min(a[3], b[3]) - max(a[1], b[1]))
    return shared / (area(a) + area(b) - shared)


def iou_cut_off_late(a, b):
    return max(0, iou_not_cut_off(a, b))


def iou_of_sizes(a, b):
    return box_iou(*((x, y, x + w, y + h) for x, y, w, h in (a, b)))


def ap_with_numpy(right, asked):
    hits = numpy.cumsum(right)
    precision, recall = hits / numpy.arange(1, len(right) + 1), hits / asked
    return numpy.mean([max(precision[recall >= r], default=0) for r in numpy.linspace(0, 1, 101)])


def ap_from_the_right(right, asked):
    """As COCO's own code does it."""
    hits = 0
    points = []
    for place, hit in enumerate(right, start=1):
        hits += hit
        points.append([hits / asked, hits / place])
    for i in reversed(range(len(points) - 1)):
        points[i][1] = max(points[i][1], points[i + 1][1])
    reached = [next((p for r, p in points if r >= level / 100), 0.0) for level in range(101)]
    return sum(reached) / 101


def ap_with_teeth(right, asked):
    points = [(sum(right[:k]) / asked, sum(right[:k]) / k) for k in range(1, len(right) + 1)]
    return sum(next((p for r, p in points if r >= n / 100), 0.0) for n in range(101)) / 101


def ap_reached(right, asked):
    points = [(sum(right[:k]) / asked, sum(right[:k]) / k) for k in range(1, len(right) + 1)]
    best = [max([p for r, p in points if r >= n / 100], default=None) for n in range(101)]
    best = [one for one in best if one is not None]
    return sum(best) / len(best)


def ap_at_hits(right, asked):
    return sum(sum(right[: k + 1]) / (k + 1) for k, hit in enumerate(right) if hit) / asked


def ends(numbers, low=0.025):
    return torch.stack([numbers.quantile(low), numbers.quantile(1 - low)])


def interval_by_sorting(values, chosen):
    means = sorted(values[row].mean().item() for row in chosen)
    return torch.tensor([float(numpy.quantile(means, q)) for q in (0.025, 0.975)])


def interval_around(values, spread):
    return torch.stack([values.mean() - 1.96 * spread, values.mean() + 1.96 * spread])


def exactly(wins, losses):
    return math.comb(wins + losses, wins) / 2 ** (wins + losses)


def tail(wins, losses):
    n = wins + losses
    return sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n


def p_by_trying(wins, losses):
    """All sequences of coins."""
    n, far = wins + losses, abs(wins - losses)
    heads = [bin(number).count("1") for number in range(2**n)]
    return sum(abs(2 * h - n) >= far for h in heads) / 2**n


ANSWERS = [
    ("iou", lambda a, b: both(a, b) / union(a, b), "✓"),
    ("iou", lambda a, b: torch.tensor(both(a, b) / union(a, b)), "✓"),
    ("iou", iou_on_a_grid, "✓"),
    ("iou", iou_not_cut_off, "apart get something other than 0"),
    ("iou", iou_cut_off_late, "cut off at 0, not each of them"),
    ("iou", lambda a, b: both(a, b) / (area(a) + area(b)), "counted twice"),
    ("iou", lambda a, b: 2 * both(a, b) / (area(a) + area(b)), "Dice"),
    ("iou", lambda a, b: both(a, b) / area(a), "the share of a that b covers"),
    ("iou", lambda a, b: both(a, b) / area(b), "the share of b that a covers"),
    ("iou", lambda a, b: both(a, b) / min(area(a), area(b)), "the smaller box"),
    ("iou", both, "the area that both cover, as it is"),
    ("iou", iou_of_sizes, "left, top, width, height"),
    ("iou", lambda a, b: 1 - both(a, b) / union(a, b), "the area that both boxes cover over"),
    ("iou", lambda a, b: [0.5], "a list"),
    ("average_precision", ap_with_numpy, "✓"),
    ("average_precision", ap_from_the_right, "✓"),
    ("average_precision", ap_with_teeth, "the first precision that reaches it"),
    ("average_precision", ap_reached, "never found is left out"),
    ("average_precision", lambda r, asked: ap_with_numpy(r, sum(r)), "never found is left out"),
    ("average_precision", ap_at_hits, "over all that was asked"),
    ("average_precision", lambda r, asked: ap_at_hits(r, sum(r)), "the mean precision at the hits"),
    ("average_precision", lambda r, asked: sum(r) / len(r), "of all detections together"),
    ("average_precision", lambda r, asked: sum(r) / asked, "the recall of all"),
    ("average_precision", lambda r, asked: ap_with_numpy(r[::-1], asked), "read from its end"),
    ("average_precision", lambda r, asked: 0.5, "the mean over the recalls"),
    ("interval", lambda v, c: ends(v[c].mean(1)), "✓"),
    ("interval", interval_by_sorting, "✓"),
    ("interval", lambda v, c: v[c].mean(1).quantile(torch.tensor([0.025, 0.975])), "✓"),
    ("interval", lambda v, c: ends(v), "the values, not of means"),
    ("interval", lambda v, c: ends(v[c].flatten()), "all drawn values"),
    ("interval", lambda v, c: ends(v[c].mean(0)), "the wrong axis"),
    ("interval", lambda v, c: ends(v[c].mean(1), 0.05), "an interval of 90 %"),
    ("interval", lambda v, c: ends(v[c].median(1).values), "medians"),
    ("interval", lambda v, c: ends(v[c].mean(1), 0.0), "from the least to the largest"),
    ("interval", lambda v, c: ends(v[c].mean(1)).flip(0), "the upper end first"),
    ("interval", lambda v, c: interval_around(v, v.std()), "1.96 spreads"),
    ("interval", lambda v, c: interval_around(v, v.std() / len(v) ** 0.5), "without the samples"),
    ("interval", lambda v, c: v[c].mean(1), "the shape (400,)"),
    ("interval", lambda v, c: (0.1, 0.2), "a tuple"),
    ("p_value", lambda w, n: min(1, 2 * tail(max(w, n), min(w, n))), "✓"),
    ("p_value", p_by_trying, "✓"),
    ("p_value", lambda w, n: tail(max(w, n), min(w, n)), "one tail only"),
    ("p_value", lambda w, n: 2 * tail(max(w, n), min(w, n)), "above 1"),
    ("p_value", lambda w, n: min(1, 2 * tail(w, n)), "also where there are fewer"),
    (
        "p_value",
        lambda w, n: min(1, 2 * (tail(max(w, n), min(w, n)) - exactly(w, n))),
        "one too late",
    ),
    ("p_value", exactly, "of exactly this count"),
    ("p_value", lambda w, n: min(1, 2 * exactly(w, n)), "twice the probability"),
    ("p_value", lambda w, n: w / (w + n), "the share of wins"),
    ("p_value", lambda w, n: 0.05, "a fair coin is at least as one-sided"),
]


@pytest.mark.parametrize(("exercise", "answer", "said"), ANSWERS)
def test_every_answer_of_notebook_09_is_diagnosed(exercise, answer, said, capsys):
    assert_diagnosed(getattr(checks, f"check_{exercise}"), answer, said, capsys)


@pytest.mark.parametrize("exercise", ["iou", "average_precision", "interval", "p_value"])
def test_an_untouched_stub_is_no_mistake(exercise, capsys):
    def stub(*arguments): ...

    getattr(checks, f"check_{exercise}")(stub)
    assert capsys.readouterr().out == "not implemented yet: stub\n"


def test_what_exercise_2_accepts_is_what_coco_computes():
    """The check's own solution is held against pycocotools."""
    pytest.importorskip("pycocotools")
    box, elsewhere = (0.1, 0.1, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)
    right = [True, False, True, False, True]

    def detector(image, prompts):
        number = image.getpixel((0, 0))[0]
        return [[Detection(box if right[number] else elsewhere, 0.9 - 0.1 * number, None)]]

    layout = Layout("a car", layers=[Layer("a car", box)])
    images = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(len(right))]
    coco = average_precision(detector, [(image, layout) for image in images])
    assert coco["AP50"] == pytest.approx(checks.area_under_curve(right, len(right)), abs=0.011)


def test_what_exercise_3_accepts_is_what_the_report_does():
    values = torch.rand(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    chosen = numpy.random.default_rng(0).integers(20, size=(2000, 20))
    own = checks.bootstrap_interval(values, torch.from_numpy(chosen))
    assert own.tolist() == pytest.approx(estimate(values.tolist())[1:], abs=1e-9)
