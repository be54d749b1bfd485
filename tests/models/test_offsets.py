"""Which bytes tokens cover: without gaps, and apart wherever their bytes tell them apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from limbeck.core.types import NO_OFFSET
from limbeck.models.offsets import byte_places, cover, of_written, untrimmed

TEXT = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=30)


def covered(text, offsets, pieces):
    characters = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    return [tuple(span) for span in cover(text, characters, range(len(pieces)), pieces).tolist()]


@given(TEXT)
def test_byte_places_are_those_of_utf_8(text):
    assert byte_places(text).tolist() == [len(text[:n].encode()) for n in range(len(text) + 1)]


@settings(max_examples=200)
@given(TEXT, st.data())
def test_tokens_cut_at_any_byte_are_found_exactly(text, data):
    """Offsets in characters, as byte-level tokenizers give them, are made bytes again."""
    written = text.encode()
    inner = data.draw(st.lists(st.integers(0, len(written)), max_size=10))
    cuts = sorted({0, len(written), *inner})
    places = byte_places(text)
    spans = list(zip(cuts, cuts[1:], strict=False))
    offsets = [
        (int(np.searchsorted(places, s, side="right")) - 1, int(np.searchsorted(places, e)))
        for s, e in spans
    ]
    assert covered(text, offsets, [written[s:e] for s, e in spans]) == spans


def test_tokens_whose_bytes_are_not_the_texts_share_what_they_cover():
    # A normaliser made one character of two, and the token pieces say so.
    text = "e\u0301x"
    assert covered(text, [(0, 1), (0, 1), (2, 3)], [b"\xc3", b"\xa9", b"x"]) == [
        (0, 3),
        (0, 3),
        (3, 4),
    ]
    # As many bytes, but others: it may not be cut in the middle.
    assert covered("Éx", [(0, 1), (0, 1), (1, 2)], [b"\xc3", b"\xa9", b"x"])[:2] == [(0, 2)] * 2
    # A prefix that claims the first character.
    assert covered("ab", [(0, 1), (0, 1), (1, 2)], [b" ", b"a", b"b"]) == [(0, 1), (0, 1), (1, 2)]


def test_nothing_between_tokens_is_left_out():
    words = [b"the", b"cat", b"sat"]
    # Spaces belong to the word behind them.
    assert covered("the cat  sat", [(0, 3), (4, 7), (9, 12)], words) == [(0, 3), (3, 7), (7, 12)]
    # What a normaliser took out belongs to the token before; at the start, to the first.
    assert covered("a\u0301 b", [(0, 1), (3, 4)], [b"a", b"b"]) == [(0, 3), (3, 5)]
    assert covered("\u0301a b ", [(1, 2), (3, 4)], [b"a", b"b"]) == [(0, 3), (3, 6)]


def test_added_tokens_have_no_offset_and_empty_texts_no_tokens():
    assert covered("ab", [(0, 0), (0, 2), (0, 0)], [None, b"ab", None]) == [
        (NO_OFFSET, NO_OFFSET),
        (0, 2),
        (NO_OFFSET, NO_OFFSET),
    ]
    assert covered("", [], []) == []
    assert covered("", [(0, 0)], [None]) == [(NO_OFFSET, NO_OFFSET)]


@settings(max_examples=200)
@given(TEXT, st.data())
def test_any_offsets_at_all_give_stretches_that_follow_one_another(text, data):
    """Also those that no tokenizer should give: overlapping, out of order, with holes."""
    point = st.integers(0, len(text))
    offsets = data.draw(st.lists(st.tuples(point, point), max_size=8))
    pieces = [data.draw(st.one_of(st.none(), st.binary(max_size=3))) for _ in offsets]
    found = covered(text, offsets, pieces)
    real = [span for span, (s, e) in zip(found, offsets, strict=True) if e > s]
    assert [span == (NO_OFFSET, NO_OFFSET) for span in found] == [e <= s for s, e in offsets]
    stretches = list(dict.fromkeys(real))
    if stretches:
        assert [s for s, _ in stretches] == [0, *(e for _, e in stretches[:-1])]
        assert stretches[-1][1] == len(text.encode())


@pytest.mark.parametrize("nested", [False, True])
def test_trimmed_spaces_come_back_and_the_tokenizer_stays_as_it_is(tokenizer, nested):
    import copy

    trims = copy.deepcopy(tokenizer)
    last = processors.ByteLevel(trim_offsets=True)
    template = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    trims.backend_tokenizer.post_processor = (
        processors.Sequence([last, template]) if nested else last
    )
    text = "the  cat"

    def offsets(fast):
        spans = fast(text, return_offsets_mapping=True)["offset_mapping"]
        return [tuple(span) for span in spans if span != (0, 0)]

    before = offsets(trims)
    repaired = offsets(untrimmed(trims))
    assert before != repaired
    assert [s for s, _ in repaired] == [0, *(e for _, e in repaired[:-1])]
    assert offsets(trims) == before
    assert untrimmed(tokenizer) is tokenizer


def placed(pieces, text):
    return [tuple(span) for span in of_written(pieces, text).tolist()]


@settings(max_examples=200)
@given(st.lists(st.one_of(TEXT.map(str.encode), st.binary(max_size=4)), max_size=8), st.booleans())
def test_what_a_model_wrote_is_found_behind_half_a_character_too(pieces, ended):
    """Tokens may be any bytes; the text has a mark where they are no characters."""
    written = b"".join(pieces)
    text = written.decode(errors="replace")
    whole = text.encode()
    spans = placed([*pieces, b""] if ended else pieces, text)
    if ended:
        assert spans.pop() == (len(whole), len(whole))
    cut = 0
    for piece, (start, end) in zip(pieces, spans, strict=True):
        assert end == NO_OFFSET or whole[start:end] == piece
        try:
            before = written[:cut].decode()
            piece.decode()
        except UnicodeDecodeError:
            pass
        else:
            assert (start, end) == (len(before.encode()), len(before.encode()) + len(piece))
        cut += len(piece)
    if b"\xef\xbf\xbd" not in written:  # a mark that was written stands beside others
        assert NO_OFFSET not in [start for start, _ in spans]


@pytest.mark.parametrize(
    ("pieces", "text", "expected"),
    [
        pytest.param(
            [b"x", b"\xf0", b"\x9f", b" b", b""],
            "x\ufffd\ufffd b",
            [(0, 1), (1, -1), (1, -1), (7, 9), (9, 9)],
            id="a mark for each byte",
        ),
        pytest.param(
            [b"\xef\xbf", b"\xbd", b"\xef\xbf", b"y"],
            "\ufffd\ufffdy",
            [(0, 2), (2, 3), (3, -1), (6, 7)],
            id="half of a mark",
        ),
        pytest.param(
            [b"so", b" ?", b" ", b"!", b" no", b""],
            "so?! no",
            [(0, 2), (2, -1), (3, -1), (3, 4), (4, 7), (7, 7)],
            id="spaces that the tokenizer leaves out",
        ),
        pytest.param(
            [b"a", b"b.\n", b"Q", b""],
            "ab.",
            [(0, 1), (1, -1), (-1, -1), (3, 3)],
            id="cut before a stop string",
        ),
        pytest.param([b"a", b"", b"b"], "ab", [(0, 1), (1, 1), (1, 2)], id="a special token"),
        pytest.param([], "", [], id="nothing"),
    ],
)
def test_what_does_not_come_back_ends_nowhere_known(pieces, text, expected):
    assert placed(pieces, text) == expected
