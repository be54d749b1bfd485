"""What a recipe asks of its models that they cannot do, found without a weight."""

import pytest

from limbeck.core.errors import RecipeError
from limbeck.recipe.check import check

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}


def test_a_sample_may_not_be_longer_than_the_students_positions(make_recipe):
    check(make_recipe(student={"config": GPT2, "max_length": 128}))
    with pytest.raises(RecipeError) as error:
        check(make_recipe(student={"config": GPT2, "max_length": 129}))
    assert error.value.field == "student.max_length"
    assert error.value.reason == (
        "129 is more than the 128 positions that the student has; set it to 128 or less"
    )


def test_positions_that_are_computed_have_no_end(make_recipe):
    check(make_recipe(student={"from": "teacher", "layers": [0], "max_length": 4096}))


@pytest.fixture
def short(tmp_path, tokenizer):
    """A teacher of 128 positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**{**GPT2, "vocab_size": len(tokenizer)})
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    return str(tmp_path / "short")


@pytest.mark.parametrize(
    ("student", "teacher", "field"),
    [
        (200, None, "student.max_length"),
        (200, 100, "student.max_length"),  # it reads what the student reads
        (100, 200, "teachers.big.max_length"),
        (128, 128, None),
    ],
)
def test_nor_than_a_teachers(make_recipe, short, student, teacher, field):
    spec = {"name": short} if teacher is None else {"name": short, "max_length": teacher}
    layers = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1}
    config = {**layers, "num_attention_heads": 2, "intermediate_size": 16}
    made = make_recipe(teachers={"big": spec}, student={"config": config, "max_length": student})
    if field is None:
        check(made)
        return
    with pytest.raises(RecipeError, match="teacher 'big' has; set it to 128 or less") as error:
        check(made)
    assert error.value.field == field


def test_of_a_cached_teacher_it_is_the_inner_field(make_recipe, short, tmp_path):
    cached = {"kind": "cache", "path": str(tmp_path / "cache"), "keep": "full"}
    of = {"name": short, "max_length": 200}
    with pytest.raises(RecipeError) as error:
        check(
            make_recipe(
                teachers={"big": {**cached, "of": of}}, student={"config": GPT2, "max_length": 64}
            )
        )
    assert error.value.field == "teachers.big.of.max_length"
