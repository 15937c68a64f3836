"""The machine of notebook 08: the learner's right pieces, and ours in place of the others."""

import numpy
import torch
from benchmark_examples import TWO
from test_checks_answers import (
    algorithm_in_two_parts,
    composed_by_choice,
    fields_by_loop,
    masks_by_loops,
    noises_layer_by_layer,
)

from lrd_helpers import Layer, LayeredRendering, Layout
from lrd_helpers.benchmark import drawn, noise_of
from lrd_helpers.checks import layered_rendering as checks

NAMES = ["visible_masks", "fields_of", "layer_noises", "composed", "algorithm_1"]


def stub(*arguments): ...


def test_for_what_is_not_written_ours_stands_in(capsys):
    pieces = checks.assembled(stub, None, stub, stub, stub)
    assert capsys.readouterr().out == f"yours: none yet\nours:  {', '.join(NAMES)}\n"
    boxes = [(0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 1.0, 0.5)]
    layout = Layout("x", layers=[Layer("x", box=box) for box in boxes])
    assert torch.equal(pieces.visible_masks(boxes, 8, 8), layout.masks(8, 8))


def test_what_is_right_is_used_and_what_is_wrong_is_not(capsys):
    pieces = checks.assembled(
        masks_by_loops,
        lambda *case: fields_by_loop(*case)[1:],  # no background
        noises_layer_by_layer,
        lambda noises, masks: masks * noises,  # neither summed nor of the right shape
        algorithm_in_two_parts,
    )
    yours, ours = capsys.readouterr().out.splitlines()
    assert yours == "yours: visible_masks, layer_noises, algorithm_1"
    assert ours == "ours:  fields_of, composed"
    assert pieces.visible_masks is masks_by_loops
    assert pieces.layer_noises is noises_layer_by_layer
    assert pieces.algorithm_1 is algorithm_in_two_parts
    noises, masks = torch.ones(2, 4, 3, 3), torch.full((2, 3, 3), 0.5)
    assert torch.equal(pieces.composed(noises, masks), torch.ones(4, 3, 3))


def test_with_five_right_pieces_nothing_is_ours(capsys):
    checks.assembled(
        masks_by_loops,
        fields_by_loop,
        noises_layer_by_layer,
        composed_by_choice,
        algorithm_in_two_parts,
    )
    assert capsys.readouterr().out.splitlines()[1] == "ours:  none"


def test_the_machine_is_a_contender_that_draws_what_the_method_draws(pipe, capsys):
    pieces = checks.assembled(masks_by_loops, stub, noises_layer_by_layer, stub, stub)
    method = LayeredRendering(delta="constant", inside=0.2, outside=0.2, layered_fraction=0.6)
    options = {"num_inference_steps": 5, "guidance_scale": 4.0}
    ([mine], [cost]), ([theirs], [its_cost]) = (
        drawn(pipe, contender, [TWO], [noise_of("two", 3)], **options)
        for contender in (pieces, method)
    )
    difference = numpy.asarray(mine).astype(int) - numpy.asarray(theirs).astype(int)
    assert abs(difference).max() <= 1, "both are rounded to bytes"
    assert cost.unet_calls >= its_cost.unet_calls > 0
