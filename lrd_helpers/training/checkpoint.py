"""Checkpoints: the whole state of a training in its run's folder, as safetensors and JSON.

Reading them runs no code that somebody put there, as unpickling would (`Accelerator.load_state`
unpickles in some of the versions that work here). The state of torch's global random numbers is
not kept: trainings draw from generators that (seed, step) make.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from lrd_helpers.files import write_atomically
from lrd_helpers.training.options import TrainingOptions
from lrd_helpers.training.progress import Progress


@dataclass
class State:
    """What a checkpoint keeps; `scaler` is half precision's (fp16), else None."""

    options: TrainingOptions
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: EMAModel
    progress: Progress
    scaler: Any = None

    def save(self) -> None:
        """Writes `checkpoint-STEP` beside the older one, then removes that: never a moment without.

        Raises:
            OSError: it could not be written whole; the one before it stands.
        """
        run = self.options.run
        final = run / f"checkpoint-{self.progress.step:07d}"
        partial = final.with_suffix(".partial")
        if final.exists():
            return
        for leftover in run.glob("checkpoint-*.partial"):
            shutil.rmtree(leftover)
        try:
            partial.mkdir(parents=True)
            self._write(partial)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"could not write {final}: {error}; the checkpoint before it stands"
            ) from error
        os.replace(partial, final)
        for older in run.glob("checkpoint-*"):
            if older != final:
                shutil.rmtree(older)

    def _write(self, folder: Path) -> None:
        save_model(self.model, str(folder / "model.safetensors"))
        moments = {
            f"{number}.{name}": tensor.contiguous()
            for number, tensors in self.optimizer.state_dict()["state"].items()
            for name, tensor in tensors.items()
        }
        save_file(moments, folder / "optimizer.safetensors")
        average = {
            str(n): weight.contiguous() for n, weight in enumerate(self.average.shadow_params)
        }
        save_file(average, folder / "average.safetensors")
        record = {
            "progress": asdict(self.progress),
            "options": self.options.as_json(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        write_atomically(folder / "state.json", (json.dumps(record, indent=1) + "\n").encode())

    def resume(self) -> Path | None:
        """Takes up the latest checkpoint of the run, if there is one, and returns its folder.

        Raises:
            ValueError: it was made with other options, does not fit the model, or is damaged.
        """
        folder = latest_checkpoint(self.options.run)
        if folder is None:
            return None
        try:
            record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            progress, options = Progress(**record["progress"]), dict(record["options"])
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise unusable(folder, error) from error
        self.options.check_resumed(options)
        try:
            self._read(folder)
            if self.scaler is not None:
                self.scaler.load_state_dict(record["scaler"])
        except (OSError, RuntimeError, ValueError, LookupError, SafetensorError) as error:
            raise unusable(folder, error) from error
        for name, value in asdict(progress).items():
            setattr(self.progress, name, value)
        self.average.optimization_step = progress.step
        if changed := self.options.changed_since(options):
            self.progress.earlier_options.append({"until_step": progress.step, **changed})
        return folder

    def _read(self, folder: Path) -> None:
        load_model(self.model, str(folder / "model.safetensors"))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(folder / "optimizer.safetensors").items():
            number, _, name = key.partition(".")
            moments.setdefault(int(number), {})[name] = tensor
        groups = self.optimizer.state_dict()["param_groups"]  # the options say what is in them
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        average = load_file(folder / "average.safetensors")
        for number, weight in enumerate(self.average.shadow_params):
            weight.copy_(average[str(number)])


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint: a folder gets its name only when it is complete."""
    complete = [path for path in run.glob("checkpoint-*") if path.suffix != ".partial"]
    return max(complete, default=None)


def unusable(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split("\n")[0].split())[:100]
    return ValueError(
        f"{folder} does not fit this model or is damaged ({reason}); "
        "--fresh begins anew, --run names another folder"
    )
