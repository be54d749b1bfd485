"""Templates: what is wrong with a file is one clear line, and texts are never places."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import limbeck.synth
from limbeck.core.errors import RecipeError
from limbeck.synth.template import PLACE, filled, ours, template

FOLDER = Path(limbeck.synth.__file__).parent / "templates"


def test_a_file_of_the_user_starts_at_the_recipe(tmp_path):
    (tmp_path / "own.txt").write_text('{"a": 1} {instruction}')
    assert template("own.txt", "evolve_deepen", tmp_path, ["instruction"]).startswith('{"a"')
    whole = str(tmp_path / "own.txt")
    assert template(whole, "evolve_deepen", Path("elsewhere"), ["instruction"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"do it", "own.txt: has no place {instruction}"),
        (
            b"{instruction} {instructoin}",
            "unknown place {instructoin}; did you mean 'instruction'?",
        ),
        (b"{instruction} {other}", "unknown place {other}"),
        (b"\xff\xfe", "own.txt: not UTF-8 text"),
        (None, "own.txt: No such file or directory"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / "own.txt").write_bytes(content)
    with pytest.raises(RecipeError) as error:
        template("own.txt", "evolve_deepen", tmp_path, ["instruction"], "templates.deepen")
    assert error.value.field == "templates.deepen"
    assert said in error.value.reason
    assert "\n" not in str(error.value)


@given(st.dictionaries(st.sampled_from(["first", "second"]), st.text(), min_size=2))
def test_a_text_is_never_taken_for_a_place(texts):
    made = filled("<{first}|{second}>", **texts)
    assert made == "<" + texts["first"] + "|" + texts["second"] + ">"
    wanted = "{second}{text}\\1" + texts["second"]
    assert filled("{first}", first=wanted) == wanted


def test_a_place_may_be_called_text():
    assert filled("{text}!", text="a") == "a!"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_ours_can_be_copied_and_used(path, tmp_path):
    """A step that loads ours names the places that are in it: see the tests of each step."""
    text = ours(path.stem)
    (tmp_path / "copy.txt").write_text(text)
    places = sorted(set(PLACE.findall(text)))
    assert places
    assert template("copy.txt", path.stem, tmp_path, places) == text


def test_the_places_of_ours_are_those_that_steps_fill():
    """The packaged files are read unchecked, so the steps' names are held against them here."""
    known = {
        "self_instruct": {"examples", "number"},
        **{f"evolve_{way}": {"instruction"} for way in ways()},
        "evolve_same": {"first", "second"},
        **{f"grounded_{what}": {"document", "number"} for what in grounded()},
        "backtranslate": {"text"},
        "backtranslate_score": {"instruction", "text", "form"},
    }
    assert {path.stem: set(PLACE.findall(path.read_text())) for path in FOLDER.iterdir()} == known


def ways():
    from limbeck.synth.evolve import WAYS

    return WAYS


def grounded():
    return "questions", "quoted", "instructions", "personas"
