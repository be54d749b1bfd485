"""What the comparisons of methods share: arms, settings, runs, results that grow run by run.

An arm is the part of a recipe that differs between methods. A run is an ordinary `limbeck.run` of
an ordinary recipe in a process of its own, on one core and one thread; two run at a time, each on
its own core. Its evaluations come after training, in the same process, so that the peak of memory
that is reported is that of training. What is measured:

- `kl_nats`, `top1`: beside the teacher, on held-out text (only where both have one tokenizer);
- `bits_per_byte`: of held-out text, which may be compared across tokenizers;
- `right`: which of the held-out problems the student answers, by greedy decoding;
- `step_processor_seconds`: of the median step, with encoding and reading the teacher, without the
  first ones; `step_seconds` is the same by the clock, which a busy machine moves (what is done
  once before training, such as Flex-KD's choice of units, is in `seconds` alone);
- `peak_bytes`: of the process, at the end of training.

Rows are written as they come. A row is kept as long as its recipe is the same; the others are made
again. `--only`, `--setting` and `--seeds` do a part.
"""

import argparse
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from environment import commit, environment, load, now

from limbeck.core.registry import kinds
from limbeck.recipe import resolve as _registers  # noqa: F401

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
RUN = Path(__file__).with_name("comparison_run.py")
QUICK_STEPS = 2
LABELS: dict[str, Any] = {"objective": "cross_entropy"}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    `terms`, `train` and `teachers` (beside `big`) are as a recipe writes them, and so is `source`,
    to which the data are given as its `of`. `rows` names the data: `data`, or `spoken`, which the
    teacher wrote; `a then b` names two, for a source of several. `measured` is `teacher` or
    `student` for a model as it is, untrained.
    `note` says what stands beside it in the table.
    """

    title: str
    terms: tuple[Mapping[str, Any], ...] = ()
    train: Mapping[str, Any] = field(default_factory=dict[str, Any])
    teachers: Mapping[str, Any] = field(default_factory=dict[str, Any])
    source: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rows: str = "data"
    measured: str | None = None
    note: str = ""

    @property
    def kinds(self) -> list[str]:
        """The kinds of its objectives."""
        objectives = [term["objective"] for term in self.terms]
        return [value if isinstance(value, str) else value["kind"] for value in objectives]

    @property
    def missing(self) -> list[str]:
        """Kinds that this limbeck does not have."""
        return [kind for kind in self.kinds if kind not in kinds("objective")]

    @property
    def taught(self) -> bool:
        """Whether a teacher is read while the student trains."""
        listens = [kind for kind in self.kinds if kinds("objective")[kind].needs]
        own = {term.get("teacher") for term in self.terms} & set(self.teachers)
        speaks = "teacher" in self.source.get("speaker", {})
        return speaks or (bool(listens) and not own)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What all arms of a setting share.

    `student` and `teacher` are folders; `rows` are files of training rows by name; `train` is as a
    recipe writes it; `task` is a file of problems with answers, and `others` are more, by name.
    """

    student: str
    teacher: str
    rows: Mapping[str, str]
    held_out: str
    train: Mapping[str, Any]
    max_length: int = 256
    task: str | None = None
    held_out_rows: int = 100
    others: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A teacher, a student and their data; `make` writes what it needs into a folder."""

    name: str
    make: Callable[[Path], Material | None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms in settings, and where its figures lie."""

    name: str
    settings: Sequence[Setting]
    arms: Callable[[str], Sequence[Arm]]

    @property
    def results(self) -> Path:
        return Path(__file__).with_name("results") / f"{self.name}.json"


def references() -> list[Arm]:
    """The models between which all arms lie."""
    return [
        Arm(title="teacher", measured="teacher"),
        Arm(title="student before training", measured="student"),
    ]


def job_of(material: Material, arm: Arm, seed: int) -> dict[str, Any]:
    """All that the process of a run must know, as JSON values."""
    files = [{"path": material.rows[name], "holdout": 0} for name in arm.rows.split(" then ")]
    data = files if len(files) > 1 else files[0]
    recipe: dict[str, Any] = {
        "student": {"name": material.student, "max_length": material.max_length},
        "teachers": {**({"big": {"name": material.teacher}} if arm.taught else {}), **arm.teachers},
        "source": {**arm.source, "of": data} if arm.source else data,
        "terms": [dict(term) for term in arm.terms],
        "train": {**material.train, "save_every": 100_000, "device": "cpu", **arm.train},
        "seed": seed,
    }
    # What is not used leaves no trace, so that older rows stay what they are.
    used = {key: value for key, value in asdict(material).items() if value or key != "others"}
    return {"recipe": recipe, "measured": arm.measured, "material": used}


def fingerprint(job: Mapping[str, Any], folder: Path) -> str:
    """Of a run's recipe, whatever folder its material lies in."""
    text = json.dumps(job, sort_keys=True).replace(str(folder), "").replace(str(REPOSITORY), "")
    return hashlib.sha256(text.replace(str(SHARED), "").encode()).hexdigest()[:16]


@dataclass
class Store:
    """The rows of a comparison, in memory and in its file (None: nowhere)."""

    path: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    materials: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def open(cls, path: Path | None) -> "Store":
        known: dict[str, Any] = {}
        if path is not None and path.exists():
            known = json.loads(path.read_text())
        return cls(path, known.get("rows", []), known.get("train", {}))

    def has(self, key: Mapping[str, Any]) -> bool:
        return any(
            all(row.get(k) == v for k, v in key.items())
            and ("step_processor_seconds" in row or "peak_bytes" not in row)
            for row in self.rows
        )

    def put(self, row: dict[str, Any]) -> None:
        """Add a row in the place of an older one of the same setting, arm and seed."""
        place = ("setting", "arm", "seed")
        self.rows = [r for r in self.rows if any(r[k] != row[k] for k in place)] + [row]
        self.write()

    def write(self) -> None:
        """All rows, into the file."""
        if self.path is not None:
            values = {"environment": environment(), "train": self.materials, "rows": self.rows}
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(values, indent=1) + "\n")


def compare(comparison: Comparison, describe: Callable[[dict[str, Any]], str]) -> None:
    """The command line of a comparison: make what is missing, then print `describe(results)`."""
    arguments = _arguments(comparison)
    store = Store.open(None if arguments.quick else comparison.results)
    if arguments.table:
        print(describe({"rows": _in_order(store.rows, comparison)}))
        return
    seeds = range(1 if arguments.quick else arguments.seeds)
    began = time.perf_counter()
    home = REPOSITORY / "runs" / comparison.name
    jobs = list(_jobs(comparison, arguments, home, seeds, store))
    print(f"{len(jobs)} runs to make, {len(store.rows)} rows there", flush=True)
    with tempfile.TemporaryDirectory() as name:
        _work(jobs, Path(name), store, arguments.cores)
    store.rows = _in_order(store.rows, comparison)
    store.write()
    print(describe({"rows": store.rows}))
    print(f"\nIt took {(time.perf_counter() - began) / 60:.1f} minutes.")


def _arguments(comparison: Comparison) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Compares methods: {comparison.name}.")
    names = [setting.name for setting in comparison.settings]
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="two steps of one seed; results/ stays"
    )
    parser.add_argument("--only", action="append", metavar="ARM", help="part of an arm's title")
    parser.add_argument("--setting", choices=names, action="append")
    parser.add_argument("--table", action="store_true", help="print what is in results/ alone")
    cores = sorted(os.sched_getaffinity(0))[:2]
    parser.add_argument("--cores", type=int, nargs="+", default=cores, help="one run on each")
    return parser.parse_args()


def _jobs(
    comparison: Comparison,
    arguments: argparse.Namespace,
    home: Path,
    seeds: Sequence[int],
    store: Store,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The runs that are wanted and not there: what names each, and what its process must know.

    Seed by seed, so that a busy hour of the machine does not fall on some arms alone.
    """
    settings: dict[str, Material] = {}
    for setting in comparison.settings:
        if arguments.setting and setting.name not in arguments.setting:
            continue
        folder = home / setting.name
        folder.mkdir(parents=True, exist_ok=True)
        material = setting.make(folder)
        if material is None:
            print(f"{setting.name} is left out: {SHARED} is absent")
            continue
        if arguments.quick:
            material = _quick(material)
        settings[setting.name] = material
        store.materials[setting.name] = dict(material.train)
    told: set[str] = set()
    for seed in seeds:
        for name, material in settings.items():
            for arm in comparison.arms(name):
                if arguments.only and not any(part in arm.title for part in arguments.only):
                    continue
                if arm.missing:
                    if arm.title not in told:
                        print(f"{arm.title} is left out: there is no {', '.join(arm.missing)} yet")
                    told.add(arm.title)
                    continue
                if arm.measured and seed:
                    continue  # a model as it is does not depend on a seed
                job = job_of(material, arm, seed)
                mark = fingerprint(job, home)
                key = {"setting": name, "arm": arm.title, "seed": seed, "fingerprint": mark}
                if not store.has(key):
                    yield {**key, "note": arm.note}, job


def _quick(material: Material) -> Material:
    values = {f: getattr(material, f) for f in material.__dataclass_fields__}
    values |= {"train": {**material.train, "steps": QUICK_STEPS}, "held_out_rows": 8}
    if material.task is not None:
        short = Path(material.task).with_name("quick.jsonl")
        short.write_text("".join(Path(material.task).read_text().splitlines(keepends=True)[:4]))
        values["task"] = str(short)
    return Material(**values)


def _work(
    jobs: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    home: Path,
    store: Store,
    cores: Sequence[int],
) -> None:
    """Run all jobs, one on each core at a time."""
    free: queue.Queue[int] = queue.Queue()
    for core in cores:
        free.put(core)

    def one(numbered: tuple[int, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
        number, (key, job) = numbered
        core = free.get()
        try:
            return {**key, **_child(job, home / f"{number}", core)}
        finally:
            free.put(core)

    failed: list[str] = []
    with ThreadPoolExecutor(len(cores)) as pool:
        runs = [pool.submit(one, numbered) for numbered in enumerate(jobs)]
        for done, ended in enumerate(as_completed(runs), 1):
            row = ended.result()
            title = f"[{done}/{len(jobs)}] {row['setting']}, {row['arm']}, seed {row['seed']}"
            if "error" in row:
                failed.append(title)
                print(f"{title}: FAILED: {row['error']}", flush=True)
                continue
            store.put(row)
            print(f"{title}: {_short(row)}", flush=True)
    if failed:
        print(f"\n{len(failed)} runs failed; the command makes them again:", *failed, sep="\n  ")


def _child(job: Mapping[str, Any], folder: Path, core: int) -> dict[str, Any]:
    """One run in a fresh process; its figures, or the `error` that it ended with."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / "job.json"
    path.write_text(json.dumps({**job, "core": core}))
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(RUN), str(path)]
    began = time.perf_counter()
    ended = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    if ended.returncode != 0:
        said = ended.stderr.strip().splitlines() or ["no message"]
        return {"error": said[-1]}
    found = json.loads((folder / "found.json").read_text())
    shutil.rmtree(folder)
    took = {"seconds": time.perf_counter() - began, "date": now(), "load": load()}
    return {**found, **took, "limbeck_commit": commit()}


def _short(row: Mapping[str, Any]) -> str:
    shown = [
        f"{name} {row[name]:.4f}"
        for name in ("bits_per_byte", "kl_nats")
        if row.get(name) is not None
    ]
    if row.get("right"):
        shown.append(f"right {row['right'].count('1')}/{len(row['right'])}")
    return ", ".join([*shown, f"{row['seconds']:.0f} s"])


def _in_order(rows: Sequence[dict[str, Any]], comparison: Comparison) -> list[dict[str, Any]]:
    """Rows as the arms are listed; those of arms that are gone are left out."""
    places = {
        (setting.name, arm.title): (i, j)
        for i, setting in enumerate(comparison.settings)
        for j, arm in enumerate(comparison.arms(setting.name))
    }
    known = [row for row in rows if (row["setting"], row["arm"]) in places]
    return sorted(known, key=lambda r: (places[r["setting"], r["arm"]], r["seed"]))
