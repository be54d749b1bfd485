"""Whose sentences they are, and which answers are kept for it."""

import itertools
import math
import re
from collections import Counter

import pytest
import torch
from fakes import FakeReader, good, row, run_step
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.core.errors import RecipeError
from limbeck.core.specs import LocalTeacher
from limbeck.models.load import load_teacher
from limbeck.synth.divergence import Divergence, kinds_of, sentence_scores
from limbeck.synth.scoring import BATCH_TOKENS, Token, read_tokens, sample_of, written_tokens
from limbeck.synth.sentences import sentences
from limbeck.synth.step import asks_of

TEXT = "Now 2 + 3 = 5. Then 5 - 1 = 4. The answer is 4."


def words(text):
    """Words with the space before them, as most tokenizers cut."""
    return re.findall(r"\s*\S+|\s+$", text)


def halves(text):
    """The same, each in two tokens."""
    parts = [(word[: len(word) // 2], word[len(word) // 2 :]) for word in words(text)]
    return [part for pair in parts for part in pair if part]


def per_character(nats):
    """A log-probability that grows with a token's length, whatever the cut."""
    return lambda text, start, end: -nats(start) * (end - start)


def reader(pieces=words, nats=lambda start: 0.5, **more):
    return FakeReader(pieces, per_character(nats), **more)


def tokens_of(text, pieces, logp):
    found, place = [], 0
    for piece in pieces(text):
        found.append(Token(place, place + len(piece.encode()), logp(piece, place)))
        place += len(piece.encode())
    return found


def step(**more):
    return Divergence(teacher="big", **{"threshold": 0.1, **more})


def test_scores_are_means_over_the_tokens_that_end_in_a_sentence():
    tokens = tokens_of(TEXT, words, lambda piece, place: -float(place % 7) - 0.25)
    found = sentences(TEXT)
    for unit in ("token", "character"):
        scores = sentence_scores(found, [*tokens, Token(len(TEXT), len(TEXT), -99.0)], unit)
        for sentence, score in zip(found, scores, strict=True):
            mine = [t.logp for t in tokens if sentence.start < t.end <= sentence.end]
            length = len(mine) if unit == "token" else len(sentence.text)
            assert score == pytest.approx(sum(mine) / length, rel=1e-12)


@given(st.integers(1, 6), st.integers(0, 5))
def test_splitting_a_token_changes_its_mean_but_not_that_of_characters(parts, which):
    """One token of logp x becomes several whose logps sum to x."""
    tokens = tokens_of(TEXT, words, lambda piece, place: -1.0 - place)
    old = tokens[which]
    size = old.end - old.start
    edges = [old.start + size * k // parts for k in range(parts + 1)]
    pieces = [
        Token(a, b, old.logp / parts) for a, b in itertools.pairwise(edges) if b > a or parts == 1
    ]
    pieces[0] = Token(pieces[0].start, pieces[0].end, old.logp - sum(t.logp for t in pieces[1:]))
    other = [*tokens[:which], *pieces, *tokens[which + 1 :]]
    found = sentences(TEXT)
    by_character = [sentence_scores(found, t, "character") for t in (tokens, other)]
    assert by_character[0] == pytest.approx(by_character[1], rel=1e-12)
    by_token = [sentence_scores(found, t, "token") for t in (tokens, other)]
    if len(pieces) > 1:
        at = next(i for i, s in enumerate(found) if s.start < old.end <= s.end)
        changed = [a != pytest.approx(b) for a, b in zip(*by_token, strict=True)]
        # The first piece may end in the sentence before, where the token only ended in its own.
        assert changed[at]


def test_two_tokenizers_that_agree_on_text_share_every_sentence_by_character_only():
    row_ = row("a", TEXT)
    readers = {"big": reader(halves), "student": reader(words)}
    (found,), _ = run_step(step(unit="character"), [row_], readers=readers)
    assert (found.notes["teacher_sentences"], found.notes["shared_sentences"]) == (0, 3)
    # The teacher's tokens are half as long, so each is likelier: nothing but the cut is measured.
    (found,), _ = run_step(step(unit="token"), [row_], readers=readers)
    assert found.notes["teacher_sentences"] == 3


def test_the_teachers_sentence_is_found_and_its_share_is_of_characters():
    second = range(15, 31)  # bytes of the second sentence
    readers = {
        "big": reader(nats=lambda start: 0.2 if start in second else 0.5),
        "student": reader(nats=lambda start: 0.5 if start < 31 else 0.1),
    }
    (found,), desk = run_step(step(), [row("a", TEXT)], readers=readers)
    kinds = [found.notes[f"{kind}_sentences"] for kind in ("teacher", "student", "shared")]
    assert kinds == [1, 1, 1]
    assert found.notes["teacher_share"] == 16 / len(TEXT)
    assert desk.counts == {"teacher sentences": 1, "student sentences": 1, "shared sentences": 1}


def test_the_threshold_itself_counts_and_infinities_do_not_hurt():
    one = sentences("One.")[0]

    def kind(theirs, own, threshold=0.25):
        tokens = [[Token(0, 4, 4 * value)] for value in (theirs, own)]
        ((sentence, found),) = kinds_of("One.", *tokens, unit="character", threshold=threshold)
        assert sentence == one
        return found

    assert kind(-0.25, -0.5) == "teacher"
    assert kind(-0.26, -0.5) == "shared"
    assert kind(-0.5, -0.25) == "student"
    assert kind(-1.0, -math.inf) == "teacher"
    assert kind(-math.inf, -1.0) == "student"
    assert kind(-math.inf, -math.inf) == "shared"


def candidates(count=3):
    return [row(f"p#{k}", TEXT + f" Answer {k}.", group="p") for k in range(count)]


def test_equal_models_have_no_teachers_sentence_and_choose_evenly():
    readers = {"big": reader(), "student": reader()}
    chosen = Counter()
    for seed in range(300):
        rows, desk = run_step(step(best=1), candidates(), readers=readers, seed=seed)
        assert desk.counts["teacher sentences"] == desk.counts["student sentences"] == 0
        (kept,) = good(rows)
        chosen[kept.id] += 1
        again, _ = run_step(step(best=1), candidates(), readers=readers, seed=seed)
        assert again == rows  # the lot is drawn from the seed and the row's id
    # 300 fair draws of three: each count is within four standard deviations of 100.
    assert all(abs(chosen[one.id] - 100) < 4 * math.sqrt(300 * 2 / 9) for one in candidates())


def with_share(name, group, high):
    """An answer of four sentences, of which the first `high` are the teacher's own."""
    marks = ["Yes it is."] * high + ["No it isn't."] * (4 - high)
    return row(name, " ".join(marks), group=group)


def by_word():
    def theirs(text, start, end):
        return -(0.1 if "Yes" in sentence_at(text, start, end) else 1.0) * (end - start)

    def sentence_at(text, start, end):
        return next(s.text for s in sentences(text) if s.start < end <= s.end)

    return {"big": FakeReader(words, theirs), "student": reader(nats=lambda start: 1.0)}


def test_the_best_of_each_prompt_are_kept_and_the_others_say_why_not():
    rows = [with_share(f"{g}#{h}", g, h) for g, h in itertools.product("ab", (1, 4, 0, 2))]
    found, _ = run_step(step(best=2), rows, readers=by_word())
    assert [one.id for one in found] == [one.id for one in rows]  # no row is lost or moved
    assert [one.id for one in good(found)] == ["a#4", "a#2", "b#4", "b#2"]
    assert {one.failure for one in found} == {
        None,
        "other answers have more of the teacher's own sentences",
    }


def test_a_part_of_all_is_kept_or_those_above_a_share():
    rows = [with_share(f"{g}#{h}", g, h) for g, h in (("a", 1), ("b", 2), ("c", 3), ("d", 4))]
    found, _ = run_step(step(keep=0.5), rows, readers=by_word())
    assert [one.id for one in good(found)] == ["c#3", "d#4"]
    found, _ = run_step(step(keep=0.51), rows, readers=by_word())
    assert len(good(found)) == 3
    found, _ = run_step(step(min_share=0.6), rows, readers=by_word())
    assert [one.id for one in good(found)] == ["c#3", "d#4"]
    assert found[0].failure == "only 0.22 of it is the teacher's own"
    # `keep` counts those that are still good: half of two.
    found, _ = run_step(step(min_share=0.6, keep=0.5), rows, readers=by_word())
    assert [one.id for one in good(found)] == ["d#4"]


def test_what_a_model_cannot_read_fails_with_the_reason():
    readers = {"big": reader(longest=8), "student": reader()}
    rows = [row("short", "Yes."), row("long", TEXT), row("empty", "")]
    found, _ = run_step(step(), rows, readers=readers)
    assert [one.failure for one in found] == [
        None,
        "fake reader cannot read so long a text",
        "there is no text to score",
    ]


def test_scores_that_the_teacher_wrote_stand_for_its_reading():
    said = [[piece, -0.2 * len(piece)] for piece in words(TEXT)]
    rows = [
        row("a", TEXT, notes={"scores": said}),
        row("b", TEXT),
        row("c", TEXT + " More.", notes={"scores": said}),
    ]
    one = step(scores="written", threshold=0.25)
    assert one.reads == ("student",)
    found, _ = run_step(one, rows, readers={"student": reader()})
    assert found[0].notes["teacher_sentences"] == 3
    assert "ask for them with `scores: true`" in found[1].failure
    assert found[2].failure == "the teacher's scores do not spell the text"


@pytest.mark.parametrize("end", ["<eos>", "\nQ:", " And"])
def test_what_ended_an_answer_has_no_place_in_it(end):
    """vLLM shows the token, or the stop string, behind a text that is without it."""
    said = [["One", -1.0], [" two.", -2.0], [end, -3.0]]
    found = written_tokens(row("a", "One two.", notes={"scores": said}))
    assert [(t.start, t.end, t.logp) for t in found] == [(0, 3, -1.0), (3, 8, -2.0)]


@pytest.mark.parametrize("lead", ["", " ", "\n"])
def test_written_tokens_have_their_places_where_white_space_was_taken_off(lead):
    said = [{"text": "  Zwei", "logp": -1.0}, {"text": " größer\n", "logp": -2.0}]
    text = lead + "Zwei größer"
    found = written_tokens(row("a", text, notes={"scores": said}))
    at = len(lead)
    assert [(t.end, t.logp) for t in found] == [
        (at + 4, -1.0),
        (at + 4 + len(" größer".encode()), -2.0),
    ]
    assert found[0].start == 0 or lead == ""
    assert text.encode()[found[1].start : found[1].end].decode() == " größer"


def test_long_and_short_rows_are_read_in_batches_and_come_out_in_order():
    rows = [row(str(k), "ab " * (1 + 37 * k % 500) + "end.") for k in range(40)]
    one = reader()
    found = list(read_tokens(iter(rows), one))
    assert [r.id for r, _ in found] == [r.id for r in rows]
    assert 1 < len(one.batches) < 40
    for r, tokens in found:  # the first token has the line break of the prompt too
        assert sum(t.logp for t in tokens) == pytest.approx(-0.5 * (1 + len(r.text)), rel=1e-5)
    assert BATCH_TOKENS >= 500


def test_what_no_tokenizer_can_read_is_said_of_its_row_alone(tiny_teacher):
    model = load_teacher(LocalTeacher(name=str(tiny_teacher)), torch.device("cpu"), 128)
    rows = [row("a", "One."), row("b", "cut \ud83d"), row("c", "Two.")]
    found = [tokens for _, tokens in read_tokens(rows, model)]
    assert found[1] == "it holds half a character, which no tokenizer can read"
    assert len(found[0]) > 0 < len(found[2])


def test_a_local_model_gives_the_log_probabilities_of_the_text(tiny_teacher):
    """Beside the network itself, token by token, in one pass of its own."""
    model = load_teacher(LocalTeacher(name=str(tiny_teacher)), torch.device("cpu"), 128)
    rows = [row(str(k), text, prompt=row("x").prompt) for k, text in enumerate([TEXT, "One. Two."])]
    for one, tokens in read_tokens(rows, model):
        encoding = model.encode(sample_of(one))
        ids = torch.tensor([list(encoding.ids)])
        with torch.no_grad():
            logp = model.module(input_ids=ids).logits[0].double().log_softmax(-1)
        wanted = [
            float(logp[place - 1, encoding.ids[place]])
            for place in range(1, len(encoding.ids))
            if encoding.learn[place]
        ]
        assert [t.logp for t in tokens] == pytest.approx(wanted, abs=1e-4)
        assert tokens[-1].start == tokens[-1].end == len(one.text.encode())  # its end
        assert [t.end for t in tokens] == sorted(t.end for t in tokens)


@settings(max_examples=15)
@given(st.integers(0, 2**32))
def test_a_model_beside_itself_has_no_sentences_of_its_own(tiny_teacher, seed):
    model = load_teacher(LocalTeacher(name=str(tiny_teacher)), torch.device("cpu"), 128)
    rows = candidates(2)
    readers = {"big": model, "student": model}
    found, desk = run_step(step(best=1, unit="token"), rows, readers=readers, seed=seed)
    assert desk.counts["teacher sentences"] == 0
    assert len(good(found)) == 1


def test_fields_that_do_not_go_together():
    with pytest.raises(RecipeError, match="give one"):
        Divergence(teacher="big", best=1, keep=0.5)
    assert step().reads == ("big", "student")
    assert asks_of(step()) == ()


def test_a_share_that_is_a_whole_number_of_rows_is_not_rounded_up():
    """0.55 * 100 is a bit more than 55 in binary numbers."""
    reader = FakeReader(list, lambda text, start, end: -1.0)
    rows = [row(str(k), f"answer {k}.") for k in range(100)]
    both = {"big": reader, "student": reader}
    for keep, count in ((0.55, 55), (0.07, 7), (0.551, 56), (1.0, 100)):
        found, _ = run_step(Divergence(teacher="big", keep=keep), rows, readers=both)
        assert len(good(found)) == count
