"""Training on what the student writes itself, beside training on given text, under one budget.

    python benchmarks/own_words.py            # all arms, three seeds
    python benchmarks/own_words.py --quick    # two steps of one seed, nothing written
    python benchmarks/own_words.py --only GKD

The embedded domain: word problems, the teacher and the student that ship with limbeck. All arms of
a seed have the same starting weights, prompts, steps and tokens a step; nothing was tuned for any
of them. What the student writes is drawn at temperature 1: at most 100 tokens, 32 prompts at a
time.

"own text" is measured where the student will be used: it answers unseen problems greedily, and the
teacher reads what it wrote. If it is worse there than on given text, mistakes lead to mistakes.

Self-distillation has no teacher but the student. (a) trains on its own answers that are right, of
four drawn to each prompt; (b) on its own greedy answer where that is right, else on the row's; (c)
on what it writes, with itself as the teacher, which reads a solved problem first; SDPO the same
with its own right answer to the same problem, of eight, where there is one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison import LABELS, Arm, Comparison, Material, Setting, compare, references
from comparison_material import CPU, demo_model, once, read_rows, word_problems, write_rows
from comparison_table import (
    COSTS,
    Arms,
    Column,
    Rows,
    accuracy_of,
    beside_arm,
    of_seeds,
    spread,
    tables,
)

from limbeck.core.exchange import Question
from limbeck.core.specs import LocalTeacher
from limbeck.core.types import Sampling, Turn
from limbeck.demo import problems, write_jsonl
from limbeck.evals.matching import last_number
from limbeck.models.load import load_teacher
from limbeck.teachers.local import LocalWriter

TRAIN = {"steps": 120, "batch_tokens": 2048, "learning_rate": 1e-3}
WRITING: dict[str, Any] = {"kind": "rollouts", "max_tokens": 100, "batch": 32}
DRAWS = 4
ITSELF: dict[str, Any] = {"me": {"kind": "self", "update": "ema", "decay": 0.99}}
BEFORE: dict[str, Any] = {"before": {"kind": "self", "update": "frozen"}}


def demo(folder: Path) -> Material:
    """Word problems, unseen phrasings and longer chains; the student's own answers to them."""
    paths = word_problems(folder, 3000, 150)
    others: dict[str, str] = {}
    for split in ("phrasings", "chains"):
        path = folder / f"{split}-100.jsonl"
        once(path, lambda aside, split=split: void(write_jsonl(aside, problems(0, split, 100))))
        others[split] = str(path)
    rows = {
        "data": str(paths["rows"]),
        "best of n": str(once(folder / "best.jsonl", lambda p: best_of_n(paths["rows"], p))),
        "rewritten": str(once(folder / "own.jsonl", lambda p: rewritten(paths["rows"], p))),
        "solved first": str(once(folder / "solved.jsonl", lambda p: solved(paths["rows"], p))),
    }
    return Material(
        student=str(demo_model("student")),
        teacher=str(demo_model("teacher")),
        rows=rows,
        held_out=str(paths["held_out"]),
        train=TRAIN,
        task=str(paths["task"]),
        others=others,
    )


def void(count: int) -> None:
    """`once` wants nothing back."""
    del count


def answers(rows: Sequence[Mapping[str, Any]], sampling: Sampling, n: int) -> list[list[str]]:
    """What the student that ships with limbeck answers, where it ends by itself."""
    model = load_teacher(LocalTeacher(name=str(demo_model("student"))), CPU, 256)
    asked = [Question(id=str(i), prompt=(Turn(text=r["prompt"]),)) for i, r in enumerate(rows)]
    replies = LocalWriter(model).answers(asked, sampling, n)
    return [[reply.text for reply in group if reply.whole] for group in replies]


def right(text: str, row: Mapping[str, Any]) -> bool:
    """Whether an answer ends in the row's number."""
    return last_number(text) == last_number(str(row["answer"]))


def best_of_n(path: Path, aside: Path) -> None:
    """(a): of each problem, the first right answer that the student drew."""
    rows = read_rows(path)
    drawn = answers(rows, Sampling(max_tokens=100, temperature=1.0, seed=1), DRAWS)
    kept: list[dict[str, Any]] = []
    for row, texts in zip(rows, drawn, strict=True):
        good = [text for text in texts if right(text, row)]
        if good:
            kept.append({**row, "completion": good[0]})
    write_rows(aside, kept)


def rewritten(path: Path, aside: Path) -> None:
    """(b): the student's answer where it is right, the given one elsewhere."""
    rows = read_rows(path)
    written = answers(rows, Sampling(max_tokens=100), 1)
    made = [
        {**row, "completion": text[0]} if text and right(text[0], row) else row
        for row, text in zip(rows, written, strict=True)
    ]
    own = sum(a["completion"] != b["completion"] for a, b in zip(made, rows, strict=True))
    print(f"self-distillation (b): {own:,} of {len(rows):,} rows are the student's own")
    write_rows(aside, made)


def solved(path: Path, aside: Path) -> None:
    """(c): each row with another one, solved, which only the teacher reads."""
    rows = read_rows(path)
    shown = [f"{row['prompt']}{row['completion']}\n" for row in [*rows[1:], rows[0]]]
    write_rows(aside, [{**row, "privileged": text} for row, text in zip(rows, shown, strict=True)])


def _gkd(share: float) -> Arm:
    return Arm(
        title=f"GKD, lambda {share:g}",
        terms=({"objective": "jensen_shannon"},),
        source={**WRITING, "share": share},
    )


def arms(setting: str) -> list[Arm]:
    """Everything that is compared."""
    del setting
    harder = {"alpha": {"from": 0.3, "to": 0.05}}
    mixed = {"kind": "mixed", "teacher": "big", "alpha": 0.2}
    return [
        *references(),
        Arm(title="labels", terms=(LABELS,)),
        Arm(title="forward_kl, given text", terms=({"objective": "forward_kl"},)),
        Arm(title="reverse_kl, given text", terms=({"objective": "reverse_kl"},)),
        Arm(
            title="forward_kl, own text",
            terms=({"objective": "forward_kl"},),
            source={**WRITING, "share": 1.0},
        ),
        Arm(
            title="reverse_kl, own text",
            terms=({"objective": "reverse_kl"},),
            source={**WRITING, "share": 1.0},
        ),
        *(_gkd(share) for share in (0.0, 0.5, 1.0)),
        Arm(
            title="DistiLLM",
            terms=({"objective": {"kind": "skew_forward_kl", "alpha": 0.1}},),
            source={
                **WRITING,
                "share": 0.5,
                "replay": {"size": 1000, "share": 0.5, "age_steps": 200},
            },
        ),
        Arm(
            title="DistiLLM-2",
            terms=(
                {
                    "objective": {"kind": "skew_forward_kl", "alpha": 0.3},
                    "channel": "given",
                    "schedule": harder,
                },
                {
                    "objective": {"kind": "skew_reverse_kl", "alpha": 0.3},
                    "channel": "student",
                    "schedule": harder,
                },
            ),
            source={**WRITING, "share": 0.5},
        ),
        Arm(
            title="MiniLLM",
            terms=(
                {
                    "objective": {
                        "kind": "on_policy_kl",
                        "discount": 1.0,
                        "own": False,
                        "mean": True,
                    },
                    "channel": "student",
                },
                {"objective": "reverse_kl", "channel": "student"},
                {**LABELS, "channel": "given"},
            ),
            source={**WRITING, "share": 0.75, "speaker": mixed},
        ),
        Arm(
            title="reverse KL of drawn tokens",
            terms=({"objective": {"kind": "on_policy_kl"}},),
            source={**WRITING, "share": 1.0},
        ),
        Arm(
            title="speculative KD",
            terms=({"objective": "forward_kl"},),
            source={**WRITING, "speaker": {"kind": "speculative", "teacher": "big"}},
        ),
        Arm(
            title="GAD",
            terms=(
                {
                    **LABELS,
                    "channel": "given",
                    "schedule": {"weight": {"from": 1.0, "to": 0.1, "until": 0.3}},
                },
                {
                    "objective": "group_policy",
                    "channel": "student",
                    "schedule": {"weight": {"from": 0.0, "to": 1.0, "until": 0.3}},
                },
                {
                    "objective": "reverse_kl",
                    "channel": "student",
                    "teacher": "before",
                    "weight": 0.01,
                },
            ),
            teachers=BEFORE,
            source={
                **WRITING,
                "batch": 16,
                "share": 0.5,
                "answers": 8,
                "scorer": {"kind": "critic", "learning_rate": 1e-3},
            },
        ),
        Arm(title="self-distillation (a), best of 4", terms=(LABELS,), rows="best of n"),
        Arm(title="self-distillation (b), rewritten", terms=(LABELS,), rows="rewritten"),
        Arm(
            title="self-distillation (c), on its own text",
            terms=({"objective": "forward_kl", "teacher": "me"},),
            teachers=ITSELF,
            rows="solved first",
            source={**WRITING, "share": 1.0},
        ),
        Arm(
            title="SDPO",
            terms=({"objective": "jensen_shannon", "teacher": "me", "channel": "helped"},),
            teachers={"me": {"kind": "self", "update": "ema", "decay": 0.95}},
            source={**WRITING, "batch": 16, "answers": 8, "scorer": {"kind": "feedback"}},
        ),
    ]


def minutes(rows: Rows, arms: Arms) -> str:
    """Of training, by the clock, beside labels of the same seeds."""
    theirs = {row["seed"]: row.get("train_seconds") for row in arms.get("labels", [])}
    found = [
        row["train_seconds"] / theirs[row["seed"]]
        for row in rows
        if row.get("train_seconds") and theirs.get(row["seed"])
    ]
    return spread(found, "{:.1f}")


COLUMNS: Sequence[Column] = (
    ("accuracy (95%)", COSTS[0][1]),
    ("unseen phrasings", accuracy_of("phrasings")),
    ("longer chains", accuracy_of("chains")),
    ("KL, given text", of_seeds("kl_nats")),
    ("KL, own text", of_seeds("own_kl_nats")),
    (
        "beside forward_kl, given text (lower in)",
        beside_arm("own_kl_nats", "forward_kl, given text"),
    ),
    ("tokens an answer", lambda rows, _: spread([r.get("answer_tokens") for r in rows], "{:.0f}")),
    ("tokens written", lambda rows, _: spread([r.get("written_tokens") for r in rows], "{:,.0f}")),
    ("time", minutes),
)


def table(results: dict[str, Any]) -> str:
    """Arms down; quality in and out of distribution, on given and on own text; what it took."""
    return tables(results, COLUMNS)


COMPARISON = Comparison(name="own_words", settings=[Setting(name="demo", make=demo)], arms=arms)

if __name__ == "__main__":
    compare(COMPARISON, table)
