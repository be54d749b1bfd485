"""Who writes: the closed form of what is drawn, and a second model that follows along."""

from types import SimpleNamespace

import pytest
import torch

from limbeck.core.errors import RecipeError
from limbeck.core.types import Sample, Sampling, Turn
from limbeck.models.load import load_student, load_teacher
from limbeck.sources.speakers import MixedSpeaker, SpeculativeSpeaker, StudentSpeaker

CPU = torch.device("cpu")
SAMPLING = Sampling(max_tokens=10, temperature=1.0, scores=0)


@pytest.fixture
def models(make_recipe):
    recipe = make_recipe()
    student = load_student(recipe.student, recipe.teachers, CPU, 0)
    return student, {"big": load_teacher(recipe.teachers["big"], CPU, 64)}


def asked(*texts):
    return [Sample(id="1", turns=(Turn(text=text),)) for text in texts]


def test_mixed_draws_from_the_mixture():
    q, p = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.1, 0.8]])
    mixed = MixedSpeaker(teacher="t", alpha=0.25).mix(q.log(), p.log()).exp()
    assert torch.allclose(mixed, 0.25 * p + 0.75 * q)


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_speculative_draws_as_proposing_and_replacing_would(k):
    """Against the procedure: propose by q, and draw from p where that is not in its top k."""
    q, p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]), torch.tensor([[0.05, 0.15, 0.2, 0.6]])
    found = SpeculativeSpeaker(teacher="t", k=k).mix(q.log(), p.log()).exp()[0]
    kept = set(p[0].topk(min(k, 4)).indices.tolist())
    generator = torch.Generator().manual_seed(0)
    count = 200_000
    proposed = torch.multinomial(q[0], count, replacement=True, generator=generator)
    other = torch.multinomial(p[0], count, replacement=True, generator=generator)
    accepted = torch.tensor([token in kept for token in range(4)])[proposed]
    share = torch.bincount(torch.where(accepted, proposed, other), minlength=4) / count
    assert torch.allclose(found, share, atol=0.005)
    assert found.sum() == pytest.approx(1)


def test_impossible_tokens_stay_impossible():
    q, p = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    for speaker in (MixedSpeaker(teacher="t"), SpeculativeSpeaker(teacher="t", k=1)):
        mixed = speaker.mix(q.log(), p.log()).exp()
        assert mixed[0, 2] == 0
        assert mixed.sum() == pytest.approx(1)


def test_what_is_written_has_the_log_probability_with_which_it_was_drawn(models):
    student, teachers = models
    prompts = asked("the cat ")
    line = student.prompt_ids(prompts[0])
    speaker = MixedSpeaker(teacher="big", alpha=0.4)
    (said,) = speaker.write(student, teachers, prompts, [3], SAMPLING)
    with torch.no_grad():
        ids = torch.tensor([[*line, *said.ids]])
        both = [m.transformer(ids).logits[0].softmax(-1) for m in (student, teachers["big"])]
    for place, (token, logp) in enumerate(zip(said.ids, said.logp, strict=True)):
        row = len(line) + place - 1
        expected = 0.6 * both[0][row, token] + 0.4 * both[1][row, token]
        assert logp == pytest.approx(expected.log().item(), abs=1e-4)


def test_a_mixture_with_itself_is_the_student(models):
    student, _ = models
    prompts = asked("the cat ", "two")
    alone = StudentSpeaker().write(student, {}, prompts, [3, 4], SAMPLING)
    for speaker in (MixedSpeaker(teacher="me"), SpeculativeSpeaker(teacher="me", k=320)):
        both = speaker.write(student, {"me": student}, prompts, [3, 4], SAMPLING)
        assert [one.ids for one in both] == [one.ids for one in alone]


def test_a_teacher_that_cannot_write_along_is_refused(models, tmp_path):
    student, _ = models
    prompts = asked("a")
    with pytest.raises(RecipeError, match="no teacher with weights"):
        MixedSpeaker(teacher="no").write(student, {}, prompts, [1], SAMPLING)
    other = SimpleNamespace(transformer=None, vocabulary="another")
    with pytest.raises(RecipeError, match="another tokenizer"):
        MixedSpeaker(teacher="t").write(student, {"t": other}, prompts, [1], SAMPLING)
