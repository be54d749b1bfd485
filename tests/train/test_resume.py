"""A run that was killed ends with the same weights as one that was not, bit for bit."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from limbeck.core.errors import CheckpointError, Interrupted, RecipeError
from limbeck.recipe.resolve import dump
from limbeck.recipe.run import run
from limbeck.train import checkpoint as checkpoints
from limbeck.train.checkpoint import broken, sorted_checkpoints
from limbeck.train.listeners import Interruption
from limbeck.train.loop import Step, Trainer

FAULTS = Path(__file__).with_name("faults.py")
RANDOM_KILLS = 30


def weights(out: Path) -> str:
    return hashlib.sha256((out / "student" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def recipe(make_recipe, tmp_path):
    """Accumulates, runs over several epochs, has dropout, saves every other step."""
    made = make_recipe({"steps": 5, "save_every": 2, "accumulate": 2, "batch_tokens": 400})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(made))
    return made, path


@pytest.fixture
def uninterrupted(recipe, tmp_path):
    run(recipe[0], tmp_path / "whole")
    return weights(tmp_path / "whole")


def faults(path: Path, out: Path, *how: str) -> str:
    command = [sys.executable, str(FAULTS), str(path), str(out), *how]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_sigkill_at_random_moments(recipe, uninterrupted, tmp_path):
    said = faults(recipe[1], tmp_path / "killed", "random", "0", str(RANDOM_KILLS))
    ended = said.split()
    assert ended
    assert set(ended) == {uninterrupted}


def test_sigkill_at_every_write_sync_and_rename(recipe, uninterrupted, tmp_path):
    lines = faults(recipe[1], tmp_path / "killed", "each").splitlines()
    assert len(lines) > 20
    for line in lines:
        number, found = line.split()
        assert found == uninterrupted, f"point {number}"


def test_metrics_hold_each_step_once_after_a_kill(recipe, tmp_path):
    out = tmp_path / "killed"
    faults(recipe[1], out, "random", "5", "6")
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 6))


def test_dropout_draws_the_same_after_a_resume(make_recipe, tmp_path, tokenizer, tiny_data):
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.3}
    made = make_recipe(
        {"steps": 6, "save_every": 2, "keep": 3},
        student={"config": {**config, "n_positions": 256}, "max_length": 256},
        compare="labels",
    )
    run(made, tmp_path / "whole")
    run(made, tmp_path / "again")
    for step in (4, 6):
        remove(tmp_path / "again" / "checkpoints" / f"step-{step}")
    run(made, tmp_path / "again", resume=True)
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over(recipe, uninterrupted, tmp_path, file, damage):
    out = tmp_path / "out"
    run(recipe[0], out)
    newest, before = sorted_checkpoints(out / "checkpoints")
    victim = newest / file
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "cut":
        victim.write_bytes(data[: len(data) // 2])
    else:
        victim.unlink()
    assert broken(newest)
    assert not broken(before)
    run(recipe[0], out, resume=True)
    assert weights(out) == uninterrupted
    assert not broken(newest)


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(recipe, uninterrupted, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "limbeck", "run", str(recipe[1]), "--out", str(out)]
    command += ["train.steps=4000", "train.save_every=4000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "a checkpoint was written" in errors.splitlines()[-1]
    assert "--resume" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    (only,) = sorted_checkpoints(out / "checkpoints")
    assert not broken(only)


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_do_not_take_the_place_of_new_ones(make_recipe, tmp_path, keep):
    made = make_recipe({"steps": 9, "save_every": 3, "keep": keep})
    folder = tmp_path / "out" / "checkpoints"
    run(made, tmp_path / "out")
    whole = weights(tmp_path / "out")
    for path in folder.iterdir():
        (path / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(Interrupted), asked_to_stop_at(4, signal.SIGINT):
        run(made, tmp_path / "out", resume=True)
    newest, *others = sorted_checkpoints(folder)
    assert newest.name == "step-4"
    assert not any(map(broken, (newest, *others)))
    run(made, tmp_path / "out", resume=True)
    assert weights(tmp_path / "out") == whole


def test_a_good_checkpoint_is_not_discarded_for_a_damaged_one(make_recipe, tmp_path):
    """Saved at other steps than before, the damaged one is never written again."""
    folder = tmp_path / "out" / "checkpoints"
    run(make_recipe({"steps": 8, "save_every": 2, "keep": 4}), tmp_path / "out")
    for step in (4, 6, 8):
        (folder / f"step-{step}" / "weights.safetensors").write_bytes(b"x")
    made = make_recipe({"steps": 8, "save_every": 5, "keep": 2})
    with pytest.raises(Interrupted), asked_to_stop_at(5, signal.SIGINT):
        run(made, tmp_path / "out", resume=True)
    assert [path.name for path in sorted_checkpoints(folder)] == ["step-5", "step-2"]


@contextmanager
def asked_to_stop_at(number, what):
    """A signal arrives while that step is computed."""
    step = Trainer.step

    def signalled(self):
        if self.state.step + 1 == number:
            os.kill(os.getpid(), what)
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", signalled)
        yield


@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_an_arms_last_step_stops_the_run(make_recipe, tmp_path, what):
    made = make_recipe({"steps": 3, "save_every": 2}, compare="labels")
    run(made, tmp_path / "whole")
    out = tmp_path / "out"
    written = pytest.raises(Interrupted, match="stopped at step 3, a checkpoint was written")
    with written, asked_to_stop_at(3, what):
        run(made, out)
    assert not (out / "control").exists()
    assert sorted_checkpoints(out / "checkpoints")[0].name == "step-3"
    assert run(made, out, resume=True).train.steps == 3
    assert weights(out) == weights(tmp_path / "whole")


def test_a_signal_behind_the_last_step_is_not_forgotten():
    interruption = Interruption(SimpleNamespace(any=bool), print, "go on")
    interruption.__enter__()
    interruption.on_step(Step(3, 3))
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="behind the last step"):
        interruption.__exit__(None, None, None)
    interruption.__exit__(ZeroDivisionError, None, None)  # what went wrong is told first


def test_a_second_run_in_the_same_folder_is_refused(recipe, tmp_path):
    run(recipe[0], tmp_path / "out")
    with pytest.raises(RecipeError, match="holds a run"):
        run(recipe[0], tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(RecipeError, match="not empty"):
        run(recipe[0], tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


def test_a_folder_that_another_process_uses_is_refused(recipe, tmp_path, held_elsewhere):
    run(recipe[0], tmp_path / "out")
    in_use = pytest.raises(RecipeError, match="in use by another run")
    with held_elsewhere(tmp_path / "out"), in_use:
        run(recipe[0], tmp_path / "out", resume=True)


def test_a_checkpoint_of_another_recipe_is_refused(recipe, make_recipe, tmp_path):
    run(recipe[0], tmp_path / "out")
    other = make_recipe({"steps": 5, "learning_rate": 0.5})
    with pytest.raises(RecipeError, match="another recipe"):
        run(other, tmp_path / "out", resume=True)


def test_a_full_disk_leaves_the_previous_checkpoint_whole(recipe, tmp_path, monkeypatch):
    real = checkpoints.save_file
    calls = iter(range(1000))

    def full(tensors, path):
        if next(calls) == 3:  # the optimizer of the second checkpoint
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step-4: [\d,]+ bytes needed, [\d,]+ free"):
        run(recipe[0], tmp_path / "out")
    (only,) = sorted_checkpoints(tmp_path / "out" / "checkpoints")
    assert only.name == "step-2"
    assert not broken(only)
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-2"]


def test_a_truly_full_disk(make_recipe, tmp_path, uninterrupted, recipe):
    probe = subprocess.run(["unshare", "-Urm", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("user namespaces are not allowed here, so no small disk can be made")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
mount -t tmpfs -o size=200k none {disk} || exit
{sys.executable} -m limbeck run {recipe[1]} --out {disk}/out 2>{tmp_path}/errors
echo $? >{tmp_path}/code
mount -o remount,size=50m {disk} &&
{sys.executable} -m limbeck run {recipe[1]} --out {disk}/out --resume &&
sha256sum {disk}/out/student/model.safetensors >{tmp_path}/sum
"""
    subprocess.run(["unshare", "-Urm", "sh", "-c", script], timeout=120, capture_output=True)
    errors = (tmp_path / "errors").read_text().splitlines()
    assert (tmp_path / "code").read_text().strip() == "1"
    assert "bytes needed" in errors[-1]
    assert "free" in errors[-1]
    assert "Traceback" not in "".join(errors)
    assert (tmp_path / "sum").read_text().split()[0] == uninterrupted


def test_only_the_newest_checkpoints_stay(make_recipe, tmp_path):
    run(make_recipe({"steps": 8, "save_every": 2, "keep": 3}), tmp_path / "out")
    names = [p.name for p in sorted_checkpoints(tmp_path / "out" / "checkpoints")]
    assert names == ["step-8", "step-6", "step-4"]


def test_nothing_in_a_checkpoint_is_a_pickle(recipe, tmp_path):
    run(recipe[0], tmp_path / "out")
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            assert not file.read_bytes().startswith((b"\x80", b"PK")), file


def test_interrupted_is_an_error_of_ours():
    assert issubclass(Interrupted, InterruptedError)
