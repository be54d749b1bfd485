"""Encoding: what is learnt, where tokens stand in the text, what is cut."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.core.errors import DataError, ModelError
from limbeck.core.types import NO_OFFSET, Sample, Turn
from limbeck.models.encode import Encoder

TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=40)


def pair_of(prompt: str, completion: str) -> Sample:
    return Sample(id="s", turns=(Turn(text=prompt), Turn(text=completion, learn=True)))


def learnt(encoder: Encoder, sample: Sample) -> str:
    encoding = encoder.encode(sample)
    return encoder.tokenizer.decode(
        [i for i, learn in zip(encoding.ids, encoding.learn, strict=True) if learn]
    )


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, 512)


def test_only_the_completion_and_its_end_are_learnt(encoder):
    assert learnt(encoder, pair_of("the cat\n", "sat on")) == "sat on<eos>"


def test_padding_and_eos_that_are_the_same_token_still_teach_the_end(tokenizer):
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    encoder = Encoder(same, 512)
    view = encoder.collate(
        [encoder.encode(pair_of("a\n", "mat")), encoder.encode(pair_of("a\n", "mat on a mat"))]
    )
    assert (view.labels == same.eos_token_id).sum() == 2


def test_first_completion_token_is_predicted_from_the_last_prompt_token(encoder):
    encoding = encoder.encode(pair_of("the cat\n", "sat"))
    view = encoder.collate([encoding])
    first = encoding.learn.index(True)
    assert view.rows[0] == first - 1
    assert view.labels[0] == encoding.ids[first]


def test_a_conversation_teaches_every_assistant_turn_and_its_end_mark(encoder):
    turns = (
        Turn(role="user", text="the cat"),
        Turn(role="assistant", text="sat", learn=True),
        Turn(role="user", text="two dogs"),
        Turn(role="assistant", text="run past", learn=True),
    )
    assert learnt(encoder, Sample(id="s", turns=turns)) == "sat<eos>run past<eos>"


def test_repeated_words_in_a_conversation_are_not_confused(encoder):
    turns = (
        Turn(role="user", text="cat"),
        Turn(role="assistant", text="cat", learn=True),
        Turn(role="user", text="cat"),
    )
    encoding = encoder.encode(Sample(id="s", turns=turns))
    assert learnt(encoder, Sample(id="s", turns=turns)) == "cat<eos>"
    words = [(s, e) for s, e in zip(encoding.starts, encoding.ends, strict=True) if e > s >= 0]
    assert min(words)[0] == 0
    assert max(words)[1] == 9


@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_words_that_an_earlier_turn_said_too_are_not_looked_for_in_it(tokenizer, space):
    """A template that trims: the user's words with the space behind them stand only up there."""
    trimming = copy.deepcopy(tokenizer)
    trimming.chat_template = tokenizer.chat_template.replace("m.content", "m.content | trim")
    texts = ("the cat", f"run{space} on past{space} a mat", f"past{space}", "sat")
    turns = tuple(
        Turn(role=("user", "assistant")[k % 2], text=text, learn=k % 2 == 1)
        for k, text in enumerate(texts)
    )
    encoding = Encoder(trimming, 512).encode(Sample(id="s", turns=turns))
    whole = "".join(texts)
    words = [
        (encoding.learn[k], trimming.decode([token]), whole[start:end])
        for k, (token, start, end) in enumerate(
            zip(encoding.ids, encoding.starts, encoding.ends, strict=True)
        )
        if end > start >= 0
    ]
    assert all(token == text for _, token, text in words)
    assert "".join(text for learn, _, text in words if learn) == texts[1] + texts[3]


def test_a_conversation_without_template_says_what_to_do(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        Encoder(bare, 64).encode(Sample(id="r7", turns=(Turn(role="user", text="hi"),)))


def test_a_template_that_rewrites_history_is_refused(tokenizer):
    odd = copy.deepcopy(tokenizer)
    odd.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }};{% endfor %}"
    turns = (Turn(role="user", text="a"), Turn(role="assistant", text="b", learn=True))
    with pytest.raises(DataError, match="rewrites earlier turns"):
        Encoder(odd, 64).encode(Sample(id="s", turns=turns))


WANTS_A_USER = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ raise_exception('No user query found in messages.') }}{% endif %}"
)


def test_a_template_may_want_a_users_turn_behind_the_systems(tokenizer, encoder):
    """It cannot be asked what it writes for the system's turn alone."""
    wanting = copy.deepcopy(tokenizer)
    wanting.chat_template = WANTS_A_USER + tokenizer.chat_template
    turns = (
        Turn(role="system", text="the cat"),
        Turn(role="user", text="the cat sat"),
        Turn(role="assistant", text="on a mat", learn=True),
    )
    sample = Sample(id="s", turns=turns)
    assert Encoder(wanting, 512).encode(sample) == encoder.encode(sample)


def test_a_conversation_that_the_template_refuses_is_named(tokenizer):
    wanting = copy.deepcopy(tokenizer)
    wanting.chat_template = WANTS_A_USER + tokenizer.chat_template
    turns = (Turn(role="system", text="Hm."), Turn(role="assistant", text="sat", learn=True))
    sample = Sample(id="r7", turns=turns)
    for ask in (Encoder(wanting, 64).encode, Encoder(wanting, 64).prompt_ids):
        with pytest.raises(DataError, match="row r7: .*No user query found in messages"):
            ask(sample)


def test_what_does_not_fit_is_cut_and_counted(tokenizer, encoder):
    sample = pair_of("the cat\n", "sat on a mat and saw two dogs")
    whole = encoder.encode(sample)
    cut = Encoder(tokenizer, 6).encode(sample)
    assert len(cut.ids) == 6
    assert cut.truncated == len(whole.ids) - 6


@settings(max_examples=100)
@given(prompt=TEXT, completion=TEXT)
def test_offsets_cover_the_bytes_of_the_text(tokenizer, prompt, completion):
    encoder = Encoder(tokenizer, 4096)
    encoding = encoder.encode(pair_of(prompt, completion))
    size = len((prompt + completion).encode())
    spans = [(s, e) for s, e in zip(encoding.starts, encoding.ends, strict=True) if s != NO_OFFSET]
    assert spans[-1] == (size, size)  # the end-of-sequence token
    covered = set()
    for start, end in spans[:-1]:
        assert 0 <= start < end <= size
        covered |= set(range(start, end))
    assert covered == set(range(size))


def test_real_tokenizers_learn_the_completion(shared):
    from transformers import AutoTokenizer

    sample = pair_of("Once upon a time", " there was a naïve 🐈‍⬛ cat.")
    for folder in sorted((shared / "tokenizers").iterdir()):
        fast = AutoTokenizer.from_pretrained(folder)
        encoder = Encoder(fast, 512)
        encoding = encoder.encode(sample)
        starts = [s for s, learn in zip(encoding.starts, encoding.learn, strict=True) if learn]
        assert min(starts) >= len("Once upon a time") - 1, folder.name
        assert encoding.rows > 5, folder.name


def test_a_real_chat_template(shared):
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(shared / "tokenizers" / "smollm_like"), 512)
    turns = (
        Turn(role="user", text="What is 2 + 2?"),
        Turn(role="assistant", text="It is 4.", learn=True),
    )
    assert learnt(encoder, Sample(id="s", turns=turns)) == "It is 4.<|im_end|>"


def test_a_sample_keeps_its_name_in_every_layout(encoder):
    samples = [
        Sample(id=name, turns=(Turn(text=f"{name} cat "), Turn(text="sat on a mat", learn=True)))
        for name in ("row 7", "row 12")
    ]
    encodings = [encoder.encode(sample) for sample in samples]
    assert [encoding.name for encoding in encodings] == ["row 7", "row 12"]
    for packed in (False, True):
        assert encoder.collate(encodings, packed=packed).names == ("row 7", "row 12")


def test_in_a_packed_line_no_row_predicts_another_samples_token(encoder):
    whole = Sample(id="s", turns=(Turn(text="the cat sat", learn=True),))
    encodings = [encoder.encode(whole)] * 3
    view = encoder.collate(encodings, packed=True)
    length = len(encodings[0].ids)
    assert all(encodings[0].learn)
    assert len(view.rows) == 3 * (length - 1)
    assert view.positions.tolist() == [[*range(length)] * 3]
    assert torch.equal(view.sample_of(view.rows), view.sample_of(view.rows + 1))
    assert torch.equal(view.labels, view.ids[0, view.rows + 1])


def test_white_space_is_learnt_where_offsets_leave_it_out(shared):
    """GPT-NeoX gives a token of spaces the empty span; code is full of them."""
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(shared / "tokenizers" / "neox20b"), 512)
    encoding = encoder.encode(pair_of("x:\n", "if a:\n        b  \n    c"))
    assert learnt(encoder, pair_of("x:\n", "if a:\n        b  \n    c")).startswith(
        "if a:\n        b"
    )
    first = encoding.learn.index(True)
    assert all(encoding.learn[first:])
    assert encoding.ends[first:-2] == encoding.starts[first + 1 : -1]


def test_an_end_that_the_tokenizer_adds_itself_is_learnt(tokenizer):
    from tokenizers import processors

    ends = copy.deepcopy(tokenizer)
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    encoding = Encoder(ends, 512).encode(pair_of("the cat\n", "sat"))
    assert encoding.ids.count(2) == 1
    assert encoding.learn[-1]
    assert (encoding.starts[-1], encoding.ends[-1]) == (11, 11)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast, name_or_path = False, "old/model"
        eos_token_id = pad_token_id = 0

    with pytest.raises(ModelError, match=r"old/model.*no offsets.*tokenizer\.json"):
        Encoder(Slow(), 64)


def test_half_a_character_is_refused_with_the_rows_name(encoder):
    broken = Sample(id="r.jsonl:7", turns=(Turn(text="a \ud83d b", learn=True),))
    with pytest.raises(DataError, match=r"r\.jsonl:7 holds half a character, '.ud83d'"):
        encoder.encode(broken)


def test_words_that_the_template_changed_have_no_place_but_are_learnt(tokenizer):
    loud = copy.deepcopy(tokenizer)
    loud.chat_template = (
        "{% for m in messages %}[{{ m.role }}]\n{{ m.content | upper }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    turns = (Turn(role="user", text="Cat"), Turn(role="assistant", text="sat", learn=True))
    encoding = Encoder(loud, 64).encode(Sample(id="s", turns=turns))
    assert sum(encoding.learn) == 4  # S A T and its end
    assert {s for s, learn in zip(encoding.starts, encoding.learn, strict=True) if learn} == {
        NO_OFFSET
    }


def test_tokens_that_a_cut_leaves_of_a_character_do_not_cover_it(shared):
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(shared / "tokenizers" / "tinystories_bpe2k")
    whole = Encoder(fast, 512).encode(pair_of("a", "b\u00bdc"))  # NFKC: 1, a slash, 2
    half = whole.starts.index(len("ab"))
    assert whole.starts.count(len("ab")) > 2
    cut = Encoder(fast, half + 2).encode(pair_of("a", "b\u00bdc"))
    assert cut.starts[-2:] == [2, 2]
    assert cut.ends[-2:] == [NO_OFFSET] * 2
    assert cut.ends[-3] == 2


def test_special_tokens_spelt_out_in_a_text_cover_nothing_known(encoder):
    encoding = encoder.encode(pair_of("the cat ", "sat <eos> on"))
    view = encoder.collate([encoding])
    place = encoding.ids.index(encoder.eos)
    assert encoding.ends[place] - encoding.starts[place] == len("<eos>")
    assert view.offsets[0, place].tolist() == [encoding.starts[place], NO_OFFSET]
    size = len("the cat sat <eos> on")
    assert view.offsets[0, -1].tolist() == [size, size]  # the end itself is known


def test_what_shares_bytes_with_an_unknown_character_is_not_known_either(shared):
    """A space that was put before the text claims the first character, which is unknown."""
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(shared / "models" / "babyllama105")
    encoder = Encoder(fast, 512)
    encoding = encoder.encode(pair_of("", "日x"))
    assert fast.convert_ids_to_tokens(encoding.ids)[:4] == ["<s>", "▁", "<unk>", "x"]
    for packed in (False, True):
        view = encoder.collate([encoding], packed=packed)
        assert view.offsets[0].tolist() == [[-1, -1], [0, -1], [0, -1], [3, 4], [4, 4]]
    assert encoding.ends[1:3] == [3, 3]  # bytes are still counted


def test_half_a_character_that_a_model_wrote_moves_nothing_behind_it(encoder):
    half = encoder.table.index(b"\xf0")
    written = [*encoder.tokenizer(" sat")["input_ids"], half]
    written += [*encoder.tokenizer(" on é")["input_ids"], encoder.eos]
    sample = pair_of("the cat", " sat\ufffd on é")
    encoding = encoder.encode_written(sample, written)
    whole = (sample.turns[0].text + sample.turns[1].text).encode()
    learnt = [place for place, learn in enumerate(encoding.learn) if learn]
    assert [encoding.ids[place] for place in learnt] == written
    for place, token in zip(learnt, written, strict=True):
        start, end = encoding.starts[place], encoding.ends[place]
        if token == half:
            assert (start, end) == (len(b"the cat sat"), NO_OFFSET)
        elif token == encoder.eos:
            assert start == end == len(whole)
        else:
            assert whole[start:end] == encoder.table[token]
