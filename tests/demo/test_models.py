"""The two models that ship with the package: small, whole, and able to do what is said of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.demo import model_path, problems, verify

PROBLEMS = 100


@pytest.fixture(scope="module")
def models():
    import torch

    from limbeck.core.specs import LocalTeacher
    from limbeck.models.load import load_teacher

    return {
        which: load_teacher(
            LocalTeacher(name=str(model_path(which)), dtype="float32"), torch.device("cpu"), 512
        )
        for which in ("teacher", "student")
    }


def size(model) -> int:
    return sum(parameter.numel() for parameter in model.module.parameters())


def test_sizes(models):
    assert size(models["teacher"]) <= 3_000_000
    assert size(models["student"]) * 8 <= size(models["teacher"])
    assert (model_path("teacher") / "model.safetensors").stat().st_size <= 6_000_000


def test_both_have_the_same_tokenizer(models):
    assert models["teacher"].vocabulary == models["student"].vocabulary


@settings(max_examples=200)
@given(text=st.text(st.characters(blacklist_categories=["Cs"]), max_size=60))
def test_any_text_survives_the_tokenizer(models, text):
    tokenizer = models["teacher"].tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_digits_are_single_tokens(models):
    tokenizer = models["teacher"].tokenizer
    for row in problems(0, "train", 20):
        tokens = tokenizer.tokenize(row.completion)
        assert all(len(token.lstrip("Ġ")) == 1 for token in tokens if any(map(str.isdigit, token)))


def test_the_teacher_solves_unseen_problems(models):
    from limbeck.core.types import Sample, Sampling, Turn

    rows = list(problems(5, "test", PROBLEMS))
    prompts = [Sample(id="p", turns=(Turn(text=row.prompt),)) for row in rows]
    answers = models["teacher"].speak(prompts, Sampling(max_tokens=120))
    right = sum(verify(row, answer) for row, answer in zip(rows, answers, strict=True))
    # The measured share is far above; this floor leaves room for chance in 100 problems.
    assert right >= 0.85 * PROBLEMS
