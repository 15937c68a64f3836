"""Words against picture: CLIP models and their scores."""

import io

import numpy
import pytest
import torch
from painted import paint
from picture_files import as_a_phone_saves
from PIL import Image
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from lrd_helpers.measure import (
    PretrainedClip,
    StorybookClip,
    clip_score,
    text_image_similarity,
)
from lrd_helpers.storybook import StorybookDataset
from lrd_helpers.words import word_tokenizer

HELD_OUT = 1_000_000


def test_any_clip_model_with_its_processor(tiny_clip):
    model, tokenizer = tiny_clip
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 16},
        crop_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=Image.Resampling.BILINEAR,
    )
    clip = PretrainedClip(model, CLIPProcessor(images, tokenizer))
    ours = StorybookClip(model, tokenizer)
    picture = Image.new("RGB", (16, 16), (255, 128, 0))
    assert torch.allclose(clip.encode_images([picture]), ours.encode_images([picture]), atol=1e-5)
    assert torch.equal(clip.encode_texts(["a car"]), ours.encode_texts(["a car"]))
    tensor = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    assert clip.encode_images([tensor]).norm() == pytest.approx(1, abs=1e-5)
    photo = Image.effect_noise((16, 16), 90).convert("RGB")
    sides = Image.open(io.BytesIO(as_a_phone_saves(photo)))
    for each in (clip, ours):
        assert torch.equal(each.encode_images([sides]), each.encode_images([photo]))


def test_clip_score_is_a_hundred_times_the_cosine():
    class Fake:
        def encode_images(self, images):
            return torch.tensor([[1.0, 0.0]] * len(images))

        def encode_texts(self, texts):
            vectors = {
                "same": [1.0, 0.0],
                "unlike": [0.0, 1.0],
                "half": [0.5, 0.75**0.5],
                "opposite": [-1.0, 0.0],
            }
            return torch.tensor([vectors[text] for text in texts])

    scores = [clip_score(Fake(), paint(), text) for text in ("same", "unlike", "half", "opposite")]
    assert scores == pytest.approx([100, 0, 50, -100])


def test_text_image_similarity_is_the_mean_cosine(tiny_clip):
    clip = StorybookClip(*tiny_clip)
    images, texts = [paint(), paint(("car", "red", (0, 0, 64, 64)))], ["a red car", "a tree"]
    scores = [clip_score(clip, *pair) for pair in zip(images, texts, strict=True)]
    mean = text_image_similarity(clip, images, texts)
    assert mean == pytest.approx(sum(scores) / 200, abs=1e-6)
    for wrong in ([], texts[:1]):
        with pytest.raises(ValueError, match="cannot be compared"):
            text_image_similarity(clip, images if wrong else [], wrong)


@pytest.fixture(scope="module")
def tiny_clip():
    tokenizer = word_tokenizer(["a", "red", "car", "boat"], length=16)
    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = small | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = small | {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return CLIPModel(config).eval(), tokenizer


def test_storybook_clip_encodes_as_the_model_does(tiny_clip):
    model, tokenizer = tiny_clip
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = ["a red car", "boat"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens, pixel_values=(image[None] - 0.5) / 0.5)
    clip = StorybookClip(model, tokenizer)
    torch.testing.assert_close(clip.encode_images([image]), expected.image_embeds)
    torch.testing.assert_close(clip.encode_texts(texts), expected.text_embeds)


def test_storybook_clip_takes_any_size_and_any_length(tiny_clip):
    clip = StorybookClip(*tiny_clip)
    image = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    large = functional.interpolate(image[None], scale_factor=16)[0]
    vectors = clip.encode_images([image.repeat_interleave(4, 1).repeat_interleave(4, 2), large])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    assert vectors[0] @ vectors[1] > 0.95
    assert clip.encode_texts(["a red car " * 40]).shape == (1, 8)


def test_storybook_clip_wants_both_or_neither(tiny_clip):
    with pytest.raises(ValueError, match="both a model and its tokenizer"):
        StorybookClip(tiny_clip[0])


# ------------------------------------------------------------------ the shipped model


def test_on_true_scenes_the_right_caption_scores_highest():
    clip = StorybookClip()
    rendering = StorybookDataset(16, seed=HELD_OUT + 1).batch(0)
    scores = clip.encode_images(list(rendering.images)) @ clip.encode_texts(rendering.captions).T
    captions = numpy.array(rendering.captions)
    best = captions[scores.argmax(1).numpy()]
    assert (best == captions).mean() >= 0.9
    for number in range(4):
        score = clip_score(clip, rendering.images[number], rendering.captions[number])
        assert score == pytest.approx(100 * float(scores[number, number]), abs=1e-3)
