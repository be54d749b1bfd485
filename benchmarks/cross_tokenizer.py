"""Teachers with another tokenizer: every way to listen to one, beside plain fine-tuning.

    python benchmarks/cross_tokenizer.py            # all arms, three settings, three seeds
    python benchmarks/cross_tokenizer.py --quick    # two steps of one seed, nothing written
    python benchmarks/cross_tokenizer.py --only semantic_transport --setting to_characters

Settings:

- `to_characters`: stories260K (512 tokens) teaches four of the five layers of babyllama105 (105
  tokens, nearly all of one character);
- `from_characters`: babyllama105 teaches four of the five layers of stories260K;
- `own_300`: the demo's teacher (640 tokens) teaches a student with 300 tokens of its own. It has
  the body of the demo's student and embeddings that are means of the old ones, and was trained for
  a while on labels of other problems, alone, before any arm begins.

The first two are left out where `shared/` is absent. Their rows are pieces of stories of at most
240 characters, the longest that both read, and end without an end-of-sequence token. All arms of a
seed have the same starting weights, order and steps. "teacher's text" trains on what the teacher
wrote for the prompts of the same rows (sampled at temperature 1; greedily for the problems), the
others on the rows themselves.

Each distilling arm is 0.5 of the labels and 0.5 times a weight of the method. `WEIGHTS` holds the
weights, chosen once: 1 for what is in nats, the 1.5 of its paper for `sorted_l1`, and the same for
`semantic_transport`, which is a distance too; they were not tuned for any setting. The one learning
rate of `own_300` is the better of two for labels (1e-3, 2e-3). Bits a byte compare students of all
tokenizers. `comparison.py` says how it is measured.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison import LABELS, SHARED, Arm, Comparison, Material, Setting, compare, references
from comparison_material import (
    cut,
    demo_model,
    named,
    pieces,
    read_rows,
    retokenized,
    spoken,
    without_end,
    word_problems,
)
from comparison_table import COSTS, beside_arm, of_seeds, tables

from limbeck.core.types import Sampling

WEIGHTS: Mapping[str, float] = {
    "sorted_l1": 1.5,
    "semantic_transport": 1.5,
    "likelihood_matching": 1.0,
    "mapped_kl": 1.0,
    "prefix_kl": 1.0,
    "hybrid_kl": 1.0,
    "dual_space": 1.0,
}
STORIES = {"steps": 120, "batch_tokens": 2048, "learning_rate": 2e-3}
PROBLEMS = {"steps": 120, "batch_tokens": 2048, "learning_rate": 1e-3, "schedule": "wsd"}
WARM_UP = {**PROBLEMS, "steps": 400, "learning_rate": 2e-3}
ROWS = 1200
LAYERS = (0, 1, 2, 4)


def _stories(folder: Path, teacher: str, student: str) -> Material | None:
    data, models = SHARED / "data" / "stories", SHARED / "models"
    if not data.exists():
        return None
    characters = json.loads((models / "babyllama105" / "tokenizer.json").read_text())
    alphabet = {token for token in characters["model"]["vocab"] if len(token) == 1}
    rows = pieces(data / "train.jsonl", alphabet, folder / f"rows-{ROWS}.jsonl", ROWS)
    held_out = pieces(data / "valid.jsonl", alphabet, folder / "held_out-150.jsonl", 150)
    whole = cut(str(models / student), LAYERS, folder / named("whole", student, LAYERS))
    big = without_end(models / teacher, folder / "teacher")
    tokens = 220 if teacher == "babyllama105" else 110
    written = _spoken(big, rows, folder, Sampling(max_tokens=tokens, temperature=1.0))
    return Material(
        student=str(without_end(whole, folder / named("student", student, LAYERS))),
        teacher=str(big),
        rows={"data": str(rows), "spoken": str(written)},
        held_out=str(held_out),
        held_out_rows=150,
        train=STORIES,
    )


def _spoken(teacher: Path, rows: Path, folder: Path, sampling: Sampling) -> Path:
    path = folder / f"{named('spoken', rows.name, sampling)}.jsonl"
    return spoken(teacher, rows, path, sampling, 256)


def to_characters(folder: Path) -> Material | None:
    """A teacher of whole words for a student of characters."""
    return _stories(folder, "stories260K", "babyllama105")


def from_characters(folder: Path) -> Material | None:
    """A teacher of characters for a student of whole words."""
    return _stories(folder, "babyllama105", "stories260K")


def own_300(folder: Path) -> Material:
    """Word problems in a vocabulary that the teacher does not share."""
    paths = word_problems(folder, 3000, 150)
    texts = [row["prompt"] + row["completion"] for row in read_rows(paths["rows"])]
    teacher = demo_model("teacher")
    made = folder / named("student", 300, paths["others"].name, WARM_UP)
    student = retokenized(demo_model("student"), texts, 300, paths["others"], WARM_UP, made)
    written = _spoken(teacher, paths["rows"], folder, Sampling(max_tokens=120))
    return Material(
        student=str(student),
        teacher=str(teacher),
        rows={"data": str(paths["rows"]), "spoken": str(written)},
        held_out=str(paths["held_out"]),
        task=str(paths["task"]),
        train=PROBLEMS,
        max_length=384,
    )


def arms(setting: str) -> Sequence[Arm]:
    """The same in all settings, but for what would be another arm twice."""

    def beside_labels(title: str, **objective: Any) -> Arm:
        method = {"objective": objective, "weight": 0.5 * WEIGHTS[objective["kind"]]}
        return Arm(title=title, terms=({**LABELS, "weight": 0.5}, method))

    # Elsewhere the teacher has all of the student's tokens, and the nearest one is the same one.
    equal_alone = [
        beside_labels("mapped_kl, equal tokens alone", kind="mapped_kl", max_distance=0)
        for _ in range(setting == "from_characters")
    ]
    return [
        *references(),
        Arm(title="labels", terms=(LABELS,)),
        Arm(title="teacher's text", terms=(LABELS,), rows="spoken"),
        beside_labels("sorted_l1, paired by bytes", kind="sorted_l1"),
        beside_labels("sorted_l1, paired by order", kind="sorted_l1", pairing="order"),
        beside_labels("semantic_transport", kind="semantic_transport"),
        beside_labels("likelihood_matching", kind="likelihood_matching"),
        beside_labels("mapped_kl", kind="mapped_kl"),
        *equal_alone,
        beside_labels("prefix_kl", kind="prefix_kl"),
        beside_labels("hybrid_kl", kind="hybrid_kl"),
        beside_labels("dual_space, attention", kind="dual_space"),
        beside_labels("dual_space, bytes", kind="dual_space", align="bytes"),
    ]


COLUMNS = (
    ("bits/byte", of_seeds("bits_per_byte")),
    ("beside labels (lower in)", beside_arm("bits_per_byte", "labels")),
    *COSTS,
)


def table(results: dict[str, Any]) -> str:
    """Arms down; quality, time and memory across; all beside plain fine-tuning."""
    return tables(results, COLUMNS)


COMPARISON = Comparison(
    name="cross_tokenizer",
    settings=[
        Setting(name="to_characters", make=to_characters),
        Setting(name="from_characters", make=from_characters),
        Setting(name="own_300", make=own_300),
    ],
    arms=arms,
)

if __name__ == "__main__":
    compare(COMPARISON, table)
