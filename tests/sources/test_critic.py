"""The critic of GAD: what it finds at first, what it learns, and that it goes on after a stop."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from limbeck.core.errors import DivergedError, RecipeError
from limbeck.core.types import Sample, Turn
from limbeck.models.load import load_student
from limbeck.recipe.run import run
from limbeck.sources.collapse import Collapse, Watch
from limbeck.sources.critic import Critic


@pytest.fixture
def student(make_recipe):
    return load_student(make_recipe().student, make_recipe().teachers, torch.device("cpu"), 0)


def answer(text, k=0):
    turns = (Turn(text="the cat "), Turn(text=text, learn=True))
    return Sample(id=str(k), turns=turns, group="g", channel="student")


def test_at_first_all_answers_are_equal(student):
    critic = Critic().open(student, None, 0)
    (judged,) = critic.judge([answer("sat")], [[answer("ran"), answer("sat on a mat")]])
    assert [sample.score for sample in judged] == [0.0, 0.0]
    assert critic.figures["loss"] == pytest.approx(math.log(2))


def test_it_learns_to_tell_them_apart_and_leaves_the_student_alone(student):
    before = [parameter.clone() for parameter in student.module.parameters()]
    critic = Critic(learning_rate=0.01).open(student, None, 0)
    real, mine = answer("sat on a mat"), [answer("dogs dogs dogs", 1), answer("red river", 2)]
    for _ in range(12):
        (judged,) = critic.judge([real], [mine])
    assert critic.figures["right"] == 1.0
    assert critic.figures["loss"] < 0.4
    assert critic.figures["given_score"] > critic.figures["student_score"]
    (judged,) = critic.judge([real], [[*mine, answer("sat on a mat", 3)]])
    assert judged[2].score > max(judged[0].score, judged[1].score)
    assert all(map(torch.equal, before, student.module.parameters()))


def test_the_score_is_that_before_it_learns(student):
    """An update on an answer must not be part of what that answer is worth."""
    critic = Critic(learning_rate=0.01).open(student, None, 0)
    for _ in range(3):
        critic.judge([answer("sat")], [[answer("ran")]])
    with torch.no_grad():
        expected = critic._scores([answer("ran")]).item()
    ((judged,),) = critic.judge([answer("sat")], [[answer("ran")]])
    assert judged.score == pytest.approx(expected)


def test_it_sees_the_end_of_an_answer(student):
    """Behind the last token, so that one that was cut differs from one that was ended."""
    from limbeck.core.types import Written

    critic = Critic(learning_rate=0.01).open(student, None, 0)
    for _ in range(2):
        critic.judge([answer("sat")], [[answer("ran")]])
    ids = tuple(student.tokenizer.encode("sat"))
    ended, cut = (
        replace(answer("sat"), written=Written(vocabulary=student.vocabulary, ids=(*ids, *more)))
        for more in ((student.encoder.eos,), ())
    )
    with torch.no_grad():
        scores = critic._scores([ended, cut]).tolist()
    assert scores[0] != scores[1]


def test_a_text_as_long_as_may_be_is_read(tokenizer):
    """A model with a table of positions has none for one more token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from limbeck.models.causal import CausalModel

    config = GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2)
    student = CausalModel(GPT2LMHeadModel(config), tokenizer, name="s", max_length=16)
    critic = Critic(learning_rate=0.01).open(student, None, 0)
    real, mine = answer("the cat sat on a mat " * 9), answer("dogs " * 40)
    for _ in range(2):
        (judged,) = critic.judge([real], [[mine, answer("dogs")]])
    assert all(math.isfinite(sample.score) for sample in judged)
    assert len(critic._closed(mine).ids) == 16


def test_a_prompt_without_a_given_answer_is_only_scored(student):
    critic = Critic().open(student, None, 0)
    prompt = replace(answer(""), turns=(Turn(text="the cat "),))
    ((judged,),) = critic.judge([prompt], [[answer("ran")]])
    assert judged.score == 0.0
    assert critic.figures == {}


def test_a_split_student_is_refused(student):
    from types import SimpleNamespace

    with pytest.raises(RecipeError, match="use ddp"):
        Critic().open(student, SimpleNamespace(parallel="fsdp", size=2), 0)


def gad(make_recipe, tiny_data, **train):
    return make_recipe(
        teachers={},
        student={
            "config": {
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
            "tokenizer": train.pop("tokenizer"),
        },
        source={
            "kind": "rollouts",
            "of": {"path": str(tiny_data), "holdout": 4},
            "answers": 3,
            "share": 0.6,
            "max_tokens": 6,
            "batch": 6,
            "scorer": {"kind": "critic", "learning_rate": 0.01},
        },
        terms=[
            {"objective": "cross_entropy", "channel": "given"},
            {"objective": "group_policy", "channel": "student"},
        ],
        train=train,
    )


def test_a_resumed_run_has_the_same_critic(make_recipe, tiny_data, tiny_teacher, tmp_path):
    recipe = gad(make_recipe, tiny_data, tokenizer=str(tiny_teacher), steps=6, save_every=3)
    for name in "ab":
        run(recipe, tmp_path / name)
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-6")
    (tmp_path / "b" / "report.json").unlink()
    run(recipe, tmp_path / "b", resume=True)
    for file in ("carried", "weights"):
        a, b = (
            load_file(tmp_path / x / "checkpoints" / "step-6" / f"{file}.safetensors") for x in "ab"
        )
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert any("critic/loss" in json.loads(line) for line in lines)


REPORT = {"length_tokens": 40.0, "repetition": 0.1, "entropy_nats": 1.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"repetition": 0.9}, "repeats"),
        ({"length_tokens": 1.0}, "tokens"),
        ({"entropy_nats": 0.0}, "surprise"),
    ],
)
def test_a_collapse_stops_the_run_after_a_while(changes, said):
    watch = Watch(Collapse(patience=3))
    watch.look(1, REPORT)
    for step in (2, 3):
        watch.look(step, {**REPORT, **changes})
    watch.look(4, REPORT)  # a good one begins anew
    again = Watch(Collapse(patience=3))
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    for step in (5, 6):
        again.look(step, {**REPORT, **changes})
    again.look(6, {"share": 0.5})  # nothing was written
    with pytest.raises(DivergedError, match=said):
        again.look(7, {**REPORT, **changes})
