import dataclasses
import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from malformed import malformed
from picture_files import bomb
from PIL import Image

import lrd_helpers
from lrd_helpers import __main__ as command_line
from lrd_helpers import measure, models, plotting
from lrd_helpers.layerdiff import export
from lrd_helpers.layerdiff.alpha import grown
from lrd_helpers.layerdiff.pipeline import LayerDiffPipeline
from lrd_helpers.layerdiff.unet import LayeredUNet2DConditionModel
from lrd_helpers.layout import Layer, Layout
from lrd_helpers.pipeline import LayeredRenderingPipeline

LAYOUT = Layout("a red car at sea", layers=[Layer("a red car", (0.1, 0.3, 0.6, 0.8))])


@pytest.fixture
def folder(tmp_path: Path, tiny, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the layout car.json; the tiny model stands in for the shipped ones."""
    pipe = LayeredRenderingPipeline(**tiny.components, requires_safety_checker=False)

    def load(name: str, device: str | None) -> LayeredRenderingPipeline:
        if name != "storybook":
            raise models.AssetError(f"there is no model {name!r}")
        return pipe

    monkeypatch.setattr(models, "load_pipeline", load)
    monkeypatch.setattr(measure, "StorybookDetector", lambda: "detector")
    monkeypatch.setattr(measure, "StorybookClip", lambda: "clip")
    monkeypatch.setattr(measure, "layout_iou", lambda detector, image, layout: [0.25])
    monkeypatch.setattr(measure, "clip_score", lambda clip, image, text: 31.44)
    LAYOUT.save(tmp_path / "car.json")
    return tmp_path


@pytest.fixture
def layered(folder: Path, tiny, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with a tiny layered model."""
    parts = {name: tiny.components[name] for name in ("text_encoder", "tokenizer", "scheduler")}
    unet = LayeredUNet2DConditionModel.grown(tiny.unet).eval()
    pipe = LayerDiffPipeline(vae=grown(tiny.vae).eval(), unet=unet, **parts)
    monkeypatch.setattr(models, "load_pipeline", lambda name, device: pipe)
    return folder


def run(*arguments: object) -> int:
    return command_line.main(["render", *map(str, arguments)])


def test_renders_a_picture_and_prints_a_row(folder, capsys) -> None:
    assert run(folder / "car.json", "--output", folder / "out", "--steps", 2) == 0
    assert os.listdir(folder / "out") == ["car.png"]
    with Image.open(folder / "out" / "car.png") as picture:
        assert picture.width > picture.height, "the picture, and the boxes beside it"
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "layout    IoU   CLIP  IoU of each layer",
        "car      0.25   31.4  0.25",
    ]
    assert err == ""


def test_steps_are_the_models_own_where_none_are_given(folder, monkeypatch) -> None:
    monkeypatch.setattr(LayeredRenderingPipeline, "default_steps", 3)
    steps = []
    original = LayeredRenderingPipeline.progress_bar
    monkeypatch.setattr(
        LayeredRenderingPipeline,
        "progress_bar",
        lambda pipe, total: steps.append(total) or original(pipe, total=total),
    )
    for more in ((), ("--steps", 2)):
        given = folder / "car.json", "--output", folder / "out", "--method", "plain"
        assert run(*given, *more) == 0
    assert steps == [3, 2]


def test_the_seed_decides(folder) -> None:
    pictures = []
    for number, seed in enumerate([3, 3, 4]):
        output = folder / str(number)
        assert run(folder / "car.json", "--output", output, "--steps", 2, "--seed", seed) == 0
        pictures.append((output / "car.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_a_picture_does_not_depend_on_its_neighbours(folder) -> None:
    LAYOUT.save(folder / "other.json")
    both = [folder / "other.json", folder / "car.json"]
    assert run(*both, "--output", folder / "both", "--steps", 2) == 0
    assert run(folder / "car.json", "--output", folder / "one", "--steps", 2) == 0
    one, two = ((folder / name / "car.png").read_bytes() for name in ("one", "both"))
    assert one == two


def test_unknown_words_are_a_warning(folder, capsys) -> None:
    path = folder / "dog.json"
    Layout("a red dog", layers=[Layer("a red car", (0, 0, 1, 1))]).save(path)
    assert run(path, "--output", folder / "out", "--steps", 1) == 0
    assert capsys.readouterr().err == (
        f"warning: {path}: caption: the model does not know the word 'dog'\n"
    )


def test_a_layer_without_a_sticker_has_a_dash(folder, capsys, monkeypatch) -> None:
    def iou(detector, image, layout):
        raise ValueError("names no sticker")

    monkeypatch.setattr(measure, "layout_iou", iou)
    assert run(folder / "car.json", "--output", folder / "out", "--steps", 1) == 0
    assert capsys.readouterr().out.splitlines()[1] == "car         –   31.4"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    try:
        code = run(*arguments)
    except SystemExit as exit_:  # argparse
        code = exit_.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, "one sentence"
    return err


def test_bad_layouts_are_refused_before_anything_is_drawn(folder, capsys) -> None:
    bad = folder / "bad.json"
    bad.write_text('{"caption": "a", "layers": [{"prompt": "a cat", "box": [0, 0, 90, 70]}]}')
    message = refused(capsys, folder / "car.json", bad, "--output", folder / "out")
    assert message.startswith(f"error: {bad}, layer 1 'a cat', box is (0, 0, 90, 70), which is out")
    assert not (folder / "out").exists()


def test_an_opacity_is_drawn_or_refused_with_file_and_layer(folder, capsys) -> None:
    glass = folder / "glass.json"
    half = [dataclasses.replace(LAYOUT.layers[0], opacity=0.5)]
    dataclasses.replace(LAYOUT, layers=half).save(glass)
    output = "--output", folder / "out", "--steps", 2
    message = refused(capsys, glass, *output, "--method", "boxdiff")
    assert message.startswith(f"error: {glass}: layer 1 'a red car' has an opacity of 0.5, but ")
    wrong = folder / "wrong.json"
    wrong.write_text(glass.read_text().replace("0.5", "1.4"))
    message = refused(capsys, glass, wrong, *output)
    assert message.startswith(f"error: {wrong}, layer 1 'a red car', opacity is 1.4, but should be")
    assert not (folder / "out").exists()
    assert run(glass, *output) == 0
    assert os.listdir(folder / "out") == ["glass.png"]


def test_a_mask_that_is_a_bomb_is_refused_with_file_and_layer(folder, capsys) -> None:
    bad = folder / "bad.json"
    (folder / "bomb.png").write_bytes(bomb(14_000))
    bad.write_text('{"caption": "a", "layers": [{"prompt": "a cat", "mask": "bomb.png"}]}')
    message = refused(capsys, bad, "--output", folder / "out")
    assert message.startswith(f"error: {bad}, layer 1 'a cat', mask is '")
    assert message.endswith("bomb.png', which has more than 89,478,485 pixels\n")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "car.json: num_inference_steps is 0, but should be a whole number"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--guidance-scale", "nan"], "argument --guidance-scale: 'nan' is not a finite number"),
        (["--guidance-scale", "much"], "argument --guidance-scale: 'much' is not a finite number"),
        (["--seed", "many"], "argument --seed: 'many' is not between 0 and 2**63 - 1"),
        (["--seed", "-1"], "argument --seed: '-1' is not between 0 and 2**63 - 1"),
        (["--model", "nothing"], "error: there is no model 'nothing'"),
        (["--sede", "1"], "unrecognized arguments: --sede 1"),
    ],
)
def test_bad_arguments(folder, capsys, arguments, message) -> None:
    given = [folder / "car.json", "--output", folder / "out", *arguments]
    assert message in refused(capsys, *given)
    assert not (folder / "out").exists()


NAME = "x" * 10**5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/dev/zero"], "error: /dev/zero: cannot be read: it is a device, but should be a file"),
        (["pipe"], "pipe: cannot be read: it is a pipe, but should be a file"),
        (["."], "error: .: cannot be read: it is a folder, but should be a file"),
        (["a\nb\x1b[2J"], r"error: a\nb\x1b[2J: cannot be read: No such file or directory"),
        ([NAME], "xxx: cannot be read: File name too long"),
        (["car.json", "--output", "car.json/out"], "car.json is a file, but should be a folder"),
        (["car.json", "--output", NAME], "xxx: File name too long"),
        (["car.json", "--method", NAME], "error: --method "),
        (["car.json", "--model", NAME], "error: there is no model 'xxx"),
        (["car.json", "--seed", NAME], "argument --seed: 'xxx"),
        (["car.json", "--steps", "9" * 5000], "argument --steps: invalid int value: '999"),
        (["car.json", f"--{NAME}"], "unrecognized arguments: --xxx"),
    ],
)
def test_nasty_arguments(folder, capsys, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(folder)
    os.mkfifo("pipe")
    sentence = refused(capsys, "--output", "out", "--steps", 1, *arguments)
    assert message in sentence
    assert len(sentence) <= 301, "with its line end"


@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=malformed())
def test_malformed_layouts(folder, capsys, case) -> None:
    path = folder / "bad.json"
    path.write_bytes(case[0].encode(errors="surrogatepass"))
    sentence = refused(capsys, path, "--output", folder / "out", "--model", "nothing")
    assert sentence.startswith((f"error: {path}", "error: there is no model"))
    assert len(sentence) <= 301


def test_a_terminal_that_lacks_signs(capsys, monkeypatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as done:
        run("--help")
    assert done.value.code == 0
    terminal.seek(0)
    assert r"\u03b3 of the caption" in terminal.read()


def test_two_layouts_of_one_name(folder, capsys) -> None:
    (folder / "b").mkdir()
    LAYOUT.save(folder / "b" / "car.json")
    files = [folder / "car.json", folder / "b" / "car.json"]
    message = refused(capsys, *files, "--output", folder / "out")
    assert (
        message == f"error: {files[0]} and {files[1]} would both be drawn as car.png; rename one\n"
    )


@pytest.mark.parametrize("output", ["out", "out/deeper/still"])
def test_an_output_that_is_a_file(folder, capsys, output) -> None:
    (folder / "out").write_text("mine")
    message = refused(capsys, folder / "car.json", "--output", folder / output)
    assert message == f"error: --output {folder / 'out'} is a file, but should be a folder\n"
    assert (folder / "out").read_text() == "mine"


def test_a_full_disk_leaves_no_half_picture(folder, capsys, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = refused(capsys, folder / "car.json", "--output", folder / "out", "--steps", 1)
    assert message == f"error: {folder / 'out' / 'car.png'}: No space left on device\n"
    assert os.listdir(folder / "out") == []


def test_a_mistake_of_ours_is_not_dressed_up(folder, monkeypatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(plotting, "side_by_side", broken)
    with pytest.raises(ZeroDivisionError):
        run(folder / "car.json", "--output", folder / "out", "--steps", 1)


# ------------------------------------------------------------------ the package


def test_importing_the_package_does_not_import_torch() -> None:
    slow = "{'torch', 'diffusers', 'numpy', 'scipy'}"
    code = f"import sys, lrd_helpers; print(sorted({slow} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    assert set(lrd_helpers.__all__) == set(lrd_helpers._MODULES)
    assert set(lrd_helpers.__all__) <= set(dir(lrd_helpers))
    for name in lrd_helpers.__all__:
        value = getattr(lrd_helpers, name)
        assert name.isupper() or value.__name__ == name
    with pytest.raises(AttributeError, match="module 'lrd_helpers' has no attribute 'Layuot'"):
        _ = lrd_helpers.Layuot


def test_the_demo(storybook_folder: Path, tmp_path: Path) -> None:
    """As `make demo` does it, with one of the examples and few steps."""
    example = Path(__file__).parents[1] / "examples" / "1_one_object.json"
    command = [sys.executable, "-m", "lrd_helpers", "render", example, "--output", tmp_path]
    done = subprocess.run([*command, "--steps", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == ""
    assert os.listdir(tmp_path) == ["1_one_object.png"]


# ------------------------------------------------------------------ layers


@pytest.mark.parametrize(
    ("kind", "written"), [("psd", "car.psd"), ("ora", "car.ora"), ("png", "car")]
)
def test_layers_are_written_for_other_programs(layered, capsys, kind, written) -> None:
    out = layered / "out"
    arguments = ["layers", layered / "car.json", "--output", out, "--format", kind, "--steps", 1]
    assert command_line.main([*map(str, arguments)]) == 0
    assert sorted(os.listdir(out)) == sorted([written, "car.png"])
    stack = export.load_stack(out / written)
    assert [layer.prompt for layer in stack.layers] == ["a red car"]
    with Image.open(out / "car.png") as picture:
        assert picture.convert("RGB") == stack.flatten()
    assert "a red car" in capsys.readouterr().out


def test_a_folder_of_other_things_is_refused_before_layers_are_drawn(
    layered, capsys, monkeypatch
) -> None:
    (layered / "out" / "car").mkdir(parents=True)
    (layered / "out" / "car" / "notes.txt").touch()
    monkeypatch.setattr(LayerDiffPipeline, "__call__", None)
    arguments = ["layers", layered / "car.json", "--output", layered / "out", "--format", "png"]
    arguments += ["--model", "runs/layerdiff/model"]
    assert command_line.main([*map(str, arguments)]) == 2
    assert "it is a folder with 'notes.txt', not of a stack" in capsys.readouterr().err
    assert os.listdir(layered / "out") == ["car"]


def test_a_command_refuses_the_other_kind_of_model(layered, capsys) -> None:
    assert run(layered / "car.json", "--output", layered / "out") == 2
    assert "is for the command `lrd_helpers layers`" in capsys.readouterr().err
    assert not (layered / "out").exists()


def test_a_format_whose_library_is_missing_is_refused_first(layered, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "psd_tools", None)
    arguments = ["layers", layered / "car.json", "--output", layered / "out", "--format", "psd"]
    assert command_line.main([*map(str, arguments)]) == 2
    assert "pip install psd-tools" in capsys.readouterr().err
    assert not (layered / "out").exists()
