"""What two people exchange: read as it was written; another file is said to be none."""

import json
import zipfile

import pytest
from PIL import Image

from lrd_helpers.layout import Layer, Layout
from lrd_helpers.portfolio import MOST, Portfolio, PortfolioError
from lrd_helpers.storybook import own_sticker

FLAG = own_sticker(
    "flag", '<svg viewBox="0 0 100 100"><rect width="90" height="50" fill="{main}"/></svg>'
)
LAYOUTS = tuple(
    Layout(
        f"a {colour} flag at sea",
        background="at sea",
        layers=[Layer(f"a {colour} flag", box=(0.1, 0.2, 0.6, 0.5))],
    )
    for colour in ("red", "blue")
)
PICTURES = tuple(Image.new("RGB", (128, 128), colour) for colour in ("red", "blue"))


@pytest.mark.parametrize("pictures", [(), PICTURES], ids=["to be drawn", "drawn"])
def test_a_portfolio_comes_back_as_it_was_saved(tmp_path, pictures):
    path = tmp_path / "ann.zip"
    Portfolio("Ann Ü", (FLAG,), LAYOUTS, pictures).save(path)
    read = Portfolio.load(path)
    assert (read.author, read.stickers) == ("Ann Ü", (FLAG,))
    assert [each.to_json() for each in read.layouts] == [each.to_json() for each in LAYOUTS]
    assert [each.tobytes() for each in read.pictures] == [each.tobytes() for each in pictures]


def spoilt(path, name, content):
    """A saved portfolio in which one part is replaced; None leaves it out."""
    Portfolio("ann", (FLAG,), LAYOUTS, PICTURES).save(path)
    with zipfile.ZipFile(path) as archive:
        parts = {each: archive.read(each) for each in archive.namelist()}
    head = json.loads(parts["portfolio.json"])
    parts[name] = json.dumps(head | content).encode() if isinstance(content, dict) else content
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, data in parts.items():
            if data is not None:
                archive.writestr(each, data)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("portfolio.json", None, "it has no portfolio.json"),
        ("portfolio.json", b"[]", "version is None"),
        ("portfolio.json", b"{", "not a portfolio: Expecting"),
        ("portfolio.json", {"version": 2}, "version 2, but 1 is read here"),
        ("portfolio.json", {"author": 3}, "author is 3, not of str"),
        ("portfolio.json", {"author": " "}, "the author is ' ': write a name"),
        ("portfolio.json", {"layouts": 10**9}, f"more than {MOST} stickers"),
        ("portfolio.json", {"layouts": 0, "pictures": 0}, "there are no layouts"),
        ("portfolio.json", {"pictures": 1}, "1 pictures of 2 layouts"),
        ("portfolio.json", {"stickers": ["star"]}, "it has no stickers/star.svg"),
        ("portfolio.json", {"stickers": ["../flag"]}, r"it has no stickers/\.\./flag.svg"),
        ("stickers/flag.svg", b"<html/>", "it begins with <html>, not <svg>"),
        ("layouts/2.json", b"{}", r"layouts/2\.json"),
        ("pictures/1.png", b"GIF89a", "not a portfolio"),
        ("pictures/2.png", bytes(2**24 + 1), r"pictures/2\.png is larger than 16 MB"),
    ],
)
def test_a_part_that_is_not_what_it_should_be_is_named(tmp_path, name, content, said):
    path = tmp_path / "ben.zip"
    spoilt(path, name, content)
    with pytest.raises(PortfolioError, match=rf"^ben\.zip: .*{said}") as caught:
        Portfolio.load(path)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 and then nothing"])
def test_a_file_that_is_no_portfolio_says_so(tmp_path, content):
    path = tmp_path / "ben.zip"
    path.write_bytes(content)
    with pytest.raises(PortfolioError, match=r"ben\.zip: not a portfolio: it is no zip file"):
        Portfolio.load(path)
    with pytest.raises(PortfolioError, match=r"none\.zip: cannot be read: No such file"):
        Portfolio.load(tmp_path / "none.zip")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Portfolio("ann", (), LAYOUTS, PICTURES), "both are by 'ann'"),
        (Portfolio("ben", (), LAYOUTS), "that of 'ben' has no pictures yet"),
        (Portfolio("ben", (), LAYOUTS[:1], PICTURES[:1]), "they have 2 and 1 layouts"),
        (Portfolio("ben", (), LAYOUTS[::-1], PICTURES), "layout 1 is 'a red flag at sea' here"),
    ],
)
def test_only_two_peoples_pictures_of_the_same_layouts_are_compared(other, said):
    mine = Portfolio("ann", (FLAG,), LAYOUTS, PICTURES)
    mine.check_comparable(Portfolio("ben", (), LAYOUTS, PICTURES))
    with pytest.raises(PortfolioError, match=said):
        mine.check_comparable(other)
