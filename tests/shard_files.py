"""Shards and the files in them, as other programs write them."""

import io
import tarfile

from PIL import Image


def png(colour: tuple[int, int, int] = (0, 0, 0), size: tuple[int, int] = (40, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def tar(*files: tuple[str, bytes]) -> bytes:
    """A tar of these files in this order, named as they stand."""
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return shard.getvalue()
