"""Sources one after the other."""

import json
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.core.errors import DataError, RecipeError
from limbeck.recipe.resolve import describe
from limbeck.recipe.run import run
from limbeck.sources import Dataset, Rollouts, Stages
from limbeck.train.batches import Batches


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(name, prompts, answers=1):
    """Rows `name/prompt#answer`, those of a prompt as a group."""
    group = answers > 1
    return [
        {
            "id": f"{name}/{p}#{k}",
            "prompt": f"{p}?\n",
            "completion": f"{name} {p} {k}",
            **({"group": f"{name}/{p}"} if group else {}),
        }
        for p in prompts
        for k in range(answers)
    ]


@pytest.fixture
def files(tmp_path):
    """Low: 6 prompts of one answer; high: 5 prompts of three."""
    return (
        write(tmp_path / "low.jsonl", rows_of("low", range(6))),
        write(tmp_path / "high.jsonl", rows_of("high", range(100, 105), 3)),
    )


def stages(files, epochs=(), **more):
    return Stages(of=tuple(Dataset(path=f, **{"holdout": 0, **more}) for f in files), epochs=epochs)


def ids(stream, count):
    return [sample.id for sample in islice(stream, count)]


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_each_stage_is_visited_whole_and_the_last_has_no_end(files, epochs):
    stream = stages(files, (epochs,)).open(0)
    first = ids(stream, 6 * epochs)
    for epoch in range(epochs):
        visited = first[6 * epoch : 6 * epoch + 6]
        assert sorted(visited) == [f"low/{p}#0" for p in range(6)]
    assert all(name.startswith("high/") for name in ids(stream, 60))
    alone = Dataset(path=files[0], holdout=0).open(0)
    assert first == ids(alone, 6 * epochs)  # in the order that the source has by itself
    alone = Dataset(path=files[1], holdout=0).open(0)
    again = stages(files, (epochs,)).open(0)
    assert ids(again, 6 * epochs + 40)[6 * epochs :] == ids(alone, 40)


def test_a_stage_in_the_middle_has_its_own_count(files):
    low, high = files
    stream = stages((low, high, low), (1, 2)).open(0)
    names = [name.partition("/")[0] for name in ids(stream, 6 + 2 * 15 + 20)]
    assert names == ["low"] * 6 + ["high"] * 30 + ["low"] * 20


def test_the_stage_is_that_of_the_sample_to_come(files):
    stream = stages(files).open(0)
    seen = []
    for _ in range(8):
        seen.append((stream.stage, next(stream).id.partition("/")[0]))
    assert seen == [(0, "low")] * 6 + [(1, "high")] * 2


@settings(max_examples=20)
@given(at=st.integers(0, 40), epochs=st.integers(1, 3))
def test_it_goes_on_from_any_sample(files_for_hypothesis, at, epochs):
    spec = stages(files_for_hypothesis, (epochs,))
    stream = spec.open(5)
    ids(stream, at)
    state = json.loads(json.dumps(stream.state_dict()))
    wanted = [(sample.id, sample.siblings) for sample in islice(stream, 30)]
    other = spec.open(5)
    ids(other, 7)  # wherever it stood before
    other.load_state_dict(state)
    assert [(sample.id, sample.siblings) for sample in islice(other, 30)] == wanted


@pytest.fixture(scope="module")
def files_for_hypothesis(tmp_path_factory):
    """As `files`, once for all examples."""
    folder = tmp_path_factory.mktemp("stages")
    return (
        write(folder / "low.jsonl", rows_of("low", range(6))),
        write(folder / "high.jsonl", rows_of("high", range(100, 105), 3)),
    )


def test_groups_are_never_parted(files):
    stream = stages(files).open(3)
    ids(stream, 6)
    for _ in range(15):
        samples = list(islice(stream, 3))
        assert len({sample.group for sample in samples}) == 1
        assert [sample.siblings for sample in samples] == [2, 1, 0]


def test_what_one_holds_out_none_trains_on(tmp_path):
    """The same prompts in both stages; the second one's rows stand in groups."""
    prompts = range(40)
    files = (
        write(tmp_path / "low.jsonl", rows_of("low", prompts)),
        write(tmp_path / "high.jsonl", rows_of("high", prompts, 2)),
    )
    spec = Stages(of=(Dataset(path=files[0], holdout=4), Dataset(path=files[1], holdout=3)))
    stream = spec.open(0)
    held = {sample.prompt for sample in stream.holdout}
    # Four by the first; by the second three rows, which take their siblings with them.
    assert 4 < len(held) <= 4 + 3
    assert {sample.id.partition("/")[0] for sample in stream.holdout} == {"low", "high"}
    drawn = list(islice(stream, 36 - len(held) + 2 * 40))
    assert not held & {sample.prompt for sample in drawn}
    assert not held & {sample.prompt for sample in stream.training}
    assert len(stream.training) == 3 * (40 - len(held))
    assert {sample.id for sample in drawn} == {sample.id for sample in stream.training}
    assert stream.training[-1].id == stream.training[len(stream.training) - 1].id
    assert [s.id for s in stream.training[:3]] == [stream.training[k].id for k in range(3)]
    with pytest.raises(IndexError):
        stream.training[len(stream.training)]
    # After what was held out of it, a stage is still left behind when its epoch ends.
    names = [sample.id.partition("/")[0] for sample in drawn]
    assert names == sorted(names, reverse=True)


def test_a_row_without_an_id_has_a_name_of_its_own(tmp_path):
    """Two folders with a `train.jsonl` each; the first one's comes again at the end."""
    paths = []
    for folder in ("easy", "hard"):
        (tmp_path / folder).mkdir()
        rows = [{"prompt": f"{folder} {k}?", "completion": "x"} for k in range(3)]
        paths.append(write(tmp_path / folder / "train.jsonl", rows))
    other = write(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "x"}, {"text": "b"}])
    stream = stages([*paths, other, paths[0]]).open(0)
    easy, hard = ([f"{place}/train.jsonl:{line}" for line in (1, 2, 3)] for place in (0, 1))
    names = [*easy, *hard, "other.jsonl:1", "other.jsonl:2", *easy]
    assert [sample.id for sample in stream.training] == names
    assert sorted(ids(stream, 8)) == sorted(names[:8])
    folder = str(tmp_path / "hard")
    assert [s.id for s in stages([paths[0], folder]).open(0).training] == [*easy, *hard]


def test_a_group_leaves_whole_where_one_of_its_prompts_is_held_out(tmp_path):
    """Two tasks of one question have prompts of their own, and stay together."""
    pairs = [
        {"id": f"{q}/{task}", "prompt": f"{task}: {q}?", "completion": "x", "group": str(q)}
        for q in range(20)
        for task in ("explain", "predict")
    ]
    both = write(tmp_path / "pairs.jsonl", pairs)
    held = write(tmp_path / "held.jsonl", [{"prompt": "explain: 3?", "completion": "x"}])
    one = write(tmp_path / "one.jsonl", rows_of("one", range(9)))
    spec = Stages(of=(Dataset(path=one, holdout=0), Dataset(path=both, holdout=held)))
    stream = spec.open(0)
    ids(stream, 9)
    names = ids(stream, 60)
    assert not {"3/explain", "3/predict"} & set(names)
    assert len(set(names)) == 38


def test_all_rows_held_out_is_an_error_not_an_endless_search(tmp_path):
    one = write(tmp_path / "one.jsonl", rows_of("one", range(3)))
    other = write(tmp_path / "other.jsonl", rows_of("other", range(3)))
    spec = Stages(of=(Dataset(path=one, holdout=other), Dataset(path=other, holdout=0)))
    with pytest.raises(DataError, match=r"of\.0: all 3 rows"):
        spec.open(0)


def test_a_recipe_may_say_it_and_what_it_may_not_say(files, make_recipe):
    low, high = ({"kind": "dataset", "path": path, "holdout": 0} for path in files)
    recipe = make_recipe(source={"kind": "stages", "of": [low, high], "epochs": [2]})
    assert recipe.source == stages(files, (2,))
    said = describe(recipe.source)
    assert [one["path"] for one in said["of"]] == list(files)
    assert make_recipe(source=said) == recipe
    for source, message in (
        ({"of": []}, "there is no source"),
        ({"of": [low, high], "epochs": [1, 1]}, "has 2 numbers for 2 sources; give 1"),
        ({"of": [low, high], "epochs": [0]}, "greater than 0"),
        ({"of": [low, {"kind": "rollouts", "of": high}]}, "only given rows can be a stage"),
    ):
        with pytest.raises(RecipeError, match=message):
            make_recipe(source={"kind": "stages", **source})
    with pytest.raises(RecipeError, match="only given rows"):
        Stages(of=(Rollouts(of=Dataset(path=files[0])),))


def test_batches_resume_within_a_window_that_spans_two_stages(files, make_recipe):
    """A window is drawn ahead, so for some steps around the boundary both stages mix."""

    class Words:
        def encode(self, sample):
            from limbeck.core.types import Encoding

            length = 4 + len(sample.completion)
            flags = [False] + [True] * (length - 1)
            return Encoding(ids=[1] * length, learn=flags, starts=[0] * length, ends=[0] * length)

    def steps(batches, count):
        return [[item.sample.id for part in batches.next(1) for item in part] for _ in range(count)]

    spec = stages(files, (2,))
    batches = Batches(spec.open(0), Words(), 30, 0)
    wanted = steps(batches, 12)
    names = {name.partition("/")[0] for step in wanted for name in step}
    assert names == {"low", "high"}
    for at in range(12):
        first = Batches(spec.open(0), Words(), 30, 0)
        assert steps(first, at) == wanted[:at]
        second = Batches(spec.open(0), Words(), 30, 0)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert steps(second, 12 - at) == wanted[at:]


def test_a_run_on_stages_ends_with_the_report(files, make_recipe, tmp_path):
    source = {"kind": "stages", "of": [{"path": path, "holdout": 1} for path in files]}
    report = run(make_recipe(source=source, train={"steps": 3}), tmp_path / "run")
    assert report.train.steps == 3
