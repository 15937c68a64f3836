"""The command line: `python -m lrd_helpers render LAYOUT.json… --output DIR`, and others."""

from __future__ import annotations

import argparse
import io
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lrd_helpers.messages import excerpt, in_file, sentence

if TYPE_CHECKING:
    from PIL import Image

    from lrd_helpers.layout import Layout
    from lrd_helpers.methods import Method
    from lrd_helpers.pipeline import LayeredRenderingPipeline


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence; `--help` has the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {sentence(message, 220)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, or 2 after one sentence on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign that a terminal lacks stops nothing
            stream.reconfigure(errors="backslashreplace")
    parser = _Parser(prog="python -m lrd_helpers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    render = commands.add_parser(
        "render",
        help="draw layouts",
        description="Draw each layout; write LAYOUT.png (the picture, and beside it the picture "
        "with the boxes); print one row each: how well the boxes are obeyed (IoU of each layer, 0 "
        "to 1) and how well the picture fits the caption (CLIP score, 100·cos).",
    )
    render.add_argument("layouts", nargs="+", metavar="LAYOUT.json", type=Path)
    render.add_argument("--output", required=True, metavar="DIR", type=Path)
    render.add_argument("--seed", type=_seed, default=0, help="of the initial noise (%(default)s)")
    # A few-step model has its own.
    render.add_argument("--steps", type=int, help="denoising steps (25; 4 of a few-step model)")
    render.add_argument(
        "--guidance-scale", type=_finite, help="γ of the caption (5.0; off for a few-step model)"
    )
    render.add_argument(
        "--method",
        default="collage",
        help="collage, lrdiff, paper, authors, unofficial, plain, multidiffusion, "
        "paint-with-words, layout-guidance, boxdiff, larender or rag; or with choices changed: "
        "paper,inside=0.3 (%(default)s)",
    )
    render.add_argument(
        "--model", default="storybook", help="storybook, a folder, or a hub name (%(default)s)"
    )
    render.add_argument("--device", help="cuda, mps, cpu (the best there is)")
    render.set_defaults(run=_render)
    _add_layers(commands)
    _add_construct(commands)
    _add_benchmark(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        goes_on = options.run in (_benchmark, _construct)
        resumed = "; the same command goes on from here" if goes_on else ""
        print(f"interrupted{resumed}", file=sys.stderr)
        return 130
    except OSError as error:
        file = str(error.filename) if error.filename else None
        return _complain(in_file(file, error.strerror or str(error)))
    except Exception as error:
        # Only what is meant for the user; anything else is a mistake of ours and shows itself.
        if isinstance(error, _refusals(options)):
            return _complain(str(error))
        raise
    return 0


def _add_layers(commands: argparse._SubParsersAction) -> None:
    layers = commands.add_parser(
        "layers",
        help="draw layouts as layers, for other programs",
        description="Draw the background and each layer of a layout by themselves, with alpha, "
        "complete behind what hides them; write LAYOUT.psd (or .ora, or a folder of PNGs), and the "
        "picture of all of them as LAYOUT.png.",
    )
    add = layers.add_argument
    add("layouts", nargs="+", metavar="LAYOUT.json", type=Path)
    add("--output", required=True, metavar="DIR", type=Path)
    add(
        "--format",
        default="ora",
        choices=("psd", "ora", "png"),
        help="Photoshop (needs psd-tools), OpenRaster (Krita, GIMP), or a folder of PNGs "
        "(%(default)s)",
    )
    add("--seed", type=_seed, default=0, help="of the initial noise (%(default)s)")
    add("--steps", type=int, default=15, help="denoising steps (%(default)s)")
    add("--guidance-scale", type=_finite, default=3.0, help="γ of the prompts (%(default)s)")
    add("--model", default="storybook-layers", help="storybook-layers, or a folder (%(default)s)")
    add("--device", help="cuda, mps, cpu (the best there is)")
    layers.set_defaults(run=_layers)


def _add_construct(commands: argparse._SubParsersAction) -> None:
    construct = commands.add_parser(
        "construct",
        help="take pictures apart into layers, to train a layered model on",
        description="Take each picture of webdataset shards apart: find what its caption names, "
        "order it, cut it out with its alpha, fill what it hides. Write a shard of layers for each "
        "shard, and beside it, in .json, how many pictures were kept, and why the others were not. "
        "A shard that is written is whole, and the same command goes on with the others. A picture "
        "file (with its caption in a .txt beside it) becomes a .ora, for Krita or GIMP.",
    )
    add = construct.add_argument
    add("sources", nargs="+", metavar="SHARD", help="shards/*.tar, an address, or picture files")
    add("--output", required=True, metavar="DIR", type=Path)
    add(
        "--captions",
        default="given",
        choices=("given", "made"),
        help="leave out pictures without a caption, or caption all by the detector (%(default)s)",
    )
    add("--device", help="cuda, mps, cpu (the best there is)")
    construct.set_defaults(run=_construct)


def _add_benchmark(commands: argparse._SubParsersAction) -> None:
    benchmark = commands.add_parser(
        "benchmark",
        help="measure methods on many layouts",
        description="Draw layouts by several methods from the same noise and measure how well they "
        "are obeyed: a row a picture in results.csv, tables in table.md, two figures. The same "
        "command goes on where a run was cut; more methods and seeds can be added to a folder. "
        "`torchrun --standalone --nproc_per_node 2 -m lrd_helpers benchmark` shares the work.",
    )
    add = benchmark.add_argument
    add(
        "layouts",
        nargs="*",
        metavar="LAYOUTS.json",
        type=Path,
        help="files of layouts (the 220 that are shipped)",
    )
    add(
        "--coco",
        nargs=2,
        metavar=("INSTANCES.json", "CAPTIONS.json"),
        type=Path,
        help="in place of LAYOUTS.json: COCO's annotations, instances_val2017.json and "
        "captions_val2017.json",
    )
    add("--masks", action="store_true", help="with --coco: objects' masks, not their boxes")
    add(
        "--detector",
        metavar="MODEL",
        help="judges in place of the storybook's: OWLv2, OWL-ViT or Grounding DINO, a folder or a "
        "hub name (with --coco google/owlv2-base-patch16-ensemble)",
    )
    add("--threshold", type=_finite, help="how sure that detector must be, 0 to 1 (0.2)")
    add("--sam", metavar="MODEL", help="adds pixels to its boxes, such as facebook/sam-vit-base")
    add(
        "--clip",
        metavar="MODEL",
        help="of the CLIP score (with --coco or --detector openai/clip-vit-large-patch14)",
    )
    add("--output", default="outputs/benchmark", metavar="DIR", type=Path, help="(%(default)s)")
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="names, or names with choices changed: paper paper,inside=0.3,outside=0.3 fuse=once "
        "(all there are; with --ablations those that are ablated)",
    )
    add(
        "--ablations",
        nargs="*",
        metavar="METHOD",
        help="also these methods with one choice changed, for every choice they have (collage and "
        "lrdiff, and all others with and without the background in their layers' prompts)",
    )
    add("--metrics", nargs="+", metavar="METRIC", help="columns of the tables (all there are)")
    add("--seeds", type=int, default=1, help="pictures a layout and method (%(default)s)")
    add("--limit", type=int, metavar="N", help="only N layouts, evenly spread (all)")
    add("--steps", type=int, default=25, help="denoising steps (%(default)s)")
    add("--guidance-scale", type=_finite, default=5.0, help="γ of the caption (%(default)s)")
    add(
        "--batch-size",
        type=int,
        default=1,
        help="pictures our methods draw at once: quicker, but their seconds then say less "
        "(%(default)s)",
    )
    add("--model", default="storybook", help="storybook, a folder, or a hub name (%(default)s)")
    add("--device", help="cuda, mps, cpu (the best there is)")
    add(
        "--measure-again",
        action="store_true",
        help="draw nothing: measure the pictures that are in the folder by the detector and the "
        "CLIP of now, and make the tables anew",
    )
    benchmark.set_defaults(run=_benchmark)


class _Refused(ValueError):
    """Arguments that are each legal, but not here or not together."""


def _refusals(options: argparse.Namespace) -> tuple[type[Exception], ...]:
    """What a command raises where its arguments or files are to blame."""
    from lrd_helpers.layout import LayoutError
    from lrd_helpers.models import AssetError

    if options.run is not _benchmark:
        from lrd_helpers.layerdiff.stack import StackError

        return LayoutError, AssetError, StackError, _Refused
    from lrd_helpers.benchmark import BenchmarkError

    return LayoutError, AssetError, BenchmarkError, _Refused


def _complain(message: str) -> int:
    print(sentence(f"error: {message}"), file=sys.stderr)
    return 2


def _seed(text: str) -> int:
    seed = int(text) if text.isdecimal() and len(text) < 20 else -1
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"{excerpt(text)} is not between 0 and 2**63 - 1")
    return seed


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{excerpt(text)} is not a finite number")
    return number


def _layouts(options: argparse.Namespace) -> dict[Path, Layout]:
    """The layouts by their files: all that can be refused, before anything is drawn or written."""
    from lrd_helpers.files import check_folder
    from lrd_helpers.layout import Layout

    layouts = {path: Layout.load(path) for path in options.layouts}
    pictures: dict[str, Path] = {}
    for path in options.layouts:
        if (other := pictures.setdefault(path.stem, path)) != path:
            raise _Refused(f"{other} and {path} would both be drawn as {path.stem}.png; rename one")
    try:
        check_folder(options.output)
    except NotADirectoryError as error:
        raise _Refused(f"--output {error.strerror}") from None
    return layouts


def _pipe(options: argparse.Namespace, *, layered: bool) -> Any:
    """The model, of the kind that the command draws with; no progress bar of its own."""
    from lrd_helpers.layerdiff.pipeline import LayerDiffPipeline
    from lrd_helpers.models import load_pipeline

    try:
        pipe = load_pipeline(options.model, options.device)
    except ValueError as error:
        raise _Refused(str(error)) from None
    if isinstance(pipe, LayerDiffPipeline) != layered:
        other = "render" if layered else "layers"
        raise _Refused(f"--model {options.model} is for the command `lrd_helpers {other}`")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _layers(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    layouts = _layouts(options)

    from lrd_helpers.files import write_atomically
    from lrd_helpers.layerdiff.export import check_format, save_stack
    from lrd_helpers.pictures import png_of

    suffix = "" if options.format == "png" else f".{options.format}"
    files = {path: options.output / f"{path.stem}{suffix}" for path in layouts}
    try:
        for file in files.values():
            check_format(file)
    except ImportError as error:
        raise _Refused(f"--format {options.format}: {error}") from None
    pipe = _pipe(options, layered=True)
    with tqdm(layouts.items(), unit="layout", leave=False, disable=None) as progress:
        for path, layout in progress:
            progress.set_description(path.stem)
            stack = _drawn(pipe, path, layout, options).stacks[0]
            options.output.mkdir(parents=True, exist_ok=True)
            save_stack(stack, files[path])
            write_atomically(options.output / f"{path.stem}.png", png_of(stack.flatten()))
            shown = ", ".join(
                layer.prompt if layer.box else f"{layer.prompt} (empty)" for layer in stack.layers
            )
            tqdm.write(f"{path.stem}{suffix or '/'}  {shown}", file=sys.stdout)


def _construct(options: argparse.Namespace) -> None:
    from lrd_helpers.benchmark.judges import digest
    from lrd_helpers.layerdiff.construction import GATES, storybook_stages
    from lrd_helpers.measure import StorybookDetector
    from lrd_helpers.models import load_pipeline, load_segmenter
    from lrd_helpers.storybook import IMAGE_SIZE
    from lrd_helpers.training.layered_shards import Construction, ConstructionError

    try:
        pipe = load_pipeline("storybook", options.device)
        detector = StorybookDetector(load_segmenter(pipe.device))
        construction = Construction(
            options.sources,
            options.output,
            storybook_stages(pipe, detector),
            settings={
                "model": digest(pipe.unet, pipe.vae, pipe.text_encoder),
                "detector": f"{digest(detector.model)}, {detector.rules}",
            },
            size=IMAGE_SIZE,
            gates=GATES,
            captioned=options.captions == "given",
        )
    except NotADirectoryError as error:
        raise _Refused(f"--output {error.strerror}") from None
    except (ConstructionError, ImportError, ValueError) as error:
        raise _Refused(str(error)) from None
    construction.run()
    print(construction.summary())
    if rates := construction.rates():
        print(rates)


def _render(options: argparse.Namespace) -> None:
    # Here and not above: --help and a wrong argument need not wait for torch.
    from tqdm import tqdm

    layouts = _layouts(options)

    from lrd_helpers.files import write_atomically
    from lrd_helpers.methods import parsed
    from lrd_helpers.pictures import png_of
    from lrd_helpers.plotting import side_by_side

    try:
        method = parsed(options.method)
    except ValueError as error:
        raise _Refused(f"--method {error}") from None
    pipe = _pipe(options, layered=False)
    measure = _Measure(pipe)

    width = max(len(path.stem) for path in [Path("layout"), *layouts])
    rows = [f"{'layout':{width}}  {'IoU':>5}  {'CLIP':>5}  IoU of each layer"]
    with tqdm(layouts.items(), unit="layout", leave=False, disable=None) as progress:
        for path, layout in progress:
            progress.set_description(path.stem)
            image = _drawn(pipe, path, layout, options, method=method).images[0]
            row = f"{path.stem:{width}}  {measure(image, layout)}"
            png = png_of(side_by_side(image, layout))
            options.output.mkdir(parents=True, exist_ok=True)
            write_atomically(options.output / f"{path.stem}.png", png)
            for line in [*rows, row]:
                tqdm.write(line, file=sys.stdout)
            rows = []  # the heading is printed once


def _benchmark(options: argparse.Namespace) -> None:
    from lrd_helpers.benchmark import (
        BEST,
        ablations,
        checked_metrics,
        coco_layouts,
        load_layouts,
        measure_again,
        methods_named,
        processes,
        report,
        run,
        with_and_without_background,
    )
    from lrd_helpers.methods import METHODS

    if options.coco and options.layouts:
        raise _Refused("--coco and LAYOUTS.json are two sources of layouts; give one of them")
    if options.masks and not options.coco:
        raise _Refused("--masks goes with --coco; other layouts say themselves what they have")
    if options.coco:
        layouts = coco_layouts(*options.coco, shapes="masks" if options.masks else "boxes")
    else:
        layouts = load_layouts(*options.layouts)
    bases = options.ablations if options.ablations != [] else [BEST, "lrdiff"]
    names = [*(options.methods or bases or METHODS)]
    names += [name for base in bases or () for name in ablations(base)]
    if options.ablations == []:
        names += with_and_without_background()
    methods = methods_named(names)
    metrics = checked_metrics(options.metrics)
    if options.measure_again:
        if options.methods or bases or options.limit or options.seeds != 1:
            raise _Refused(
                "--measure-again measures every picture of the folder; leave out --methods, "
                "--ablations, --seeds and --limit"
            )
        judges = _judges(options, options.device)
        measure_again(options.output, layouts, **judges)
        print(report(options.output, layouts, metrics=metrics, detector=judges["detector"]))
        return

    from lrd_helpers.models import load_pipeline

    state = processes()
    # Of several processes each has a device of its own.
    device = options.device or (state.device if state.num_processes > 1 else None)
    judges = _judges(options, device)
    try:
        pipe = load_pipeline(options.model, device)
    except ValueError as error:
        raise _Refused(str(error)) from None
    pipe.set_progress_bar_config(disable=True)
    try:
        run(
            pipe,
            layouts,
            methods,
            output=options.output,
            seeds=options.seeds,
            limit=options.limit,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            batch_size=options.batch_size,
            **judges,
        )
    finally:
        state.destroy_process_group()
    if state.is_main_process:
        print(report(options.output, layouts, metrics=metrics, detector=judges["detector"]))


def _judges(options: argparse.Namespace, device: Any) -> dict[str, Any]:
    """The detector and the CLIP; None stands for the storybook's."""
    if not (options.coco or options.detector) and (options.sam or options.threshold is not None):
        raise _Refused("--sam and --threshold go with a --detector; the storybook's needs neither")
    if not (options.coco or options.detector or options.clip):
        return {"detector": None, "clip": None}

    from lrd_helpers.measure import load_detector, load_pretrained_clip
    from lrd_helpers.measure.pretrained import CLIP, OWLV2, THRESHOLD

    try:
        detector = None
        if options.coco or options.detector:
            threshold = THRESHOLD if options.threshold is None else options.threshold
            name = options.detector or OWLV2
            detector = load_detector(name, device, sam=options.sam, threshold=threshold)
        return {"detector": detector, "clip": load_pretrained_clip(options.clip or CLIP, device)}
    except ValueError as error:
        raise _Refused(str(error)) from None


def _drawn(
    pipe: Any, path: Path, layout: Layout, options: argparse.Namespace, **more: Method
) -> Any:
    """What a pipeline makes of a layout; its warnings go to stderr with the file's name."""
    import torch

    # On the CPU whatever the device: the same seed is the same noise everywhere.
    generator = torch.Generator("cpu").manual_seed(options.seed)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always", UserWarning)
        try:
            made = pipe(
                layout,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance_scale,
                generator=generator,
                **more,
            )
        except ValueError as error:
            raise _Refused(in_file(path, str(error))) from None
    for remark in remarks:
        if issubclass(remark.category, UserWarning):
            print(sentence(f"warning: {in_file(path, str(remark.message))}"), file=sys.stderr)
    return made


class _Measure:
    """IoU and CLIP score of a picture as a row of text.

    The shipped segmenter and CLIP know the storybook world only: for a model with another
    vocabulary, and for a layer that names no sticker, there is a dash.
    """

    def __init__(self, pipe: LayeredRenderingPipeline) -> None:
        from lrd_helpers.measure import StorybookClip, StorybookDetector
        from lrd_helpers.words import WHOLE_WORDS

        storybook = len(pipe.tokenizer) <= WHOLE_WORDS
        self.detector = StorybookDetector() if storybook else None
        self.clip = StorybookClip() if storybook else None

    def __call__(self, image: Image.Image, layout: Layout) -> str:
        from lrd_helpers.measure import clip_score, layout_iou

        if self.detector is None or self.clip is None:
            return f"{'–':>5}  {'–':>5}"
        score = f"{clip_score(self.clip, image, layout.caption):5.1f}"
        try:
            ious = layout_iou(self.detector, image, layout)
        except ValueError:  # a prompt that names no sticker
            return f"{'–':>5}  {score}"
        each = " ".join(f"{iou:.2f}" for iou in ious)
        return f"{sum(ious) / len(ious):5.2f}  {score}  {each}"


if __name__ == "__main__":
    sys.exit(main())
