"""What the trainers learn from: a tokenizer, two random models, rows of words.

Each row is exactly `prompt` + `completion` tokens long, the end-of-sequence token included, whoever
renders it: so tokens and learnt tokens of a step are the same for everyone, and no one pads.
Where the student writes, `endless` models do the same: they never draw the end of the sequence.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Size:
    """Of a measurement: the heads, the rows (in tokens), and how many steps.

    Attributes:
        vocabulary: rows of both heads; the tokenizer may have fewer, as published ones do.
        prompt: tokens of a row that are not learnt.
        completion: tokens that are, with the end of the sequence.
        warm_up: steps before the clock starts.
        steps: steps that are timed.
        sequences: rows of a step.
        teacher_width, teacher_layers, student_width, student_layers: of the models.
        gpu: on a GPU, in bfloat16; else on a CPU in float32.
    """

    vocabulary: int
    prompt: int
    completion: int
    warm_up: int
    steps: int
    sequences: int = 4
    teacher_width: int = 64
    teacher_layers: int = 2
    student_width: int = 32
    student_layers: int = 2
    gpu: bool = False


TOKENS = 1000
"""Of the tokenizer."""

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""A conversation as the plain text, so that chat trainers and plain ones see the same tokens."""


ENDLESS_LOGIT = -50.0
"""About what the end of the sequence has for a logit in models that never end."""


def write_material(folder: Path, size: Size, rows: int, *, endless: bool = False) -> None:
    """Write `teacher/`, `student/` (with their tokenizer) and `rows.jsonl` into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    draw = random.Random(0)
    tokenizer = make_tokenizer(draw)
    models = (
        ("teacher", size.teacher_width, size.teacher_layers, "bfloat16" if size.gpu else "float32"),
        ("student", size.student_width, size.student_layers, "float32"),
    )
    for seed, (name, width, layers, dtype) in enumerate(models):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(4, width // 64),
            num_key_value_heads=2,
            max_position_embeddings=max(256, size.prompt + size.completion),
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        with torch.device("cuda" if size.gpu else "cpu"):
            model = LlamaForCausalLM(config).to(getattr(torch, dtype))
        if endless:
            never_end(model)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = [w for w in tokenizer.get_vocab() if w.startswith("\u0120") and w[1:].isalpha()]
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(rows):
            drawn = [" " + w[1:] for w in draw.choices(words, k=size.prompt + size.completion - 1)]
            prompt, completion = "".join(drawn[: size.prompt]), "".join(drawn[size.prompt :])
            assert len(tokenizer(prompt + completion)["input_ids"]) == len(drawn)
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def never_end(model: Any) -> None:
    """Make the end of the sequence too unlikely to be drawn, by the weights alone.

    The first number of every hidden state is the same and positive (embeddings bring it, no layer
    adds to it), and the end's row of the head looks at nothing else.
    """
    import torch

    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = model.config.initializer_range
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model.lm_head.weight[model.config.eos_token_id] = 0
        model.lm_head.weight[model.config.eos_token_id, 0] = ENDLESS_LOGIT


def make_tokenizer(draw: random.Random):
    """A byte-level BPE of `TOKENS` tokens; GOLD's alignment needs the byte level."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    consonants, vowels = "bcdfghjklmnprstvwz", "aeiou"
    words = [
        "".join(draw.choice(consonants) + draw.choice(vowels) for _ in "xy") for _ in range(900)
    ]
    raw.train_from_iterator(
        [" " + " ".join(draw.choices(words, k=200)) for _ in range(200)], trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    assert len(tokenizer) == TOKENS, len(tokenizer)
    return tokenizer


def read_rows(folder: Path) -> list[dict[str, str]]:
    """The rows as they were written."""
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
