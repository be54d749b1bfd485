"""A process of its own that makes a cache, for `test_store.py`.

python writer.py fill FOLDER BYTES    make what is missing of eight shards; print which
python writer.py hang FOLDER BYTES    begin the first of four shards, and never end
python writer.py read FOLDER BYTES    read every record of four shards; print how many
python writer.py each FOLDER          fill FOLDER/N, dying at fault point N; for N = 1, 2, ...

Fault points are before and after every sync and rename, in the middle of every small file, and
after each record batch of a shard.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parent))
import test_store

from limbeck.teachers.shard import ShardWriter
from limbeck.teachers.store import Shards, Store


def fill(path: Path, size: int) -> list[int]:
    """Make all shards beside other processes; returns those that this one made."""
    count, made = test_store.COUNT * 2, []
    shards = Shards(path, test_store.FINGERPRINT, count)
    while missing := shards.missing():
        for index in missing:
            with shards.claim(index) as writer:
                if writer is None:
                    continue
                for number in test_store.samples(index):
                    writer.add(test_store.record(number, size))
                    time.sleep(0.002)  # so that the others come in between
                made.append(index)
        time.sleep(0.01)
    return made


def hang(path: Path, size: int) -> None:
    shards = Shards(path, test_store.FINGERPRINT, test_store.COUNT, {"columns": 30})
    with shards.claim(0) as writer:
        writer.add(test_store.record(0, size))
        print("writing", flush=True)
        time.sleep(600)


def read(path: Path) -> int:
    store = Store(path)
    for number in range(len(store)):
        wanted = test_store.record(number)
        assert store.get(wanted.id, wanted.tokens) == wanted
    return len(store)


def instrument(target: int | None) -> list[int]:
    """Die at a fault point; returns where they are counted."""
    count = [0]

    def point() -> None:
        count[0] += 1
        if count[0] == target:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner, name):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            point()
            result = real(*args, **kwargs)
            point()
            return result

        setattr(owner, name, wrapped)

    for name in ("fsync", "replace", "unlink"):
        around(os, name)
    around(ShardWriter, "_flush")
    write = Path.write_text

    def half_then_all(self, text, *args, **kwargs):
        write(self, text[: len(text) // 2], *args, **kwargs)
        point()
        return write(self, text, *args, **kwargs)

    Path.write_text = half_then_all
    return count


def each(path: Path) -> int:
    """Returns how many fault points there are."""
    number = 0
    while True:
        number += 1
        child = os.fork()
        if not child:
            instrument(number)
            test_store.fill(path / str(number), count=2)
            os._exit(0)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            return number - 1


if __name__ == "__main__":
    mode, folder = sys.argv[1], Path(sys.argv[2])
    pa.set_cpu_count(1)
    if mode == "fill":
        print(json.dumps(fill(folder, int(sys.argv[3]))))
    elif mode == "hang":
        hang(folder, int(sys.argv[3]))
    elif mode == "read":
        print(read(folder))
    else:
        folder.mkdir()
        print(each(folder))
