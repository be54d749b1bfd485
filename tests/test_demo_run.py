"""The demo watches its runs: what stops it stops them once, and one that falls is named."""

import os
import signal
import subprocess
import sys
import time

import pytest

from limbeck import demo_run
from limbeck.core.errors import Interrupted, LimbeckError, RecipeError

RUN = """
import signal, sys, time
count = 0
def hears(number, frame):
    global count
    count += 1
    with open(sys.argv[1] + "/heard", "a") as file:
        file.write(signal.Signals(number).name + "\\n")
    if count > 1:
        sys.exit(1)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, hears)
open(sys.argv[1] + "/ready", "w").close()
while not count:
    time.sleep(0.02)
time.sleep(0.3)  # in which a second signal would come
sys.exit(130)
"""

DEMO = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
from pathlib import Path
from limbeck import cli, demo_run
real = subprocess.Popen
def run_of_ours(shown, **settings):
    folder = shown[shown.index("--out") + 1]
    return real([sys.executable, "-c", Path(sys.argv[2]).read_text(), folder], **settings)
demo_run.subprocess.Popen = run_of_ours
demo_run.TRAIN_ROWS = demo_run.TEST_ROWS = demo_run.UNSEEN_ROWS = 5
cli.main(["demo", "--out", sys.argv[1], "--seeds", "2"])
"""


@pytest.fixture
def folders(tmp_path):
    made = [tmp_path / "demo", tmp_path / "demo-seed-1"]
    for folder in made:
        folder.mkdir()
    return made


@pytest.fixture
def runs_are(monkeypatch):
    """Stands other code in for the runs: (of the first, of the others)."""

    def make(*codes):
        real = subprocess.Popen

        def start(shown, **settings):
            first = shown[-1] == "seed=0"
            return real([sys.executable, "-c", codes[not first]], **settings)

        monkeypatch.setattr(demo_run.subprocess, "Popen", start)

    return make


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_stops_the_demo_reaches_each_run_once(tmp_path, number):
    """A terminal's Ctrl-C goes to a whole group of processes."""
    (tmp_path / "run.py").write_text(RUN)
    out, other = tmp_path / "demo", tmp_path / "demo-seed-1"
    command = [sys.executable, "-c", DEMO, str(out), str(tmp_path / "run.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as demo:
        try:
            patience = time.monotonic() + 60
            while not all((folder / "ready").exists() for folder in (out, other)):
                assert time.monotonic() < patience
                time.sleep(0.05)
            os.killpg(demo.pid, number)
            _, said = demo.communicate(timeout=60)
        finally:
            demo.kill()  # or it would be waited for
    assert demo.returncode == 130
    assert said.splitlines()[-1] == "the demo was stopped; the same command goes on"
    for folder in (out, other):
        assert (folder / "heard").read_text() == "SIGTERM\n"


@pytest.mark.parametrize(
    ("falls", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"a signal \(Killed\)"),
        ("import sys; print('out of luck'); sys.exit(2)", "failed: out of luck"),
        ("import sys; sys.exit(130)", "failed: no message"),
    ],
)
def test_a_run_that_falls_is_named_and_stops_the_others(folders, runs_are, tmp_path, falls, said):
    runs_are("import time; time.sleep(60)", falls)
    began = time.monotonic()
    with pytest.raises(LimbeckError, match=f"run in {folders[1]} .*{said}"):
        demo_run._run_all(tmp_path / "recipe.yaml", folders)
    assert time.monotonic() - began < 50


def test_ctrl_c_is_an_interruption(folders, runs_are, monkeypatch, tmp_path):
    def stops(*_):
        raise KeyboardInterrupt

    runs_are("import time; time.sleep(60)", "")
    monkeypatch.setattr(demo_run, "_watch", stops)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="the same command goes on"):
        demo_run._run_all(tmp_path / "recipe.yaml", folders)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_place_that_is_not_free(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="is a file, not a folder"):
        demo_run.run_demo(tmp_path / "file", 2)
    with pytest.raises(RecipeError, match="holds no demo"):
        demo_run.run_demo(tmp_path, 2)


def test_the_folder_one_is_in_has_a_name(tmp_path, monkeypatch):
    given = []
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    monkeypatch.setattr(demo_run, "_run_all", lambda recipe, folders: given.extend(folders))
    monkeypatch.setattr(demo_run, "TRAIN_ROWS", 5)
    with pytest.raises(FileNotFoundError):  # no run has left a report
        demo_run.run_demo(demo_run.Path(), 2)
    assert given == [demo_run.Path(), tmp_path / "inside-seed-1"]
