"""The trainings: what each learns from, its loss, and a few steps of it by its command."""

import json
import re
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors.torch import load_file

from lrd_helpers.storybook import (
    COLOURS,
    PLACES,
    STICKERS,
    WORDS,
    PlacedSticker,
    Scene,
    StorybookDataset,
    own_sticker,
    render_scenes,
    sample_scene,
    seeded,
)
from lrd_helpers.training import (
    autoencoder,
    clip,
    distillation,
    latent_diffusion,
    layerdiff,
    loop,
    new_sticker,
    rgba_autoencoder,
    segmenter,
    style,
    upsampler,
)
from lrd_helpers.training import text_encoder as text_encoder_training
from lrd_helpers.training.ghosts import Ghosts, flawed_scene
from lrd_helpers.training.latent_cache import Batch
from lrd_helpers.training.latent_diffusion import Extras, LatentDiffusionTraining
from lrd_helpers.training.seeing import Seeing, cell_classes
from lrd_helpers.words import unknown_words


@pytest.fixture(scope="module")
def tiny_folder(_tiny, tmp_path_factory):
    """The tiny pipeline, saved as if it drew 128 × 128 pixels, and its autoencoder had a card."""
    folder = tmp_path_factory.mktemp("tiny")
    _tiny.save_pretrained(folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 16}))
    (folder / "vae" / "README.md").write_text("# a card\n")
    return folder


# ------------------------------------------------------------------ segmenter


@pytest.mark.parametrize("sticker_count", [0, 2])
def test_in_the_segmenter_loss_stickers_and_background_count_alike(sticker_count):
    rendering = StorybookDataset(4, sticker_count=sticker_count, size=64).batch(0)
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
    rendering = StorybookDataset(4, sticker_count=2, size=64).batch(0)
    what, colour = segmenter.labels(rendering)
    for row, scene in enumerate(rendering.scenes):
        for placed, mask in zip(scene.stickers, rendering.masks[row], strict=True):
            assert (what[row][mask] == segmenter.WHAT.index(placed.sticker)).all()
        background = ~rendering.masks[row].any(0)
        assert (what[row][background] == segmenter.WHAT.index(scene.place)).all()
        assert (colour[row][background] == 8).all()


def test_damage_leaves_the_first_quarter_clean():
    images = StorybookDataset(8, size=64).batch(0).images
    damaged = segmenter.damage(images, torch.Generator().manual_seed(0), None)
    assert torch.equal(damaged[:2], images[:2])
    assert ((damaged[4:] - images[4:]).abs().flatten(1).max(1).values > 0).all()
    assert damaged.min() >= 0
    assert damaged.max() <= 1


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


# ------------------------------------------------------------------ text encoder


def test_the_text_encoder_learns_what_each_token_stands_for():
    trainee = text_encoder_training.TextEncoderTraining()
    tokens = trainee.tokenizer(
        ["on grass a red car and a star", "red and car"], padding="max_length", return_tensors="pt"
    ).input_ids
    truth = trainee.truth(tokens)
    stickers, colours, places = (["none", *names] for names in (STICKERS, COLOURS, PLACES))
    meanings = [
        [
            (stickers[a], colours[b], places[c])
            for a, b, c in zip(
                *(truth[n][row] for n in ("sticker", "colour", "place")), strict=True
            )
        ]
        for row in (0, 1)
    ]
    nothing = ("none", "none", "none")
    assert meanings[0][1:9] == [
        nothing,  # on
        ("none", "none", "on grass"),
        nothing,  # a
        ("none", "red", "none"),
        ("car", "red", "none"),
        nothing,  # and
        nothing,  # a
        ("star", "none", "none"),
    ]
    assert meanings[1][1:4] == [("none", "red", "none"), nothing, ("car", "none", "none")]
    assert set(meanings[0][9:] + meanings[1][4:]) == {nothing}, "the end mark and the padding"
    assert torch.equal(truth["word"], tokens)


@pytest.mark.slow
def test_the_text_encoder_learns_to_be_read(tmp_path):
    text_encoder_training.main(
        [
            *("--steps", "60", "--batch-size", "16", "--learning-rate", "3e-3", "--warmup", "10"),
            *("--ema-decay", "0.9", "--mixed-precision", "no"),
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
    assert 16 < sum(bool(re.search(unlikely, caption)) for caption in captions) < 80
    assert all(set(caption.split()) <= set(WORDS) for caption in captions)


# ------------------------------------------------------------------ the U-Net


def test_the_u_net_learns_and_its_text_encoder_stands_still(text_encoder):
    trainee = LatentDiffusionTraining(text_encoder=text_encoder)
    assert not any(weight.requires_grad for weight in trainee.text_encoder.parameters())
    assert all(weight.requires_grad for weight in trainee.unet.parameters())
    text = trainee.encoded_text(["a red car on grass", ""])
    assert trainee.unet.config.cross_attention_dim == text.shape[-1]
    with pytest.raises(ValueError, match="has to read by something"):
        LatentDiffusionTraining()


def test_another_text_encoder_costs_only_the_keys_and_values(tiny_folder, text_encoder):
    kept = LatentDiffusionTraining(tiny_folder).unet.state_dict()
    other = LatentDiffusionTraining(tiny_folder, text_encoder).unet.state_dict()
    before = load_file(tiny_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == kept.keys() == other.keys()
    for name, weight in before.items():
        assert torch.equal(weight, kept[name]), name
        anew = name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        assert torch.equal(weight, other[name]) is not anew, name


def test_the_objective_is_equation_3_with_some_captions_left_empty(tiny_folder):
    """Against the formula, written out with the same draws: LDM, Eq. 3, and min-SNR's weights."""
    trainee = LatentDiffusionTraining(tiny_folder).eval()
    z, guess = torch.randn(2, 64, 4, 4, 4, generator=seeded(0))
    questions = []

    def unet(*question):
        questions.append(question)
        return UNet2DConditionOutput(guess)

    losses = trainee.objective(Batch(z, ["a red car"] * 64), seeded(1), unet, Extras())
    ((z_t, t, text),) = questions

    generator = seeded(1)
    dropped = torch.rand(64, generator=generator) < 0.1
    noise = torch.randn(z.shape, generator=generator)
    assert torch.equal(t, torch.randint(1000, (64,), generator=generator))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bar = (1 - betas).cumprod(0)[t][:, None, None, None]
    torch.testing.assert_close(z_t, bar.sqrt() * z + (1 - bar).sqrt() * noise)
    empty, caption = trainee.encoded_text(["", "a red car"])
    assert 0 < dropped.sum() < 20
    torch.testing.assert_close(text, torch.where(dropped[:, None, None], empty, caption))
    squares, snr = (guess - noise).square().mean((1, 2, 3)), (bar / (1 - bar)).flatten()
    torch.testing.assert_close(losses["mse"], squares.mean())
    weights = torch.minimum(snr, torch.tensor(5.0)) / snr
    torch.testing.assert_close(losses["loss"], (weights * squares).mean())


def test_noise_levels_count_as_much_as_the_weighting_says():
    snr = torch.tensor([0.01, 0.04, 0.25, 1.0, 25.0])
    assert latent_diffusion.min_snr(snr).tolist() == pytest.approx([1, 1, 1, 1, 0.2])
    assert latent_diffusion.root_snr(snr).tolist() == pytest.approx([5, 5, 2, 1, 0.2])


def test_options_become_extras():
    plain = latent_diffusion.LatentDiffusionOptions().extras()
    assert (plain.noise, plain.weights) == (latent_diffusion.noise_alone, latent_diffusion.min_snr)
    options = latent_diffusion.LatentDiffusionOptions(weighting="root-snr", spread=0.1, ghosts=0.3)
    extras = options.extras()
    assert (extras.noise, extras.weights) == (Ghosts(0.3), latent_diffusion.root_snr)
    assert (plain.timesteps(64, seeded(0)) < 300).any()
    assert (extras.timesteps(64, seeded(0)) > 400).all(), "a small spread: all in the middle"


def test_timesteps_of_a_batch_cover_the_range():
    drawn = latent_diffusion.stratified_timesteps(50, seeded(0))
    assert (drawn.sort().values // 20).tolist() == list(range(50)), "one from each part"
    assert not torch.equal(drawn, drawn.sort().values), "no sample always has little noise"
    assert torch.equal(drawn, latent_diffusion.stratified_timesteps(50, seeded(0)))
    many = torch.cat(
        [latent_diffusion.stratified_timesteps(3, seeded(i), steps=10) for i in range(1000)]
    )
    assert many.bincount(minlength=10).tolist() == pytest.approx([300] * 10, abs=60)
    middle = latent_diffusion.stratified_timesteps(10_000, seeded(0), spread=1.2)
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
    classes = cell_classes(rendering)
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


def test_features_learn_to_see_and_what_reads_them_is_no_part_of_the_trainee(text_encoder):
    trainee = LatentDiffusionTraining(text_encoder=text_encoder)
    names = trainee.state_dict().keys()
    seeing = Seeing(trainee, 0.5)
    assert trainee.state_dict().keys() == names
    rendering = StorybookDataset(2, seed=5, sticker_count=2).batch(0)
    latents = torch.randn(2, 4, 16, 16, generator=seeded(0))
    batch = Batch(latents, rendering.captions, cell_classes(rendering))
    losses = seeing(batch, seeded(0))
    losses["seen"].backward()
    blocks = trainee.unet.up_blocks
    assert all(block.resnets[0].conv1.weight.grad.any() for block in blocks[:2])
    assert blocks[2].resnets[0].conv1.weight.grad is None, "the loss is of the blocks before it"

    with torch.no_grad():
        plain = trainee(batch, seeded(0))
    total = plain["loss"] + 0.5 * losses["seen"].detach()
    assert losses["loss"].item() == pytest.approx(total.item())
    features = dict(seeing.features)
    optimizer = torch.optim.AdamW(seeing.readouts.parameters(), 1e-2)
    seen = []
    for _ in range(25):  # the readouts learn even from features of random weights
        seeing.features = dict(features)
        loss = seeing.cross_entropy(batch.classes)
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1] < seen[0] / 3


def test_a_flawed_scene_has_one_mistake_that_its_caption_tells():
    changes, again_smaller = [], []
    for number in range(200):
        scene = sample_scene(seeded(number), sticker_count=2)
        wrong = flawed_scene(scene, seeded(number, 1))
        assert wrong == flawed_scene(scene, seeded(number, 1))
        assert (wrong.place, wrong.place_numbers) == (scene.place, scene.place_numbers)
        new = [placed for placed in wrong.stickers if placed not in scene.stickers]
        gone = [placed for placed in scene.stickers if placed not in wrong.stickers]
        assert len(new) <= 1
        assert len(gone) <= 1
        again = any(copy.sticker == placed.sticker for copy in new for placed in scene.stickers)
        again_smaller += [
            max(copy.size) < max(placed.size)
            for copy in new
            for placed in scene.stickers
            if (copy.sticker, copy.colour) == (placed.sticker, placed.colour)
        ]
        changes.append((len(new), len(gone), again))
    assert {change[:2] for change in changes} >= {(1, 0), (0, 1), (1, 1)}
    assert sum(change[:2] == (0, 0) for change in changes) < 6, "by chance the same colour again"
    assert changes.count((1, 0, True)) > 30, "a thing twice"
    assert changes.count((1, 0, False)) > 60, "a thing that nobody asked for"
    assert sum(again_smaller) > 0.9 * len(again_smaller), "or else it could not be told which"
    bare = Scene("at sea", (), "at sea")
    assert len(flawed_scene(bare, seeded(0)).stickers) == 1


def test_a_ghost_is_noise_to_be_taken_away(tiny_folder):
    latents = torch.randn(64, 4, 16, 16, generator=seeded(0))
    batch = Batch(latents, ["a car"] * 64, None, latents + 1)
    trainee = LatentDiffusionTraining(tiny_folder)
    stratified = latent_diffusion.stratified_timesteps
    noisy = []

    def all_but_the_scene(given, timesteps, text):
        """Of what is given everything but z is taken for noise, as a perfect U-Net would."""
        noisy.append((given, timesteps, text))
        alpha = trainee.scheduler.alphas_cumprod[timesteps][:, None, None, None]
        return UNet2DConditionOutput((given - alpha.sqrt() * latents) / (1 - alpha).sqrt())

    trainee.trained_unet = trainee.unet.forward = all_but_the_scene
    for extras in (Extras(stratified, Ghosts(0.5)), Extras(stratified)):
        trainee.extras = extras
        assert float(trainee(batch, seeded(1))["mse"]) < 1e-8, "asked for is the scene, not a ghost"
    (with_ghosts, timesteps, _), (without, same_timesteps, _) = noisy
    assert torch.equal(timesteps, same_timesteps)
    assert 0.3 < (with_ghosts != without).flatten(1).any(1).float().mean() < 0.6

    # With no noise but the ghost, and a flaw of 1 everywhere, what is left over is its strength.
    trainee.extras = Extras(stratified, Ghosts(1.0))
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
    trainee.eval()(Batch(latents, ["a car"] * 64), seeded(0))  # judged without ghosts: no flaws


def test_only_training_steps_run_compiled(monkeypatch, tiny_folder):
    calls = []

    def compiled(unet):
        def run(*inputs):
            calls.append(inputs)
            return unet(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    trainee = LatentDiffusionTraining(tiny_folder)
    names = trainee.state_dict().keys()
    batch = Batch(torch.zeros(1, 4, 16, 16), ["a red car"])
    trainee.compile_unet()
    assert trainee.state_dict().keys() == names
    trainee(batch, seeded(0))["loss"].backward()
    assert len(calls) == 1
    assert trainee.unet.conv_out.weight.grad is not None
    trainee.eval()(batch, seeded(0))
    assert len(calls) == 1


def test_the_cache_has_the_scenes_that_are_asked_for(tmp_path, tiny):
    def cache(shares, ghosts=0.0):
        options = latent_diffusion.LatentDiffusionOptions(
            seed=1,
            cache=64,
            batch_size=16,
            run=tmp_path,
            sticker_shares=[float(share) for share in shares],
            mixed_precision="no",
            ghosts=ghosts,
        )
        return latent_diffusion.LatentCache(tiny.vae, options, 0, 1)

    pairs, other = cache("00100"), cache("01003")  # not the latents kept for other shares
    for kept in (pairs, other):
        assert len(kept.kept["latents"]) == len(kept.scenes) == 64
    assert {len(scene.stickers) for scene in pairs.scenes} == {2}
    counts = [len(scene.stickers) for scene in other.scenes]
    assert set(counts) == {1, 4}
    assert 0.6 < counts.count(4) / 64 < 0.9

    # And each with a mistake, if ghosts are asked for: not the file without them.
    plain, haunted = next(pairs.batches(0)), next(cache("00100", 0.5).batches(0))
    assert plain.flawed is None
    assert torch.equal(haunted.latents, plain.latents)
    assert haunted.captions == plain.captions
    assert haunted.flawed.shape == haunted.latents.shape
    assert (haunted.flawed != haunted.latents).flatten(1).any(1).sum() >= 14


def test_a_mean_of_the_weights_begun_with_and_ended_with(tmp_path):
    def unet():
        return UNet2DConditionModel(
            block_out_channels=(4,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
            norm_num_groups=4,
        )

    begun, ended = unet(), unet()
    begun.save_pretrained(tmp_path)
    expected = {
        name: 0.25 * weight + 0.75 * ended.state_dict()[name]
        for name, weight in begun.state_dict().items()
    }
    latent_diffusion.mix_with(ended, tmp_path, 0.25)
    for name, weight in ended.state_dict().items():
        torch.testing.assert_close(weight, expected[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ghosts", "1.5"], "--ghosts 1.5: it must be a share, from 0 to 1"),
        (["--ghosts", "0.5", "--data", "shards.tar"], "--data cannot be drawn once more"),
        (["--see", "-1"], "--see -1: a weight cannot be negative"),
        (["--see", "0.1", "--data", "shards.tar"], "nobody knows what stands where"),
        (["--spread", "0"], "--spread 0: it must be a number above 0"),
        (["--spread", "inf"], "--spread inf: it must be a number above 0"),
        (["--keep", "1", "--from", "."], "--keep 1: it must be a share, from 0 to less than 1"),
        (["--keep", "nan", "--from", "."], "--keep nan: it must be a share"),
        (["--keep", "0.5"], "--keep is for going on from a U-Net"),
        (["--keep", "0.5", "--text-encoder", "."], "--keep is for going on from a U-Net"),
        (["--sticker-shares", "-1", *"1111"], "--sticker-shares: none can be negative"),
        (["--sticker-shares", *"00000"], "--sticker-shares: none can be negative"),
        (["--sticker-shares", "nan", *"1111"], "--sticker-shares: none can be negative"),
        (["--sticker-shares", "inf", *"1111"], "--sticker-shares: none can be negative"),
        (["--sticker-shares", *"111"], "--sticker-shares: 3 of them, but 5 are expected"),
        (["--autoencoder", "."], "python -m lrd_helpers.training.autoencoder"),
        (["--text-encoder", "."], "python -m lrd_helpers.training.text_encoder"),
    ],
)
def test_options_that_cannot_work_exit_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        latent_diffusion.main(arguments)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------ a new sticker

FLAG = '<svg viewBox="0 0 100 100"><rect width="90" height="50" fill="{main}"/></svg>'


def test_a_new_word_is_learnt_and_the_others_keep_their_embeddings(tiny_folder):
    trainee = new_sticker.NewStickerTraining(tiny_folder, ["flag", "owl"])
    assert unknown_words(trainee.tokenizer, "a red flag and a blue owl at sea") == []
    embeddings = trainee.text_encoder.get_input_embeddings().weight
    before = embeddings.detach().clone()
    known = ["ball</w>", "boat</w>", "car</w>", "star</w>"]  # of the stickers, by this model
    mean = before[trainee.tokenizer.convert_tokens_to_ids(known)].mean(0)
    assert torch.equal(before[-2:], mean.expand(2, -1))
    batch = Batch(torch.randn(4, 4, 16, 16), ["a red flag and a blue owl at sea"] * 4)
    optimizer = torch.optim.SGD(trainee.parameters(), 1.0)
    trainee.train()(batch, seeded(0))["loss"].backward()
    optimizer.step()
    assert torch.equal(embeddings[:-2], before[:-2])
    assert (embeddings[-2:] != before[-2:]).any(1).all()
    assert trainee.unet.conv_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("words", [["night"], ["flag", "flag"], []])
def test_words_that_are_known_are_not_taught(tiny_folder, words):
    with pytest.raises(ValueError, match=r"the model knows the word|no new stickers"):
        new_sticker.NewStickerTraining(tiny_folder, words)


def test_a_share_of_the_scenes_shows_the_new_stickers_in_turn(tmp_path, tiny):
    stickers = [own_sticker(name, FLAG) for name in ("flag", "owl")]
    options = new_sticker.NewStickerOptions(cache=64, run=tmp_path, new=0.25, batch_size=3)
    cache = new_sticker.NewStickerCache(stickers, tiny.vae, options)
    shown = [{str(each.sticker) for each in scene.stickers} for scene in cache.scenes]
    assert [sum(name in names for names in shown) for name in ("flag", "owl")] == [8, 8]
    assert cache.kept["latents"].shape[:2] == (64, 4)
    latents, captions = cache.batch(5)[:2]
    assert torch.equal(latents, cache.batch(5).latents)
    assert captions == cache.batch(5).captions


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--new", "0"], "--new 0: it must be a share"),
        (["--from", "."], "python -m lrd_helpers.training.latent_diffusion"),
    ],
)
def test_a_new_sticker_needs_a_pipeline_and_a_share(capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        new_sticker.main(arguments)
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------ distillation

CAPTIONS = ["a red car", "a cat at night"]


@pytest.fixture
def distilled(tiny_folder, tmp_path):
    return distillation.DistillationOptions(
        student_steps=2,
        teacher_steps=2,
        cache=64,
        batch_size=12,
        seed=1,
        run=tmp_path,
        teacher=tiny_folder,
        mixed_precision="no",
    )


def test_a_jump_of_the_student_ends_where_the_teacher_s_does(tiny_folder):
    """With the x̂_0 that the loss asks for, DDIM's step is the jump: whatever the step."""
    trainee = distillation.DistillationTraining(tiny_folder, 4)
    x_t, x_s = torch.randn(2, 4, 4, 4, 4, generator=seeded(0))
    batch = distillation.Jumps(x_t, x_s, torch.arange(4), [""] * 4)
    clean = trainee.clean_of_jump(batch)
    scheduler = DDIMScheduler.from_config(
        latent_diffusion.noise_schedule().config, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == trainee.few_steps.timesteps.tolist()
    for step, t in enumerate(scheduler.timesteps):
        bar = scheduler.alphas_cumprod[t]
        noise = (x_t[step] - bar.sqrt() * clean[step]) / (1 - bar).sqrt()
        jump = scheduler.step(noise, t, x_t[step]).prev_sample
        torch.testing.assert_close(jump, x_s[step], atol=1e-3, rtol=1e-3)
        row = torch.tensor([step])
        again = trainee.clean(x_t[row], noise[None], row)
        torch.testing.assert_close(again[0], clean[step], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_teacher_and_student_draw_as_their_pipelines_do(tiny_folder, distilled):
    noise = torch.randn(2, 4, 16, 16, generator=seeded(0))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        latent_diffusion.noise_schedule().config, timestep_spacing="trailing"
    )
    drawn = {"latents": noise, "output_type": "latent"}
    expected = pipe(CAPTIONS, num_inference_steps=4, guidance_scale=5.0, **drawn).images
    teacher, x = distillation.Teacher(distilled), noise
    teacher.begin(0)
    for _ in range(2):
        x = teacher.jump(x, teacher.text(CAPTIONS))
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)

    student, x = distillation.DistillationTraining(tiny_folder, 2), noise
    for step in range(2):
        x = student.jump(x, step, CAPTIONS)
    pipe = distillation.student_pipeline(student, pipe.vae)
    expected = pipe(CAPTIONS, num_inference_steps=2, guidance_scale=1.0, **drawn).images
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_student_goes_on_from_where_its_steps_lead(tiny_folder, distilled):
    drawings = distillation.Drawings(distilled, 0, 1)
    x_t, x_s = drawings.kept["x_t"], drawings.kept["x_s"]
    assert x_t.shape == (64, 2, 4, 16, 16)
    assert torch.equal(x_t[:, 1:], x_s[:, :-1]), "the teacher's from end to end"
    batch = drawings.batch(5)
    assert batch.step.bincount().tolist() == [6, 6]
    row = next(i for i, each in enumerate(x_t[:, 1]) if torch.equal(each.float(), batch.x_t[1]))
    assert drawings.captions[row] == batch.captions[1]
    assert torch.equal(batch.x_t[1], drawings.batch(5).x_t[1])

    own = distillation.Drawings(replace(distilled, start_from=tiny_folder), 0, 1)
    assert own.captions == drawings.captions
    states, captions = own.kept["x_t"][:2].float(), own.captions[:2]
    student, teacher = own.student, own.teacher
    led = student.jump(states[:, 0], 0, captions)
    torch.testing.assert_close(led, states[:, 1], atol=1e-2, rtol=1e-2)
    teacher.begin(1)
    shown = teacher.jump(states[:, 1], teacher.text(captions))
    torch.testing.assert_close(shown, own.kept["x_s"][:2, 1].float(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student-steps", "0"], "--student-steps 0: it must be from 1 to 50"),
        (["--student-steps", "3"], "must be divisible by it; 2 would work"),
        (["--teacher-steps", "51"], "--teacher-steps 51: it must be from 1 to 50"),
        (["--guidance-scale", "0.5"], "--guidance-scale 0.5: it must be 1 or more"),
        (["--guidance-scale", "nan"], "--guidance-scale nan: it must be 1 or more"),
        (["--teacher", "."], "python -m lrd_helpers.training.latent_diffusion"),
    ],
)
def test_options_of_a_distillation_that_cannot_work_exit_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        distillation.main(arguments)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------ the commands


@pytest.mark.parametrize(
    ("module", "defaults"),
    [
        (autoencoder, {"--minutes": 60.0, "--batch-size": 4, "--freeze-encoder": False}),
        (clip, {"--minutes": 20.0, "--weight-decay": 0.05}),
        (segmenter, {"--coarse-steps": 5000, "--ema-decay": 0.995}),
        (text_encoder_training, {"--minutes": 4.0, "--batch-size": 128}),
        (latent_diffusion, {"--minutes": 180.0, "--warmup": 300, "--data": None, "--ghosts": 0.0}),
        (style, {"--kl-weight": 0.0001, "--cache": 16000}),
        (upsampler, {"--noise-level": 0.05, "--cache": 12000}),
        (rgba_autoencoder, {"--masks": False, "--batch-size": 4}),
        (layerdiff, {"--weighting": "root-snr", "--cache": 16000}),
        (new_sticker, {"--minutes": 9.0, "--new": 0.5, "--weight-decay": 0.0}),
        (distillation, {"--student-steps": 4, "--guidance-scale": 5.0, "--cache": 8000}),
    ],
)
def test_help_names_every_option_with_its_default(capsys, module, defaults):
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option, default in defaults.items():
        assert re.search(rf"{option} [^-].*? \(default: {default}\)", text), option
    assert text.count("(default:") >= 17, "each option has a help text"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "files"),
    [
        (autoencoder, "config.json diffusion_pytorch_model.safetensors"),
        (segmenter, "config.json diffusion_pytorch_model.safetensors"),
        (clip, "config.json model.safetensors tokenizer.json preprocessor_config.json"),
        (text_encoder_training, "config.json model.safetensors tokenizer.json"),
        (
            latent_diffusion,
            "model_index.json unet/config.json text_encoder/config.json vae/README.md",
        ),
        (style, "config.json diffusion_pytorch_model.safetensors unet.safetensors"),
        (upsampler, "config.json scheduler/scheduler_config.json"),
        (rgba_autoencoder, "config.json diffusion_pytorch_model.safetensors"),
        (layerdiff, "unet/config.json vae/config.json text_encoder/config.json"),
        (new_sticker, "model_index.json unet/config.json tokenizer/tokenizer.json"),
        (distillation, "model_index.json unet/config.json vae/README.md"),
    ],
)
def test_each_training_runs_and_exports_a_loadable_folder(
    tmp_path, monkeypatch, text_encoder, tiny_folder, module, files
):
    def quick(*_, **__):
        return {"standard deviation of latents": 0.5, "quick": 1.0}

    monkeypatch.setattr(module, "evaluate", quick)  # the real ones look at hundreds of scenes
    monkeypatch.setattr(latent_diffusion, "SHEET_STEPS", 1)
    monkeypatch.setattr(style, "SHEET_STEPS", 1)
    monkeypatch.setattr(layerdiff, "SHEET_STEPS", 1)
    monkeypatch.setattr(new_sticker, "SHEET_STEPS", 1)
    (tmp_path / "flag.svg").write_text(FLAG)
    # A step on small and a step on whole pictures; a cache of one batch of scenes.
    autoencoder_folder = ["--autoencoder", str(tiny_folder / "vae"), "--cache", "64"]
    from_tiny = ["--from", str(tiny_folder)]

    teacher_options = ["--cache", "64", "--student-steps", "2", "--teacher-steps", "1"]
    more, first = {
        segmenter: (["--coarse-steps", "1"], []),
        latent_diffusion: (autoencoder_folder, ["--text-encoder", str(text_encoder)]),
        upsampler: (autoencoder_folder, []),
        style: (["--pipeline", str(tiny_folder), "--cache", "64"], []),
        rgba_autoencoder: (autoencoder_folder[:2], ["--from", str(tiny_folder / "vae")]),
        layerdiff: ([*autoencoder_folder, "--pipeline", str(tiny_folder)], []),
        new_sticker: (["--cache", "64", "--stickers", str(tmp_path / "flag.svg")], from_tiny),
        distillation: (["--teacher", str(tiny_folder), *teacher_options], []),
    }.get(module, ([], []))
    options = ["--steps", "2", "--batch-size", "4", "--mixed-precision", "no"]
    options += ["--log-every", "1", "--output", str(tmp_path / "out"), *more]
    module.main([*options, *first, "--sample-every", "2", "--run", str(tmp_path / "run")])
    for file in [*files.split(), "README.md", "training.json", "log.csv"]:
        assert (tmp_path / "out" / file).exists(), file
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["step"] == 2
    assert record["samples"] == 8
    assert record["scores"]["quick"] == 1.0
    if module is not text_encoder_training:
        assert list((tmp_path / "run").glob("samples-*.png"))
    if module is latent_diffusion:
        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
        image = pipe("a red car", num_inference_steps=1, output_type="pt").images
        assert image.shape == (1, 3, 128, 128)
        assert_what_is_kept_is_exported(options, tmp_path)
    elif module in (style, upsampler, rgba_autoencoder, layerdiff, distillation):
        module.main([*options, "--run", str(tmp_path / "second"), "--from", str(tmp_path / "out")])
    if module not in (autoencoder, clip, segmenter, text_encoder_training, new_sticker):
        assert_a_second_run_went_on(tmp_path)


def assert_what_is_kept_is_exported(options, tmp_path):
    """A second run, exported a quarter of the way back to where it began; its steps are large."""
    weights = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    begun = load_file(weights)
    options = [*options, "--from", str(tmp_path / "out"), "--run", str(tmp_path / "second")]
    options += ["--learning-rate", "0.05", "--warmup", "1", "--ema-decay", "0"]
    latent_diffusion.main([*options, "--keep", "0.25"])
    (checkpoint,) = (tmp_path / "second").glob("checkpoint-*/model.safetensors")
    ended, exported = load_file(checkpoint), load_file(weights)
    moved = ended["unet.conv_in.weight"] - begun["conv_in.weight"].float()
    assert moved.abs().mean() > 0.02
    for name, weight in exported.items():
        mean = 0.25 * begun[name].float() + 0.75 * ended[f"unet.{name}"]
        assert torch.allclose(weight.float(), mean, atol=2e-3), name


def assert_a_second_run_went_on(tmp_path):
    """Started from the first run's model, the card and the log tell of both."""
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert [run["samples"] for run in record["before"]] == [8]
    assert "| before that | 8 samples in " in (tmp_path / "out" / "README.md").read_text()
    rows = (tmp_path / "out" / "log.csv").read_text().splitlines()[1:]
    counts = [",".join(row.split(",")[:2]) for row in rows]
    assert counts == ["1,4", "2,8", "3,12", "4,16"]
    configurations = (tmp_path / "out").rglob("*.json")
    assert not [file for file in configurations if "_name_or_path" in file.read_text()]
