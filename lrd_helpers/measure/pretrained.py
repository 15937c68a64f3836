"""Judges that know the real world: detectors, SAM and CLIP models of transformers."""

from __future__ import annotations

import os

import torch

from lrd_helpers.measure.clip import PretrainedClip
from lrd_helpers.measure.detectors import Detector, SegmentedDetector, ZeroShotDetector
from lrd_helpers.models import load_judge
from lrd_helpers.quiet import quiet_libraries

with quiet_libraries():
    import transformers

OWLV2 = "google/owlv2-base-patch16-ensemble"
GROUNDING_DINO = "IDEA-Research/grounding-dino-tiny"
SAM = "facebook/sam-vit-base"
CLIP = "openai/clip-vit-large-patch14"
"""The model of the CLIP score and T2I-Sim in papers on layouts."""

DETECTORS = {
    "owlv2": "Owlv2ForObjectDetection",
    "owlvit": "OwlViTForObjectDetection",
    "grounding-dino": "GroundingDinoForObjectDetection",
}

THRESHOLD = 0.2
"""How sure a detector must be: between what their pages use for OWLv2 (.1) and Grounding DINO (.4).
It decides much: measure with more than one."""

OVERLAP = 0.5
"""See `ZeroShotDetector`; the usual threshold of non-maximum suppression."""


def load_detector(
    name_or_folder: str | os.PathLike[str] = OWLV2,
    device: torch.device | str | None = None,
    *,
    sam: str | os.PathLike[str] | None = None,
    threshold: float = THRESHOLD,
) -> Detector:
    """A detector that finds whatever prompts name: OWLv2, OWL-ViT or Grounding DINO.

    Args:
        name_or_folder: as for `load_judge`.
        device: as for `load_pipeline`.
        sam: of a SAM model, which adds the pixels to the boxes; `SAM` would work.
        threshold: how sure it must be, in [0, 1].

    Raises:
        AssetError: see `load_judge`.
        ValueError: a threshold outside [0, 1], or a device that this machine does not have.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"the threshold is {threshold:g}, but should be between 0 and 1")
    model, processor = load_judge(name_or_folder, DETECTORS, device)
    find = transformers.pipeline(
        "zero-shot-object-detection",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        device=model.device,
    )
    kind = _Dotted if model.config.model_type == "grounding-dino" else ZeroShotDetector
    detector = kind(find, threshold=threshold, overlap=OVERLAP)
    if sam is None:
        return detector
    return SegmentedDetector(detector, *load_judge(sam, {"sam": "SamModel"}, device))


def load_pretrained_clip(
    name_or_folder: str | os.PathLike[str] = CLIP, device: torch.device | str | None = None
) -> PretrainedClip:
    """A CLIP model that knows the real world.

    Raises:
        AssetError: see `load_judge`.
        ValueError: a device that this machine does not have.
    """
    return PretrainedClip(*load_judge(name_or_folder, {"clip": "CLIPModel"}, device))


class _Dotted(ZeroShotDetector):
    """Grounding DINO reads small letters and a full stop; its answers are told apart without."""

    def asked(self, label: str) -> str:
        return f"{label.lower().rstrip('. ')}."
