"""A U-Net's own mistakes, and what it should have done instead."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lrd_helpers.measure import Description, StorybookDetector
from lrd_helpers.measure import StickerDetection as FoundSticker
from lrd_helpers.models import load_pipeline
from lrd_helpers.storybook import PlacedSticker, Scene, seeded
from lrd_helpers.training import repair


def scene(*things):
    stickers = tuple(PlacedSticker(*thing, (0.5, 0.5), (0.5, 0.5)) for thing in things)
    return Scene("at sea", stickers, "")


def found(*things):
    """(sticker, colour, side in pixels, x) each, the largest first."""
    stickers = []
    for sticker, colour, side, x in things:
        mask = torch.zeros(128, 128, dtype=torch.bool)
        mask[64 : 64 + side, x : x + side] = True
        stickers.append(FoundSticker((0.0, 0.0, 1.0, 1.0), 1.0, mask, sticker, colour))
    return Description("at sea", 1.0, tuple(stickers))


CAR, STAR = ("car", "red"), ("star", "yellow")


def test_a_thing_too_much_is_a_mistake_and_of_things_alike_the_largest_is_right():
    right = found((*CAR, 40, 0), (*STAR, 24, 80))
    assert repair.is_right(right, scene(STAR, CAR))
    assert not repair.mistakes(right, scene(STAR, CAR), 0)

    twice = found((*CAR, 40, 0), (*STAR, 24, 80), (*CAR, 16, 104))
    assert not repair.is_right(twice, scene(CAR, STAR))
    (mistake,) = repair.mistakes(twice, scene(CAR, STAR), 3)
    assert (mistake.picture, mistake.drawn, mistake.right) == (3, "a red car at sea", "at sea")
    expected = torch.zeros(1, 16, 16)
    expected[:, 7:11, 12:16] = 1  # two cells a side, and one around them
    assert torch.equal(mistake.cells, expected)


def test_what_is_missing_belongs_where_something_else_is():
    # Of the same kind first, though the flower is larger.
    other = found(("flower", "pink", 40, 0), ("car", "blue", 24, 80))
    car, flower = repair.mistakes(other, scene(CAR, STAR), 0)
    assert (car.drawn, car.right) == ("a blue car at sea", "a red car at sea")
    assert (flower.drawn, flower.right) == ("a pink flower at sea", "a yellow star at sea")
    # What is only missing has no place: nothing can be said.
    assert not repair.mistakes(found((*CAR, 40, 0)), scene(CAR, STAR), 0)


class ScriptedDetector(StorybookDetector):
    def __init__(self, *answers):
        self.answers = list(answers)

    def describe_all(self, images):
        assert images[0].shape == (3, 128, 128)
        answer = self.answers.pop(0)
        assert len(answer) == len(images)
        return answer


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusionPipeline.from_pipe(load_pipeline("storybook", "cpu"))


WHOLE, TWICE = found((*CAR, 40, 0)), found((*CAR, 40, 0), (*CAR, 16, 104))


def test_corrected_steps_become_lessons_where_they_led_to_a_right_picture(pipe):
    scenes = [scene(CAR), scene(CAR)]
    illustrator = repair.Illustrator(pipe, ScriptedDetector([WHOLE, TWICE], [WHOLE]))
    illustrator.draw(scenes, seeded(0))
    assert (illustrator.drawn, illustrator.right, illustrator.repaired) == (2, 1, 1)
    lessons = illustrator.lessons()
    steps = sum(
        repair.CLEANEST <= timestep <= repair.NOISIEST
        for timestep in illustrator.scheduler.timesteps
    )
    assert len(lessons.states) == repair.OWN_STEPS + 2 * steps
    with torch.no_grad():
        text = pipe.text_encoder(lessons.tokens)[0]
        own = pipe.unet(lessons.states, lessons.timesteps, text).sample
    change = (lessons.predictions - own).abs().amax(1)
    (mistake,) = repair.mistakes(TWICE, scenes[1], 0)
    inside = mistake.cells[0].bool()
    assert change[:, ~inside].max() < 1e-4, "nothing but that place is corrected"
    assert change[: repair.OWN_STEPS].max() < 1e-4, "what was right stays as it is"
    assert (change[repair.OWN_STEPS :, inside].amax(1) > 1e-3).all()

    # Toward the place's prediction, away from the car's.
    row = repair.OWN_STEPS
    with torch.no_grad():
        text = pipe.text_encoder(illustrator.tokens(["at sea", "a red car at sea"]))[0]
        state, timestep = lessons.states[[row, row]], lessons.timesteps[row]
        place, car = pipe.unet(state, timestep, text).sample
    expected = own[row] + repair.CORRECTION * (place - car) * mistake.cells
    torch.testing.assert_close(lessons.predictions[row], expected, atol=1e-4, rtol=1e-4)


def test_a_correction_that_did_not_help_teaches_nothing(pipe):
    illustrator = repair.Illustrator(pipe, ScriptedDetector([TWICE], [TWICE]))
    illustrator.draw([scene(CAR)], seeded(0))
    with pytest.raises(ValueError, match="of 1 pictures none was right, corrected or not"):
        illustrator.lessons()


@pytest.mark.slow
def test_the_command_writes_what_the_training_reads(tmp_path, capsys):
    from lrd_helpers.training.latent_diffusion import read_lessons

    repair.main(["--pictures", "1", "--output", str(tmp_path / "lessons")])
    said = capsys.readouterr().out
    assert f"{repair.GROUP} pictures" in said
    lessons = read_lessons(tmp_path / "lessons")
    assert len(lessons.states) == len(lessons.tokens) == len(lessons.timesteps) > 16
    assert [file.name for file in (tmp_path / "lessons").iterdir()] == [
        "lessons-0-of-1.safetensors"
    ]
    with pytest.raises(SystemExit):
        repair.main(["--pictures", "1", "--output", str(tmp_path / "lessons")])
    assert "it has lessons already; name another folder" in capsys.readouterr().err


def test_options_that_cannot_work_exit_with_2(tmp_path, capsys):
    for arguments, message in [
        (["--pictures", "0"], "--pictures 0: it must be at least 1"),
        (["--from", str(tmp_path / "none")], "no such folder"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            repair.main(["--output", str(tmp_path), *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
