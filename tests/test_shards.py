"""lrd_helpers.training.shards: webdataset shards, good and bad, written by the tests themselves."""

import gzip
import io
import json
import sys
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy
import pytest
import torch
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from picture_files import as_a_phone_saves
from PIL import Image
from safetensors.torch import load_file
from shard_files import png, tar

from lrd_helpers.storybook import StorybookDataset
from lrd_helpers.training import latent_diffusion
from lrd_helpers.training import shards as shards_module
from lrd_helpers.training.shards import APART, HELD_OUT, TWICE, Condition, ShardPairs, shard_list


def write(path: Path, pairs: list[dict[str, bytes]]) -> None:
    with webdataset.TarWriter(str(path)) as shard:
        for number, pair in enumerate(pairs):
            shard.write({"__key__": f"{path.stem}{number:05d}", **pair})


def read(path: Path, content: bytes, *conditions: str) -> tuple[list[str], Counter]:
    """The captions that come out of a shard with this content, sorted, and what was counted."""
    path.write_bytes(content)
    pairs = ShardPairs(path, 16, conditions=[Condition(text) for text in conditions])
    return sorted(captions(pairs)), pairs.counts


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


def test_pictures_of_every_kind_are_read_by_the_rules_of_pictures(tmp_path):
    grey = numpy.repeat(numpy.uint16([[51, 204]]), 20, axis=1).repeat(40, axis=0)
    image = Image.fromarray(grey.astype(numpy.uint8))
    frames = [image, Image.new("L", (40, 40))]
    clear = image.convert("RGBA")
    clear.paste((0, 0, 0, 0), (20, 0, 40, 40))

    def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
        picture.save(file := io.BytesIO(), kind, **options)
        return file.getvalue()

    files = [
        {"png": saved(image, "PNG")},
        {"png": saved(Image.fromarray(257 * grey), "PNG")},
        {"webp": saved(image.convert("RGB"), "WEBP", lossless=True)},
        {"jpg": saved(image.convert("CMYK"), "JPEG", quality=95)},
        {"png": saved(image, "PNG", save_all=True, append_images=frames[1:])},
        {"png": as_a_phone_saves(image)},
        {"png": saved(clear, "PNG")},
    ]
    write(tmp_path / "files.tar", [file | {"txt": str(n).encode()} for n, file in enumerate(files)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the animation
        pairs = ShardPairs([str(tmp_path / "files.tar")], 40)
        made = list(pairs.one_pass())
    assert pairs.counts == {"used": len(files)}
    for picture, caption in made:
        expected = [51, 255 if caption == "6" else 204]  # the transparent half is white
        for channel in 255 * picture:
            assert channel[20, [10, 30]].tolist() == pytest.approx(expected, abs=3), caption


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
    with pytest.warns(UserWarning, match=r"broken\.tar is not in tar format: "):
        assert captions(pairs) == ["a cat"]
    assert pairs.counts == Counter(
        {
            "used": 1,
            "not punsafe<0.3": 2,
            "with a .json that cannot be read": 1,
            "with a broken picture": 2,
            "too long and thin": 1,
            "too small": 1,
            "without a caption (only .json, .png)": 1,
            "with an empty caption": 1,
            "without a picture (only .json, .txt)": 1,
            "shards not in tar format": 1,
        }
    )
    assert "2 not punsafe<0.3" in pairs.summary()
    assert pairs.summary(1).endswith(", 10 for other reasons")


NAMES = [f"{number:03}" for number in range(12)]


@pytest.mark.parametrize(
    ("files", "used", "left_out"),
    [
        pytest.param(
            [
                (f"22.{day}.{kind}", png() if kind == "png" else day.encode())
                for day in ("05", "06")
                for kind in ("png", "txt")
            ],
            ["05", "06"],
            {},
            id="dots in names",
        ),
        pytest.param(
            [("v1.2/a.PNG", png()), ("v1.2/a.TXT", b"a cat"), ("v1.2/README", b"hello")],
            ["a cat"],
            {},
            id="dots in folders, capitals, no ending",
        ),
        pytest.param(
            [("1.png", png()), ("1.seg.png", png()), ("._1.png", b"\0\5"), ("1.txt", b"a cat")],
            ["a cat"],
            {"without a caption (only .png)": 1},
            id="more files of a pair",
        ),
        pytest.param(
            [(f"{name}.png", png()) for name in NAMES]
            + [(f"{name}.txt", name.encode()) for name in NAMES],
            NAMES[4:],
            {APART: 4},
            id="pictures first and texts later",
        ),
        pytest.param(
            [("1.png", png()), ("1.txt", b"a cat"), ("1.png", png()), ("1.txt", b"a dog")]
            + [("2.png", png()), ("2.txt", b"a red car")],
            ["a red car"],
            {TWICE: 1},
            id="a name twice",
        ),
        pytest.param(
            [("1.png", png()), ("1.txt", b"a cat")]
            + [(f"{name}.png", png()) for name in NAMES]
            + [("1.png", png()), ("1.txt", b"a dog")],
            ["a cat"],
            {TWICE: 1, "without a caption (only .png)": 12},
            id="once more, far away",
        ),
        pytest.param(
            [("1.png", png()), ("1.caption", b"a cat"), ("2.png", png()), ("2.cls", b"5")]
            + [("3.gif", b"GIF89a"), ("3.txt", b"a dog"), ("4.\n/x", b"")],
            ["a cat"],
            {"without a caption (only .cls, .png)": 1, "without a picture (only .gif, .txt)": 1},
            id="other kinds",
        ),
    ],
)
def test_files_find_each_other_by_name_or_it_is_said_what_was_there(
    tmp_path, files, used, left_out
):
    assert read(tmp_path / "0.tar", tar(*files)) == (used, {"used": len(used), **left_out})


NO_UTF8 = "with a caption that is not UTF-8"
DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("files", "caption", "reason"),
    [
        ({"txt": "un café".encode()}, "un café", None),
        ({"txt": "un café".encode("utf-8-sig")}, "un café", None),
        ({"txt": "un café".encode("cp1252")}, None, NO_UTF8),
        ({"txt": "a cat".encode("utf-16")}, None, NO_UTF8),
        ({"txt": "a cat".encode("utf-16-le")}, None, NO_UTF8),
        ({"caption": "un café".encode("utf-8-sig")}, "un café", None),
        ({"json": b'{"caption": "un caf\\u00e9"}'}, "un café", None),
        ({"json": '{"caption": "un café"}'.encode("utf-8-sig")}, "un café", None),
        ({"json": b'{"caption": "\\ud800"}'}, None, NO_UTF8),
        ({"json": b'{"caption": 7}'}, None, "without a caption (only .json, .png)"),
        ({"json": DEEP}, None, "with a .json that cannot be read"),
        ({"json": b"9" * 5000}, None, "with a .json that cannot be read"),
        ({"json": b'["a cat"]'}, None, "with a .json that cannot be read"),
        ({"txt": b"a cat", "json": DEEP}, "a cat", None),
        ({"txt": b"cat " * 3000}, None, "with a caption of more than 10,000 characters"),
    ],
)
def test_captions_are_utf8_in_txt_caption_or_json(tmp_path, files, caption, reason):
    shard = tar(("1.png", png()), *((f"1.{kind}", content) for kind, content in files.items()))
    used = [caption] if caption else []
    assert read(tmp_path / "0.tar", shard) == (used, {reason or "used": 1})


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (b'{"punsafe": 0.1}', "used"),
        (b'{"punsafe": "0.1"}', "used"),
        (b'{"punsafe": -' + b"9" * 400 + b"}", "not punsafe<0.3"),
        (b'{"punsafe": null}', "not punsafe<0.3"),
        (b'{"punsafe": ' + DEEP + b"}", "with a .json that cannot be read"),
        (b'{"punsafe": ' + b"9" * 5000 + b"}", "with a .json that cannot be read"),
        (b'"\xe9"', "with a .json that cannot be read"),
        (None, "without a .json (only .png, .txt)"),
    ],
)
def test_facts_that_no_condition_can_judge_leave_the_pair_out(tmp_path, facts, reason):
    files = [("1.png", png()), ("1.txt", b"a cat")] + ([("1.json", facts)] if facts else [])
    assert read(tmp_path / "0.tar", tar(*files), "punsafe<0.3")[1] == {reason: 1}


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "LARGEST_FILE", 2**20)
    shard = tar(
        ("1.png", png()),
        ("1.txt", b"a" * (2**20 + 1)),
        ("2.png", png()),
        ("2.txt", b"a cat"),
        ("2.npy", b"a" * (2**20 + 1)),
    )
    counts = {"used": 1, "with a file of more than 1 MB": 1}
    assert read(tmp_path / "0.tar", shard) == (["a cat"], counts)


@pytest.mark.filterwarnings("ignore:.*0.tar is:UserWarning")
def test_a_shard_that_is_cut_off_anywhere_is_a_single_fault(tmp_path):
    names = NAMES[:3]
    whole = tar(
        *(file for name in names for file in ((f"{name}.png", png()), (f"{name}.txt", b"a")))
    )
    end = 6 * 1024 + 512  # six headers, six blocks of content, and the first block of the end mark
    for cut in range(0, end, 256):
        state = "not in tar format" if cut < 512 else "cut off or damaged"
        used = sum(cut >= 2048 * pair - 511 for pair in (1, 2, 3))
        expected = Counter({f"shards {state}": 1, "used": used})
        assert read(tmp_path / "0.tar", whole[:cut])[1] == +expected, cut
    assert read(tmp_path / "0.tar", whole[:end])[1] == {"used": 3}
    packed = gzip.compress(whole)
    assert read(tmp_path / "0.tar", packed)[1] == {"used": 3}
    counts = read(tmp_path / "0.tar", packed[:-20])[1]
    assert counts["shards cut off or damaged"] == counts.total() - counts["used"] == 1


SMALL = tar(
    ("1.png", png(size=(16, 16))),
    ("1.json", b'{"caption": "a cat", "punsafe": 0.1}'),
    ("2.png", png(size=(16, 16))),
    ("2.txt", b"a dog"),
    ("2.json", b'{"punsafe": 0.2}'),
)


@pytest.mark.filterwarnings("ignore:.*0.tar is:UserWarning")
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=9
    )
)
def test_whatever_a_shard_holds_is_used_or_counted(tmp_path, changes):
    content = bytearray(SMALL)
    for place, byte in changes:
        content[place] = byte
    used, counts = read(tmp_path / "0.tar", bytes(content), "punsafe<0.3")
    assert len(used) == counts["used"]
    assert sum(counts[reason] for reason in counts if reason.startswith("shards ")) <= 1
    assert 1 <= counts.total() <= 6
    assert all("\n" not in reason for reason in counts)


def test_what_cannot_be_opened_is_named_by_a_warning(tmp_path):
    pairs = ShardPairs(["pipe:exit 3", "pipe:cat " + str(tmp_path / "0.tar")], 16)
    (tmp_path / "0.tar").write_bytes(tar(("1.png", png()), ("1.txt", b"a cat")))
    with pytest.warns(UserWarning, match="pipe:exit 3 is not in tar format"):
        assert captions(pairs) == ["a cat"]
    assert pairs.counts == {"used": 1, "shards not in tar format": 1}
    (tmp_path / "1.tar").write_bytes(b"")
    pairs = ShardPairs(tmp_path / "1.tar", 16)
    (tmp_path / "1.tar").unlink()
    with pytest.warns(UserWarning, match=r"1\.tar is unreachable: .*No such file"):
        assert not captions(pairs)


def test_most_pairs_left_out_is_said_after_the_first_pass(tmp_path):
    (tmp_path / "0.tar").write_bytes(
        tar(
            *((f"{name}.png", png()) for name in NAMES),
            ("000.caption", b"a cat"),
            ("011.caption", b"a dog"),
        )
    )
    pairs = ShardPairs(tmp_path / "0.tar", 16)
    message = r"most pairs are left out: 10 without a caption \(only .png\), 1 with files that"
    with pytest.warns(UserWarning, match=message):
        assert [caption for _, caption in islice(pairs, 2)] == ["a dog", "a dog"]


@pytest.mark.parametrize("pattern", ["*.tar", "pipe:touch ran;.tar"])
def test_a_file_is_a_file_whatever_its_name(tmp_path, monkeypatch, pattern):
    """Names that a shell or an address would read otherwise."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("pipe:touch ran;.tar", "a#b?c;d.tar", "https:x.tar")):
        Path(name).write_bytes(tar((f"{number}.png", png()), (f"{number}.txt", b"a cat")))
    options = latent_diffusion.LatentDiffusionOptions(data=[pattern])
    pairs = latent_diffusion.shard_pairs(options, 16)
    assert set(captions(pairs)) == {"a cat"}
    assert pairs.counts == {"used": 3 if pattern == "*.tar" else 1}
    assert not Path("ran").exists()


def test_shards_that_name_nothing_are_refused_by_their_pattern(folder):
    with pytest.raises(FileNotFoundError, match=r"no shard matches '.*x\*\.tar'$"):
        shard_list(str(folder / "x*.tar"))
    with pytest.raises(FileNotFoundError, match=r"no shard matches '.*0003\.tar' \(from '.*\.\.00"):
        shard_list(str(folder / "{0000..0003}.tar"))
    with pytest.raises(FileNotFoundError, match="no shards were named"):
        shard_list([])
    (folder / "d.tar").mkdir()
    with pytest.raises(FileNotFoundError, match=r"d\.tar' is no file; a shard is a tar file"):
        shard_list(folder / "*.tar")
    with pytest.raises(ValueError, match="'s3://a/0.tar': webdataset opens no s3: addresses"):
        shard_list("s3://a/0.tar")
    command = "pipe:cat " + "a" * 300
    assert shard_list(command) == [command]
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
    piped = ShardPairs(f"pipe:cat {folder / '0001.tar'}", 8)
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
        return load_file(next((tmp_path / run).glob("checkpoint-*")) / "optimizer.safetensors")

    train("cut", 2)
    resumed, whole = train("cut", 4), train("whole", 4)
    assert any(name.endswith("exp_avg") for name in whole)
    for name, moment in whole.items():
        assert torch.equal(moment, resumed[name]), name
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
