"""Where the demo's teacher says more than a label does: its entropy, by kind of token.

    python benchmarks/teacher_certainty.py

A distribution can teach more than a label only where it is spread out.
"""

import torch

from limbeck.core.specs import LocalTeacher
from limbeck.core.types import Sample, Turn
from limbeck.demo import model_path, problems
from limbeck.models.load import load_teacher

ROWS = 500


def main() -> None:
    """Print mean entropy (nats) and share of tokens, for what decides an answer and for words."""
    spec = LocalTeacher(name=str(model_path("teacher")), dtype="float32")
    teacher = load_teacher(spec, torch.device("cpu"), 512)
    samples = [
        Sample(id=str(i), turns=(Turn(text=row.prompt), Turn(text=row.completion, learn=True)))
        for i, row in enumerate(problems(3, "test", ROWS))
    ]
    entropies: dict[str, list[float]] = {"digits and operators": [], "words and marks": []}
    for first in range(0, ROWS, 50):
        view = teacher.collate([teacher.encode(s) for s in samples[first : first + 50]])
        with torch.no_grad():
            signals = teacher.read(view, frozenset({"logits"}))
        logp = signals.logits.log_softmax(-1)
        values = -(logp.exp() * logp).sum(-1)
        for label, value in zip(signals.labels.tolist(), values.tolist(), strict=True):
            text = teacher.tokenizer.decode([label]).strip()
            decides = text.isdigit() or text in ("+", "-", "*", "/")
            entropies["digits and operators" if decides else "words and marks"].append(value)
    total = sum(map(len, entropies.values()))
    for kind, values in entropies.items():
        mean = sum(values) / len(values)
        print(f"{kind}: {len(values) / total:.0%} of tokens, entropy {mean:.3f} nats")


if __name__ == "__main__":
    main()
