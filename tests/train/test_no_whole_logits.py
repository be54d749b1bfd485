"""No term but those that say so ever holds a tensor of all rows by all tokens of a vocabulary."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.losses import by_rows, chunks
from limbeck.recipe.document import Document
from limbeck.recipe.resolve import resolve
from limbeck.recipe.run import run

CHUNK = 64

KINDS = {
    "forward_kl": {},
    "sorted_l1": {},
    "sorted_l1 order": {"pairing": "order"},
    "semantic_transport": {"k": 4},
    "likelihood_matching": {},
    "mapped_kl": {},
    "prefix_kl": {},
    "hybrid_kl": {},
    "dual_space": {},
    "features": {"projector": "linear"},
    "flex_kd": {},
    "attention_relations": {},
}


class Largest(TorchDispatchMode):
    """Notes the most numbers that a new tensor has, other than those as wide as a model."""

    def __init__(self, widths):
        super().__init__()
        self.widths, self.largest, self.where = widths, 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and not set(value.shape[-1:]) & self.widths:
                size = value.untyped_storage().nbytes() // value.element_size()
                if value.numel() > 1 and min(size, value.numel()) > self.largest:
                    self.largest, self.where = value.numel(), f"{func} {list(value.shape)}"
        return out


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_tokenizer):
    """Two models of different tokenizers whose heads have far more columns than tokens."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    words = [f"{a}{b}{c}" for a in "bcdfghklm" for b in "aeiou" for c in "nprstvwxz"]
    folders = {}
    for name, size, columns, width in (
        ("student", 300, 4000, 16),
        ("teacher", 420, 5000, 32),
    ):
        folders[name] = tmp_path_factory.mktemp("wide") / name
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=columns,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        make_tokenizer(size, " ".join(words)).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide") / "rows.jsonl"
    words = [f"{a}{b}{c}" for a in "bcd" for b in "aei" for c in "npr"]
    with path.open("w") as file:
        for row in range(80):
            text = " ".join(words[(row * 5 + k) % len(words)] for k in range(12))
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.mark.parametrize("case", KINDS)
def test_a_step_makes_logits_of_a_chunk_at_a_time(case, models, rows, tmp_path, monkeypatch):
    for kind in ("CPU", "GPU"):
        monkeypatch.setattr(chunks, kind, replace(chunks.CPU, chunk_rows=CHUNK))
    monkeypatch.setattr(by_rows, "CHUNK_BYTES", CHUNK * 5000 * 4)
    kind = case.split()[0]
    same = kind == "forward_kl"
    recipe = resolve(
        Document(
            {
                "student": {"name": str(models["teacher" if same else "student"])},
                "teachers": {"big": {"name": str(models["teacher"])}},
                "source": {"path": str(rows), "holdout": 2},
                "terms": [
                    {"objective": {"kind": kind, **KINDS[case]}, "weight": 0.5},
                    {"objective": "cross_entropy", "weight": 0.5},
                ],
                "train": {"steps": 1, "batch_tokens": 2000},
            },
            {},
        )
    )
    from limbeck.train.loop import Trainer

    step = Trainer.step
    watch = Largest(widths={16, 32})
    rows_seen = []

    def watched(self):
        with watch:
            found = step(self)
        rows_seen.append(self.state.tokens)
        return found

    monkeypatch.setattr(Trainer, "step", watched)
    run(recipe, tmp_path / "run")
    assert rows_seen[0] > 1000
    whole = rows_seen[0] * 4000
    assert watch.largest <= whole / 4, f"{watch.where} of {whole:,}"
