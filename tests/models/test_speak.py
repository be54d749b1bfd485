"""What a model writes behind a prompt is text that continues it."""

from limbeck.core.types import Sample, Sampling, Turn
from limbeck.models.load import load_teacher
from limbeck.models.writing import text_behind


def test_the_space_before_the_first_word_is_kept(shared):
    import torch

    from limbeck.core.specs import LocalTeacher

    name = str(shared / "models" / "stories260K")  # its tokenizer drops a text's first space
    model = load_teacher(LocalTeacher(name=name), torch.device("cpu"), 64)
    prompt = Sample(id="1", turns=(Turn(text="Once upon a"),))
    (text,) = model.speak([prompt], Sampling(max_tokens=8))
    assert text.startswith(" time")
    whole = model.tokenizer.encode("Once upon a" + text)
    assert whole[: len(model.encoder.prompt_ids(prompt))] == model.encoder.prompt_ids(prompt)


def test_a_character_that_the_prompt_cuts_is_no_reason_to_fail(tiny_teacher):
    import torch

    from limbeck.core.specs import LocalTeacher

    model = load_teacher(LocalTeacher(name=str(tiny_teacher)), torch.device("cpu"), 64)
    snow = model.tokenizer.encode("\N{SNOWMAN}")
    assert text_behind(model.tokenizer, snow[:1], snow[1:]) != ""
    assert text_behind(model.tokenizer, snow, snow) == "\N{SNOWMAN}"


def test_a_teacher_may_read_more_tokens_than_the_student(tiny_teacher):
    import torch

    from limbeck.core.specs import LocalTeacher

    cpu = torch.device("cpu")
    assert load_teacher(LocalTeacher(name=str(tiny_teacher)), cpu, 7).encoder.max_length == 7
    longer = LocalTeacher(name=str(tiny_teacher), max_length=9)
    assert load_teacher(longer, cpu, 7).encoder.max_length == 9
