"""A reader sees the old file or the new one; an error leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys

import pytest

from limbeck.core.files import discard, held, new_folder, sweep, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "inner" / "a.txt"
    write_text(path, "old")
    write_text(path, "nëw")
    assert path.read_text(encoding="utf-8") == "nëw"
    assert names(path.parent) == ["a.txt"]


def test_what_cannot_be_written_leaves_the_old_text(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_folder_appears_when_it_is_full(tmp_path):
    path = tmp_path / "folder"
    with new_folder(path) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "a").write_text("1")
        assert not path.exists()
    assert (path / "inner" / "a").read_text() == "1"
    with new_folder(path) as aside:
        (aside / "b").write_text("2")
    assert names(path) == ["b"]
    assert names(tmp_path) == ["folder"]


def test_a_folder_that_fails_is_not_there(tmp_path):
    path = tmp_path / "folder"

    def fail():
        with new_folder(path) as aside:
            (aside / "a").write_text("1")
            raise KeyError("half way")

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path) == []


def test_sweep_takes_only_what_was_left_aside(tmp_path):
    (tmp_path / ".a.1.tmp").write_text("x")
    (tmp_path / ".b.1.old.tmp").mkdir()
    (tmp_path / ".b.1.old.tmp" / "c").write_text("x")
    (tmp_path / ".lock").write_text("")
    (tmp_path / "d.tmp").write_text("mine")
    sweep(tmp_path)
    assert names(tmp_path) == [".lock", "d.tmp"]
    (tmp_path / "e").mkdir()
    discard(tmp_path / "e")
    assert names(tmp_path) == [".lock", "d.tmp"]


def test_a_folder_is_held_by_one_at_a_time(tmp_path, held_elsewhere):
    (tmp_path / "link").symlink_to(tmp_path)
    with held(tmp_path) as mine:
        assert mine
        with held(tmp_path / "link") as again:
            assert not again
    with held_elsewhere(tmp_path), held(tmp_path) as mine:
        assert not mine
    with held(tmp_path) as mine:
        assert mine


KILLED = """
import os, signal, sys, time
from pathlib import Path
from limbeck.core.files import held
with held(Path(sys.argv[1])) as mine:
    child = os.fork()
    if child:
        print(mine, child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""


def test_what_a_killed_process_leaves_running_does_not_hold_it(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        mine, child = process.stdout.readline().split()
        assert mine == "True"
        assert process.wait() == -signal.SIGKILL
        with held(tmp_path) as free:
            assert free
        os.kill(int(child), signal.SIGKILL)
