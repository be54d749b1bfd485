"""A cache is whole or says what is not; writers may die, meet each other, and run out of room."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from limbeck.core.errors import CacheError, LimbeckError
from limbeck.teachers import shard as shards_module
from limbeck.teachers.shard import FLUSH_BYTES, id_hash
from limbeck.teachers.store import Record, Shards, Store, token_hash

WRITER = Path(__file__).with_name("writer.py")
FINGERPRINT = {"teacher": "abc", "k": 12, "temperature": 1.0, "seed": None}
COUNT = 4


def record(number, size=200):
    """A sample's record that no other sample has."""
    generator = np.random.default_rng(number)
    return Record(
        id=f"rows.jsonl:{number}",
        tokens=token_hash([number, 1, 2], [False, True, True]),
        rows=2,
        cells={"ids": generator.bytes(size), "counts": generator.bytes(number % 5)},
    )


def samples(index):
    return range(index * 6, index * 6 + 6)


def fill(path, shards=None, count=COUNT):
    """Make what is missing; returns which shards were made."""
    shards = shards or Shards(path, FINGERPRINT, count, {"columns": 30})
    made = shards.missing()
    for index in made:
        with shards.claim(index) as writer:
            for number in samples(index):
                writer.add(record(number))
    return made


def check(path, count=COUNT, **how):
    """Every record is as it was written."""
    store = Store(path, **how)
    for number in reversed(range(count * 6)):
        wanted = record(number)
        assert store.get(wanted.id, wanted.tokens) == wanted
    return store


def content(path):
    """Bytes by name of all files, locks and manifests' times aside."""
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


def left_aside(path):
    return [file.name for file in Path(path).iterdir() if file.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished cache, not to be changed."""
    path = tmp_path_factory.mktemp("cache") / "whole"
    fill(path)
    return path


@pytest.fixture
def cache(whole, tmp_path):
    """A finished cache to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def test_every_record_is_found_in_any_order(whole):
    store = check(whole)
    assert len(store) == COUNT * 6
    assert store.rows == COUNT * 12
    assert store.size_bytes == sum(file.stat().st_size for file in whole.iterdir())
    assert store.fingerprint == FINGERPRINT
    assert store.extra == {"columns": 30}
    assert not left_aside(whole)


def test_a_finished_cache_has_nothing_left_to_make(whole):
    shards = Shards(whole, FINGERPRINT, COUNT)
    assert shards.missing() == []
    assert shards.extra == {"columns": 30}  # of who came first
    with shards.claim(2) as writer:
        assert writer is None


def test_records_may_have_different_cells_and_be_large(tmp_path):
    large = Record("a", b"t" * 16, 3, {"floats": os.urandom(FLUSH_BYTES + 1)})
    records = [
        large,
        Record("b", b"t" * 16, 0, {}),
        Record("c", b"u" * 16, 1, {"x": b"", "y": b"1"}),
    ]
    shards = Shards(tmp_path / "cache", {}, 1)
    with shards.claim(0) as writer:
        for one in records:
            writer.add(one)
    store = Store(tmp_path / "cache")
    assert [store.get(one.id, one.tokens) for one in records] == records


def test_an_empty_shard_is_a_shard(tmp_path):
    shards = Shards(tmp_path, FINGERPRINT, 1)
    with shards.claim(0):
        pass
    assert shards.missing() == []
    assert len(Store(tmp_path, verify=True)) == 0


def test_token_hash_tells_ids_learnt_marks_and_lengths_apart():
    known = [
        token_hash(ids, learn)
        for ids, learn in (
            ([1, 2], [False, True]),
            ([1, 2], [True, True]),
            ([1, 3], [False, True]),
            ([2, 1], [False, True]),
            ([1, 2, 0], [False, True, False]),
            ([], []),
        )
    ]
    assert len(set(known)) == len(known)
    assert all(len(one) == 16 for one in known)
    assert token_hash(np.array([1, 2]), np.array([False, True])) == known[0]


def test_an_unknown_sample_and_changed_tokens_are_told_apart(whole):
    store = Store(whole)
    with pytest.raises(
        CacheError, match=r"sample new is not in the cache: run limbeck cache RECIPE"
    ):
        store.get("new", b"t" * 16)
    with pytest.raises(CacheError, match=r"sample rows\.jsonl:3 had other tokens"):
        store.get("rows.jsonl:3", b"t" * 16)


def test_ids_whose_hashes_meet_are_told_apart(tmp_path, monkeypatch):
    from limbeck.teachers import store as store_module

    for module in (shards_module, store_module):
        monkeypatch.setattr(module, "id_hash", lambda name: 2**64 - 1 - (id_hash(name) & 1))
    fill(tmp_path / "cache")
    check(tmp_path / "cache")
    with pytest.raises(CacheError, match="sample new is not in"):
        Store(tmp_path / "cache").get("new", b"t" * 16)


def test_one_id_with_two_sets_of_tokens_is_two_records(tmp_path):
    twins = [Record("a", bytes([mark]) * 16, 1, {"x": bytes([mark])}) for mark in (1, 2)]
    with Shards(tmp_path, {}, 1).claim(0) as writer:
        for one in twins:
            writer.add(one)
    assert [Store(tmp_path).get("a", one.tokens) for one in twins] == twins


def test_a_cache_in_the_making_says_so(tmp_path):
    with pytest.raises(
        CacheError, match=r"holds no cache: make it first with limbeck cache RECIPE"
    ):
        Store(tmp_path / "none")
    shards = Shards(tmp_path, FINGERPRINT, COUNT)
    with shards.claim(1) as writer:
        writer.add(record(6))
    assert shards.missing() == [0, 2, 3]
    store = Store(tmp_path)
    assert store.get(record(6).id, record(6).tokens) == record(6)
    with pytest.raises(CacheError, match="3 shards are not made yet"):
        store.get("rows.jsonl:0", b"t" * 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 50}, r"k was 12 when it was made and is 50 now"),
        ({"teacher": "xyz", "k": 50}, r"teacher was 'abc' when it was made and is 'xyz' now"),
        ({"seed": 1}, r"seed was None .* is 1 now"),
        ({"dtype": "float16"}, r"dtype was None .* is 'float16' now"),
    ],
)
def test_a_cache_of_something_else_is_refused(cache, change, message):
    before = content(cache)
    with pytest.raises(CacheError, match=message):
        Shards(cache, {**FINGERPRINT, **change}, COUNT)
    left = {field: value for field, value in FINGERPRINT.items() if field != "k"}
    with pytest.raises(CacheError, match="k was 12 when"):
        Shards(cache, left, COUNT)
    with pytest.raises(CacheError, match="shards was 4 when it was made and is 5 now"):
        Shards(cache, FINGERPRINT, 5)
    after = content(cache)
    after.pop(".manifest.lock", None)
    before.pop(".manifest.lock", None)
    assert after == before


def test_a_cache_of_another_format_is_refused(cache):
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(CacheError, match="format 2 is not 1"):
        Store(cache)
    with pytest.raises(CacheError, match="format 2 is not 1"):
        Shards(cache, FINGERPRINT, COUNT)


def test_shards_of_another_cache_are_not_taken_over(cache):
    """Whoever removes a manifest to get rid of an error must not mix two teachers."""
    (cache / "manifest.json").unlink()
    shards = Shards(cache, {**FINGERPRINT, "teacher": "xyz"}, COUNT)
    assert shards.missing() == list(range(COUNT))
    with pytest.raises(CacheError, match="made for a cache of another fingerprint"):
        Store(cache, verify=True)


def mutate(draw, cache):
    """Damage one file in one way; returns its name."""
    names = sorted(file.name for file in cache.iterdir() if file.suffix in (".arrow", ".json"))
    victim = cache / draw.choice(names)
    data = bytearray(victim.read_bytes())
    how = draw.choice(["cut", "flip", "swap", "empty", "remove", "zero", "grow"])
    if how == "cut":
        victim.write_bytes(data[: draw.integers(0, len(data))])
    elif how == "flip":
        data[draw.integers(0, len(data))] ^= 1 << int(draw.integers(0, 8))
        victim.write_bytes(data)
    elif how == "swap":
        if victim.name == "manifest.json":
            other = cache / "shard-00000.json"
        else:
            same = [n for n in names if n.endswith(victim.suffix) and n.startswith("shard")]
            other = cache / draw.choice([n for n in same if n != victim.name])
        victim.write_bytes(other.read_bytes())
    elif how == "empty":
        victim.write_bytes(b"")
    elif how == "remove":
        victim.unlink()
    elif how == "zero":
        first = int(draw.integers(0, len(data)))
        span = data[first : first + 50]
        data[first : first + 50] = bytes(255 - byte for byte in span)
        victim.write_bytes(data)
    else:
        victim.write_bytes(data + b"\0")
    return victim.name


@pytest.mark.parametrize("seed", range(120))
def test_damage_is_found_before_use_named_and_only_that_shard_made_again(whole, tmp_path, seed):
    cache = Path(shutil.copytree(whole, tmp_path / "cache"))
    victim = mutate(np.random.default_rng(seed), cache)
    if victim != "manifest.json":
        with pytest.raises(CacheError) as caught:
            check(cache)
        text = str(caught.value)
        absent = not (cache / victim).exists() and victim.endswith(".json")
        assert "1 shards are not made yet" in text if absent else victim in text
        assert "limbeck cache RECIPE" in text
        if not absent:
            with pytest.raises(CacheError, match=victim):
                Store(cache, verify=True)
    elif not (cache / victim).exists():
        with pytest.raises(CacheError, match="holds no cache"):
            Store(cache)
    else:
        for opening in (lambda: Store(cache), lambda: Shards(cache, FINGERPRINT, COUNT)):
            with pytest.raises(CacheError, match=r"manifest\.json"):
                opening()
        (cache / victim).unlink()  # as the error says
    made = fill(cache)
    assert made == ([] if victim == "manifest.json" else [int(victim[6:11])])
    check(cache, verify=True)


def test_an_exception_leaves_nothing_and_is_not_disguised(tmp_path):
    shards = Shards(tmp_path, FINGERPRINT, COUNT)

    def fail(error):
        with shards.claim(0) as writer:
            writer.add(record(0))
            raise error

    for error in (FileNotFoundError("mine"), KeyboardInterrupt(), ZeroDivisionError()):
        with pytest.raises(type(error)) as caught:
            fail(error)
        assert caught.value is error
        assert not isinstance(error, LimbeckError)
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == [
        "manifest.json"
    ]
    fill(tmp_path)
    check(tmp_path)


def test_a_shard_that_another_holds_is_not_given(tmp_path):
    mine, theirs = (Shards(tmp_path, FINGERPRINT, COUNT) for _ in range(2))
    with mine.claim(0) as writer:
        with theirs.claim(0) as second:
            assert second is None
        with theirs.claim(1) as second:
            assert second is not None
        writer.add(record(0))
    assert mine.missing() == theirs.missing() == [2, 3]


def test_what_was_verified_is_verified_again_when_it_changes(cache):
    shards = Shards(cache, FINGERPRINT, COUNT)
    assert shards.missing() == []
    (cache / "shard-00001.arrow").write_bytes(b"")
    assert shards.missing() == [1]


def test_a_fault_while_writing_says_what_to_do(tmp_path, monkeypatch):
    shards = Shards(tmp_path, FINGERPRINT, COUNT)
    with shards.claim(0) as writer:
        for number in samples(0):
            writer.add(record(number))
    for owner, name in ((shards_module, "sync"), (os, "replace"), (shards_module, "write_text")):

        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(CacheError, match=r"[\d,]+ bytes needed, [\d,]+ free .*No space"):
                fill(tmp_path, shards)
        assert not left_aside(tmp_path)
        assert shards.missing() == [1, 2, 3]
    assert fill(tmp_path, shards) == [1, 2, 3]
    check(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot write"):
        Shards(tmp_path / "file" / "cache", FINGERPRINT, COUNT)


def test_a_truly_full_disk(tmp_path):
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("user namespaces are not allowed here, so no small disk can be made")
    disk = tmp_path / "disk"
    disk.mkdir()
    run = f"{sys.executable} {WRITER} fill {disk}/cache 40000"
    script = f"""
mount -t tmpfs -o size=1m none {disk} || exit
{run} 2>{tmp_path}/errors
ls -a {disk}/cache >{tmp_path}/left
mount -o remount,size=50m {disk} && {run} >{tmp_path}/made && cp -r {disk}/cache {tmp_path}/saved
"""
    subprocess.run(["unshare", "-Urm", "sh", "-c", script], timeout=120, capture_output=True)
    error = (tmp_path / "errors").read_text().splitlines()[-1]
    assert error.startswith("limbeck.core.errors.CacheError: cannot write")
    assert "bytes needed" in error
    left = (tmp_path / "left").read_text().split()
    assert not [name for name in left if name.endswith(".tmp")]
    finished = [name for name in left if name.endswith(".json") and name != "manifest.json"]
    assert 0 < len(finished) < COUNT * 2
    made = json.loads((tmp_path / "made").read_text())
    assert len(made) == COUNT * 2 - len(finished)
    assert len(Store(tmp_path / "saved", verify=True)) == COUNT * 2 * 6


def start(*words, **how):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WRITER), *map(str, words)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, **how)


def test_several_processes_write_one_cache(tmp_path):
    writers = [start("fill", tmp_path / "cache", 200) for _ in range(3)]
    made = [json.loads(writer.communicate(timeout=60)[0]) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert sorted(sum(made, [])) == list(range(COUNT * 2))  # each by one of them
    assert len(Store(tmp_path / "cache", verify=True)) == COUNT * 2 * 6
    assert not left_aside(tmp_path / "cache")


@pytest.mark.slow
def test_sigkill_at_every_write_sync_and_rename(tmp_path):
    """Resumed, the cache is the same bytes as one that was never interrupted."""
    fill(tmp_path / "whole", count=2)
    wanted = content(tmp_path / "whole")
    done = subprocess.run(
        [sys.executable, str(WRITER), "each", str(tmp_path / "killed")],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    points = int(done.stdout)
    assert points > 30
    for number in range(1, points + 1):
        path = tmp_path / "killed" / str(number)
        fill(path, count=2)
        check(path, count=2)
        assert not left_aside(path), number
        found = content(path)
        assert {k: v for k, v in found.items() if not k.endswith(".lock")} == {
            k: v for k, v in wanted.items() if not k.endswith(".lock")
        }, number


def test_sigkill_in_the_middle_of_a_shard_frees_it_for_others(tmp_path):
    writer = start("hang", tmp_path / "cache", 200)
    assert writer.stdout.readline() == "writing\n"
    shards = Shards(tmp_path / "cache", FINGERPRINT, COUNT)
    with shards.claim(0) as mine:
        assert mine is None
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate(timeout=60)
    assert left_aside(tmp_path / "cache")
    fill(tmp_path / "cache", shards)
    check(tmp_path / "cache")
    assert not left_aside(tmp_path / "cache")


def test_many_threads_read_one_store(whole):
    store = Store(whole)
    barrier = threading.Barrier(4)

    def read(seed):
        barrier.wait()
        for number in np.random.default_rng(seed).integers(0, COUNT * 6, 200):
            wanted = record(int(number))
            assert store.get(wanted.id, wanted.tokens) == wanted
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


def test_reading_holds_no_file_open(tmp_path):
    """A large cache has more shards than a process may hold files."""
    fill(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    store = check(tmp_path)
    assert len(store.tables) == COUNT
    assert len(os.listdir("/proc/self/fd")) == before


def test_readers_in_several_processes(whole):
    readers = [start("read", whole, 200) for _ in range(2)]
    assert [json.loads(one.communicate(timeout=60)[0]) for one in readers] == [COUNT * 6] * 2


def test_a_shard_is_read_only_when_it_is_needed(cache):
    (cache / "shard-00003.arrow").write_bytes(b"")
    store = Store(cache)
    assert store.get(record(0).id, record(0).tokens) == record(0)
    with pytest.raises(CacheError, match=r"shard-00003\.arrow is damaged"):
        store.get(record(20).id, record(20).tokens)
