"""The checks of notebook 06: a right answer passes however written, each mistake is recognised."""

import pytest
import torch
from test_checks import assert_diagnosed
from torch.nn import functional

from lrd_helpers.checks import cross_attention as checks

# ------------------------------------------------------------------ answers


def by_loops(weights, tokens, height, width):
    result = torch.zeros(height, width)
    for row in range(height):
        for column in range(width):
            for token in tokens:
                result[row, column] += weights[:, row * width + column, token].mean()
    return result


def no_shape(weights, tokens, height, width):
    return weights[..., tokens].sum(-1).mean(0)


def heads_kept(weights, tokens, height, width):
    return weights[..., tokens].sum(-1).unflatten(1, (height, width))


def by_corrcoef(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]


def by_cosine(a, b):
    return functional.cosine_similarity(
        (a - a.mean()).flatten(), (b - b.mean()).flatten(), dim=0
    ).item()


def by_unravel(attention, k):
    indices = attention.flatten().topk(k).indices
    return torch.stack(torch.unravel_index(indices, attention.shape), dim=1)


def by_sorting(attention, k):
    every = [(row, column) for row in range(len(attention)) for column in range(len(attention[0]))]
    return torch.tensor(sorted(every, key=lambda at: -attention[at])[:k])


def iou(threshold, score):
    """An answer made of its threshold and its score."""

    def answer(attention, mask, share):
        return score(attention >= threshold(attention, share), mask)

    return answer


def of_peak(attention, share):
    return share * attention.max()


def over_union(a, b):
    return (a * b).sum() / ((a + b) > 0).sum()


ANSWERS = [
    ("word_map", by_loops, "✓"),
    ("word_map", lambda w, i, h, n: w.mean(0)[:, i].sum(1).view(h, n), "✓"),
    ("word_map", lambda w, i, h, n: w.mean(0)[:, i].mean(1).view(h, n), "are averaged"),
    ("word_map", lambda w, i, h, n: w.mean(0)[:, i[0]].view(h, n), "first token"),
    ("word_map", lambda w, i, h, n: w.sum(0)[:, i].sum(1).view(h, n), "heads are added up"),
    ("word_map", lambda w, i, h, n: w[0][:, i].sum(1).view(h, n), "only one head"),
    ("word_map", lambda w, i, h, n: w.mean(0)[:, i].sum(1).view(n, h).t(), "mixed up"),
    ("word_map", lambda w, i, h, n: w.mean(0)[:, i].sum(1).view(n, h), "the shape (5, 3)"),
    ("word_map", no_shape, "the shape (15,)"),
    ("word_map", heads_kept, "the shape (2, 3, 5)"),
    ("word_map", lambda w, i, h, n: by_loops(w.softmax(-1), i, h, n), "a second time"),
    (
        "word_map",
        lambda w, i, h, n: by_loops(w, i, h, n) / by_loops(w, i, h, n).max(),
        "largest value is 1",
    ),
    (
        "word_map",
        lambda w, i, h, n: by_loops(w, i, h, n) / by_loops(w, i, h, n).sum(),
        "adds up to 1",
    ),
    ("word_map", lambda w, i, h, n: w[i].mean(0).view(h, n), "it raised"),
    ("similarity", by_corrcoef, "✓"),
    ("similarity", by_cosine, "✓"),
    ("similarity", lambda a, b: functional.cosine_similarity(a.ravel(), b.ravel(), 0), "cosine"),
    ("similarity", lambda a, b: torch.cov(torch.stack([a.ravel(), b.ravel()]))[0, 1], "saw"),
    ("similarity", lambda a, b: ((a - a.mean()) * (b - b.mean())).mean(), "covariance"),
    ("similarity", lambda a, b: ((a - a.mean()) * (b - b.mean())).sum(), "nothing is divided"),
    (
        "similarity",
        lambda a, b: ((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()),
        "n − 1",
    ),
    (
        "similarity",
        lambda a, b: (
            ((a - a.mean()) * (b - b.mean())).sum()
            / (((a - a.mean()) ** 2).sum() * ((b - b.mean()) ** 2).sum())
        ),
        "not by their root",
    ),
    ("similarity", lambda a, b: by_corrcoef(a, b).abs(), "the sign is lost"),
    ("similarity", lambda a, b: by_corrcoef(a, b) ** 2, "square of the correlation"),
    ("similarity", lambda a, b: -(a - b).norm(), "saw"),
    ("similarity", lambda a, b: a * b, "a number"),
    ("top_positions", by_unravel, "✓"),
    ("top_positions", by_sorting, "✓"),
    ("top_positions", lambda a, k: by_unravel(-a, k), "smallest"),
    ("top_positions", lambda a, k: by_unravel(a, k).flip(1), "changed places"),
    ("top_positions", lambda a, k: by_unravel(a, k).flip(0), "the faintest first"),
    ("top_positions", lambda a, k: by_unravel(a, k).T, "the shape (2, 5)"),
    ("top_positions", lambda a, k: a.flatten().topk(k).indices, "the shape (5,)"),
    ("top_positions", lambda a, k: (a >= a.flatten().topk(k).values[-1]).nonzero(), "reading"),
    (
        "top_positions",
        lambda a, k: torch.stack(
            [a.flatten().topk(k).indices // len(a), a.flatten().topk(k).indices % len(a)], 1
        ),
        "divided by the height",
    ),
    ("top_positions", lambda a, k: by_unravel(a, k).tolist(), "a list"),
    ("mask_iou", iou(of_peak, over_union), "✓"),
    ("mask_iou", iou(of_peak, lambda a, b: ((a & b).sum() / (a | b).sum()).item()), "✓"),
    ("mask_iou", iou(lambda a, share: share, over_union), "not a share of the peak"),
    (
        "mask_iou",
        iou(lambda a, share: a.min() + share * (a.max() - a.min()), over_union),
        "from the least value",
    ),
    (
        "mask_iou",
        lambda a, b, s: over_union(a < s * a.max(), b),
        "*below* the threshold",
    ),
    ("mask_iou", iou(of_peak, lambda a, b: (a & b).sum() / b.sum()), "over the mask"),
    ("mask_iou", iou(of_peak, lambda a, b: (a & b).sum() / a.sum()), "over the region"),
    ("mask_iou", iou(of_peak, lambda a, b: (a & b).sum() / (a.sum() + b.sum())), "sum of both"),
    ("mask_iou", iou(of_peak, lambda a, b: 2 * (a & b).sum() / (a.sum() + b.sum())), "Dice"),
    ("mask_iou", iou(of_peak, lambda a, b: (a == b).float().mean()), "both agree"),
    ("mask_iou", iou(of_peak, lambda a, b: a & b), "a number"),
]


@pytest.mark.parametrize(("exercise", "answer", "said"), ANSWERS)
def test_every_answer_of_notebook_06_is_diagnosed(exercise, answer, said, capsys):
    assert_diagnosed(getattr(checks, f"check_{exercise}"), answer, said, capsys)


@pytest.mark.parametrize("exercise", ["word_map", "similarity", "top_positions", "mask_iou"])
def test_an_untouched_stub_is_no_mistake(exercise, capsys):
    def stub(*arguments): ...

    getattr(checks, f"check_{exercise}")(stub)
    assert capsys.readouterr().out == "not implemented yet: stub\n"
