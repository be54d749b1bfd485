"""`train_step.py` on a GPU, with models of a real width: steps a second and peak device memory.

    python benchmarks/train_step_gpu.py

Random Llama models, a teacher of 12 layers of width 2,048 (1.0 billion weights) and a student of 8
layers of width 1,024 (0.4 billion), V = 151,936, in bfloat16; 8 rows a step of 256 tokens of prompt
and 768 of completion, so that 6,144 of 8,192 are learnt. Time is wall clock from the end of one
step to the end of the next, the GPU's work done, after a warm-up; memory is the most that torch has
allocated on the GPU. `trainers.py` says what is set.
"""

import sys
from dataclasses import replace
from pathlib import Path

from table import train_step_table
from train_material import Size
from train_step import Comparison, compare
from trainers import TRAINERS

SIZE = Size(
    vocabulary=151_936,
    prompt=256,
    completion=768,
    warm_up=4,
    steps=12,
    sequences=8,
    teacher_width=2048,
    teacher_layers=12,
    student_width=1024,
    student_layers=8,
    gpu=True,
)

NAMES = ("trl-sft", "trl-gkd", "trl-distillation", "limbeck-labels", "limbeck")

GPU = Comparison(
    script=__file__,
    about=__doc__,
    trainers={name: TRAINERS[name] for name in NAMES},
    sizes=[SIZE],
    quick=[replace(SIZE, warm_up=2, steps=3)],
    results=Path(__file__).with_name("results") / "train_step_gpu.json",
    table=train_step_table,
    cores=None,
)


if __name__ == "__main__":
    sys.exit(compare(GPU))
