"""Average precision, as object detection has it."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from lrd_helpers.layout import Layout
from lrd_helpers.mask import Box
from lrd_helpers.measure.detectors import Detector
from lrd_helpers.pictures import Picture


def average_precision(
    detector: Detector, pairs: Sequence[tuple[Picture, Layout]]
) -> dict[str, float]:
    """AP of the layers' boxes as COCO has it: the layouts are the truth, the detector looks.

    As the papers on layouts measure it: the area under precision against recall, the mean over IoU
    thresholds .50, .55, … .95 and over the prompts. In each picture the detector is asked for that
    picture's prompts only. By pycocotools, which must be installed.

    Returns:
        "AP", and "AP50" and "AP75" with one threshold each, in [0, 1].

    Raises:
        ValueError: no pictures.
        ImportError: pycocotools is not installed.
    """
    if not pairs:
        raise ValueError("there are no pictures to judge")
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise ImportError("average precision needs pycocotools: pip install pycocotools") from None
    truth, detections = _records(detector, pairs)
    if not detections:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # it reports every step it takes
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(evaluation.stats[i]) for i, name in enumerate(("AP", "AP50", "AP75"))}


def _records(
    detector: Detector, pairs: Sequence[tuple[Picture, Layout]]
) -> tuple[dict[str, list | dict], list[dict[str, Any]]]:
    """The layouts as a data set of COCO, and what the detector says as its results."""
    prompts = sorted({layer.prompt for _, layout in pairs for layer in layout.layers})
    truth, detections = [], []
    for number, (image, layout) in enumerate(pairs, start=1):
        for layer in layout.layers:
            record = _record(number, prompts.index(layer.prompt), layer.bounding_box)
            _, _, width, height = record["bbox"]
            truth.append({"id": len(truth) + 1, "area": width * height, "iscrowd": 0} | record)
        asked = list(dict.fromkeys(layer.prompt for layer in layout.layers))
        for prompt, things in zip(asked, detector(image, asked), strict=True):
            detections += [
                _record(number, prompts.index(prompt), thing.box) | {"score": thing.score}
                for thing in things
            ]
    dataset = {
        "info": {},
        "images": [{"id": number} for number in range(1, len(pairs) + 1)],
        "categories": [{"id": n, "name": prompt} for n, prompt in enumerate(prompts)],
        "annotations": truth,
    }
    return dataset, detections


def _record(picture: int, prompt: int, box: Box) -> dict[str, Any]:
    # In thousandths: COCO counts pixels, and only ratios matter here.
    x0, y0, x1, y1 = (1000 * value for value in box)
    return {"image_id": picture, "category_id": prompt, "bbox": [x0, y0, x1 - x0, y1 - y0]}
