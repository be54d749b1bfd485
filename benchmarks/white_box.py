"""Every way to learn from a teacher with the same tokenizer, under one budget.

    python benchmarks/white_box.py            # all arms, two settings, three seeds
    python benchmarks/white_box.py --quick    # two steps of one seed, nothing written
    python benchmarks/white_box.py --only features --setting stories

Two settings: `demo` (word problems; the teacher and the student that ship with limbeck) and
`stories` (stories260K into three of its five layers; left out where `shared/` is absent). All arms
of a seed have the same starting weights, rows, order and steps; `TRAIN` says how many. The method
is all that differs, and nothing was tuned for any arm: settings are the defaults unless the title
says otherwise. The one learning rate of `demo` is the better of two for labels (1e-3, 3e-3).
"labels" has no teacher; a distilling arm has no labels, unless its title says so.

What looks inside the network stands beside a forward KL of weight 1, as one would use it, so the
arm to compare with is "forward_kl". Its weight is 1 where nothing else is said. "labels +" arms
show what the inside alone adds to fine-tuning. `comparison.py` says how it is measured.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison import LABELS, SHARED, Arm, Comparison, Material, Setting, compare, references
from comparison_material import cut, demo_model, named, word_problems
from comparison_table import COSTS, beside_arm, of_seeds, tables

TRAIN = {
    "demo": {"steps": 120, "batch_tokens": 2048, "learning_rate": 1e-3},
    "stories": {"steps": 100, "batch_tokens": 2048, "learning_rate": 2e-3},
}
LAYERS = (0, 2, 4)
KL: dict[str, Any] = {"objective": "forward_kl"}


def demo(folder: Path) -> Material:
    """Word problems, about as many as the steps read once; the held-out ones are others."""
    paths = word_problems(folder, 3000, 150)
    return Material(
        student=str(demo_model("student")),
        teacher=str(demo_model("teacher")),
        rows={"data": str(paths["rows"])},
        held_out=str(paths["held_out"]),
        train=TRAIN["demo"],
        task=str(paths["task"]),
    )


def stories(folder: Path) -> Material | None:
    """TinyStories; None where the shared assets are absent."""
    data, teacher = SHARED / "data" / "stories", SHARED / "models" / "stories260K"
    if not data.exists():
        return None
    return Material(
        student=str(cut(str(teacher), LAYERS, folder / named("student", LAYERS))),
        teacher=str(teacher),
        rows={"data": str(data / "train.jsonl")},
        held_out=str(data / "valid.jsonl"),
        train=TRAIN["stories"],
    )


def _alone(kind: str, **settings: Any) -> Arm:
    said = ", ".join(f"{name} {value}" for name, value in settings.items())
    return Arm(
        title=f"{kind} ({said})" if said else kind,
        terms=({"objective": {"kind": kind, **settings}},),
    )


def _beside(
    title: str, kind: str, *, first: dict[str, Any] = KL, weight: float = 1.0, **of: Any
) -> Arm:
    """An objective of the inside, beside a forward KL or the labels."""
    name = "KL" if first is KL else "labels"
    return Arm(
        title=f"{name} + {title}",
        terms=(first, {"objective": {"kind": kind, **of}, "weight": weight}),
    )


def _mix(title: str, **train: Any) -> Arm:
    """Logits, hidden states and relations together."""
    inside = [
        {"kind": "features", "layers": "last", "loss": "cosine", "projector": "linear"},
        {"kind": "attention_relations", "layers": "last"},
    ]
    return Arm(title=title, terms=(KL, *({"objective": one} for one in inside)), train=train)


def arms(setting: str) -> Sequence[Arm]:
    """The same in both settings, but that a choice of units needs a wider teacher than student."""
    rising = {"from": 0.0, "to": 1.0, "until": 0.8}
    linear = {"layers": "last", "projector": "linear"}
    return [
        *references(),
        Arm(title="labels", terms=(LABELS,)),
        *(
            _alone(kind)
            for kind in (
                "forward_kl",
                "reverse_kl",
                "jensen_shannon",
                "skew_forward_kl",
                "skew_reverse_kl",
                "total_variation",
                "adaptive_kl",
                "alpha_beta",
                "logit_mse",
                "decoupled_kd",
                "ranking",
            )
        ),
        Arm(
            title="taid (t from 0 to 1)",
            terms=({"objective": "taid", "schedule": {"t": rising}},),
        ),
        Arm(
            title="KL + labels, half each",
            terms=({**KL, "weight": 0.5}, {**LABELS, "weight": 0.5}),
        ),
        _beside("features mse, linear", "features", loss="mse", **linear),
        _beside("features mse, mlp", "features", loss="mse", layers="last", projector="mlp"),
        _beside("features cosine, linear", "features", loss="cosine", **linear),
        _beside("features correlation, linear", "features", loss="correlation", **linear),
        _beside("features similarity", "features", loss="similarity", layers="last"),
        _beside("features cka", "features", loss="cka", layers="last"),
        _beside("attention_maps kl", "attention_maps", loss="kl", layers="last"),
        _beside("attention_maps mse", "attention_maps", loss="mse", layers="last"),
        _beside("attention_relations q, k, v", "attention_relations", layers="last"),
        _beside("attention_relations v", "attention_relations", layers="last", relations=["value"]),
        *(
            _beside(f"flex_kd {select}", "flex_kd", select=select)
            for select in ("attribution", "random", "pca")
            if select != "random" or setting == "demo"
        ),
        _mix("KL + cosine + relations, fixed"),
        _mix("KL + cosine + relations, gradient", balance="gradient"),
        _mix("KL + cosine + relations, uncertainty", balance="uncertainty"),
        _beside("features cosine, linear", "features", first=LABELS, loss="cosine", **linear),
        _beside("attention_relations q, k, v", "attention_relations", first=LABELS, layers="last"),
        _beside("flex_kd attribution", "flex_kd", first=LABELS, select="attribution"),
    ]


COLUMNS = (
    ("KL to the teacher, nats/token", of_seeds("kl_nats")),
    ("beside forward_kl (lower in)", beside_arm("kl_nats", "forward_kl")),
    ("bits/byte", of_seeds("bits_per_byte")),
    *COSTS,
)


def table(results: dict[str, Any]) -> str:
    """Arms down; quality, time and memory across; both beside the arm of labels."""
    return tables(results, COLUMNS)


COMPARISON = Comparison(
    name="white_box",
    settings=[
        Setting(name="demo", make=demo),
        Setting(name="stories", make=stories),
    ],
    arms=arms,
)

if __name__ == "__main__":
    compare(COMPARISON, table)
