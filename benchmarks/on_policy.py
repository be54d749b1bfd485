"""Distillation on the student's own words, TRL's trainers and limbeck's: steps a second and memory.

    python benchmarks/on_policy.py                 # everything; about ten minutes
    python benchmarks/on_policy.py --quick         # a few steps, nothing written
    python benchmarks/on_policy.py --vocabulary 1000 --trainer trl-gkd --trainer limbeck-4 --update

The models, the processes and the clock are those of `train_step.py`, and so is what `trainers.py`
says; all learn by the forward KL alone, at temperature 1. Each step has 4 prompts of 24 tokens,
which the student answers with 40 tokens that it draws from its whole distribution, and learns
from. The models never draw the end of the sequence (`train_material.py` says how), though all look
for it, so everyone writes and learns the same number of tokens: 160 and 256 positions a step, or
the row is an error.

- `trl-gkd`: `lmbda=1`, so that every batch is written by the student just before it is learnt.
- `trl-distillation`: TRL's other trainer for it, with a tiled loss; its own defaults.
- `limbeck-4`: `batch: 4`, the prompts of one step at a time: as fresh as TRL's.
- `limbeck-32`: `batch: 32`, the default: the prompts of eight steps are answered together, so that
  what is learnt was written up to seven steps before (3.5 on average). Steps that are timed are a
  multiple of eight; the median step of this one does not write, so look at steps a second.

"Writing" is the share of a step's time from the first token that is written until a model reads
them, with the choice of tokens and what is made of them.
"""

import sys
from functools import partial
from pathlib import Path

from clock import Clock
from table import on_policy_table
from train_material import Size
from train_step import Comparison, compare
from trainers import Maker, Ours, trl_distillation, trl_gkd

RESULTS = Path(__file__).with_name("results") / "on_policy.json"

SIZES = [
    Size(vocabulary=1000, prompt=24, completion=40, warm_up=16, steps=400),
    Size(vocabulary=151_936, prompt=24, completion=40, warm_up=8, steps=16),
]

QUICK = [
    Size(vocabulary=1000, prompt=24, completion=40, warm_up=8, steps=16),
    Size(vocabulary=151_936, prompt=24, completion=40, warm_up=1, steps=8),
]


def own_words(folder: Path, size: Size, clock: Clock, *, batch: int) -> Ours:
    """limbeck on what its student writes, `batch` prompts at a time."""
    made = Ours(folder, size, clock, teacher=True)
    made.recipe["source"] = {
        "kind": "rollouts",
        "of": made.recipe["source"],
        "share": 1,
        "max_tokens": size.completion,
        "batch": batch,
    }
    made.recipe["terms"] = [{"objective": {"kind": "forward_kl"}, "teacher": "big"}]
    return made


TRAINERS: dict[str, tuple[str, Maker]] = {
    "trl-gkd": ("TRL GKD (lmbda 1)", partial(trl_gkd, writes=True)),
    "trl-distillation": ("TRL Distillation (tiled)", partial(trl_distillation, writes=True)),
    "limbeck-4": (
        "**limbeck**, the prompts of a step at a time",
        partial(own_words, batch=Size.sequences),
    ),
    "limbeck-32": (
        "**limbeck**, of eight steps (default; less fresh)",
        partial(own_words, batch=32),
    ),
}

ON_POLICY = Comparison(
    script=__file__,
    about=__doc__,
    trainers=TRAINERS,
    sizes=SIZES,
    quick=QUICK,
    results=RESULTS,
    table=on_policy_table,
    writes=True,
)


if __name__ == "__main__":
    sys.exit(compare(ON_POLICY))
