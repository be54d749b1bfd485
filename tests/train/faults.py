"""Run a recipe again and again, killing it at a fault point or at random, until it is done.

    python faults.py RECIPE OUT each               die at fault point N, resume; for N = 1, 2, ...
    python faults.py RECIPE OUT random SEED COUNT  die COUNT times at random moments, beginning
                                                   anew where a run has ended, then finish

Imports are paid once: each attempt is a fork. Fault points are before and after every sync and
rename, and in the middle of every file that is written. `each` takes all points of the second
checkpoint and every eighth of the others, and prints a line `N SHA256` of the weights for each;
`random` prints `SHA256` for each run that ended.
"""

import hashlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401  # slow to import, so once for all forks
import matplotlib.figure  # noqa: F401

import limbeck.core.files
import limbeck.recipe.run
import limbeck.train.checkpoint
from limbeck.recipe.document import read
from limbeck.recipe.resolve import resolve

count = 0


def point(target: int | None) -> None:
    global count
    count += 1
    if count == target:
        os.kill(os.getpid(), signal.SIGKILL)


def instrument(target: int | None) -> None:
    """Put a fault point around every call that leaves a trace on the disk."""
    for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace")):
        real = getattr(owner, name)

        def wrapped(*args, real=real):
            point(target)
            result = real(*args)
            point(target)
            return result

        setattr(owner, name, wrapped)
    write = Path.write_text

    def half_then_all(self, text, *args, **kwargs):
        write(self, text[: len(text) // 2], *args, **kwargs)
        point(target)
        return write(self, text, *args, **kwargs)

    Path.write_text = half_then_all
    save = limbeck.train.checkpoint.save_file

    def save_half_then_all(tensors, path):
        save(tensors, path)
        with open(path, "r+b") as file:
            file.truncate(max(1, os.path.getsize(path) // 2))
        point(target)
        save(tensors, path)
        point(target)

    limbeck.train.checkpoint.save_file = save_half_then_all


def attempt(recipe: Path, out: Path, target: int | None = None, watch: bool = False) -> int:
    """Fork a run and wait for it; returns its wait status. It resumes where there is something."""
    child = start(recipe, out, target, watch)
    return os.waitpid(child, 0)[1]


def start(recipe: Path, out: Path, target: int | None = None, watch: bool = False) -> int:
    """Fork a run; returns the child's process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if watch:
            instrument(target)
        resume = (out / "recipe.yaml").exists()
        limbeck.recipe.run.run(resolve(read(recipe)), out, resume)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def points(recipe: Path, out: Path) -> tuple[int, range]:
    """How many fault points a run passes, and which of them lie in the second checkpoint."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        instrument(None)
        save, spans = limbeck.train.checkpoint.Checkpoints.save, []

        def counted(self):
            before = count
            save(self)
            spans.append((before + 1, count + 1))

        limbeck.train.checkpoint.Checkpoints.save = counted
        limbeck.recipe.run.run(resolve(read(recipe)), out, False)
        os.write(writer, f"{count} {spans[1][0]} {spans[1][1]}".encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    total, first, last = map(int, os.read(reader, 100).split())
    return total, range(first, last)


def each(recipe: Path, out: Path) -> None:
    total, save = points(recipe, out / "points")
    for number in range(1, total + 1):
        if number not in save and number % 8:
            continue
        place = out / str(number)
        if not os.WIFSIGNALED(attempt(recipe, place, number, watch=True)):
            sys.exit(f"point {number} was not reached")
        if attempt(recipe, place):
            sys.exit(f"the resume after point {number} failed")
        if left := [path.name for path in place.rglob(".*.tmp")]:
            sys.exit(f"point {number} left {left}")
        print(number, weights(place), flush=True)


def at_random(recipe: Path, out: Path, seed: int, times: int) -> None:
    draw = random.Random(seed)
    began = time.time()
    attempt(recipe, out.with_name(out.name + "-timing"))
    whole = time.time() - began
    killed = 0
    while killed < times:
        child = start(recipe, out)
        time.sleep(draw.random() * whole * 0.8)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
            continue
        if status:
            sys.exit(f"an attempt failed after {killed} kills")
        print(weights(out), flush=True)
        shutil.rmtree(out)
    if attempt(recipe, out):
        sys.exit("the last attempt failed")
    print(weights(out), flush=True)


def weights(out: Path) -> str:
    return hashlib.sha256((out / "student" / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    path, folder, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if mode == "each":
        each(path, folder)
    else:
        at_random(path, folder, int(sys.argv[4]), int(sys.argv[5]))
