"""Files of pictures as cameras, editors and villains write them."""

import io
import struct
import zlib

import numpy
from PIL import Image

Transpose = Image.Transpose
TURNS = {  # orientation → how the pixels lie in the file if they are to be seen upright
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_90, 7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}  # fmt: skip


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def lying(shape: numpy.ndarray, orientation: int) -> numpy.ndarray:
    if orientation == 1:
        return shape
    return numpy.asarray(Image.fromarray(shape).transpose(TURNS[orientation]))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int, colour: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)


GREY, RGB, PALETTE, LA, RGBA = 0, 2, 3, 4, 6
PNGS = [
    *((GREY, depth, clear) for depth in (1, 2, 4, 8, 16) for clear in (False, True)),
    *((PALETTE, depth, clear) for depth in (1, 2, 4, 8) for clear in (False, True)),
    *((RGB, depth, clear) for depth in (8, 16) for clear in (False, True)),
    *((kind, depth, clear) for kind in (LA, RGBA) for depth in (8, 16) for clear in (False, True)),
]


def png(
    shape: numpy.ndarray, kind: int, depth: int, clear: bool, orientation: int, dark: bool = False
) -> bytes:
    """A PNG of every kind that the format has, written by hand: Pillow cannot write them all.

    Args:
        shape: what is white, or opaque.
        kind: the colour type.
        depth: bits a channel.
        clear: transparent outside, white on black else (with an alpha that is opaque everywhere).
        orientation: in EXIF.
        dark: if it is clear, the object is black, and white what is transparent.
    """
    top = 2**depth - 1
    alpha = [top] if kind in (LA, RGBA) else []
    colours = 1 if kind in (GREY, LA, PALETTE) else 3
    black, white = [0] * colours + alpha, [1 if kind == PALETTE else top] * colours + alpha
    yes, no = (black, white) if clear and dark else (white, black)
    extra = b""
    if kind == PALETTE:
        extra += chunk(b"PLTE", bytes([0, 0, 0, 255, 255, 255]))
        extra += chunk(b"tRNS", bytes([255 * (i == yes[0]) for i in range(2)])) if clear else b""
    elif clear and alpha:
        no = [*no[:-1], 0]
    elif clear:
        extra += chunk(b"tRNS", b"".join(struct.pack(">H", value) for value in no))
    samples = numpy.where(lying(shape, orientation)[..., None], yes, no)
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)
    if depth == 16:
        rows = rows.astype(">u2").view(numpy.uint8)
    else:  # the bits of each sample, most significant first
        bits = (rows[..., None] >> numpy.arange(depth)[::-1]) & 1
        rows = numpy.packbits(bits.astype(bool).reshape(height, -1), axis=1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    extra += chunk(b"eXIf", exif(orientation).removeprefix(b"Exif\0\0"))
    extra += chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return png_header(width, height, depth, kind) + extra


def bomb(side: int) -> bytes:
    """A PNG that says it has side × side pixels of one bit."""
    data = chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return png_header(side, side, 1, GREY) + data


def as_a_phone_saves(picture: Image.Image) -> bytes:
    """A PNG in which the picture lies on its side; EXIF says how it is turned."""
    file = io.BytesIO()
    picture.transpose(TURNS[6]).save(file, "PNG", exif=exif(6))
    return file.getvalue()
