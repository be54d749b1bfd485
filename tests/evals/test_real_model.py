"""The evaluations on a model of transformers: its own loss is the reference."""

import copy
import math

import pytest
import torch
from tests.evals.conftest import sample
from transformers import AutoModelForCausalLM

from limbeck.evals import Agreement, Perplexity, tokens_per_second
from limbeck.models.causal import CausalModel

HOLDOUT = [
    sample("the cat sat on a mat\n", "and saw two dogs"),
    sample("crème ", "brûlée near the river"),
    sample("three old red trees\n", "run"),
]


@pytest.fixture(scope="module")
def teacher(tiny_teacher, tokenizer) -> CausalModel:
    module = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    return CausalModel(module, tokenizer, name="tiny", max_length=128)


@torch.no_grad()
def test_perplexity_is_the_model_s_own_loss(teacher: CausalModel) -> None:
    nats, tokens = 0.0, 0
    for item in HOLDOUT:
        encoding = teacher.encode(item)
        ids = torch.tensor([list(encoding.ids)])
        labels = torch.where(torch.tensor([list(encoding.learn)]), ids, -100)
        nats += float(teacher.module(input_ids=ids, labels=labels).loss) * encoding.rows
        tokens += encoding.rows
    scores = Perplexity(batch_tokens=40).measure(teacher, None, HOLDOUT)
    assert scores["perplexity"].value == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    written = sum(len(item.turns[-1].text.encode()) for item in HOLDOUT)
    assert scores["bits_per_byte"].n == written
    assert scores["bits_per_byte"].value == pytest.approx(nats / math.log(2) / written, rel=1e-5)


@torch.no_grad()
def test_agreement_is_that_of_whole_distributions(teacher: CausalModel, tokenizer) -> None:
    module = copy.deepcopy(teacher.module)
    for parameter in module.parameters():
        parameter.mul_(0.9)
    student = CausalModel(module, tokenizer, name="shrunk", max_length=128)
    total, same, rows = 0.0, 0, 0
    for item in HOLDOUT:
        encoding = teacher.encode(item)
        ids = torch.tensor([list(encoding.ids)])
        learnt = torch.tensor(encoding.learn)[1:]
        p, q = (m(input_ids=ids).logits[0, :-1][learnt].double() for m in (teacher.module, module))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        rows += encoding.rows
    scores = Agreement(batch_tokens=40).measure(student, teacher, HOLDOUT)
    assert scores["kl_nats"].value == pytest.approx(total / rows, rel=1e-4)
    assert scores["top1"].value == pytest.approx(same / rows)
    assert scores["kl_nats"].n == rows


def test_speed_of_writing(teacher: CausalModel) -> None:
    prompts = [sample("the cat", ""), sample("two dogs", "")]
    rate = tokens_per_second(teacher, prompts, max_tokens=4)
    assert rate is not None
    assert rate > 0
