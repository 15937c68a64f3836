"""lrd_helpers.training.shards: webdataset shards, good and bad, written by the tests themselves."""

import io
import json
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
import webdataset
from PIL import Image

from lrd_helpers.storybook import StorybookDataset
from lrd_helpers.training import latent_diffusion
from lrd_helpers.training.shards import HELD_OUT, Condition, ShardPairs, shard_list


def png(colour: tuple[int, int, int] = (0, 0, 0), size: tuple[int, int] = (40, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def write(path: Path, pairs: list[dict[str, bytes]]) -> None:
    with webdataset.TarWriter(str(path)) as shard:
        for number, pair in enumerate(pairs):
            shard.write({"__key__": f"{path.stem}{number:05d}", **pair})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 50 pairs; the colour and the caption tell which one a pair is."""
    for shard in range(3):
        pairs = [
            {"png": png((number, 0, shard)), "txt": f"a {shard} {number}".encode()}
            for number in range(50)
        ]
        write(tmp_path / f"{shard:04d}.tar", pairs)
    return tmp_path


def captions(pairs: ShardPairs, number: int = 0) -> list[str]:
    return [caption for _, caption in pairs.one_pass(number)]


def test_every_pair_comes_once_a_pass_as_it_was_written(folder):
    shards = shard_list(str(folder / "{0000..0002}.tar"))
    pairs = ShardPairs(shards, 16)
    train = list(pairs.one_pass())
    held_out = captions(ShardPairs(shards, 16, held_out=True))
    all_captions = [caption for _, caption in train] + held_out
    assert sorted(all_captions) == sorted(f"a {shard} {n}" for shard in range(3) for n in range(50))
    assert len(held_out) == pytest.approx(150 / HELD_OUT, abs=4)
    for picture, caption in train:
        _, shard, number = caption.split()
        assert picture.shape == (3, 16, 16)
        assert picture[:, 5, 5].tolist() == pytest.approx([int(number) / 255, 0, int(shard) / 255])
    assert pairs.counts == {"used": len(train)}


def test_the_order_is_random_repeatable_and_another_in_each_pass(folder):
    shards = shard_list(str(folder / "*.tar"))
    once, again = (captions(ShardPairs(shards, 8)) for _ in range(2))
    assert once == again
    assert once != sorted(once)
    other_pass, other_seed = captions(ShardPairs(shards, 8), 1), ShardPairs(shards, 8, seed=1)
    assert sorted(other_pass) == sorted(once)
    assert other_pass != once
    assert captions(other_seed) != once
    endless = [caption for _, caption in islice(ShardPairs(shards, 8), 2 * len(once))]
    assert endless == once + other_pass


def test_readers_share_the_shards_without_overlap(folder):
    shards = shard_list(str(folder / "*.tar"))
    parts = [captions(ShardPairs(shards, 8, reader=reader, readers=2)) for reader in range(2)]
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == sorted(captions(ShardPairs(shards, 8)))
    with pytest.raises(ValueError, match="3 shards cannot be shared by 4 processes"):
        ShardPairs(shards, 8, readers=4)


def test_pictures_are_cut_to_the_square_in_their_middle(tmp_path):
    wide = Image.new("RGB", (60, 40), (255, 0, 0))
    wide.paste((0, 0, 255), (10, 0, 50, 40))
    file = io.BytesIO()
    wide.save(file, "PNG")
    write(tmp_path / "0.tar", [{"png": file.getvalue(), "txt": b"blue, its sides are red"}])
    [(picture, _)] = ShardPairs([str(tmp_path / "0.tar")], 16).one_pass()
    assert picture[:, :, 2:-2].mean((1, 2)).tolist() == pytest.approx([0, 0, 1], abs=0.01)


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path):
    facts = [json.dumps({"punsafe": value}).encode() for value in (0.1, 0.9)]
    good = {"png": png(), "txt": b"a  cat\n", "json": facts[0]}
    (tmp_path / "broken.tar").write_bytes(b"this is no tar file" * 100)
    write(
        tmp_path / "pairs.tar",
        [
            good,
            good | {"json": facts[1]},
            good | {"json": b"{}"},
            good | {"json": b"not JSON"},
            good | {"png": png()[:60]},
            good | {"png": b""},
            good | {"png": png(size=(40, 100))},
            good | {"png": png(size=(12, 40))},
            {"png": png(), "json": facts[0]},
            good | {"txt": b"  "},
            {"txt": b"a cat", "json": facts[0]},
        ],
    )
    shards = shard_list(str(tmp_path / "*.tar"))
    pairs = ShardPairs(shards, 16, conditions=[Condition("punsafe<0.3")])
    assert captions(pairs) == ["a cat"]
    assert pairs.counts == Counter(
        {
            "used": 1,
            "not punsafe<0.3": 3,
            "with a broken picture": 2,
            "too long and thin": 1,
            "too small": 1,
            "without a caption": 2,
            "without a picture": 1,
            "broken shards": 1,
        }
    )
    assert "3 not punsafe<0.3" in pairs.summary()


def test_shards_that_name_nothing_are_refused_by_their_pattern(folder):
    with pytest.raises(FileNotFoundError, match=r"no shard matches '.*x\*\.tar'$"):
        shard_list(str(folder / "x*.tar"))
    with pytest.raises(FileNotFoundError, match=r"no shard matches '.*0003\.tar' \(from '.*\.\.00"):
        shard_list(str(folder / "{0000..0003}.tar"))
    with pytest.raises(FileNotFoundError, match="no shards were named"):
        shard_list([])
    assert shard_list(["pipe:cat {a,b}.tar", "https://example.org/0.tar"]) == [
        "pipe:cat a.tar",
        "pipe:cat b.tar",
        "https://example.org/0.tar",
    ]


def test_without_webdataset_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(ImportError, match="pip install webdataset"):
        shard_list("0.tar")


def test_a_command_is_a_shard_too(folder):
    piped = ShardPairs([f"pipe:cat {folder / '0001.tar'}"], 8)
    assert sorted(captions(piped)) == sorted(captions(ShardPairs([str(folder / "0001.tar")], 8)))


def test_shards_without_a_usable_pair_end_with_the_reasons(tmp_path):
    write(tmp_path / "0.tar", [{"png": png(size=(5, 5)), "txt": b"small"}] * 3)
    with pytest.raises(ValueError, match="no pair in 1 shards can be used: 3 too small"):
        next(iter(ShardPairs([str(tmp_path / "0.tar")], 16)))


@pytest.mark.parametrize("text", ["punsafe", "punsafe<", "<3", "a==b", "punsafe<low", ""])
def test_an_invalid_condition(text):
    with pytest.raises(ValueError, match="is no condition; it should be like 'punsafe<0.3'"):
        Condition(text)


def test_latent_diffusion_trains_on_shards_and_goes_on_where_it_was_cut(tmp_path, tiny):
    tiny.save_pretrained(tmp_path / "tiny")
    for shard in range(2):
        rendering = StorybookDataset(60, seed=shard, size=32).batch(0)
        pairs = []
        for image, caption in zip(rendering.images, rendering.captions, strict=True):
            file = io.BytesIO()
            pixels = (255 * image).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(file, "JPEG")
            pairs.append({"jpg": file.getvalue(), "txt": caption.encode()})
        write(tmp_path / f"{shard}.tar", pairs)

    def train(run: str, steps: int) -> dict:
        latent_diffusion.main(
            [
                *("--data", str(tmp_path / "{0..1}.tar"), "--from", str(tmp_path / "tiny")),
                *("--autoencoder", str(tmp_path / "tiny" / "vae"), "--mixed-precision", "no"),
                *("--steps", str(steps), "--batch-size", "4", "--sample-every", "0"),
                *("--warmup", "1", "--decay", "0.000001"),  # one rate, whatever the last step is
                *("--run", str(tmp_path / run), "--output", str(tmp_path / f"{run}-model")),
            ]
        )
        return torch.load(
            next((tmp_path / run).glob("checkpoint-*")) / "optimizer.bin", weights_only=True
        )

    train("cut", 2)
    resumed, whole = train("cut", 4), train("whole", 4)
    for number, state in whole["state"].items():
        assert torch.equal(state["exp_avg"], resumed["state"][number]["exp_avg"])
    card = (tmp_path / "whole-model" / "README.md").read_text()
    assert "| data | 2 shards: 16 used" in card
    assert "held-out pairs" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing/*.tar"], "no shard matches 'nothing/*.tar'"),
        (["--only", "punsafe<0.3"], "--only and --least-side are for --data"),
    ],
)
def test_what_cannot_be_trained_on_is_one_sentence(
    tmp_path, capsys, text_encoder, arguments, message
):
    arguments = [*arguments, "--text-encoder", str(text_encoder)]
    with pytest.raises((SystemExit, FileNotFoundError)) as refused:
        latent_diffusion.main([*arguments, "--steps", "1", "--run", str(tmp_path)])
    assert message in f"{refused.value} {capsys.readouterr().err}"
