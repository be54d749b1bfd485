"""The trainers that `train_step.py` and `on_policy.py` measure: TRL's, and ours.

What is set besides the sizes, and whom it helps:
- TRL: `gradient_checkpointing=False` and `bf16=False` (its defaults recompute every layer and
  compute in bfloat16, which is slower here), no checkpoints, no progress bar, no tracker, its
  loss logged every 10 steps (default), the loader in the process (default) without pinned memory.
  Ours: a line of metrics every step, no evaluation, one checkpoint at the end.
- SFT tokenizes before it trains, GKD and GOLD tokenize while they train, as does limbeck.
  `gkd-tokenized` is GKD with rows that were tokenized beforehand.
- TRL's DistillationTrainer generates by design; in `train_step.py` a subclass gives it the rows'
  completions, tokenized beforehand, so it neither generates nor tokenizes.
- On a GPU: autocast to bfloat16 with the student's weights in float32, the teacher in bfloat16,
  and pinned memory.
- All: AdamW in float32, clipping at 1, constant or decaying rate (costs nothing), forward KL
  (beta 0) at temperature 1.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clock import Clock
from train_material import Size, read_rows

RATE = 3e-4


def trl_settings(folder: Path, size: Size) -> dict[str, Any]:
    """What TRL's trainers have in common."""
    return {
        "output_dir": str(folder / "out"),
        "max_steps": size.warm_up + size.steps,
        "per_device_train_batch_size": size.sequences,
        "learning_rate": RATE,
        "gradient_checkpointing": False,
        "bf16": size.gpu,
        "use_cpu": not size.gpu,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": size.gpu,
    }


def trl_parts(folder: Path, clock: Clock) -> dict[str, Any]:
    """Student, tokenizer and callback of any of TRL's trainers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype="float32")
    clock.watch(student)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    return {"model": student, "processing_class": tokenizer, "callbacks": [Ticks()]}


def trl_teacher(folder: Path, size: Size) -> Any:
    """The teacher, which GOLD asks to have a folder as its name."""
    from transformers import AutoModelForCausalLM

    dtype = "bfloat16" if size.gpu else "float32"
    return AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=dtype)


def conversations(folder: Path) -> Any:
    """The rows as GKD and GOLD document them."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"]},
                ]
            }
            for row in read_rows(folder)
        ]
    )


def trl_sft(folder: Path, size: Size, clock: Clock) -> Any:
    """TRL's supervised fine-tuning: no teacher."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        args=SFTConfig(**trl_settings(folder, size)),
        train_dataset=Dataset.from_list(read_rows(folder)),
        **trl_parts(folder, clock),
    )


def trl_gkd(
    folder: Path, size: Size, clock: Clock, *, tokenized: bool = False, writes: bool = False
) -> Any:
    """TRL's GKD on the rows as they are (lmbda 0), or on what the student writes (lmbda 1)."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    parts = trl_parts(folder, clock)
    rows = conversations(folder)
    if tokenized:
        rows = _tokenized(folder, size, parts["processing_class"])
    return GKDTrainer(
        teacher_model=trl_teacher(folder, size),
        args=GKDConfig(
            **trl_settings(folder, size),
            lmbda=float(writes),
            beta=0.0,
            temperature=1.0,
            max_new_tokens=size.completion,
        ),
        train_dataset=rows,
        **parts,
    )


def _tokenized(folder: Path, size: Size, tokenizer: Any) -> Any:
    from datasets import Dataset

    mask = [0] * size.prompt + [1] * size.completion
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "input_ids": [
                    *tokenizer(row["prompt"] + row["completion"])["input_ids"],
                    tokenizer.eos_token_id,
                ],
                "completion_mask": mask,
            }
            for row in read_rows(folder)
        ]
    )


def trl_gold(folder: Path, size: Size, clock: Clock, *, uld: bool = False) -> Any:
    """TRL's GOLD on the rows as they are; with ULD it compares across tokenizers."""
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    return GOLDTrainer(
        teacher_model=trl_teacher(folder, size),
        args=GOLDConfig(
            **trl_settings(folder, size),
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            use_uld_loss=uld,
            teacher_tokenizer_name_or_path=str(folder / "teacher") if uld else None,
        ),
        train_dataset=conversations(folder),
        **trl_parts(folder, clock),
    )


def trl_distillation(folder: Path, size: Size, clock: Clock, *, writes: bool = False) -> Any:
    """TRL's DistillationTrainer (tiled loss), its generation replaced by the rows' completions.

    Unless it `writes`, which it does in the manner of TRL's other trainers.
    """
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    parts = trl_parts(folder, clock)
    tokenizer = parts["processing_class"]
    rows = read_rows(folder)
    known = {
        row["prompt"]: (
            tokenizer(row["prompt"])["input_ids"],
            [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id],
        )
        for row in rows
    }

    class OffPolicy(DistillationTrainer):
        def _generate(self, prompts: list[Any]) -> Any:
            ids = [known[prompt] for prompt in prompts]
            return [p for p, _ in ids], [c for _, c in ids], None, None, []

    return (DistillationTrainer if writes else OffPolicy)(
        teacher_model=trl_teacher(folder, size),
        args=DistillationConfig(
            **trl_settings(folder, size), beta=0.0, max_completion_length=size.completion
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        **parts,
    )


class Ours:
    """A run of limbeck through its Python interface, as a user starts it."""

    def __init__(self, folder: Path, size: Size, clock: Clock, *, teacher: bool) -> None:
        # One step more: the clock ticks when the next one begins.
        steps = size.warm_up + size.steps + 1
        dtype = "bfloat16" if size.gpu else "float32"
        cross_entropy = {"objective": {"kind": "cross_entropy"}, "weight": 0.5}
        recipe: dict[str, Any] = {
            "student": {"name": str(folder / "student"), "dtype": dtype},
            "source": {"path": str(folder / "rows.jsonl"), "holdout": 0},
            "terms": [cross_entropy],
            "train": {
                "steps": steps,
                "batch_tokens": size.sequences * (size.prompt + size.completion),
                "learning_rate": RATE,
                "save_every": steps,
                "device": "cuda" if size.gpu else "cpu",
            },
        }
        if teacher:
            recipe["teachers"] = {"big": {"name": str(folder / "teacher"), "dtype": dtype}}
            forward_kl = {"objective": {"kind": "forward_kl"}, "teacher": "big", "weight": 0.5}
            recipe["terms"] = [forward_kl, cross_entropy]
        self.recipe, self.out, self.clock = recipe, folder / "run", clock

    def train(self) -> None:
        """Run; the clock ticks when the loop comes for the next step, listeners done."""
        import limbeck
        from limbeck.train.loop import Trainer

        clock, step = self.clock, Trainer.step
        watched: list[Any] = []

        def ticking(trainer: Any) -> dict[str, float]:
            if not watched:
                teachers = [reader.transformer for reader in trainer.readers.values()]
                clock.watch(trainer.student.transformer, *teachers)
                watched.append(trainer)
            else:
                clock.tick()
            return step(trainer)

        Trainer.step = ticking
        limbeck.run(self.recipe, self.out)


Maker = Callable[[Path, Size, Clock], Any]
"""Makes a trainer of the material, with a `train` that lets the clock tick."""


def ours(*, teacher: bool) -> Maker:
    """limbeck with forward KL and cross-entropy, or with cross-entropy alone."""
    return lambda folder, size, clock: Ours(folder, size, clock, teacher=teacher)


TRAINERS: dict[str, tuple[str, Maker]] = {
    "trl-sft": ("TRL SFT (no teacher)", trl_sft),
    "trl-gkd": ("TRL GKD, forward KL", trl_gkd),
    "trl-gkd-tokenized": (
        "TRL GKD, rows tokenized before",
        lambda folder, size, clock: trl_gkd(folder, size, clock, tokenized=True),
    ),
    "trl-gold": ("TRL GOLD, forward KL", trl_gold),
    "trl-gold-uld": (
        "TRL GOLD with ULD",
        lambda folder, size, clock: trl_gold(folder, size, clock, uld=True),
    ),
    "trl-distillation": ("TRL Distillation (tiled), off-policy", trl_distillation),
    "limbeck-labels": ("**limbeck**, cross-entropy (no teacher)", ours(teacher=False)),
    "limbeck": ("**limbeck**, forward KL + cross-entropy", ours(teacher=True)),
}
