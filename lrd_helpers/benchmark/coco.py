"""COCO's annotations as layouts: what papers on layouts measure by (Lin et al. 2014).

    layouts = coco_layouts("instances_val2017.json", "captions_val2017.json")

Which pictures are taken is what MultiDiffusion says of its evaluation (Bar-Tal et al. 2023, section
5): "2 to 4 foreground objects, excluding people, and masks that occupy less than 5% of the image".
Two more rules are ours: no two objects of a kind, and a caption that names them all, since methods
that steer the words of a caption must know which words are whose.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lrd_helpers.benchmark.layouts import BenchmarkError, NamedLayout
from lrd_helpers.files import checked_file
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.layout_json import box_from_coco
from lrd_helpers.mask import Box, Mask
from lrd_helpers.messages import in_file

Shapes = Literal["boxes", "masks"]

LARGEST = 2**30
"""Bytes of a file that are read: of train2017 they are 470 million."""

PLURAL = ("scissors", "skis")
"""COCO's kinds with no article."""


@dataclass(frozen=True)
class CocoRules:
    """Which pictures become layouts.

    Attributes:
        least, most: objects of a picture.
        smallest: share of the picture below which a thing does not count as an object.
        without: kinds of which a picture shows none, however small.
    """

    least: int = 2
    most: int = 4
    smallest: float = 0.05
    without: tuple[str, ...] = ("person",)


def coco_layouts(
    instances: str | os.PathLike[str],
    captions: str | os.PathLike[str],
    *,
    shapes: Shapes = "boxes",
    rules: CocoRules = CocoRules(),
) -> list[NamedLayout]:
    """The layouts of pictures, in the order of their ids; the larger an object, the further back.

    Args:
        instances: a file such as instances_val2017.json.
        captions: the captions of the same pictures, captions_val2017.json.
        shapes: each object's box, or its mask (needs pycocotools). Both are shares of the picture's
            sides: on a square canvas a wide picture becomes narrower.
        rules: which pictures are taken.

    Raises:
        BenchmarkError: a file that cannot be read or is no such file, a damaged annotation, or no
            picture that the rules let pass (says how many failed by which).
    """
    pictures, kinds, things = _read(instances, "instances", "bbox")
    _, _, texts = _read(captions, "captions", "caption")
    dropped: Counter[str] = Counter()
    layouts = []
    for number, picture in sorted(pictures.items()):
        try:
            objects = _objects(things.get(number, []), picture, kinds, rules)
            caption = _naming_all(texts.get(number, []), [name for name, _ in objects])
            layers = [_layer(name, thing, picture, shapes) for name, thing in objects]
            layout = Layout(caption, layers=layers)
        except _Dropped as reason:
            dropped[str(reason)] += 1
            continue
        except BenchmarkError:
            raise
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            fault = f"picture {number} has a damaged annotation: {type(error).__name__} {error}"
            raise BenchmarkError(in_file(instances, fault)) from None
        layouts.append(NamedLayout(f"coco-{number}", f"{len(layers)} objects", layout))
    if not layouts:
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        fault = f"none of its {len(pictures)} pictures is left as a layout ({counts or 'empty'})"
        raise BenchmarkError(in_file(instances, fault))
    return layouts


class _Dropped(Exception):
    """A rule that a picture breaks."""


def _objects(
    things: Sequence[Mapping[str, Any]],
    picture: Mapping[str, Any],
    kinds: Mapping[int, str],
    rules: CocoRules,
) -> list[tuple[str, Mapping[str, Any]]]:
    """A picture's objects with the names of their kinds, the largest first."""
    named = [(kinds[thing["category_id"]], thing) for thing in things]
    for name, _ in named:
        if name in rules.without:
            raise _Dropped(f"with a {name}")
    area = picture["width"] * picture["height"]
    objects = [each for each in named if each[1]["area"] / area >= rules.smallest]
    if any(thing.get("iscrowd") for _, thing in objects):
        raise _Dropped("with a crowd")
    if not rules.least <= len(objects) <= rules.most:
        raise _Dropped(f"without {rules.least} to {rules.most} objects")
    if len({name for name, _ in objects}) < len(objects):
        raise _Dropped("with two objects of a kind")
    return sorted(objects, key=lambda each: -each[1]["area"])


def _naming_all(texts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The first caption that names all kinds, each with words of its own, without its full stop."""
    for text in texts:
        caption = rest = " ".join(text["caption"].split()).rstrip(".")
        for name in sorted(names, key=len, reverse=True):  # "hot dog" before "dog"
            rest, there = re.subn(rf"\b{re.escape(name)}\b", " | ", rest, count=1, flags=re.I)
            if not there:
                break
        else:
            return caption
    raise _Dropped("whose captions do not name all objects")


def _layer(
    name: str, thing: Mapping[str, Any], picture: Mapping[str, Any], shapes: Shapes
) -> Layer:
    width, height = picture["width"], picture["height"]
    article = "" if name in PLURAL else "an " if name[0] in "aeiou" else "a "
    if shapes == "boxes":
        return Layer(
            article + name, _within(box_from_coco(thing["bbox"], width, height)), word=name
        )
    try:
        from pycocotools import mask
    except ImportError:
        raise BenchmarkError("masks of COCO need pycocotools: pip install pycocotools") from None
    parts = mask.frPyObjects(thing["segmentation"], height, width)
    return Layer(article + name, mask=Mask.of(mask.decode(mask.merge(parts))), word=name)


def _within(box: Box) -> Box:
    """The part of a box on the canvas: COCO's reach over the edge by parts of a pixel."""
    return tuple(min(1.0, max(0.0, side)) for side in box)


def _read(
    path: str | os.PathLike[str], what: str, field: str
) -> tuple[dict[int, dict[str, Any]], dict[int, str], dict[int, list[dict[str, Any]]]]:
    """Pictures by their id, names of kinds by theirs, annotations by their picture's."""
    try:
        data = json.loads(checked_file(path, LARGEST))
        pictures = {picture["id"]: picture for picture in data["images"]}
        kinds = {kind["id"]: kind["name"] for kind in data.get("categories", [])}
        things: dict[int, list[dict[str, Any]]] = {}
        for thing in data["annotations"]:
            things.setdefault(thing["image_id"], []).append(thing)
        if any(field not in thing for thing in data["annotations"]):
            raise KeyError(field)
    except OSError as error:
        raise BenchmarkError(in_file(path, f"cannot be read: {error.strerror}")) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BenchmarkError(
            in_file(
                path,
                f"is no file of COCO's {what}, such as {what}_val2017.json: an object with images, "
                f"and annotations that have an image_id and a {field}",
            )
        ) from None
    return pictures, kinds, things
