"""Which tokens are alike, against a plain dynamic programme; and on real vocabularies."""

import builtins

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.align import vocabulary
from limbeck.align.vocabulary import (
    as_array,
    edit_costs,
    edit_costs_of_pairs,
    nearest,
    shared_tokens,
)
from limbeck.core.errors import RecipeError
from limbeck.models.tokens import token_bytes

TOKEN = st.one_of(st.none(), st.binary(max_size=6), st.text("abé ", max_size=5).map(str.encode))
TOKENS = st.lists(TOKEN, min_size=1, max_size=12)


def distance(a, b):
    """Levenshtein's, by the recursion of Wagner and Fischer."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        corner, row[0] = row[0], i + 1
        for j, y in enumerate(b):
            corner, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, corner + (x != y))
    return row[-1]


def test_distance_itself():
    assert distance(b"kitten", b"sitting") == 3
    assert distance(b"", b"abc") == 3


@settings(max_examples=200)
@given(teacher=TOKENS, student=TOKENS, limit=st.one_of(st.none(), st.integers(0, 4)))
def test_nearest_is_the_nearest(teacher, student, limit):
    got = nearest(teacher, student, max_distance=limit)
    assert got.dtype == torch.int64
    for token, index in zip(student, got.tolist(), strict=True):
        options = [
            (distance(token, other), place)
            for place, other in enumerate(teacher)
            if token is not None and other is not None
        ]
        best = min(options, default=(0, -1))
        assert index == (best[1] if limit is None or best[0] <= limit else -1)


@settings(max_examples=100)
@given(teacher=TOKENS, student=TOKENS)
def test_shared_tokens_are_equal_and_all_of_them(teacher, student):
    theirs, mine = (ids.tolist() for ids in shared_tokens(teacher, student))
    assert [teacher[i] for i in theirs] == [student[j] for j in mine]
    assert {student[j] for j in mine} == (set(teacher) & set(student)) - {None}
    assert len(set(mine)) == len(mine) == len(set(theirs))
    assert mine == sorted(mine)


def test_roles_pair_what_has_no_bytes():
    teacher, student = [None, b"a", None], [b"b", b"a", None, None]
    assert nearest(teacher, student).tolist() == [1, 1, -1, -1]
    assert nearest(teacher, student, {2: 3}).tolist() == [1, 1, -1, 2]
    theirs, mine = shared_tokens(teacher, student, {2: 3})
    assert (theirs.tolist(), mine.tolist()) == ([1, 2], [1, 3])


def test_space_marks_of_real_tokenizers_are_spaces(shared):
    from transformers import AutoTokenizer

    gpt2, llama = (
        AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
        for name in ("gpt2", "tinystories_bpe2k")
    )
    teacher, student = token_bytes(gpt2, 50_257), token_bytes(llama, 2048)
    got = nearest(teacher, student)
    assert teacher[got[student.index(b" the")]] == b" the"
    equal = sum(
        token is not None and teacher[index] == token
        for token, index in zip(student, got.tolist(), strict=True)
    )
    assert equal == len(shared_tokens(teacher, student)[0])
    assert equal > 1500
    for index in range(300, 2048, 437):  # every so often, against all of them
        token = student[index]
        if token is not None:
            least = min(distance(token, other) for other in teacher if other is not None)
            assert distance(token, teacher[got[index]]) == least


@settings(max_examples=60)
@given(first=TOKENS, second=TOKENS)
def test_costs_are_distances_over_the_longer_length(first, second):
    table = edit_costs(first, second)
    assert table.dtype == torch.float16
    for a, row in zip(first, table.tolist(), strict=True):
        for b, cost in zip(second, row, strict=True):
            if a is None or b is None:
                assert cost == 1.0
            else:
                longest = max(len(a), len(b), 1)
                assert cost == pytest.approx(distance(a, b) / longest, abs=5e-4)


@settings(max_examples=60)
@given(first=TOKENS, second=TOKENS, data=st.data())
def test_costs_of_pairs_are_those_of_the_table(first, second, data):
    index = st.tuples(st.integers(0, len(first) - 1), st.integers(0, len(second) - 1))
    pairs = torch.tensor(data.draw(st.lists(index, min_size=1))).numpy()
    got = edit_costs_of_pairs(as_array(first), as_array(second), pairs)
    want = edit_costs(first, second)[pairs[:, 0], pairs[:, 1]]
    assert got.tolist() == want.tolist()


def test_blocks_change_nothing(monkeypatch):
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (60,), generator=random).tolist()
    words = [bytes(torch.randint(97, 101, (n,), generator=random).tolist()) for n in lengths]
    first, second = words[:25], words[25:]
    want = edit_costs(first, second), nearest(first, second)
    monkeypatch.setattr(vocabulary, "BLOCK_PAIRS", 40)
    assert torch.equal(edit_costs(first, second), want[0])
    assert torch.equal(nearest(first, second), want[1])


def test_without_rapidfuzz_one_line_says_what_to_do(monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **kw):
        if name.startswith("rapidfuzz"):
            raise ImportError(name)
        return plain(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (lambda: edit_costs([b"a"], [b"b"]), lambda: nearest([b"a"], [b"b"])):
        with pytest.raises(RecipeError, match=r"pip install 'limbeck\[align\]'"):
            call()
    assert nearest([b"a"], [b"a"]).tolist() == [0]  # equal tokens need none
    assert nearest([b"a"], [b"b"], max_distance=0).tolist() == [-1]


def test_at_the_default_epsilon_edit_distances_of_real_vocabularies_make_a_divergence(shared):
    """exp(-C / epsilon) is positive semidefinite, so S cannot be negative; at 1 it is not."""
    models = shared / "models"
    from transformers import AutoTokenizer

    tokens = set()
    for name, columns in (("stories260K", 512), ("babyllama105", 105)):
        tokenizer = AutoTokenizer.from_pretrained(models / name)
        tokens |= set(token_bytes(tokenizer, columns)) - {None}
    cost = edit_costs(sorted(tokens), sorted(tokens)).double()
    assert torch.linalg.eigvalsh((-cost / 0.1).exp())[0] > 0.5
    assert torch.linalg.eigvalsh((-cost).exp())[0] < 0


def test_a_students_tokens_begin_the_teachers_as_its_tokenizer_cuts_them(shared):
    """On real vocabularies: the longest prefix is where the student's own tokenizer cuts first."""
    from transformers import AutoTokenizer

    from limbeck.align.vocabulary import openings
    from limbeck.models.tokens import token_bytes

    theirs = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    own = AutoTokenizer.from_pretrained(shared / "tokenizers" / "tinystories_bpe2k")
    teacher, student = (token_bytes(t, len(t)) for t in (theirs, own))
    columns = openings(teacher, student).tolist()
    words = [
        i for i, token in enumerate(teacher) if token and token[:1] == b" " and token[1:].isalpha()
    ]
    alike = 0
    for index in words[:2000]:
        assert teacher[index].startswith(student[columns[index]])
        alike += own.encode(teacher[index].decode())[0] == columns[index]
    assert alike > 0.8 * len(words[:2000])
