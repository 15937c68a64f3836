"""Judges of the open world, loaded as from the hub: tiny random ones in folders."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from judges import save_judge
from PIL import Image

from lrd_helpers import models
from lrd_helpers.measure import box_iou, load_detector, load_pretrained_clip
from lrd_helpers.measure.pretrained import CLIP, GROUNDING_DINO, OWLV2, SAM
from lrd_helpers.models import ASSETS, AssetError

PICTURE = Image.effect_noise((64, 32), 90).convert("RGB")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("judges")
    return {kind: save_judge(kind, folder) for kind in ("owlv2", "grounding-dino", "sam", "clip")}


@pytest.mark.parametrize("kind", ["owlv2", "grounding-dino"])
def test_a_detector_finds_what_prompts_name(folders, kind) -> None:
    detector = load_detector(folders[kind], "cpu", threshold=0.0)
    found = detector(PICTURE, ["a car", "A boat"])
    assert all(found)
    for things in found:
        assert [thing.score for thing in things] == sorted((t.score for t in things), reverse=True)
        for one, other in itertools.combinations(things, 2):
            assert box_iou(one.box, other.box) <= 0.5, "a thing counts once"
    sure = max(thing.score for things in found for thing in things)
    assert detector.rules == "threshold 0, overlap 0.5"
    assert load_detector(folders[kind], "cpu", threshold=sure)(PICTURE, ["a car"]) == [[]]
    assert detector.asked("A boat") == ("A boat" if kind == "owlv2" else "a boat.")


def test_sam_adds_the_pixels(folders) -> None:
    plain = load_detector(folders["owlv2"], "cpu", threshold=0.0)
    detector = load_detector(folders["owlv2"], "cpu", sam=folders["sam"], threshold=0.0)
    boxes, found = plain(PICTURE, ["a car"]), detector(PICTURE, ["a car", "a car"])
    assert [thing.box for thing in found[0]] == [thing.box for thing in boxes[0]]
    assert all(one is other for one, other in zip(*found, strict=True))
    for thing in found[0]:
        assert thing.mask.shape == (32, 64)
        assert thing.mask.any()
    assert detector.rules == "threshold 0, overlap 0.5, masks by SAM"
    assert load_detector(folders["owlv2"], "cpu", sam=folders["sam"], threshold=1.0)(
        PICTURE, ["a car"]
    ) == [[]]


def test_where_sam_sees_nothing_the_box_counts(folders) -> None:
    detector = load_detector(folders["owlv2"], "cpu", sam=folders["sam"], threshold=0.0)
    detector.processor.post_process_masks = lambda masks, *sizes: [
        torch.zeros(masks[0].shape[0], 1, 32, 64, dtype=torch.bool)
    ]
    [[thing, *_]] = detector(PICTURE, ["a car"])
    x0, y0, x1, y1 = thing.box
    assert int(thing.mask.sum()) == pytest.approx((x1 - x0) * 64 * (y1 - y0) * 32, abs=1)


def test_clip(folders) -> None:
    clip = load_pretrained_clip(folders["clip"], "cpu")
    vectors = [clip.encode_images([PICTURE]), clip.encode_texts(["a car"])]
    assert all(each.norm().item() == pytest.approx(1, abs=1e-5) for each in vectors)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("clip", "its config.json is of the kind 'clip'; a model of transformers of the kind owlv2 "
         "or owlvit or grounding-dino would work"),
        (ASSETS / "storybook", "it holds a pipeline; a model of transformers of the kind owlv2"),
        ("nowhere", "the model folder nowhere is missing"),
    ],
)  # fmt: skip
def test_what_is_no_detector(folders, folder, message) -> None:
    with pytest.raises(AssetError, match=message) as error:
        load_detector(folders.get(folder, folder), "cpu")
    assert len(str(error.value)) <= 300
    with pytest.raises(AssetError, match=r"kind 'owlv2'; a model of transformers of the kind sam "):
        load_detector(folders["owlv2"], "cpu", sam=folders["owlv2"])
    with pytest.raises(ValueError, match="the threshold is 1.5, but should be between 0 and 1"):
        load_detector(folders["owlv2"], "cpu", threshold=1.5)


@pytest.mark.parametrize("name", [OWLV2, GROUNDING_DINO, SAM, CLIP])
def test_the_hub_is_asked_for_a_fixed_commit(monkeypatch, name) -> None:
    asked = []

    def config_dict(name: str, revision: str) -> None:
        asked.append((name, revision))
        raise OSError("no network")

    monkeypatch.setattr(models.PreTrainedConfig, "get_config_dict", config_dict)
    with pytest.raises(AssetError, match=f"{name} cannot be loaded: no network"):
        models.load_judge(name, {"owlv2": "Owlv2ForObjectDetection"}, "cpu")
    [(_, revision)] = asked
    assert len(revision) == 40
