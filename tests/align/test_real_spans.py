"""Alignment under real tokenizers, over real text in many scripts."""

import copy
import unicodedata
from itertools import permutations

import pytest
import torch

from limbeck.align.spans import pair
from limbeck.core.types import NO_OFFSET, Sample, Signals, Turn
from limbeck.models.encode import Encoder
from limbeck.models.tokens import token_bytes

TEXTS = {
    "english": "The quick brown fox jumps over the lazy dog, doesn't it? (Yes.)",
    "accents": "Le cœur déçu mais l'âme plutôt naïve, Zoë rêva de crapaüter en Íslensku.",
    "german": "Straßenbahnhaltestellenüberdachungsbeauftragter läuft über die Brücke.",
    "polish": "Zażółć gęślą jaźń; pchnąć w tę łódź jeża lub ośm skrzyń fig.",
    "turkish": "İstanbul'da ılık bir gün: pijamalı hasta yağız şoföre çabucak güvendi.",
    "vietnamese": "Tiếng Việt có nhiều dấu: ngày mai trời sẽ nắng đẹp.",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία· ἄνδρα μοι ἔννεπε.",
    "arabic": "هذا نصٌّ عربيٌّ مع تشكيلٍ، وأرقام ١٢٣.",
    "hebrew": "דג סקרן שט בים מאוכזב, שָׁלוֹם עוֹלָם.",
    "hindi": "मैं हिन्दी में लिख रहा हूँ क्योंकि यह सुन्दर है।",
    "thai": "ภาษาไทยไม่มีช่องว่างระหว่างคำ กำลังทดสอบ",
    "chinese": "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "japanese": "吾輩は猫である。名前はまだ無い。ｶﾀｶﾅも。",
    "korean": "모든 인간은 태어날 때부터 자유롭다. \u1112\u1161\u11ab",
    "emoji": "Hi 👩‍👩‍👧‍👦 and 👍🏽👍🏿, flags 🇩🇪🇯🇵, keycap 1️⃣, 🐈‍⬛!",
    "combining": "Z\u0351\u036b\u0343a\u0300\u0316l\u035dg\u0321o\u0344 e\u0301e\u0300 n\u0303",
    "composed": "Caf\u00e9 na\u00efve \u1e9b\u0323",
    "decomposed": unicodedata.normalize("NFD", "Café naïve Ångström ẛ̣"),
    "compatibility": "ﬁne ½ ² ™ ㎏ ﷺ ｆｕｌｌ ① Ⅳ",
    "lines": "first\r\nsecond\n\n\nfourth\rend\n",
    "tabs": "\tone\t\ttwo \t three\t",
    "widths": "a\u200bb\u200cc\u200dd\ufeffe\u00a0f\u2009g\u3000h\u2028i",
    "spaces": "   leading, two  inside, and trailing   ",
    "only spaces": "      ",
    "long word": "a" * 200 + "b" * 90,
    "digits": "3.14159265358979 1,000,000 0x1F 2024-02-29 -7e-12",
    "code": "def f(x: int) -> str:\n    if x > 0:\n        return f'{x!r}'\n    return \"\"\n",
    "marks": "<|im_end|> </s> <unk> [UNK] ▁ Ġ ## <0x41>",
    "control": "a\x00b\x01c\x7fd\x85e",
    "outside": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀 \U0010ffff \ufffd \ue000",
    "one": "x",
}
NAMES = "gpt2 llama2 neox20b smollm_like tinystories_bpe2k stories260K babyllama105".split()
NORMALISES = {"neox20b": "NFC", "tinystories_bpe2k": "NFKC"}
PROMPT = "Text 1:\n"


@pytest.fixture(scope="module")
def encoders(shared):
    from transformers import AutoTokenizer

    def folder(name):
        kind = "models" if (shared / "models" / name).exists() else "tokenizers"
        return shared / kind / name

    return {name: Encoder(AutoTokenizer.from_pretrained(folder(name)), 4096) for name in NAMES}


@pytest.fixture(scope="module")
def tables(encoders):
    return {n: token_bytes(e.tokenizer, len(e.tokenizer)) for n, e in encoders.items()}


def sample_of(text, prompt=PROMPT, name="s"):
    return Sample(id=name, turns=(Turn(text=prompt), Turn(text=text, learn=True)))


@pytest.fixture(scope="module")
def views(encoders):
    """Each tokenizer's view of all texts."""
    samples = [sample_of(text, name=name) for name, text in TEXTS.items()]
    return {n: e.collate([e.encode(s) for s in samples]) for n, e in encoders.items()}


@pytest.mark.parametrize("name", NAMES)
def test_tokens_tile_the_text(encoders, name):
    """From the first byte to the last without gap; tokens that share bytes share all of them."""
    for text in TEXTS.values():
        encoding = encoders[name].encode(sample_of(text))
        size = len((PROMPT + text).encode())
        spans = [span for span in zip(encoding.starts, encoding.ends, strict=True) if span[0] >= 0]
        assert spans[-1] == (size, size)
        stretches = list(dict.fromkeys(spans[:-1]))
        assert [start for start, _ in stretches] == [0, *(end for _, end in stretches[:-1])]
        assert stretches[-1][1] == size
        assert len(stretches) == len({start for start, _ in stretches})


@pytest.mark.parametrize("name", NAMES)
def test_a_token_of_its_own_bytes_covers_these(encoders, tables, name):
    """What each token is known to write is what stands there, where nothing was normalised."""
    form, exact, all_tokens = NORMALISES.get(name, "NFD"), 0, 0
    for text in TEXTS.values():
        if name in NORMALISES and unicodedata.normalize(form, text) != text:
            continue
        encoding = encoders[name].encode(sample_of(text))
        written = (PROMPT + text).encode()
        spans = list(zip(encoding.starts, encoding.ends, strict=True))
        for place, (start, end) in enumerate(spans):
            piece = tables[name][encoding.ids[place]]
            if piece is None or end <= start or spans.count((start, end)) > 1:
                continue
            found = written[start:end]
            all_tokens += 1
            exact += piece == found
            # SentencePiece puts a space before a text, and takes this mark for one.
            found = found.replace("▁".encode(), b" ")
            assert piece in (found, b" " + found), (text, piece, found)
    assert all_tokens > 500
    assert all_tokens - exact <= len(TEXTS) + 3


@pytest.mark.parametrize(("mine", "theirs"), list(permutations(NAMES, 2)))
def test_groups_cover_the_same_bytes_and_leave_nothing(views, tables, mine, theirs):
    student, teacher = views[mine], views[theirs]
    names, count = list(TEXTS), len(TEXTS)
    pairing = pair(student, teacher, [1.0] * count, same_vocabulary=False, unit="span")
    assert len(pairing.student.after) == len(pairing.teacher.after) == len(pairing.weight)
    covered = []
    for view, spans, kind in ((student, pairing.student, mine), (teacher, pairing.teacher, theirs)):
        target = (view.rows + 1)[spans.rows]
        starts, ends = view.offsets.flatten(0, 1)[target].T
        first = torch.ones_like(spans.span, dtype=torch.bool)
        first[1:] = spans.span[1:] != spans.span[:-1]
        last = first.roll(-1)
        assert len(first.nonzero()) == len(spans.after)
        # Within a group each token begins where the one before ends, or shares its bytes.
        touches = (starts[1:] == ends[:-1]) | (starts[1:] == starts[:-1]) & (ends[1:] == ends[:-1])
        assert (touches | first[1:]).all()
        sample = view.sample_of(target)
        covered.append(
            list(
                zip(
                    sample[first].tolist(), starts[first].tolist(), ends[last].tolist(), strict=True
                )
            )
        )
        # The bytes that tokens write are those of the text.
        pieces = [b""] * len(spans.after)
        for span, token in zip(spans.span.tolist(), view.labels[spans.rows].tolist(), strict=True):
            pieces[span] += tables[kind][token] or b""
        for (text, start, end), piece in zip(covered[-1], pieces, strict=True):
            whole = PROMPT + TEXTS[names[text]]
            changed = kind in NORMALISES and whole != unicodedata.normalize(NORMALISES[kind], whole)
            if not changed and names[text] != "marks":
                assert piece == whole.encode()[start:end], (names[text], start, end)
    assert covered[0] == covered[1]
    # Each text whose first learnt tokens begin at the prompt's end is covered wholly.
    if "babyllama105" in (mine, theirs):  # it has no token for most of this
        return
    whole = 0
    for text, name in enumerate(names):
        begins = [
            int(
                view.offsets.flatten(0, 1)[(view.rows + 1)[view.sample_of(view.rows) == text][0], 0]
            )
            for view in (student, teacher)
        ]
        # These are special tokens of one, which stand for no text of the others.
        if begins != [len(PROMPT)] * 2 or name == "marks":
            continue
        whole += 1
        for view, spans in ((student, pairing.student), (teacher, pairing.teacher)):
            rows = (view.sample_of(view.rows) == text).nonzero().flatten()
            assert set(rows.tolist()) <= set(spans.rows.tolist()), name
    assert whole > 0.8 * count


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("privileged", ["", "Secret: 42.\n"])
def test_one_tokenizer_gives_singletons_and_the_loss_of_no_alignment(encoders, name, privileged):
    encoder = encoders[name]
    samples = [sample_of(text) for text in TEXTS.values()]
    told = [
        Sample(id="s", turns=s.turns, privileged=(Turn(text=privileged),) if privileged else ())
        for s in samples
    ]
    student = encoder.collate([encoder.encode(s) for s in samples])
    teacher = encoder.collate([encoder.encode(s) for s in told])
    weights = [1.0] * len(samples)
    spans = pair(student, teacher, weights, same_vocabulary=True, unit="span")
    tokens = pair(student, teacher, weights, same_vocabulary=True)
    generator = torch.Generator().manual_seed(0)
    logp = [torch.rand(len(v.rows), generator=generator).log() for v in (student, teacher)]
    said = [
        Signals(labels=v.labels, chosen=p) for v, p in zip((student, teacher), logp, strict=True)
    ]

    def loss(pairing):
        one, two = said[0].select(pairing.student), said[1].select(pairing.teacher)
        return (pairing.weight * (one.chosen - two.chosen) ** 2).sum()

    if not privileged:
        assert tokens.student is None
        assert loss(spans) == loss(tokens)
        assert len(spans.student.after) == len(student.rows)
    elif name != "babyllama105":  # there, what is unknown is in no group
        groups, rows = len(spans.student.after), len(spans.student.rows)
        # All but the tokens that cover something together: a prefix, a character normalised.
        assert rows >= 0.98 * len(student.rows)
        assert groups >= (0.85 if name == "tinystories_bpe2k" else 0.97) * rows


def test_text_that_one_tokenizer_cannot_write_is_left_out(encoders):
    """The 105 characters lack line breaks: a row of others has no partner but its end."""
    one = sample_of("\n\n\n", prompt="a")
    views = [encoders[n].collate([encoders[n].encode(one)]) for n in ("gpt2", "babyllama105")]
    pairing = pair(*views, [1.0], same_vocabulary=False, unit="span")
    assert len(pairing.student.after) == 1
    assert views[0].labels[pairing.student.rows].tolist() == [encoders["gpt2"].eos]
    unknown = views[1].ids.flatten() == encoders["babyllama105"].tokenizer.unk_token_id
    assert unknown.sum() == 3
    assert (views[1].offsets.flatten(0, 1)[unknown, 1] == NO_OFFSET).all()


@pytest.mark.parametrize(("mine", "theirs"), [("gpt2", "llama2"), ("stories260K", "neox20b")])
@pytest.mark.parametrize("kept", [3, 10, 17, 40])
def test_what_is_cut_off_on_one_side_changes_nothing_before(encoders, mine, theirs, kept):
    short = Encoder(encoders[theirs].tokenizer, kept)
    samples = [sample_of(text) for text in TEXTS.values()]
    student = encoders[mine].collate([encoders[mine].encode(s) for s in samples])
    whole = encoders[theirs].collate([encoders[theirs].encode(s) for s in samples])
    teacher = short.collate([short.encode(s) for s in samples])
    weights = [1.0] * len(samples)

    def groups(view):
        pairing = pair(student, view, weights, same_vocabulary=False, unit="span")
        target = (view.rows + 1)[pairing.teacher.rows]
        places = [view.sample_of(target).tolist(), view.offsets.flatten(0, 1)[target].tolist()]
        found = {}
        for span, sample, offsets in zip(pairing.teacher.span.tolist(), *places, strict=True):
            found.setdefault(span, []).append((sample, *offsets))
        return set(map(tuple, found.values()))

    cut, all_groups = groups(teacher), groups(whole)
    assert cut < all_groups
    # Lost are only those that the cut has reached.
    last = {
        sample: max(
            (int(e) for e in teacher.offsets[sample, :, 1][teacher.attend[sample]]), default=-1
        )
        for sample in range(len(samples))
    }
    for group in all_groups - cut:
        sample, start, end = group[0][0], group[0][1], group[-1][2]
        assert end > last[sample] or start == end


CHATML = None  # the tokenizer's own
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' "
    "[/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content | trim + '\n###\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{{ '\n\n' }}{% endif %}{{ m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEMPLATES = {"smollm_like": CHATML, "llama2": LLAMA, "gpt2": PLAIN, "neox20b": THINKING}


@pytest.fixture(scope="module")
def chats(encoders):
    found = {}
    for name, template in TEMPLATES.items():
        tokenizer = copy.deepcopy(encoders[name].tokenizer)
        tokenizer.chat_template = template or tokenizer.chat_template
        found[name] = Encoder(tokenizer, 4096)
    return found


TALK = (
    Turn(role="user", text="What is 2 + 2?"),
    Turn(role="assistant", text="It is 4, naïvely 🐈‍⬛.", learn=True),
    Turn(role="user", text="It is 4?"),
    Turn(role="assistant", text="Yes.\nIt is.", learn=True),
)


@pytest.mark.parametrize(("mine", "theirs"), list(permutations(TEMPLATES, 2)))
def test_chat_templates_that_differ(chats, mine, theirs):
    talk = Sample(id="s", turns=TALK)
    encoders = chats[mine], chats[theirs]
    views = [encoder.collate([encoder.encode(talk)]) for encoder in encoders]
    pairing = pair(*views, [1.0], same_vocabulary=False, unit="span")
    text = b"".join(turn.text.encode() for turn in TALK)
    bounds, place = [], 0
    for turn in TALK:
        size = len(turn.text.encode())
        bounds += [(place, place + size)] if turn.learn else []
        place += size
    for view, spans in zip(views, (pairing.student, pairing.teacher), strict=True):
        offsets = view.offsets.flatten(0, 1)[(view.rows + 1)[spans.rows]].tolist()
        covered = {byte for start, end in offsets for byte in range(start, end)}
        assert covered == {byte for start, end in bounds for byte in range(start, end)}
        ends = sorted({start for start, end in offsets if start == end})
        assert ends == [end for _, end in bounds]  # both turns' ends, each a group of its own
    assert len(text) == place


def test_white_space_that_a_template_strips_does_not_shift_the_rest(chats):
    talk = Sample(
        id="s",
        turns=(
            Turn(role="user", text=" Hi "),
            Turn(role="assistant", text="  It is so. ", learn=True),
        ),
    )
    encodings = [chats[name].encode(talk) for name in ("smollm_like", "gpt2")]  # the second strips
    first = len(" Hi ")
    for encoding, start in zip(encodings, (first, first + 2), strict=True):
        spans = list(zip(encoding.starts, encoding.ends, strict=True))
        learnt = [s for s, learn in zip(spans, encoding.learn, strict=True) if learn]
        assert learnt[0][0] == start
        size = first + len("  It is so. ")
        assert learnt[-1] == (size, size)
    found = [dict(zip(e.starts, e.ends, strict=True)) for e in encodings]
    assert found[0][first + 4] == found[1][first + 4] == first + 4 + len(" is")
