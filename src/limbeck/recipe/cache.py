"""`limbeck cache RECIPE`, and how a run opens a cache, or refuses one of something else."""

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from limbeck.core.errors import DataError, Interrupted
from limbeck.core.specs import CachedTeacher
from limbeck.core.types import Encoding, Sample
from limbeck.models.causal import CausalModel
from limbeck.models.encode import Encoder
from limbeck.models.load import load_teacher
from limbeck.recipe.check import Facts, check
from limbeck.recipe.document import Document
from limbeck.recipe.schema import Recipe
from limbeck.teachers.cache import CacheReader
from limbeck.teachers.display import FillDisplay
from limbeck.teachers.fill import SHARD_SAMPLES, Filling, dropped
from limbeck.teachers.identity import difference, fingerprint, stamps, weight_files, weights_sha256
from limbeck.teachers.keep import keeper
from limbeck.teachers.remains import describe, head_bytes, sha256, whole, write_remains
from limbeck.teachers.store import MANIFEST, Shards, Store
from limbeck.train.mesh import Mesh

MAKE = "limbeck cache RECIPE"


@dataclass(frozen=True)
class Made:
    """A cache that is whole; `seconds` is what this command took for it.

    `rows` are learnt tokens, `dropped` those of them on which the teacher's logits were not
    numbers, `bytes` all shards together.
    """

    name: str
    path: str
    samples: int
    rows: int
    dropped: int
    bytes: int
    seconds: float

    def render(self) -> str:
        """One line for people."""
        each = f"{self.bytes / self.rows:,.1f} bytes a token" if self.rows else "nothing learnt"
        return (
            f"{self.path}: teacher {self.name}, {self.samples:,} samples, {self.rows:,} tokens,"
            f" {self.bytes:,} bytes ({each}), {self.dropped:,} dropped, {self.seconds:.1f} s"
        )


def make_caches(recipe: Recipe, document: Document | None = None) -> list[Made]:
    """Fill the cache of every cached teacher, or finish one that was begun; there may be none.

    Several processes may do this at once, on one machine or under torchrun; they share the work.

    Raises:
        RecipeError: a folder holds another cache, or the recipe is wrong.
        Interrupted: by Ctrl-C; what is whole stays.
        LimbeckError: it failed; the message says what to do.
    """
    document = document or Document({}, {})
    cached = {n: t for n, t in recipe.teachers.items() if isinstance(t, CachedTeacher)}
    if not cached:
        return []
    facts = check(recipe, document)
    mesh = Mesh(recipe.train.parallel, recipe.train.device)
    try:
        samples = training(recipe.source.open(recipe.seed))
        if samples is None:
            raise document.error("source", "has no fixed set of rows that a teacher could read")
        return [
            _Making(recipe, facts, name, samples, mesh.device, document).go() for name in cached
        ]
    finally:
        mesh.close()


def open_cache(
    recipe: Recipe,
    facts: Facts,
    name: str,
    source: Any,
    device: torch.device,
    document: Document | None = None,
) -> CacheReader:
    """A cached teacher as a reader.

    Raises:
        RecipeError: there is no cache, it is not whole, or it is of something else; the message
            names what differs.
        CacheError: it is damaged.
    """
    document = document or Document({}, {})
    spec: CachedTeacher = recipe.teachers[name]
    path = Path(spec.path).expanduser()
    if not (path / MANIFEST).exists():
        raise document.error(
            f"teachers.{name}.path", f"{spec.path} holds no cache; make it first: {MAKE}"
        )
    store = Store(path)
    tokenizer = tokenizer_for(facts, name)
    weights = None
    if name not in facts.gone:
        weights = weights_sha256(weight_files(spec.of), store.extra.get("weights"))
    longest = longest_for(recipe, facts, name)
    mine = fingerprint(spec, tokenizer, longest, training(source), weights)
    refuse_other(store.fingerprint, mine, spec, name, document)
    if store.absent:
        raise document.error(
            f"teachers.{name}.path",
            f"{spec.path} is not finished: {store.absent} of {store.absent + len(store.seals)}"
            f" shards are missing; go on with: {MAKE}",
        )
    return CacheReader(store, spec, tokenizer, max_length=longest, device=device)


class _Making:
    """One cache on its way."""

    def __init__(
        self,
        recipe: Recipe,
        facts: Facts,
        name: str,
        samples: Sequence[Sample],
        device: torch.device,
        document: Document,
    ) -> None:
        self.spec: CachedTeacher = recipe.teachers[name]
        self.name, self.samples, self.device, self.document = name, samples, device, document
        self.max_length = longest_for(recipe, facts, name)
        self.path = Path(self.spec.path).expanduser()
        self.tokenizer = tokenizer_for(facts, name)
        self.gone = name in facts.gone

    def go(self) -> Made:
        """Make what is missing."""
        began = time.perf_counter()
        noted = manifest(self.path)
        teacher: CausalModel | None = None
        if not (files := weight_files(self.spec.of)) and not self.gone:
            teacher = self.load()  # from the hub, and then its files are here
            files = weight_files(self.spec.of)
        weights = weights_sha256(files, noted.get("extra", {}).get("weights"))
        mine = fingerprint(self.spec, self.tokenizer, self.max_length, self.samples, weights)
        count = -(-len(self.samples) // SHARD_SAMPLES)
        shards: Shards | None = None
        if noted:
            refuse_other(noted["fingerprint"], mine, self.spec, self.name, self.document)
            shards = Shards(self.path, noted["fingerprint"], count)
        written = shards is not None and whole(self.path, shards.extra["head_sha256"])
        if shards is None or not written or shards.missing():
            self.fill(teacher or self.load(), shards, mine, count, stamps(files, weights))
        store = Store(self.path)
        return Made(
            name=self.spec.of.name,
            path=self.spec.path,
            samples=len(store),
            rows=store.rows,
            dropped=dropped(self.path),
            bytes=sum(file.stat().st_size for file in self.path.glob("shard-*")),
            seconds=time.perf_counter() - began,
        )

    def load(self) -> CausalModel:
        """The teacher."""
        return load_teacher(self.spec.of, self.device, self.max_length)

    def fill(
        self,
        teacher: CausalModel,
        shards: Shards | None,
        mine: Mapping[str, Any],
        count: int,
        weights: Mapping[str, Any],
    ) -> None:
        """Make all shards that are missing."""
        encoder = Encoder(self.tokenizer, self.max_length)
        sizes, projection = describe(teacher, self.first_useful(encoder))
        head = head_bytes(self.spec.of.name, projection) if self.spec.keep == "hidden" else None
        extra = {
            **sizes,
            "head_sha256": None if head is None else sha256(head),
            "weights": weights,
            "name": self.spec.of.name,
        }
        shards = shards or Shards(self.path, mine, count, extra)
        write_remains(self.path, teacher, head)
        keeps = keeper(self.spec, sizes["columns"], sizes["width"], sizes["dtype"])
        filling = Filling(teacher, encoder, keeps, self.samples, self.spec.seed, self.path)
        left = sum(len(filling.shard(index)) for index in shards.missing())
        with interruptible(self.path), FillDisplay(f"caching {self.name}", left) as display:
            filling.fill(shards, display.told)

    def first_useful(self, encoder: Encoder) -> Encoding:
        """The first sample with something to learn."""
        for sample in self.samples:
            encoding = encoder.encode(sample)
            if encoding.rows:
                return encoding
        raise DataError(
            "no row has a token to learn; check that they have a completion, and student.max_length"
        )


def manifest(path: Path) -> Mapping[str, Any]:
    """What a cache says of itself, perhaps damaged; empty where there is none.

    Opening it as a `Store` would refuse a damaged shard, which is about to be made again.
    """
    try:
        noted: Any = json.loads((path / MANIFEST).read_bytes())
        return {"fingerprint": dict(noted["fingerprint"]), "extra": dict(noted["extra"])}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def training(source: Any) -> Sequence[Sample] | None:
    """All samples that a source trains on, None where their number has no end."""
    return getattr(source, "training", None)


def longest_for(recipe: Recipe, facts: Facts, name: str) -> int:
    """Tokens of a sample that a teacher reads: the student's where they are the student's own."""
    own = facts.teachers[name].vocabulary != facts.student.vocabulary
    return (recipe.teachers[name].of.max_length if own else None) or recipe.student.max_length


def tokenizer_for(facts: Facts, name: str) -> PreTrainedTokenizerBase:
    """What makes a teacher's tokens: the loop shows it the student's where vocabularies agree."""
    teacher, student = facts.teachers[name], facts.student
    return (student if student.vocabulary == teacher.vocabulary else teacher).tokenizer


def refuse_other(
    theirs: Mapping[str, Any],
    mine: Mapping[str, Any],
    spec: CachedTeacher,
    name: str,
    document: Document,
) -> None:
    """Refuse a cache of something else.

    Raises:
        RecipeError: naming what differs.
    """
    if (what := difference(theirs, mine)) is not None:
        raise document.error(
            f"teachers.{name}.path",
            f"{spec.path} is a cache of something else: {what}; set it back, or name another"
            f" folder and run: {MAKE}",
        )


@contextmanager
def interruptible(path: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block; what is whole stays.

    Raises:
        Interrupted: one of them came.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; the finished shards in {path} stay, and the same command goes on"
        ) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
