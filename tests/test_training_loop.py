"""What all trainings share: the loop, its options, and the folder of the finished model."""

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from lrd_helpers.files import locked
from lrd_helpers.training import checkpoint, export, loop
from lrd_helpers.training.options import ASSETS, TrainingOptions, parse
from lrd_helpers.training.progress import earlier_runs, read_log


class Line(nn.Module):
    """The smallest training there is: noisy points of a line."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)

    def forward(self, batch, generator):
        noise = torch.randn(len(batch), 1, generator=generator)
        return {
            "loss": (self.layer(batch) - batch.sum(1, keepdim=True) + 0.1 * noise).square().mean()
        }


def points(start, reader, readers, cut_at=None):
    number = start
    while number != cut_at:
        generator = torch.Generator().manual_seed(number)
        yield torch.randn(8, 3, generator=generator)
        number += 1
    raise InterruptedError("the power went out")


@dataclass(frozen=True)
class LineOptions(TrainingOptions):
    minutes: float = 1.0
    batch_size: int = 8
    learning_rate: float = 0.05
    warmup: int = 2
    log_every: int = 5


def options(run, *more):
    arguments = ["--run", str(run), "--mixed-precision", "no", *more]
    return parse(LineOptions, "line", "Trains a line.", arguments)


@pytest.mark.slow
def test_two_processes_train_one_model_and_stop_together(tmp_path):
    """By the clock: the first process's, which the other has to be told."""
    script = (
        "import sys\n"
        "from accelerate import debug_launcher\n"
        "from lrd_helpers.training import loop\n"
        "from test_training_loop import Line, options, points\n"
        "def train(folder):\n"
        "    budget = options(folder, '--log-every', '1', '--minutes', '0.01')\n"
        "    loop.train(Line(), budget, batches=points)\n"
        "    print('trained', flush=True)\n"
        "debug_launcher(train, sys.argv[1:], num_processes=2)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained") == 1, "only the first goes on, to write the model"
    rows = list(csv.DictReader((tmp_path / "log.csv").open(newline="")))
    assert len(rows) > 2
    assert all(int(row["samples"]) == 2 * 8 * int(row["step"]) for row in rows)


def test_a_cut_training_resumed_equals_one_in_one_go(tmp_path):
    whole, cut, resumed = Line(), Line(), Line()
    loop.train(whole, options(tmp_path / "whole", "--steps", "20"), batches=points)
    more = ("--steps", "20", "--checkpoint-every", "5")
    with pytest.raises(InterruptedError):
        loop.train(
            cut, options(tmp_path / "cut", *more), batches=lambda *where: points(*where, cut_at=13)
        )
    assert checkpoint.latest_checkpoint(tmp_path / "cut").name == "checkpoint-0000010"
    progress = loop.train(resumed, options(tmp_path / "cut", *more), batches=points)
    assert progress.step == 20
    assert progress.samples == 160
    for weight, again in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(weight, again)  # the averaged weights
    for file in ("model", "optimizer", "average"):
        contents = [
            (tmp_path / run / "checkpoint-0000020" / f"{file}.safetensors").read_bytes()
            for run in ("whole", "cut")
        ]
        assert contents[0] == contents[1], file
    logs = [
        [(row["step"], row["loss"]) for row in csv.DictReader((tmp_path / run / "log.csv").open())]
        for run in ("whole", "cut")
    ]
    assert logs[0] == logs[1]
    assert [step for step, _ in logs[0]] == ["5", "10", "15", "20"]


def test_a_run_that_another_training_writes_is_left_alone(tmp_path):
    with (
        locked(tmp_path, AssertionError()),
        pytest.raises(ValueError, match=f"--run {tmp_path}: another training is writing there"),
    ):
        loop.train(Line(), options(tmp_path, "--steps", "3"), batches=points)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert loop.train(Line(), options(tmp_path, "--steps", "3"), batches=points).step == 3


def test_fresh_begins_anew(tmp_path):
    loop.train(Line(), options(tmp_path, "--steps", "3"), batches=points)
    assert loop.train(Line(), options(tmp_path, "--steps", "6"), batches=points).step == 6
    once_more = Line()
    progress = loop.train(once_more, options(tmp_path, "--steps", "2", "--fresh"), batches=points)
    assert progress.step == 2


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    def interrupted(start, reader, readers):
        for number, batch in enumerate(points(start, reader, readers), start=start):
            if number == 7:
                signal.raise_signal(signal.SIGINT)
            yield batch

    handler = signal.getsignal(signal.SIGINT)
    arguments = options(tmp_path, "--steps", "20")
    with pytest.raises(SystemExit, match="stopped at step 8; the same command goes on from there"):
        loop.train(Line(), arguments, batches=interrupted)
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint.latest_checkpoint(tmp_path).name == "checkpoint-0000008"
    assert loop.train(Line(), arguments, batches=points).step == 20


def test_a_checkpoint_runs_no_code_that_somebody_put_there(tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    monkeypatch.chdir(tmp_path)
    loop.train(Line(), options(tmp_path / "run", "--steps", "4"), batches=points)
    folder = checkpoint.latest_checkpoint(tmp_path / "run")
    files = {"model.safetensors", "optimizer.safetensors", "average.safetensors", "state.json"}
    assert {path.name for path in folder.iterdir()} == files
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl"):
        (folder / name).write_bytes(pickle.dumps(Payload()))
    loop.train(Line(), options(tmp_path / "run", "--steps", "5"), batches=points)
    folder = checkpoint.latest_checkpoint(tmp_path / "run")
    for name in files:
        (folder / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises(ValueError, match=r"-0000005 does not fit this model or is damaged \("):
            loop.train(Line(), options(tmp_path / "run", "--steps", "6"), batches=points)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("begun", "then", "refusal"),
    [
        ((), ("--batch-size", "4"), "--batch-size 8, not 4: keep it"),
        ((), ("--seed", "1"), "--seed 0, not 1: keep it"),
        ((), ("--ema-decay", "0.5"), "--ema-decay 0.999, not 0.5: keep it"),
        ((), ("--weight-decay", "0"), "--weight-decay 0.01, not 0.0: keep it"),
        ((), ("--from", "."), "--from None, not .: keep it"),
        (("--minutes", "1"), ("--minutes", "2", "--log-every", "1", "--output", "other"), None),
        ((), ("--checkpoint-every", "7", "--sample-every", "1"), None),
    ],
)
def test_a_run_goes_on_with_the_options_it_began_with(tmp_path, begun, then, refusal):
    """Even if nothing is left to do: its card would tell of options that it never had."""
    loop.train(Line(), options(tmp_path, "--steps", "2", *begun), batches=points)
    again = options(tmp_path, "--steps", "2", *then)
    if refusal is None:
        assert loop.train(Line(), again, batches=points).step == 2
        return
    with pytest.raises(ValueError, match=f"{tmp_path.name} was begun with {refusal}") as refused:
        loop.train(Line(), again, batches=points)
    assert len(str(refused.value).replace(str(tmp_path), "")) < 200


def test_the_card_tells_of_a_schedule_that_was_changed(tmp_path):
    for more in (("--steps", "2"), ("--steps", "4"), ("--steps", "4", "--learning-rate", "0.01")):
        arguments = options(tmp_path / "run", *more, "--output", str(tmp_path / "model"))
        progress = loop.train(Line(), arguments, batches=points)
    earlier = [{"until_step": 2, "steps": 2}, {"until_step": 4, "learning_rate": 0.05}]
    assert progress.earlier_options == earlier
    with export.exported(arguments, progress, {}, title="Line", what="A line."):
        pass
    card = (tmp_path / "model" / "README.md").read_text()
    assert '| until step 2 | `{"until_step": 2, "steps": 2}` |' in card
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["earlier_options"] == earlier
    assert [run["step"] for run in earlier_runs(tmp_path / "model")] == [4]


def test_shipped_folders_are_the_same_wherever_the_package_lies():
    shipped = LineOptions(output=Path("a"), start_from=ASSETS / "storybook" / "vae")
    assert shipped.as_json()["start_from"] == "assets/storybook/vae"
    assert shipped.as_json()["output"] == "a"


LOG = "step,samples,seconds,learning_rate,loss\r\n5,40,0.1,0.05,0.25\r\n10,80,0.2,0.05,0.125\r\n"


def test_a_row_that_was_cut_off_anywhere_is_left_out(tmp_path):
    path, header = tmp_path / "log.csv", LOG.index("\n") + 1
    for cut in range(len(LOG) + 1):
        path.write_bytes(LOG[:cut].encode())
        steps = [row["step"] for row in read_log(path)]
        assert steps == ["5", "10"][: LOG[header:cut].count("\n")], LOG[:cut]
    path.write_bytes(LOG.encode() + b"15,120,\0\0\0\0")
    assert len(read_log(path)) == 2
    loop.train(Line(), options(tmp_path, "--steps", "5"), batches=points)
    assert [row["step"] for row in read_log(path)] == ["5"]


@pytest.mark.parametrize(
    "row", ["15,120,\r\n", "15,,0.3,0.05,0.1\r\n", "1520,160,0.3,0.05,0.1,0.3\r\n", "1.5,8,1,1,1\n"]
)
def test_a_damaged_row_is_named_before_the_first_step(tmp_path, row):
    (tmp_path / "log.csv").write_text(LOG + row)
    with pytest.raises(ValueError, match=r"log.csv, line 4: expected are the numbers step, "):
        loop.train(Line(), options(tmp_path, "--steps", "5"), batches=points)
    assert (
        loop.train(Line(), options(tmp_path, "--steps", "5", "--fresh"), batches=points).step == 5
    )


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("log.csv", LOG + "1\n", "log.csv, line 4: expected are the numbers step"),
        ("log.csv", "a,b\n1,2\n", "log.csv, line 2: expected are the numbers step"),
        ("training.json", '{"step": 5', "training.json is no record of a training (JSONDecode"),
        ("training.json", '{"step": 5}', "training.json is no record of a training (KeyError"),
        ("training.json", "[" * 100_000, "training.json is no record of a training (Recursion"),
    ],
)
def test_what_the_card_will_need_is_read_before_the_first_step(
    tmp_path, capsys, file, content, message
):
    (tmp_path / file).write_text(content)
    with pytest.raises(SystemExit, match="2"):
        options(tmp_path / "run", "--from", str(tmp_path))
    assert message in capsys.readouterr().err


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    loop.train(Line(), options(tmp_path, "--steps", "4"), batches=points)

    def full(tensors, path):
        Path(path).write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"could not write .*checkpoint-0000006: .*before it stands"):
        loop.train(Line(), options(tmp_path, "--steps", "6"), batches=points)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-0000004"]


def test_a_half_written_checkpoint_is_not_taken(tmp_path):
    loop.train(Line(), options(tmp_path, "--steps", "4"), batches=points)
    (tmp_path / "checkpoint-0000009.partial").mkdir()
    assert checkpoint.latest_checkpoint(tmp_path).name == "checkpoint-0000004"
    loop.train(Line(), options(tmp_path, "--steps", "6"), batches=points)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-0000006"]


def test_a_checkpoint_of_another_shape_is_named(tmp_path):
    loop.train(Line(), options(tmp_path, "--steps", "2"), batches=points)
    other = Line()
    other.layer = nn.Linear(5, 1)
    with pytest.raises(ValueError, match=r"checkpoint-0000002 does not fit this model .*--fresh"):
        loop.train(other, options(tmp_path, "--steps", "4"), batches=points)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    def poisoned(start, reader, readers):
        yield from (torch.full((8, 3), value) for value in (1.0, 1.0, float("nan")))

    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        loop.train(Line(), options(tmp_path, "--steps", "5"), batches=poisoned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "must be more than 0"),
        (["--minutes", "-1"], "must be more than 0"),
        (["--minutes", "nan"], "must be more than 0"),
        (["--checkpoint-every", "0"], "--checkpoint-every: it must be 1 or more"),
        (["--output", __file__], "test_training_loop.py is a file, but should be a folder"),
        (["--from", "nowhere"], "--from nowhere: no such folder"),
        (["--minutes", "soon"], "invalid float value: 'soon'"),
        (["--mixed-precision", "fp8"], "invalid choice: 'fp8'"),
        (["--epochs", "3"], "there is no option --epochs; --help lists them"),
    ],
)
def test_options_that_cannot_work_exit_with_2(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        options(tmp_path, *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_options_become_a_typed_dataclass_and_a_new_default_keeps_its_help(tmp_path, capsys):
    arguments = ["--steps", "7", "--learning-rate", "2e-4", "--from", str(tmp_path), "--fresh"]
    assert options(tmp_path, *arguments) == LineOptions(
        steps=7,
        learning_rate=2e-4,
        start_from=tmp_path,
        fresh=True,
        run=tmp_path,
        mixed_precision="no",
    )
    with pytest.raises(SystemExit) as stop:
        options(tmp_path, "--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "python -m lrd_helpers.training.line" in text
    assert "Trains a line." in text
    assert "stop after this many minutes of training, resumes included (default: 1.0)" in text
    assert "--from FOLDER start from the weights" in text
    assert "_from" not in text


def test_the_learning_rate_is_a_trapezoid():
    rates = [
        loop.learning_rate_factor(step, step / 100, warmup=10, decay=0.5) for step in range(100)
    ]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert rates[75] == pytest.approx(0.5)
    assert loop.learning_rate_factor(100, 1.0, 10, 0.5) == 0


def write_half_of_the_new(folder):
    (folder / "weights").write_text("half of the new")
    raise OSError(28, "No space left on device")


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    with export.replacing_folder(folder) as partial:
        (partial / "weights").write_text("old")
    message = r"could not write .*model: .*No space left.*left as it was"
    with pytest.raises(OSError, match=message), export.replacing_folder(folder) as partial:
        write_half_of_the_new(partial)
    assert (folder / "weights").read_text() == "old"
    with export.replacing_folder(folder) as partial:
        (partial / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    link = tmp_path / "link"
    link.symlink_to("model")
    with export.replacing_folder(link) as partial:
        (partial / "weights").write_text("newer")
    assert link.is_symlink()
    assert (folder / "weights").read_text() == "newer"


def test_scores_measured_later_join_the_card(tmp_path):
    (tmp_path / "README.md").write_text(
        "# card\n\n| held-out score | |\n|---|---|\n| loss | 0.1 |\n"
    )
    (tmp_path / "training.json").write_text('{"step": 3, "scores": {"loss": 0.1}}')
    for accuracy in (0.5, 0.7):
        export.add_scores(tmp_path, {"accuracy": accuracy})
    assert json.loads((tmp_path / "training.json").read_text()) == {
        "step": 3,
        "scores": {"loss": 0.1, "accuracy": 0.7},
    }
    card = (tmp_path / "README.md").read_text()
    assert card.endswith("| loss | 0.1 |\n| accuracy | 0.7 |\n")
    assert "0.5" not in card


def test_minutes_are_a_budget_too(tmp_path):
    progress = loop.train(Line(), options(tmp_path, "--minutes", "0.01"), batches=points)
    assert 0.6 < progress.seconds < 2
    assert progress.step > 20
