"""Reasoning from a teacher that only writes: what each way, and each part of DASD, is worth.

    python benchmarks/reasoning.py            # all arms, three seeds
    python benchmarks/reasoning.py --quick    # few prompts, two steps of one seed, nothing written
    python benchmarks/reasoning.py --only DASD

The embedded domain: word problems; the demo's teacher is asked as one behind an API, and the demo's
student learns. All arms of a seed have the same starting weights, steps and tokens a step; nothing
was tuned for any of them. `PROMPTS` problems are asked about; what differs is what is asked, what
is kept of it, and how it is learnt.

At temperature 1 this teacher is right about all problems of the kind it knows, so the higher
temperature is 1.5, at which about a sixth of what it writes is wrong; else there would be nothing
to verify. Of unseen phrasings and longer chains it knows little itself, and no student can be much
better.

"teacher, tokens and price" counts all that an arm's rows took, as if it were alone: prompts once
for all answers to them, at an example price. What the teacher only reads is not counted.

"adaptive" has its tries from a student that was trained on both kinds of rows first, since the
demo's cannot answer without reasoning at all; the arm itself starts where all arms do.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparison import LABELS, QUICK_STEPS, Arm, Comparison, Material, Setting, compare, references
from comparison_material import demo_model, named, once, read_rows, word_problems, write_rows
from comparison_table import NOTHING, Column, accuracy, accuracy_of, of_seeds, tables
from reasoning_material import Office, Steps, cost_of, missing_steps

import limbeck
from limbeck.demo import problems, write_jsonl

PROMPTS, TESTS = 800, 150
QUICK_PROMPTS, QUICK_TESTS = 12, 4
TRAIN = {"steps": 120, "batch_tokens": 2048, "learning_rate": 1e-3}

ASK: dict[str, Any] = {"kind": "answers", "teacher": "big", "max_tokens": 160}
LOW: dict[str, Any] = {**ASK, "n": 2, "temperature": 0.3}
HIGH: dict[str, Any] = {**ASK, "n": 4, "temperature": 1.5}
GREEDY: dict[str, Any] = {**ASK, "n": 1, "temperature": 0.0}
VERIFY: dict[str, Any] = {"kind": "verify", "match": "last_number"}
SPLIT: dict[str, Any] = {"kind": "split", "form": "the_answer_is"}
TAGS: dict[str, Any] = {"direct_tag": "! ", "reason_tag": "? "}
DIVERGENCE: dict[str, Any] = {
    "kind": "divergence",
    "teacher": "big",
    "threshold": 0.05,
    "best": 2,
}
WEIGHTS: dict[str, Any] = {"kind": "weights", "teacher": "big", "temperature": 4.0}
MIXED: dict[str, Any] = {"kind": "mixed", "teacher": "big", "max_tokens": 160, "cut": "all"}


def dasd(without: str = "") -> tuple[Steps, Steps]:
    """Steps of both temperatures, without a part."""
    low = [LOW, VERIFY, {"kind": "weights", "by": "uniform"}]
    high = [HIGH, VERIFY, DIVERGENCE, WEIGHTS, MIXED, VERIFY]
    kept = [[step for step in steps if step["kind"] != without] for steps in (low, high)]
    return kept[0], kept[1]


def adaptive(decide: str = "tries") -> dict[str, Any]:
    """The step that chooses; a trained student writes its tag first."""
    tries = {"tries": 4, "prefix": TAGS["direct_tag"].strip(), "student": "warm"}
    return {"kind": "adaptive", "decide": decide, **tries, **TAGS}


NO_TAGS = {"direct_tag": "", "reason_tag": ""}
ROWS: dict[str, Steps] = {
    "answers": [GREEDY, VERIFY, SPLIT, {**adaptive("never"), **NO_TAGS}],
    "one sequence": [GREEDY, VERIFY, SPLIT],
    "two tasks": [GREEDY, VERIFY, SPLIT, {"kind": "two_tasks", "predict": ""}],
    "rejection": [HIGH, VERIFY, {"kind": "distinct", "by": "equations", "cap": 4}],
    "low": dasd()[0],
    "high": dasd()[1],
    "low, not verified": dasd("verify")[0],
    "high, not verified": dasd("verify")[1],
    "high, not selected": dasd("divergence")[1],
    "high, not mixed": dasd("mixed")[1],
    "low, not weighted": dasd("weights")[0],
    "high, not weighted": dasd("weights")[1],
    "always": [LOW, VERIFY, SPLIT, adaptive("always")],
    "never": [LOW, VERIFY, SPLIT, adaptive("never")],
    "adaptive": [LOW, VERIFY, SPLIT, adaptive()],
}
POOLED = {"low and high": ("low", "high"), "both kinds": ("always", "never")}
"""Rows of several kinds in one file, in no order."""

MADE: dict[str, Path] = {}
"""Files of rows by name, from when they are made."""


def demo(folder: Path, prompts: int, tests: int) -> Material:
    """Problems, and rows of them by every way whose steps there are."""
    paths = word_problems(folder, prompts, tests)
    others: dict[str, str] = {}
    for split in ("phrasings", "chains"):
        path = folder / f"{split}-{tests}.jsonl"
        once(path, lambda a, s=split: void(write_jsonl(a, problems(0, s, tests))))
        others[split] = str(path)
    rows = {"data": str(paths["rows"])}
    models = {"big": str(demo_model("teacher")), "student": str(demo_model("student"))}
    office = Office(folder, models)
    for name, steps in ROWS.items():
        if missing := missing_steps(steps):
            print(f"rows {name!r} are left out: there is no step {', '.join(missing)} yet")
            continue
        if name == "adaptive":
            warm = folder / named("warm", rows["both kinds"], TRAIN)
            once(warm, lambda aside: warm_up(rows["both kinds"], aside, prompts))
            office.models = {**models, "warm": str(warm)}
        MADE[name] = office.rows(name, steps, paths["rows"])
        rows[name] = str(MADE[name])
        for pool, parts in POOLED.items():
            if pool not in rows and set(parts) <= set(rows):
                rows[pool] = str(pooled([Path(rows[part]) for part in parts], folder))
    return Material(
        student=models["student"],
        teacher=models["big"],
        rows=rows,
        held_out=str(paths["held_out"]),
        train=TRAIN,
        task=str(paths["task"]),
        others=others,
    )


def void(count: int) -> None:
    """`once` wants nothing back."""
    del count


def pooled(parts: Sequence[Path], folder: Path) -> Path:
    """The rows of several files."""
    path = folder / f"{named('pooled', [part.name for part in parts])}.jsonl"
    return once(path, lambda aside: write_rows(aside, [r for p in parts for r in read_rows(p)]))


def warm_up(rows: str, aside: Path, prompts: int) -> None:
    """A student that can answer with and without reasoning."""
    steps = TRAIN["steps"] if prompts == PROMPTS else QUICK_STEPS
    recipe = {
        "student": {"name": str(demo_model("student")), "max_length": 256},
        "source": {"path": rows, "holdout": 0},
        "terms": [{"objective": "cross_entropy"}],
        "train": {**TRAIN, "steps": steps, "save_every": 100_000, "device": "cpu"},
        "seed": 1234,  # not one of the arms' seeds
    }
    run = aside.with_name("warm-up")
    shutil.rmtree(run, ignore_errors=True)
    limbeck.run(recipe, run)
    (run / "student").rename(aside)


STAGES: dict[str, Any] = {"kind": "stages", "epochs": [1]}
PARTS = tuple(
    {"objective": "cross_entropy", "channel": name, "name": name}
    for name in ("rationale", "answer")
)
ALL_ARMS: Sequence[Arm] = (
    Arm(title="the data's own rationales", terms=(LABELS,)),
    Arm(title="answers only", terms=(LABELS,), rows="answers"),
    Arm(title="step by step, one sequence", terms=PARTS, rows="one sequence"),
    Arm(title="step by step, two tasks", terms=PARTS, rows="two tasks"),
    Arm(title="rejection sampling (RFT)", terms=(LABELS,), rows="rejection"),
    Arm(title="DASD", terms=(LABELS,), source=STAGES, rows="low then high"),
    Arm(
        title="DASD without verification",
        terms=(LABELS,),
        source=STAGES,
        rows="low, not verified then high, not verified",
    ),
    Arm(title="DASD without schedule", terms=(LABELS,), rows="low and high"),
    Arm(
        title="DASD without selection",
        terms=(LABELS,),
        source=STAGES,
        rows="low then high, not selected",
    ),
    Arm(
        title="DASD without mixed policy",
        terms=(LABELS,),
        source=STAGES,
        rows="low then high, not mixed",
    ),
    Arm(
        title="DASD without weights",
        terms=(LABELS,),
        source=STAGES,
        rows="low, not weighted then high, not weighted",
    ),
    Arm(title="always reasoning, shortest trace", terms=(LABELS,), rows="always"),
    Arm(title="adaptive", terms=(LABELS,), rows="adaptive"),
)


def parts_of(rows: str) -> list[str]:
    """The files of rows that an arm's data come from."""
    return [part for name in rows.split(" then ") for part in POOLED.get(name, (name,))]


def arms(setting: str) -> Sequence[Arm]:
    """Those whose steps there are; the same in every setting."""
    del setting
    made: list[Arm] = references()
    for arm in ALL_ARMS:
        parts = [part for part in parts_of(arm.rows) if part in ROWS]
        if not any(missing_steps(ROWS[part]) for part in parts):
            made.append(replace(arm, note=cost_of([MADE[p] for p in parts if p in MADE])))
    return made


COLUMNS: Sequence[Column] = (
    ("right, same kind (95%)", lambda rows, _: accuracy(rows)),
    ("right, unseen phrasings", accuracy_of("phrasings")),
    ("right, longer chains", accuracy_of("chains")),
    ("tokens an answer", of_seeds("answer_tokens")),
    ("teacher, tokens and price", lambda rows, _: rows[0].get("note") or NOTHING),
)


def table(results: Mapping[str, Any]) -> str:
    """Arms down; accuracy, length and cost across."""
    return tables(results, COLUMNS)


SIZES = (QUICK_PROMPTS, QUICK_TESTS) if "--quick" in sys.argv else (PROMPTS, TESTS)
COMPARISON = Comparison(
    name="reasoning",
    settings=[Setting(name="demo", make=lambda folder: demo(folder, *SIZES))],
    arms=arms,
)

if __name__ == "__main__":
    compare(COMPARISON, table)
