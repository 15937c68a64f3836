"""The training loop and the trainings, each for a few steps."""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors.torch import load_file
from torch import nn

from lrd_helpers.storybook import (
    COLOURS,
    PLACES,
    STICKERS,
    WORDS,
    PlacedSticker,
    Scene,
    StorybookDataset,
    render_scenes,
    sample_scene,
    seeded,
)
from lrd_helpers.training import (
    autoencoder,
    clip,
    latent_diffusion,
    loop,
    segmenter,
    style,
    upsampler,
)
from lrd_helpers.training import text_encoder as text_encoder_training


class Line(nn.Module):
    """The smallest training there is: noisy points of a line."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)

    def forward(self, batch, generator):
        noise = torch.randn(len(batch), 1, generator=generator)
        return {
            "loss": (self.layer(batch) - batch.sum(1, keepdim=True) + 0.1 * noise).square().mean()
        }


def points(start, reader, readers, cut_at=None):
    number = start
    while number != cut_at:
        generator = torch.Generator().manual_seed(number)
        yield torch.randn(8, 3, generator=generator)
        number += 1
    raise InterruptedError("the power went out")


def options(run, *more, **defaults):
    defaults = {"minutes": 1.0, "batch_size": 8, "learning_rate": 0.05, "warmup": 2, **defaults}
    return loop.parse(
        loop.parser("line", "", **defaults),
        ["--run", str(run), "--mixed-precision", "no", "--log-every", "5", *more],
    )


def test_two_processes_train_one_model_and_stop_together(tmp_path):
    """By the clock: the first process's, which the other one has to be told."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from lrd_helpers.training import loop\n"
        "from test_training import Line, options, points\n"
        "line = Line()\n"
        "told = options(Path(sys.argv[1]), '--log-every', '1', '--minutes', '0.01')\n"
        "loop.train(line, told, batches=points)\n"
        "print('weights', *line.layer.weight.flatten().tolist())\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    found = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launch, str(script), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": found},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("weights") == 1, "one is enough to write the model"
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open(newline="")))
    assert len(rows) > 2
    assert all(int(row["samples"]) == 2 * 8 * int(row["step"]) for row in rows)


def test_a_cut_training_resumed_equals_one_in_one_go(tmp_path):
    whole, cut, resumed = Line(), Line(), Line()
    loop.train(whole, options(tmp_path / "whole", "--steps", "20"), batches=points)
    more = ("--steps", "20", "--checkpoint-every", "5")
    with pytest.raises(InterruptedError):
        loop.train(
            cut, options(tmp_path / "cut", *more), batches=lambda *where: points(*where, cut_at=13)
        )
    assert loop.latest_checkpoint(tmp_path / "cut").name == "checkpoint-0000010"
    progress = loop.train(resumed, options(tmp_path / "cut", *more), batches=points)
    assert progress.step == 20
    assert progress.samples == 160
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    logs = [
        [(row["step"], row["loss"]) for row in csv.DictReader((tmp_path / run / "log.csv").open())]
        for run in ("whole", "cut")
    ]
    assert logs[0] == logs[1]
    assert [step for step, _ in logs[0]] == ["5", "10", "15", "20"]


def test_fresh_begins_anew(tmp_path):
    loop.train(Line(), options(tmp_path, "--steps", "3"), batches=points)
    assert loop.train(Line(), options(tmp_path, "--steps", "6"), batches=points).step == 6
    once_more = Line()
    progress = loop.train(once_more, options(tmp_path, "--steps", "2", "--fresh"), batches=points)
    assert progress.step == 2


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    def interrupted(start, reader, readers):
        for number, batch in enumerate(points(start, reader, readers), start=start):
            if number == 7:
                signal.raise_signal(signal.SIGINT)
            yield batch

    handler = signal.getsignal(signal.SIGINT)
    arguments = options(tmp_path, "--steps", "20")
    with pytest.raises(SystemExit, match="stopped at step 8; the same command goes on from there"):
        loop.train(Line(), arguments, batches=interrupted)
    assert signal.getsignal(signal.SIGINT) is handler
    assert loop.latest_checkpoint(tmp_path).name == "checkpoint-0000008"
    assert loop.train(Line(), arguments, batches=points).step == 20


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    loop.train(Line(), options(tmp_path, "--steps", "4"), batches=points)

    def full(self, folder, **_):
        Path(folder).mkdir()
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(loop.Accelerator, "save_state", full)
    with pytest.raises(OSError, match=r"could not write .*checkpoint-0000006: .*before it stands"):
        loop.train(Line(), options(tmp_path, "--steps", "6"), batches=points)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-0000004"]


def test_a_half_written_checkpoint_is_not_taken(tmp_path):
    loop.train(Line(), options(tmp_path, "--steps", "4"), batches=points)
    (tmp_path / "checkpoint-0000009.partial").mkdir()
    assert loop.latest_checkpoint(tmp_path).name == "checkpoint-0000004"
    loop.train(Line(), options(tmp_path, "--steps", "6"), batches=points)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-0000006"]


def test_a_checkpoint_of_another_shape_is_named(tmp_path):
    loop.train(Line(), options(tmp_path, "--steps", "2"), batches=points)
    other = Line()
    other.layer = nn.Linear(5, 1)
    with pytest.raises(ValueError, match=r"checkpoint-0000002 does not fit this model .*--fresh"):
        loop.train(other, options(tmp_path, "--steps", "4"), batches=points)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    def poisoned(start, reader, readers):
        yield from (torch.full((8, 3), value) for value in (1.0, 1.0, float("nan")))

    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        loop.train(Line(), options(tmp_path, "--steps", "5"), batches=poisoned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "must be more than 0"),
        (["--from", "nowhere"], "--from nowhere: no such folder"),
    ],
)
def test_options_that_cannot_work_exit_with_2(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        options(tmp_path, *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_learning_rate_is_a_trapezoid():
    rates = [
        loop.learning_rate_factor(step, step / 100, warmup=10, decay=0.5) for step in range(100)
    ]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert rates[75] == pytest.approx(0.5)
    assert loop.learning_rate_factor(100, 1.0, 10, 0.5) == 0


def write_half_of_the_new(folder):
    (folder / "weights").write_text("half of the new")
    raise OSError(28, "No space left on device")


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    with loop.replacing_folder(folder) as partial:
        (partial / "weights").write_text("old")
    message = r"could not write .*model: .*No space left.*left as it was"
    with pytest.raises(OSError, match=message), loop.replacing_folder(folder) as partial:
        write_half_of_the_new(partial)
    assert (folder / "weights").read_text() == "old"
    with loop.replacing_folder(folder) as partial:
        (partial / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_scores_measured_later_join_the_card(tmp_path):
    (tmp_path / "README.md").write_text(
        "# card\n\n| held-out score | |\n|---|---|\n| loss | 0.1 |\n"
    )
    (tmp_path / "training.json").write_text('{"step": 3, "scores": {"loss": 0.1}}')
    for accuracy in (0.5, 0.7):
        loop.add_scores(tmp_path, {"accuracy": accuracy})
    assert json.loads((tmp_path / "training.json").read_text()) == {
        "step": 3,
        "scores": {"loss": 0.1, "accuracy": 0.7},
    }
    card = (tmp_path / "README.md").read_text()
    assert card.endswith("| loss | 0.1 |\n| accuracy | 0.7 |\n")
    assert "0.5" not in card


def test_minutes_are_a_budget_too(tmp_path):
    progress = loop.train(Line(), options(tmp_path, "--minutes", "0.01"), batches=points)
    assert 0.6 < progress.seconds < 2
    assert progress.step > 20


@pytest.mark.parametrize("sticker_count", [0, 2])
def test_in_the_segmenter_loss_stickers_and_background_count_alike(sticker_count):
    rendering = StorybookDataset(4, sticker_count=sticker_count).batch(0)
    trainee = segmenter.SegmenterTraining(None, None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        losses = trainee(rendering, generator)
        images = segmenter.damage(rendering.images, generator.manual_seed(0), None)
        logits = trainee.unet(2 * images - 1, 0).sample.movedim(1, -1)
    what, colour = segmenter.labels(rendering)
    stickers = what < len(segmenter.STICKERS)
    expected = {"sticker": 0.0, "place": 0.0, "colour": 0.0}
    for pixels, name in ((stickers, "sticker"), (~stickers, "place")):
        if pixels.any():
            kinds, colours = logits[pixels].split([len(segmenter.WHAT), 9], 1)
            cross_entropy = torch.nn.functional.cross_entropy
            expected[name] = float(cross_entropy(kinds, what[pixels]))
            expected["colour"] += float(cross_entropy(colours, colour[pixels]))
    assert stickers.any() == (sticker_count > 0)
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert float(losses["loss"]) == pytest.approx(sum(expected.values()), rel=1e-4)


def test_segmenter_labels_tell_the_truth():
    rendering = StorybookDataset(4, sticker_count=2).batch(0)
    what, colour = segmenter.labels(rendering)
    for row, scene in enumerate(rendering.scenes):
        for placed, mask in zip(scene.stickers, rendering.masks[row], strict=True):
            assert (what[row][mask] == segmenter.WHAT.index(placed.sticker)).all()
        background = ~rendering.masks[row].any(0)
        assert (what[row][background] == segmenter.WHAT.index(scene.place)).all()
        assert (colour[row][background] == 8).all()


def test_damage_leaves_the_first_quarter_clean():
    images = StorybookDataset(8).batch(0).images
    damaged = segmenter.damage(images, torch.Generator().manual_seed(0), None)
    assert torch.equal(damaged[:2], images[:2])
    assert ((damaged[4:] - images[4:]).abs().flatten(1).max(1).values > 0).all()
    assert damaged.min() >= 0
    assert damaged.max() <= 1


def test_the_text_encoder_learns_what_each_token_stands_for():
    trainee = text_encoder_training.TextEncoderTraining()
    tokens = trainee.tokenizer(
        ["on grass a red car and a star", "red and car"], padding="max_length", return_tensors="pt"
    ).input_ids
    truth = trainee.truth(tokens)
    stickers, colours, places = (["none", *names] for names in (STICKERS, COLOURS, PLACES))
    said = [
        [
            (stickers[a], colours[b], places[c])
            for a, b, c in zip(
                *(truth[n][row] for n in ("sticker", "colour", "place")), strict=True
            )
        ]
        for row in (0, 1)
    ]
    nothing = ("none", "none", "none")
    assert said[0][1:9] == [
        nothing,  # on
        ("none", "none", "on grass"),
        nothing,  # a
        ("none", "red", "none"),
        ("car", "red", "none"),
        nothing,  # and
        nothing,  # a
        ("star", "none", "none"),
    ]
    assert said[1][1:4] == [("none", "red", "none"), nothing, ("car", "none", "none")]
    assert set(said[0][9:] + said[1][4:]) == {nothing}, "the end mark and the padding"
    assert torch.equal(truth["word"], tokens)


@pytest.mark.slow
def test_the_text_encoder_learns_to_be_read(tmp_path):
    text_encoder_training.main(
        [
            *("--steps", "120", "--warmup", "20", "--mixed-precision", "no"),
            *("--run", str(tmp_path / "run"), "--output", str(tmp_path / "model")),
        ]
    )
    (share,) = json.loads((tmp_path / "model" / "training.json").read_text())["scores"].values()
    assert share > 0.8


def test_captions_for_the_text_encoder_are_repeatable_and_some_say_anything():
    captions = text_encoder_training.captions_of_batch(3, 0, 256, seed=0)
    assert captions == text_encoder_training.captions_of_batch(3, 0, 256, seed=0)
    assert captions != text_encoder_training.captions_of_batch(3, 1, 256, seed=0)
    unlikely = rf"({'|'.join(COLOURS)}) (?!{'|'.join(STICKERS)})"
    assert 16 < sum(bool(re.search(unlikely, one)) for one in captions) < 80
    assert all(set(one.split()) <= set(WORDS) for one in captions)


def test_the_u_net_learns_and_its_text_encoder_stands_still(text_encoder):
    trainee = latent_diffusion.LatentDiffusionTraining(text_encoder=text_encoder)
    assert not any(weight.requires_grad for weight in trainee.text_encoder.parameters())
    assert all(weight.requires_grad for weight in trainee.unet.parameters())
    text = trainee.encoded_text(["a red car on grass", ""])
    assert trainee.unet.config.cross_attention_dim == text.shape[-1]
    with pytest.raises(ValueError, match="has to read by something"):
        latent_diffusion.LatentDiffusionTraining()


def test_another_text_encoder_costs_only_the_keys_and_values(tmp_path, text_encoder):
    first = latent_diffusion.LatentDiffusionTraining(text_encoder=text_encoder)
    latent_diffusion.pipeline(first, AutoencoderKL()).save_pretrained(tmp_path)
    kept = latent_diffusion.LatentDiffusionTraining(tmp_path)
    other = latent_diffusion.LatentDiffusionTraining(tmp_path, text_encoder)
    for name, value in first.unet.state_dict().items():
        assert torch.equal(value, kept.unet.state_dict()[name]), name
        anew = name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        assert torch.equal(value, other.unet.state_dict()[name]) is not anew, name


def test_noise_levels_count_as_much_as_is_said():
    snr = torch.tensor([0.01, 0.04, 0.25, 1.0, 25.0])
    assert latent_diffusion.loss_weights(snr).tolist() == pytest.approx([1, 1, 1, 1, 0.2])
    assert latent_diffusion.loss_weights(snr, "root-snr").tolist() == pytest.approx(
        [5, 5, 2, 1, 0.2]
    )


def test_timesteps_of_a_batch_cover_the_range():
    drawn = latent_diffusion.stratified_timesteps(50, 1000, seeded(0))
    assert (drawn.sort().values // 20).tolist() == list(range(50)), "one from each part"
    assert not torch.equal(drawn, drawn.sort().values), "no sample always has little noise"
    assert torch.equal(drawn, latent_diffusion.stratified_timesteps(50, 1000, seeded(0)))
    many = torch.cat([latent_diffusion.stratified_timesteps(3, 10, seeded(i)) for i in range(1000)])
    assert many.bincount(minlength=10).tolist() == pytest.approx([300] * 10, abs=60)
    middle = latent_diffusion.stratified_timesteps(10_000, 1000, seeded(0), spread=1.2)
    logits = torch.logit((middle + 0.5) / 1000)
    assert float(logits.mean()) == pytest.approx(0, abs=0.02)
    assert float(logits.std()) == pytest.approx(1.2, abs=0.02)


def test_what_stands_in_each_cell():
    def placed(sticker, colour, centre, size):
        return PlacedSticker(sticker, colour, centre=centre, size=size)

    behind = placed("house", "blue", (0.25, 0.5), (0.4, 0.4))
    before = placed("ball", "pink", (0.75, 0.5), (0.5, 0.5))
    rendering = render_scenes(
        [Scene("at sea", (behind, before), ""), Scene("at sea", (), "at sea")]
    )
    classes = latent_diffusion.cell_classes(rendering)
    colours = list(COLOURS)
    house, ball = (
        1 + STICKERS.index(sticker) * len(colours) + colours.index(colour)
        for sticker, colour in (("house", "blue"), ("ball", "pink"))
    )
    assert classes.shape == (2, 16, 16)
    assert not classes[1].any(), "a place is no thing"
    assert classes[0, 8, 4] == house
    assert classes[0, 8, 12] == ball
    assert classes[0, 0, 0] == 0
    covered = rendering.masks[0, 1].float().mean()
    assert (classes[0] == ball).float().mean() == pytest.approx(float(covered), abs=0.03)


def test_features_learn_to_see_and_what_sees_is_not_exported(tmp_path, text_encoder):
    trainee = latent_diffusion.LatentDiffusionTraining(text_encoder=text_encoder, see=0.5)
    rendering = StorybookDataset(2, seed=5, sticker_count=2).batch(0)
    latents = torch.randn(2, 4, 16, 16, generator=seeded(0))
    classes = latent_diffusion.cell_classes(rendering)
    batch = latent_diffusion.Batch(latents, rendering.captions, classes)
    optimizer = torch.optim.AdamW(trainee.seeing.parameters(), 1e-2)
    seen = []
    for _ in range(25):  # what sees learns even from features of random weights
        losses = trainee(batch, seeded(0))
        losses["seen"].backward()
        seen.append(float(losses["seen"]))
        optimizer.step()
        optimizer.zero_grad()
    assert seen[-1] < seen[0] / 3
    total = losses["loss"] - 0.5 * losses["seen"]
    assert float(total) == pytest.approx(float(losses["noise"])), "min-SNR is the default"
    blocks = trainee.unet.up_blocks
    assert all(block.resnets[0].conv1.weight.grad.any() for block in blocks[:2])
    assert blocks[2].resnets[0].conv1.weight.grad is None, "the loss is of the blocks before it"

    plain = latent_diffusion.LatentDiffusionTraining(text_encoder=text_encoder)
    assert not plain.seeing
    assert set(plain(batch, seeded(0))) == {"loss", "mse"}
    assert set(trainee.eval()(batch, seeded(0))) == {"loss", "mse"}
    latent_diffusion.pipeline(trainee, AutoencoderKL()).save_pretrained(tmp_path)
    again = latent_diffusion.LatentDiffusionTraining(tmp_path)
    assert again.state_dict().keys() == plain.state_dict().keys()


def test_a_flawed_scene_has_one_mistake_that_its_caption_tells():
    changes, again_smaller = [], []
    for number in range(200):
        scene = sample_scene(seeded(number), sticker_count=2)
        wrong = latent_diffusion.flawed_scene(scene, seeded(number, 1))
        assert wrong == latent_diffusion.flawed_scene(scene, seeded(number, 1))
        assert (wrong.place, wrong.place_numbers) == (scene.place, scene.place_numbers)
        left = [one for one in wrong.stickers if one not in scene.stickers]
        gone = [one for one in scene.stickers if one not in wrong.stickers]
        assert len(left) <= 1
        assert len(gone) <= 1
        again = any(one.sticker == two.sticker for one in left for two in scene.stickers)
        again_smaller += [
            max(one.size) < max(two.size)
            for one in left
            for two in scene.stickers
            if (one.sticker, one.colour) == (two.sticker, two.colour)
        ]
        changes.append((len(left), len(gone), again))
    assert {change[:2] for change in changes} >= {(1, 0), (0, 1), (1, 1)}
    assert sum(change[:2] == (0, 0) for change in changes) < 6, "by chance the same colour again"
    assert changes.count((1, 0, True)) > 30, "a thing twice"
    assert changes.count((1, 0, False)) > 60, "a thing that nobody asked for"
    assert sum(again_smaller) > 0.9 * len(again_smaller), "or else it could not be told which"
    bare = Scene("at sea", (), "at sea")
    assert len(latent_diffusion.flawed_scene(bare, seeded(0)).stickers) == 1


def test_a_ghost_is_noise_to_be_taken_away(text_encoder):
    latents = torch.randn(64, 4, 16, 16, generator=seeded(0))
    noisy = []

    def clean_scene_known(given, timesteps, text):
        noisy.append((given, timesteps, text))
        alpha = trainee.scheduler.alphas_cumprod[timesteps][:, None, None, None]
        eps = (given - alpha.sqrt() * latents) / (1 - alpha).sqrt()
        return UNet2DConditionOutput(eps)

    for ghosts in (0.5, 0.0):
        trainee = latent_diffusion.LatentDiffusionTraining(text_encoder=text_encoder, ghosts=ghosts)
        trainee.trained_unet = clean_scene_known
        batch = latent_diffusion.Batch(latents, ["a car"] * 64, None, latents + 1)
        assert float(trainee(batch, seeded(1))["mse"]) < 1e-8, "asked for is the scene, not a ghost"
    (with_ghosts, timesteps, _), (without, same_timesteps, _) = noisy
    assert torch.equal(timesteps, same_timesteps)
    assert 0.3 < (with_ghosts != without).flatten(1).any(1).float().mean() < 0.6

    # With no noise but the ghost, and a flaw of 1 everywhere, what is left over is its strength.
    trainee.ghosts = 1.0
    empty = trainee.encoded_text([""])
    strengths = []
    for number in range(20):
        trainee(batch, seeded(number))
        given, timesteps, text = noisy[-1]
        alpha = trainee.scheduler.alphas_cumprod[timesteps]
        ghost = (given / alpha.sqrt()[:, None, None, None] - latents).mean((1, 2, 3))
        noise = ((1 - alpha) / alpha).sqrt() / 32  # of the mean of 4 × 16 × 16 numbers
        assert (ghost > -5 * noise).all()
        assert (ghost < 1 + 5 * noise).all()
        read = (text != empty).flatten(1).any(1)
        assert 0 < (~read).sum() < 20
        assert (ghost.abs() < 5 * noise)[~read].all(), "an empty caption tells nothing"
        strengths.append(ghost[read & (timesteps > 200) & (timesteps < 400)])
    strengths = torch.cat(strengths)
    assert 0.4 < (strengths > 0.85).float().mean() < 0.7, "half are whole, and some by chance"
    assert 0.15 < (strengths < 0.5).float().mean() < 0.35
    before = len(noisy)
    trainee.eval().unet.forward = clean_scene_known
    trainee(latent_diffusion.Batch(latents, ["a car"] * 64), seeded(0))
    assert len(noisy) == before + 1, "judged without ghosts"


def test_seeing_that_cannot_work_exits_with_2(capsys):
    for arguments, message in [
        (["--ghosts", "1.5"], "--ghosts 1.5: it must be a share, from 0 to 1"),
        (["--ghosts", "0.5", "--data", "shards.tar"], "--data cannot be drawn once more"),
        (["--see", "-1"], "--see -1: a weight cannot be negative"),
        (["--spread", "0"], "--spread 0: it must be a number above 0"),
        (["--spread", "inf"], "--spread inf: it must be a number above 0"),
        (["--see", "0.1", "--data", "shards.tar"], "nobody knows what stands where"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            latent_diffusion.main(arguments)
        assert message in capsys.readouterr().err


def test_only_training_steps_run_compiled(monkeypatch, text_encoder):
    calls = []

    def compiled(unet):
        def run(*inputs):
            calls.append(inputs)
            return unet(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    trainee = latent_diffusion.LatentDiffusionTraining(text_encoder=text_encoder)
    names = trainee.state_dict().keys()
    batch = latent_diffusion.Batch(torch.zeros(1, 4, 16, 16), ["a red car"])
    trainee.compile_unet()
    assert trainee.state_dict().keys() == names
    trainee(batch, seeded(0))["loss"].backward()
    assert len(calls) == 1
    assert trainee.unet.conv_out.weight.grad is not None
    trainee.eval()(batch, seeded(0))
    assert len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "files"),
    [
        (autoencoder, ["config.json", "diffusion_pytorch_model.safetensors"]),
        (segmenter, ["config.json", "diffusion_pytorch_model.safetensors"]),
        (clip, ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"]),
        (text_encoder_training, ["config.json", "model.safetensors", "tokenizer.json"]),
        (
            latent_diffusion,
            [
                "model_index.json",
                "unet/diffusion_pytorch_model.safetensors",
                "vae/README.md",
                "text_encoder/model.safetensors",
            ],
        ),
        (style, ["config.json", "diffusion_pytorch_model.safetensors", "unet.safetensors"]),
        (
            upsampler,
            [
                "config.json",
                "diffusion_pytorch_model.safetensors",
                "scheduler/scheduler_config.json",
            ],
        ),
    ],
)
def test_each_training_runs_and_exports_a_loadable_folder(
    tmp_path, monkeypatch, text_encoder, module, files
):
    def quick(*_, **__):
        return {"standard deviation of latents": 0.5, "quick": 1.0}

    monkeypatch.setattr(module, "evaluate", quick)  # the real ones look at hundreds of scenes
    # One step on small and one on whole pictures; a cache of one batch of scenes.
    read_by = {latent_diffusion: ["--text-encoder", str(text_encoder)]}.get(module, [])
    one_batch = dict.fromkeys([latent_diffusion, style, upsampler], ["--cache", "64"])
    more = {segmenter: ["--coarse-steps", "1"], **one_batch}.get(module, [])
    options = ["--steps", "2", "--batch-size", "4", "--mixed-precision", "no"]
    options += ["--log-every", "1", "--sample-every", "2", "--output", str(tmp_path / "out"), *more]
    module.main([*options, *read_by, "--run", str(tmp_path / "run")])
    for file in [*files, "README.md", "training.json", "log.csv"]:
        assert (tmp_path / "out" / file).exists(), file
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["step"] == 2
    assert record["samples"] == 8
    assert record["scores"]["quick"] == 1.0
    if module is latent_diffusion:
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
        image = pipe("a red car", num_inference_steps=1, output_type="pt").images
        assert image.shape == (1, 3, 128, 128)
    if module is not text_encoder_training:
        assert list((tmp_path / "run").glob("samples-*.png"))
    if module in (latent_diffusion, style, upsampler):
        assert_a_second_run_goes_on(module, [*options, "--sample-every", "0"], tmp_path)
    if module is latent_diffusion:
        # A quarter of the way back to where it began; steps so large that they can be told.
        again = [*options, "--from", str(tmp_path / "out"), "--run", str(tmp_path / "more")]
        again += ["--learning-rate", "0.05", "--warmup", "1", "--ema-decay", "0", "--fresh"]
        for keep in ("0", "0.25"):
            module.main([*again, "--keep", keep, "--output", str(tmp_path / keep)])
        begun, ended, kept = (
            load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")
            for name in ("out", "0", "0.25")
        )
        assert (ended["conv_in.weight"] - begun["conv_in.weight"]).abs().float().mean() > 0.02
        for name, weight in kept.items():
            mean = 0.25 * begun[name].float() + 0.75 * ended[name].float()
            assert torch.allclose(weight.float(), mean, atol=2e-3), name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--keep", "1", "--from", "."], "--keep 1: it must be a share, from 0 to less than 1"),
        (["--keep", "nan", "--from", "."], "--keep nan: it must be a share"),
        (["--keep", "0.5"], "--keep is for going on from a U-Net"),
        (["--keep", "0.5", "--text-encoder", "."], "--keep is for going on from a U-Net"),
    ],
)
def test_keep_that_cannot_work_exits_with_2(capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        latent_diffusion.main(arguments)
    assert said in capsys.readouterr().err


def test_the_u_net_can_see_more_scenes_of_several_stickers(tmp_path):
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
    )

    def cached(shares, ghosts=0.0):
        told = argparse.Namespace(
            seed=1,
            cache=64,
            batch_size=16,
            run=tmp_path,
            sticker_shares=[float(share) for share in shares],
            mixed_precision="no",
            ghosts=ghosts,
        )
        return latent_diffusion.LatentCache(vae, told, 0, 1)

    def scenes(*shares):
        cache = cached(shares)
        assert len(cache.kept["latents"]) == len(cache.scenes) == 64
        return [len(scene.stickers) for scene in cache.scenes]

    assert set(scenes(0, 0, 1, 0, 0)) == {2}
    # Not the latents that were kept for other shares.
    counts = scenes(0, 1, 0, 0, 3)
    assert set(counts) == {1, 4}
    assert 0.6 < counts.count(4) / 64 < 0.9

    # And each with a mistake, if ghosts are asked for: not the file without them.
    plain, haunted = (next(cached((0, 0, 1, 0, 0), g).batches(0)) for g in (0.0, 0.5))
    assert plain.flawed is None
    assert torch.equal(haunted.latents, plain.latents)
    assert haunted.captions == plain.captions
    assert haunted.flawed.shape == haunted.latents.shape
    assert (haunted.flawed != haunted.latents).flatten(1).any(1).sum() >= 14


@pytest.mark.parametrize("coarse_steps", ["0", "1"])
def test_the_segmenter_can_see_more_scenes_of_several_stickers(monkeypatch, coarse_steps):
    counts = []

    class Enough(Exception):
        pass

    def train(trainee, options, *, batches, sample):
        for _, batch in zip(range(2), batches(0, 0, 1), strict=False):
            counts.extend(len(scene.stickers) for scene in batch.scenes)
        raise Enough

    monkeypatch.setattr(loop, "train", train)
    with pytest.raises(Enough):
        segmenter.main(["--sticker-shares", *"00030", "--coarse-steps", coarse_steps])
    assert counts == [3] * 16


@pytest.mark.parametrize(
    "shares", [["-1", "1", "1", "1", "1"], ["0"] * 5, ["nan", *"1111"], ["inf", *"1111"]]
)
def test_sticker_shares_that_cannot_work_exit_with_2(capsys, shares):
    with pytest.raises(SystemExit, match="2"):
        latent_diffusion.main(["--sticker-shares", *shares])
    assert "--sticker-shares: none can be negative" in capsys.readouterr().err


def assert_a_second_run_goes_on(module, options, tmp_path):
    """Started from the first run's model, the card and the log know of both."""
    start = str(tmp_path / "out")
    module.main([*options, "--run", str(tmp_path / "second"), "--from", start])
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert [run["samples"] for run in record["before"]] == [8]
    assert "| before that | 8 samples in " in (tmp_path / "out" / "README.md").read_text()
    rows = (tmp_path / "out" / "log.csv").read_text().splitlines()[1:]
    assert [row.split(",")[:2] for row in rows] == [
        ["1", "4"],
        ["2", "8"],
        ["3", "12"],
        ["4", "16"],
    ]
    configurations = (tmp_path / "out").rglob("*.json")
    assert not [file for file in configurations if "_name_or_path" in file.read_text()]
