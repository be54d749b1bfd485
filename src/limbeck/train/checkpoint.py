"""Checkpoints: safetensors and JSON only, written aside, synced, renamed and checksummed.

    checkpoints/step-200/
      weights.safetensors     trained parameters (and a projector's), whole, under their names
      optimizer.safetensors   AdamW's moments, under PARAMETER/exp_avg and so on
      carried.safetensors     what else changes with the steps, where something does: a teacher
                              that follows the student, a critic; under NAME/its own names
      state.json              step, batches, counters
      manifest.json           size and SHA-256 of each of the above

Tensors are stored whole, so a run may resume on another number of processes.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.errors import CheckpointError, RecipeError
from limbeck.core.files import discard, file_sha256, new_folder, sweep
from limbeck.core.text import one_line
from limbeck.train.loop import State, Step, Trainer
from limbeck.train.mesh import place, whole
from limbeck.train.optim import LossScale

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Checkpoints:
    """Saves a trainer every so many steps and brings it back. A listener.

    Args:
        folder: where the `step-N` folders go.
        recipe: hash of what decides the training; a checkpoint of another one is refused.
        every: steps between checkpoints; the last step is always saved.
        keep: how many stay.
    """

    def __init__(self, folder: Path, *, recipe: str, every: int, keep: int) -> None:
        self.folder, self.recipe, self.every, self.keep = folder, recipe, every, keep
        self.trainer: Trainer | None = None
        self.damaged: list[Path] = []  # found by `resume`

    def on_step(self, step: Step) -> None:
        """Save where it is due."""
        assert self.trainer is not None
        stopping = self.trainer.state.bad_in_a_row >= self.trainer.patience
        if step.number % self.every == 0 or step.number == step.last or stopping:
            self.save()

    def save(self) -> Path:
        """Write the trainer's state and drop the oldest checkpoints.

        All processes must call; the first one writes.

        Raises:
            CheckpointError: the disk is full or refuses; earlier checkpoints are untouched.
        """
        trainer = self.trainer
        assert trainer is not None
        main = trainer.mesh.main
        weights = _gather(trainer.named_parameters(), main)
        moments = _gather(_named_moments(trainer), main)
        carried = _gather(_named_carried(trainer), main)
        path = self.folder / f"step-{trainer.state.step}"
        if main and broken(path):  # a whole one may be there: a Ctrl-C right after it
            record = {
                "recipe": self.recipe,
                "state": asdict(trainer.state),
                "batches": trainer.preparation.state_dict(),
            }
            # They would count among the newest, and a good one would have to go.
            for old in filter(Path.exists, self.damaged):
                discard(old)
            self.damaged = []
            files = {"weights": weights, "optimizer": moments}
            self._write(path, files | ({"carried": carried} if carried else {}), record)
            for old in sorted_checkpoints(self.folder)[self.keep :]:
                discard(old)
        trainer.mesh.barrier()
        return path

    def _write(self, path: Path, parts: Mapping[str, dict[str, Tensor]], record: Any) -> None:
        needed = sum(t.nbytes for part in parts.values() for t in part.values())
        try:
            with new_folder(path) as aside:
                for name, tensors in parts.items():
                    save_file(tensors, aside / f"{name}.safetensors")
                (aside / "state.json").write_text(json.dumps(record))
                files = {f.name: _fingerprint(f) for f in sorted(aside.iterdir())}
                (aside / MANIFEST).write_text(json.dumps(files, indent=2))
        except (OSError, SafetensorError) as error:
            free = shutil.disk_usage(self.folder).free
            raise CheckpointError(
                f"cannot write {path}: {needed:,} bytes needed, {free:,} free"
                f" ({one_line(error, 120)}); earlier checkpoints are whole:"
                " make room and run again with --resume"
            ) from error

    def resume(self) -> int:
        """Load the newest checkpoint that verifies into the trainer; returns its step, 0 if none.

        Raises:
            RecipeError: the checkpoint was made by another recipe.
        """
        trainer = self.trainer
        assert trainer is not None
        if trainer.mesh.main:
            sweep(self.folder)
        trainer.mesh.barrier()
        for path in sorted_checkpoints(self.folder):
            if reason := broken(path):
                log.warning("%s is damaged (%s); trying the one before", path.name, reason)
                self.damaged.append(path)
                continue
            record = json.loads((path / "state.json").read_text())
            if record["recipe"] != self.recipe:
                raise RecipeError(
                    "--out",
                    f"{path} was made by another recipe; give another folder, or the recipe that"
                    " is in this one",
                )
            self._restore(trainer, path, record)
            return trainer.state.step
        return 0

    def _restore(self, trainer: Trainer, path: Path, record: Mapping[str, Any]) -> None:
        weights = load_file(path / "weights.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        with torch.no_grad():
            for name, parameter in trainer.named_parameters():
                parameter.copy_(place(weights[name], parameter))
                if f"{name}/step" in moments:
                    trainer.optimizer.state[parameter] = {
                        "step": moments[f"{name}/step"].to(parameter.device),
                        "exp_avg": place(moments[f"{name}/exp_avg"], parameter),
                        "exp_avg_sq": place(moments[f"{name}/exp_avg_sq"], parameter),
                    }
        if carried := dict(_named_carried(trainer)):
            kept = load_file(path / "carried.safetensors")
            with torch.no_grad():
                for name, value in carried.items():
                    value.copy_(place(kept[name], value))
        state = dict(record["state"])
        trainer.state = State(**{**state, "scale": LossScale(**state["scale"])})
        trainer.preparation.load_state_dict(record["batches"])


def _named_moments(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in trainer.named_parameters():
        for moment in MOMENTS:
            if moment in trainer.optimizer.state.get(parameter, {}):
                yield f"{name}/{moment}", trainer.optimizer.state[parameter][moment]


def _named_carried(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    for name, carried in trainer.carried.items():
        yield from ((f"{name}/{key}", value) for key, value in carried.tensors())


def _gather(named: Iterator[tuple[str, Tensor]], main: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the first process; one at a time, so none else holds them."""
    gathered: dict[str, Tensor] = {}
    for name, value in named:
        full = whole(value)
        if main:
            gathered[name] = full
    return gathered


def sorted_checkpoints(folder: Path) -> list[Path]:
    """The `step-N` folders, newest first."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def broken(path: Path) -> str | None:
    """Why a checkpoint does not verify, or None where every file is as the manifest says."""
    try:
        files = json.loads((path / MANIFEST).read_text())
        for name, expected in files.items():
            if os.sep in name or _fingerprint(path / name) != expected:
                return f"{name} is not what was written"
        missing = {"weights.safetensors", "optimizer.safetensors", "state.json"} - set(files)
        return f"{min(missing)} is missing" if missing else None
    except (OSError, ValueError, AttributeError) as error:
        return one_line(error)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
