"""Rounds on tiny models: a stand-in for `generate`, and rounds that are killed.

    python small.py RECIPE OUT KILLS POINTS

prints a hash of what rounds leave that nobody killed, of some that were killed KILLS times, and of
some that were killed once, at each of POINTS fault points that are spread evenly.

Imports are paid once: each attempt is a fork. Fault points are before and after every sync and
rename, with the real `generate`.
"""

import hashlib
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401  # slow to import, so once for all forks
import matplotlib.figure  # noqa: F401
import torch

from limbeck.campaigns.iterate import iterate
from limbeck.core.files import write_json, write_text
from limbeck.models.load import load_student
from limbeck.recipe.document import read
from limbeck.recipe.resolve import resolve
from limbeck.synth.rows import row_of, to_json
from limbeck.synth.step import Desk, through
from limbeck.teachers.local import LocalWriter

ROUNDS = 2
count = 0
target = None


def generate(document):
    """Stands for `recipe.generate.generate`: no record of answers, a price for them."""
    recipe = resolve(document)
    model = load_student(recipe.student, recipe.teachers, torch.device("cpu"), recipe.seed)
    desk = Desk(seed=recipe.seed, writer=lambda name: LocalWriter(model), reader=lambda n: model)
    rows = map(row_of, recipe.source.of.open(recipe.seed).training)
    made = list(through(recipe.source.steps, rows, desk))
    folder = Path(recipe.source.path)
    failures = [row for row in made if row.failure is not None]
    rows = [row for row in made if row.failure is None]
    for name, some in (("failed", failures), ("rows", rows)):
        text = "".join(json.dumps(to_json(row)) + "\n" for row in some)
        write_text(folder / f"{name}.jsonl", text)
    card = {"rows": len(rows), "failed": {"any": len(failures)}, "counts": dict(desk.counts)}
    write_json(folder / "card.json", card | {"usd": 0.25})


def point():
    """A moment at which a test may kill."""
    global count
    count += 1
    if count == target:
        os.kill(os.getpid(), signal.SIGKILL)


def instrument():
    """Put a fault point around every call that leaves a trace on the disk."""
    for name in ("fsync", "rename", "replace"):
        real = getattr(os, name)

        def wrapped(*args, real=real):
            point()
            result = real(*args)
            point()
            return result

        setattr(os, name, wrapped)


def start(recipe, out, at=None, counts=None):
    """Fork all rounds; returns the child's process id."""
    global target
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        target = at
        if at is not None or counts is not None:
            instrument()
        iterate(read(recipe), ROUNDS, out)
        if counts is not None:
            os.write(counts, str(count).encode())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child):
    return os.waitpid(child, 0)[1]


def finish(recipe, out):
    if wait(start(recipe, out)):
        sys.exit("it could not go on")
    print(told(out), flush=True)


def told(out):
    """A hash of the students of all rounds, and of the texts that they learnt from."""
    found = hashlib.sha256()
    for number in range(1, ROUNDS + 1):
        folder = out / f"round-{number}"
        found.update((folder / "student" / "model.safetensors").read_bytes())
        for line in (folder / "data" / "rows.jsonl").read_text().splitlines():
            row = json.loads(line)
            del row["source"]  # it names the folder of the student
            found.update(json.dumps(row).encode())
    return found.hexdigest()


def again_and_again(recipe, out, times, total):
    """Killed on the way, going on, and killed again not far from there."""
    draw = random.Random(0)
    for _ in range(times):
        at = draw.randint(1, total // (2 * times))
        if not os.WIFSIGNALED(wait(start(recipe, out, at))):
            sys.exit(f"point {at} was not reached")
    finish(recipe, out)


def main(recipe, out, kills, points):
    reader, writer = os.pipe()
    if wait(start(recipe, out / "whole", counts=writer)):
        sys.exit("it failed")
    total = int(os.read(reader, 100))
    print(told(out / "whole"), flush=True)
    again_and_again(recipe, out / "again", kills, total)
    for number in (1 + total * (2 * k + 1) // (2 * points) for k in range(points)):
        place = out / str(number)
        if not os.WIFSIGNALED(wait(start(recipe, place, number))):
            sys.exit(f"point {number} of {total} was not reached")
        finish(recipe, place)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
