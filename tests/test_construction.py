"""Pictures taken apart into layers, and shards of them: in a flat world whose truth is known."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from shard_files import png, tar
from torch import Tensor

from lrd_helpers import __main__ as command_line
from lrd_helpers import models
from lrd_helpers.files import locked
from lrd_helpers.layerdiff import construction
from lrd_helpers.layerdiff.construction import (
    GATES,
    Cut,
    Fill,
    Gate,
    Localise,
    OrderByCompletion,
    Segment,
    StorybookNames,
    Thing,
    Verdict,
    Work,
    assigned,
    cut_out,
    rounds,
    storybook_stages,
    take_apart,
    timed,
    touching,
)
from lrd_helpers.layerdiff.export import load_stack, ora_of
from lrd_helpers.mask import tight_box
from lrd_helpers.measure import Description, Detection, StickerDetection
from lrd_helpers.measure.layers import psnr, soft_iou
from lrd_helpers.pictures import picture_of, pixels_of, png_of
from lrd_helpers.storybook import PlacedSticker, Scene, render_scenes
from lrd_helpers.training.layered_shards import (
    BUSY,
    Construction,
    ConstructionError,
    StackShards,
    rendering_of,
    targets_of,
)
from lrd_helpers.training.shards import ShardPairs

SIDE = 32
COLOURS = {"red": (204, 0, 0), "green": (0, 153, 0), "blue": (0, 0, 204), "pink": (255, 102, 204)}
GROUND = (102, 102, 102)

# ------------------------------------------------------------------ a flat world


def square(x: int, y: int, width: int = 8, height: int = 8) -> Tensor:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[y : y + height, x : x + width] = True
    return mask


def painted(things: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Flat things on a flat ground, the furthest back first."""
    pixels = numpy.full((SIDE, SIDE, 3), GROUND, numpy.uint8)
    for name, mask in things:
        pixels[mask.numpy()] = COLOURS[name]
    return Image.fromarray(pixels)


def detector(score: float = 0.9, boxes_only: bool = False) -> Callable[..., list]:
    """Finds a colour by its name."""

    def find(image: Image.Image, prompts: Sequence[str]) -> list[list[Detection]]:
        pixels = torch.from_numpy(numpy.array(picture_of(image)))
        answers = []
        for prompt in prompts:
            mask = (pixels == torch.tensor(COLOURS[prompt])).all(-1)
            box = tight_box(mask) if mask.any() else None
            kept = None if boxes_only else mask
            answers.append([Detection(box, score, kept)] if mask.any() else [])
        return answers

    return find


def truth(things: Sequence[tuple[str, Tensor]]) -> Callable[..., Image.Image]:
    """A filler that knows what stands behind: all of what is still there, but the thing itself."""

    def fill(image: Image.Image, hole: Tensor, prompt: str) -> Image.Image:
        names = [name for name, _ in things]
        there = [answer[0].mask if answer else None for answer in detector()(image, names)]
        gone = max(
            range(len(names)), key=lambda n: 0 if there[n] is None else (there[n] & hole).sum()
        )
        return painted([t for n, t in enumerate(things) if there[n] is not None and n != gone])

    return fill


def names(work: Work) -> Work:
    """The names in a caption like "red and blue"."""
    words = [word for word in work.caption.split() if word != "and"]
    things = tuple(Thing(word) for word in words)
    return replace(work, things=things, place="on grey").judged("named", len(things))


def flat_stages(filler: Callable, find: Callable | None = None, segmenter: Callable | None = None):
    find = detector() if find is None else find
    each = Localise(find), Segment(segmenter), OrderByCompletion(filler, find), Fill(filler, find)
    return rounds((names,), (*each, Cut()))


def order_of(things: Sequence[tuple[str, Tensor]]) -> str:
    return "-".join(name for name, _ in things)


RED, BLUE, GREEN = ("red", square(4, 4)), ("blue", square(9, 9)), ("green", square(22, 20))


# ------------------------------------------------------------------ taking apart


@pytest.mark.parametrize("things", [*itertools.permutations([RED, BLUE, GREEN])], ids=order_of)
def test_a_picture_comes_apart_into_its_layers(things) -> None:
    picture = painted(things)
    work = take_apart(picture, "green and red and blue", flat_stages(truth(things)))
    assert work.kept
    assert work.fault == ""
    stack = work.stack
    assert (stack.caption, stack.background_prompt) == ("green and red and blue", "on grey")
    assert stack.background == painted([])
    assert stack.composite == picture == stack.flatten()
    order = [layer.prompt for layer in stack.layers]
    back, front = (name for name, _ in things if name != "green")
    assert order.index(back) < order.index(front), "the front one was cut out first"
    for name, mask in things:
        layer = numpy.array(stack.layers[stack.number(name)].image)
        assert (layer[..., 3] == 255 * mask.numpy()).all(), "whole, also where it was hidden"
        assert (layer[mask.numpy()][:, :3] == COLOURS[name]).all()


def test_every_gate_leaves_its_number() -> None:
    things = [RED, BLUE, GREEN]
    work = take_apart(painted(things), "red and blue and green", flat_stages(truth(things)))
    values = {gate: [v.value for v in work.verdicts if v.gate == gate] for gate in GATES}
    assert values["named"] == [3]
    assert values["found"] == [1, 1, 1]
    assert values["sure"] == pytest.approx([0.9] * 3)
    assert values["size"] == [(64 - 9) / SIDE**2]
    # Behind the blue square of 64 pixels, 9 of the red one turn up, and none the other way.
    assert values["order"] == [1]
    assert values["gone"] == [0, 0, 0]
    assert values["hidden"] == pytest.approx([0, 9 / 64])
    assert values["recomposed"] == [pytest.approx(100)]
    assert [v for v in work.verdicts if v.gate == "size"] == [
        Verdict("size", "red", 55 / SIDE**2, True)
    ]


def spoilt(image: Image.Image, hole: Tensor, prompt: str) -> Image.Image:
    """Fills the hole, and changes all that lies outside."""
    pixels = numpy.array(image)
    pixels[hole.numpy()] = GROUND
    pixels[~hole.numpy()] //= 2
    return Image.fromarray(pixels)


def both_grow(image: Image.Image, hole: Tensor, prompt: str) -> Image.Image:
    """Draws the thing that the prompt names all over the hole."""
    pixels = numpy.array(image)
    pixels[hole.numpy()] = COLOURS.get(prompt.split()[0], GROUND)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("gate", "of", "value", "things", "stages"),
    [
        ("named", "", 0, [], flat_stages(spoilt)),
        ("named", "", 5, [RED] * 5, flat_stages(spoilt)),
        ("found", "pink", 0.5, [RED, ("pink", square(0, 0, 0))], flat_stages(spoilt)),
        ("sure", "red", 0.3, [RED], flat_stages(spoilt, detector(0.3))),
        ("size", "blue", 3 / 1024, [RED, ("blue", square(28, 28, 3, 1))], flat_stages(spoilt)),
        ("order", "red", 0.0, [RED, ("blue", square(12, 4))], flat_stages(both_grow)),
        ("gone", "red", 1.0, [RED], flat_stages(lambda image, hole, prompt: image)),
        ("hidden", "red", 0.75, [RED, ("blue", square(6, 2, 8, 12))], None),
        ("recomposed", "", 14.26, [RED], flat_stages(spoilt)),
    ],
)
def test_a_gate_stops_what_is_no_good(gate, of, value, things, stages) -> None:
    stages = flat_stages(truth(things)) if stages is None else stages
    caption = " and ".join(name for name, _ in things)
    work = take_apart(painted(things), caption, stages)
    [failed] = [verdict for verdict in work.verdicts if not verdict.passed]
    assert (failed.gate, failed.of) == (gate, of)
    assert failed.value == pytest.approx(value, abs=0.1)
    assert not work.kept
    assert work.fault == GATES[gate].fault
    assert work.stack is None or gate == "recomposed", "no work for what is left out"
    loose = {name: Gate("never") for name in GATES}
    assert take_apart(painted(things), caption, stages, gates=loose).kept == bool(things)


def test_going_on_measures_what_a_gate_is_worth() -> None:
    things, stages = [RED, GREEN], flat_stages(truth([RED, GREEN]), detector(0.3))
    stopped = take_apart(painted(things), "red and green", stages)
    assert stopped.stack is None
    work = take_apart(painted(things), "red and green", stages, go_on=True)
    assert [layer.prompt for layer in work.stack.layers] == ["green", "red"]
    assert not work.kept
    assert work.fault == GATES["sure"].fault


def test_what_a_stage_costs() -> None:
    seconds, ticks = Counter(), itertools.count()
    stages = timed(flat_stages(truth([RED])), seconds, lambda: next(ticks))
    assert take_apart(painted([RED]), "red", stages).kept
    each = dict.fromkeys(["Localise", "Segment", "OrderByCompletion", "Fill", "Cut"], 4)
    assert seconds == {"names": 1, "Finish": 1, **each}


def test_a_number_that_is_none_passes_no_gate() -> None:
    image = painted([])
    assert Work(image, image).judged("recomposed", float("nan")).fault == GATES["recomposed"].fault


def test_boxes_are_segmented() -> None:
    asked = []

    def segmenter(image: Image.Image, boxes: Sequence[Detection]) -> list[Tensor]:
        asked.append([each.box for each in boxes])
        return [mask for name, mask in [RED, GREEN] if detector()(image, [name])[0]]

    stages = flat_stages(truth([RED, GREEN]), detector(boxes_only=True), segmenter)
    work = take_apart(painted([RED, GREEN]), "red and green", stages)
    assert work.kept
    assert asked == [[tight_box(RED[1]), tight_box(GREEN[1])], [tight_box(GREEN[1])]]
    assert work.stack.flatten() == work.original

    with pytest.raises(ValueError, match="the detector knows no pixels; give `Segment` a segm"):
        take_apart(painted([RED]), "red", flat_stages(grey, detector(boxes_only=True)))


def test_a_detection_is_of_one_thing() -> None:
    small, large = (Detection((0.0, 0.0, 1.0, 1.0), score, None) for score in (0.6, 0.9))
    assert assigned([[small, large], [large]]) == [small, large], "the choosy one first"
    assert assigned([[large], [large]]) == [large, None]
    assert assigned([[small, large], [small, large]]) == [large, small]
    assert assigned([[], [small]]) == [None, small]


def test_what_touches() -> None:
    masks = [square(0, 0), square(8 + construction.TOUCHING - 1, 0), square(24, 24)]
    assert touching(masks) == [[1], [0], []]
    masks[1] = square(8 + construction.TOUCHING, 0)
    assert touching(masks) == [[], [], []]


def test_alpha_and_colours_of_a_soft_edge() -> None:
    rows = torch.arange(SIDE)[:, None] - 15.5
    columns = torch.arange(SIDE) - 15.5
    alpha = (10 - (rows**2 + columns**2).sqrt() + 0.5).clamp(0, 1)
    behind = torch.stack([torch.linspace(0, 0.4, SIDE).expand(SIDE, SIDE)] * 3)
    colour = torch.tensor([0.9, 0.5, 0.1])[:, None, None]
    picture = alpha * colour + (1 - alpha) * behind
    layer = cut_out(picture, behind, alpha > 0.5)
    assert (layer[3] - alpha).abs().max() < 0.02
    assert (layer[:3] - colour)[:, alpha > 0].abs().max() < 0.02
    again = layer[3] * layer[:3] + (1 - layer[3]) * behind
    assert (again - picture).abs().max() < 0.01


def test_a_thing_of_the_ground_s_colour_has_the_alpha_of_its_mask() -> None:
    flat = torch.full((3, SIDE, SIDE), 0.4)
    assert torch.equal(cut_out(flat, flat, RED[1])[3], RED[1].float())
    thin = square(5, 5, 1, 9)
    assert torch.equal(cut_out(painted_pixels([("red", thin)]), flat, thin)[3], thin.float())


def painted_pixels(things: Sequence[tuple[str, Tensor]]) -> Tensor:
    return pixels_of(painted(things))


# ------------------------------------------------------------------ the storybook's stages


def described(*stickers: tuple[str, str]) -> SimpleNamespace:
    """A detector that sees these stickers, at sea."""
    seen = [
        StickerDetection((0.0, 0.0, 1.0, 1.0), 0.9, RED[1], sticker, colour)
        for colour, sticker in stickers
    ]
    return SimpleNamespace(describe=lambda image: Description("at sea", 0.9, tuple(seen)))


@pytest.mark.parametrize(
    ("caption", "things", "place"),
    [
        ("a red car and an orange star on grass", ["a red car", "an orange star"], "on grass"),
        ("At night a cat and a blue cat", ["a cat", "a blue cat"], "at night"),
        ("a starfish on a carpet and a pink mushroom", ["a pink mushroom"], "at sea"),
        ("on snow", [], "on snow"),
    ],
)
def test_the_stickers_that_a_caption_names(caption, things, place) -> None:
    image = painted([])
    work = StorybookNames(described())(Work(image, image, caption))
    assert [thing.prompt for thing in work.things] == things
    assert work.place == place
    assert work.verdicts == (Verdict("named", "", len(things), bool(things)),)


def test_a_picture_without_a_caption_is_described(tiny) -> None:
    caption, *_ = storybook_stages(tiny, described(("red", "car"), ("orange", "ball")))
    image = painted([])
    assert caption(Work(image, image)).caption == "a red car and an orange ball at sea"
    assert caption(Work(image, image, "a cat")).caption == "a cat"


@pytest.mark.filterwarnings("ignore:the picture is 64")
def test_a_picture_of_another_size(tiny) -> None:
    stages = storybook_stages(tiny, described())
    image = painted([RED]).resize((64, 64))
    work = Work(image, image, things=(Thing("red", mask=torch.ones(64, 64, dtype=torch.bool)),))
    [filling] = [stage for stage in stages[:7] if isinstance(stage, Fill)]
    with pytest.raises(ValueError, match="the picture is 64 × 64, but the model draws 32 × 32"):
        filling(work)


# ------------------------------------------------------------------ shards


def flat_png(*things: tuple[str, Tensor]) -> bytes:
    file = io.BytesIO()
    painted(things).save(file, "PNG")
    return file.getvalue()


def grey(image: Image.Image, hole: Tensor, prompt: str) -> Image.Image:
    pixels = numpy.array(image)
    pixels[hole.numpy()] = GROUND
    return Image.fromarray(pixels)


def constructed(
    output: Path, *sources: Path | str, stages: Sequence | None = None, **options: object
) -> Counter:
    options = {"settings": {"model": "flat"}, "size": SIDE, "gates": GATES} | options
    stages = flat_stages(grey) if stages is None else stages
    work = Construction(sources, output, stages, **options)
    work.run()
    return work.counts


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards: one with two good pictures and every kind of bad ones, one with a good one."""
    good = flat_png(RED, GREEN)
    files = [
        ("22.05.png", good),
        ("22.05.txt", b"red and green"),
        ("b.png", good[:60]),
        ("b.txt", b"red"),
        ("c.png", good),
        ("d.png", good),
        ("d.txt", b"red and blue"),
        ("e.png", png()),
        ("e.txt", b"blue"),
        ("f.png", png(size=(8, 8))),
        ("f.txt", b"red"),
        ("g.png", flat_png(BLUE)),
        ("g.txt", b"blue"),
        ("g.json", b'{"similarity": 0.3}'),
    ]
    (tmp_path / "0000.tar").write_bytes(tar(*files))
    (tmp_path / "0001.tar").write_bytes(tar(("h.png", flat_png(RED)), ("h.txt", b"red")))
    return tmp_path


COUNTS = {
    "kept": 3,
    "with a broken picture": 1,
    "without a caption (only .png)": 1,
    "a thing that is named is not found": 2,
    "too small": 1,
}


def test_shards_become_shards_of_layers(shards) -> None:
    output = shards / "layers"
    assert constructed(output, str(shards / "*.tar")) == COUNTS
    made = {"0000.tar", "0000.json", "0001.tar", "0001.json", "settings.json"}
    assert set(os.listdir(output)) == made
    stacks = StackShards(str(output / "*.tar"), SIDE, held_out=None)
    named = dict(stacks.in_order())
    assert list(named) == ["22.05", "g", "h"]
    assert stacks.counts == {"used": 3}
    assert named["22.05"].flatten() == painted([RED, GREEN]) == named["22.05"].composite
    assert [layer.prompt for layer in named["22.05"].layers] == ["green", "red"]
    pictures = ShardPairs(str(output / "*.tar"), SIDE, held_out=None)
    pairs = {name: caption for name, (_, caption) in pictures.in_order()}
    assert pairs == {"22.05": "red and green", "g": "blue", "h": "red"}
    report = json.loads((output / "0000.json").read_text())
    assert report["counts"] == COUNTS | {"kept": 2}
    assert set(report["left_out"]) == {"d", "e"}
    assert report["left_out"]["d"]["verdicts"][1] == {
        "gate": "found",
        "of": "blue",
        "value": 0.5,
        "passed": False,
    }


def test_captions_can_be_made(shards) -> None:
    def caption(work: Work) -> Work:
        assert not work.caption
        return replace(work, caption="red")

    stages = [caption, *flat_stages(grey)]
    counts = constructed(shards / "layers", shards / "0000.tar", stages=stages, captioned=False)
    assert counts == {
        "kept": 3,  # what the caption does not name stays in the background
        "with a broken picture": 1,
        "a thing that is named is not found": 2,
        "too small": 1,
    }


KILLED = """
import os, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from test_construction import constructed, flat_stages, grey

def dies(work):
    if work.caption == "blue":
        os.kill(os.getpid(), signal.SIGKILL)
    return work

constructed(Path(sys.argv[2]), sys.argv[3], stages=[dies, *flat_stages(grey)])
"""


def test_a_run_that_was_killed_goes_on_with_the_next_picture(shards) -> None:
    output, whole, sources = shards / "layers", shards / "whole", str(shards / "*.tar")
    constructed(whole, sources)
    tests = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, tests, output, sources]
    assert subprocess.run(command, cwd=tests.parent).returncode == -signal.SIGKILL
    assert set(os.listdir(output)) == {".0000.tar.partial", "settings.json"}
    seen = []

    def noted(work: Work) -> Work:
        seen.append(work.caption)
        return work

    stages = [noted, *flat_stages(grey)]
    # Two pictures were done. Where the end of the second one's was not written, it is done again.
    for lost, again in {0: [], 700: ["red and blue"]}.items():
        resumed = shards / f"{lost} lost"
        shutil.copytree(output, resumed)
        partial = resumed / ".0000.tar.partial" / "done.tar"
        os.truncate(partial, partial.stat().st_size - lost)
        seen.clear()
        assert constructed(resumed, sources, stages=stages) == COUNTS
        assert seen == [*again, "blue", "blue", "red"]
        assert constructed(resumed, sources, stages=stages) == COUNTS
        assert len(seen) == 3 + len(again), "all is there"
        assert set(os.listdir(resumed)) == set(os.listdir(whole))
        for file in whole.iterdir():
            assert (resumed / file.name).read_bytes() == file.read_bytes()


def test_each_shard_is_made_by_one_process(shards) -> None:
    output, sources = shards / "layers", str(shards / "*.tar")
    folder = output / ".0000.tar.partial"
    folder.mkdir(parents=True)
    constructed(output / "whole", sources)
    shutil.move(output / "whole" / "settings.json", output)
    with locked(folder, AssertionError()):  # as another process does
        assert constructed(output, sources) == {"kept": 1, BUSY: 1}
    assert not (output / "0000.tar").exists()
    assert constructed(output, sources) == COUNTS
    assert not folder.exists()


def test_a_picture_file_becomes_layers_to_open(shards) -> None:
    picture, output = shards / "both.png", shards / "layers"
    picture.write_bytes(flat_png(RED, GREEN))
    assert constructed(output, picture) == {"without a caption (only .png)": 1}
    assert set(os.listdir(output)) == {"both.json", "settings.json"}
    (shards / "both.txt").write_text("red and green")
    assert constructed(shards / "again", picture) == {"kept": 1}
    assert load_stack(shards / "again" / "both.ora").flatten() == painted([RED, GREEN])


@pytest.mark.filterwarnings("ignore:.*(cut off|not in tar format|unreachable)")
def test_what_cannot_be_read_whole(shards) -> None:
    whole = (shards / "0000.tar").read_bytes()
    (shards / "cut.tar").write_bytes(whole[: whole.index(b"g.png")])
    (shards / "text.tar").write_text("not a tar")
    output = shards / "layers"
    counts = constructed(output, shards / "cut.tar", shards / "text.tar", "pipe:exit 3")
    assert counts["kept"] == 1
    assert counts["shards cut off or damaged"] == 1
    assert counts.total() - counts["kept"] >= 3
    # What could be read of a file is kept; what may come whole another time is not written.
    assert {name for name in os.listdir(output) if name.endswith(".tar")} == {"cut.tar"}


def test_two_kinds_of_layers_are_not_mixed(shards) -> None:
    output, shard = shards / "layers", shards / "0001.tar"
    constructed(output, shard)
    with pytest.raises(ConstructionError, match=r"made with model 'flat', not 'other'; give anoth"):
        constructed(output, shard, settings={"model": "other"})
    stricter = GATES | {"sure": Gate("a thing is not seen surely", least=0.8)}
    with pytest.raises(ConstructionError, match="made with gates"):
        constructed(output, shard, gates=stricter)
    (output / "settings.json").write_text("{")
    with pytest.raises(ConstructionError, match=r"settings\.json is missing or damaged; give anot"):
        constructed(output, shard)
    with pytest.raises(ConstructionError, match=r"holds other things .* settings\.json is miss"):
        constructed(shards, shard)
    assert not (shards / "settings.json").exists()


def test_what_a_source_becomes(tmp_path) -> None:
    sources = [
        Path("a/0.tar"),
        Path("b/22.05.JPG"),
        "https://x.org/c/1.tar?key=a/b",
        "pipe:cat d/2.tar",
    ]
    names = [target.name for target in targets_of(sources, tmp_path)]
    assert names == ["0.tar", "22.05.ora", "1.tar", "2.tar"]
    with pytest.raises(ConstructionError, match=r"a/0.tar and b/0.tar would both become .*0.tar"):
        targets_of([Path("a/0.tar"), Path("b/0.tar")], tmp_path)


def test_stacks_that_cannot_be_learned_from_are_counted(shards) -> None:
    output = shards / "layers"
    constructed(output, shards / "0001.tar")
    good = dict(StackShards(output / "0001.tar", SIDE, held_out=None).in_order())["h"]
    many = replace(good, layers=good.layers * 5)
    files = [("a.ora", ora_of(good)[:-40]), ("b.ora", ora_of(many))]
    (shards / "bad.tar").write_bytes(tar(*files, ("c.png", b"")))
    stacks = StackShards(shards / "bad.tar", SIDE, held_out=None)
    assert list(stacks.in_order()) == []
    assert stacks.counts == {
        "with a broken stack": 1,
        "with more than 4 layers": 1,
        "without a stack of layers (.ora) (only .png)": 1,
    }
    other = StackShards(output / "0001.tar", 16, held_out=None)
    assert list(other.in_order()) == []
    assert other.counts == {"of another size than 16 × 16": 1}


def test_stacks_as_scenes_to_learn_from() -> None:
    things = [RED, BLUE]
    stack = take_apart(painted(things), "red and blue", flat_stages(truth(things))).stack
    scenes = rendering_of([stack, replace(stack, layers=stack.layers[:1])])
    assert torch.equal(scenes.images[0], painted_pixels(things))
    assert torch.equal(scenes.backgrounds[1], painted_pixels([]))
    alphas = scenes.rgba[:, :, 3] > 0.5
    expected = torch.zeros(2, 4, SIDE, SIDE, dtype=torch.bool)
    expected[:, 0], expected[0, 1] = RED[1], BLUE[1]
    assert torch.equal(alphas, expected)
    assert torch.allclose(scenes.rgba[0, 1, :3, 10, 10], torch.tensor(COLOURS["blue"]) / 255)


# ------------------------------------------------------------------ the command


@pytest.fixture
def command(shards, tiny, monkeypatch) -> Callable[..., int]:
    """The command, by the flat world's stages."""
    monkeypatch.setattr(models, "load_pipeline", lambda name, device: tiny)
    segmenter = torch.nn.Linear(1, 1)
    monkeypatch.setattr(models, "load_segmenter", lambda device: segmenter)
    monkeypatch.setattr(construction, "storybook_stages", lambda pipe, detector: flat_stages(grey))
    monkeypatch.setattr("lrd_helpers.storybook.IMAGE_SIZE", SIDE)
    return lambda *arguments: command_line.main(["construct", *map(str, arguments)])


def test_the_command(command, shards, capsys) -> None:
    summary = (
        "3 kept, 2 a thing that is named is not found, 1 too small, 1 with a broken picture, "
        "1 without a caption (only .png)\n"
    )
    for rates in (r"\S+ s a picture: \w+ \d+%(, \w+ \d+%){3}\n", ""):  # then all is there
        assert command(shards / "*.tar", "--output", shards / "layers") == 0
        out, _ = capsys.readouterr()
        assert out.startswith(summary)
        assert re.fullmatch(rates, out.removeprefix(summary))
    assert set(StackShards(str(shards / "layers" / "*.tar"), SIDE).shards) == {
        shards / "layers" / f"{number}.tar" for number in ("0000", "0001")
    }


def test_a_full_disk(command, shards, capsys) -> None:
    resource = pytest.importorskip("resource")
    arguments = [shards / "*.tar", "--output", shards / "layers"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))  # as if no more were left
    try:
        assert command(*arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    name = shards / "layers" / "0000.tar"
    assert capsys.readouterr().err == f"error: {name}: File too large\n"
    assert not name.exists()
    assert command(*arguments) == 0
    assert capsys.readouterr().out.startswith("3 kept, ")
    assert len(dict(StackShards(name, SIDE, held_out=None).in_order())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.tar", "--output", "layers"], "error: no shard matches 'none.tar'"),
        (["0000.tar", "--output", "."], "error: . holds other things than layers"),
        (["0000.tar", "--output", "0001.tar"], "error: --output 0001.tar is a file, but should be"),
        (["x9://a", "--output", "layers"], "error: 'x9://a': webdataset opens no x9"),
    ],
)
def test_what_the_command_refuses(command, shards, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(shards)
    assert command(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not Path("layers").exists()


@pytest.mark.slow
def test_a_true_scene_by_the_shipped_models(tmp_path, capsys) -> None:
    car = PlacedSticker("car", "red", (0.3, 0.7), (0.45, 0.35))
    star = PlacedSticker("star", "blue", (0.72, 0.3), (0.35, 0.35))
    placed = (star, car)
    true = render_scenes([Scene("on grass", placed, "")])
    picture = ("car.png", png_of(picture_of(true.images[0])))
    (tmp_path / "0.tar").write_bytes(tar(picture, ("car.txt", b"a red car and a blue star")))
    arguments = ["construct", str(tmp_path / "0.tar"), "--output", str(tmp_path / "layers")]
    assert command_line.main([*arguments, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("1 kept\n")
    shards = StackShards(tmp_path / "layers" / "0.tar", 128, held_out=None)
    stack = dict(shards.in_order())["car"]
    assert [layer.prompt for layer in stack.layers] == ["a blue star", "a red car"]
    assert stack.background_prompt == "on grass"
    made = rendering_of([stack])
    assert soft_iou(made.rgba[0, :2], true.rgba[0]).min() > 0.95
    assert float(psnr(made.backgrounds, true.backgrounds)) > 26
