"""Several sources with their shares: in proportion, groups whole, and again after a stop."""

import json
from types import SimpleNamespace

import pytest

from limbeck.core.errors import DataError, RecipeError
from limbeck.sources.dataset import Dataset
from limbeck.sources.mixture import Mixture, MixtureStream
from limbeck.sources.rollouts import Rollouts
from limbeck.sources.stages import Stages


def data(tmp_path, name, count, size=1):
    path = tmp_path / f"{name}.jsonl"
    rows = [
        {
            "id": f"{name}{k}.{j}",
            "prompt": f"{name} {k} ",
            "completion": "b",
            "channel": name,
            **({"group": f"{name}{k}"} if size > 1 else {}),
        }
        for k in range(count)
        for j in range(size)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Dataset(path=str(path), holdout=2)


def test_each_gives_its_share(tmp_path):
    spec = Mixture(of=(data(tmp_path, "new", 30), data(tmp_path, "old", 30)), shares=(3, 1))
    stream = spec.open(0)
    channels = [next(stream).channel for _ in range(1000)]
    assert 700 <= channels.count("new") <= 800
    assert {sample.channel for sample in stream.holdout} == {"new", "old"}
    assert stream.ahead


def test_what_two_parts_hold_out_counts_once(tmp_path):
    """Prompts and given answers of one file, of which both hold out the same rows."""
    one = data(tmp_path, "a", 40)
    stream = Mixture(of=(Rollouts(of=one), one)).open(0)
    assert [s.id for s in stream.holdout] == [s.id for s in one.open(0).holdout]


class Parrot:
    """Writes one and the same behind each prompt."""

    def write(self, student, teachers, prompts, seeds, sampling):
        said = SimpleNamespace(text="x", ids=[1], logp=None, ended=True)
        return [said] * len(prompts)


@pytest.mark.parametrize("around", ["plain", "rollouts", "mixture", "stages"])
def test_what_one_holds_out_none_trains_on(tmp_path, around):
    """The same prompts in two files, of which each holds out others; in the second as groups."""
    first = data(tmp_path, "a", 40)
    path = tmp_path / "b.jsonl"
    rows = [
        {"id": f"b{k}.{j}", "prompt": f"a {k} ", "completion": "c", "group": f"{k}"}
        for k in range(50)
        for j in range(2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inner = {
        "plain": lambda of: of,
        "rollouts": lambda of: Rollouts(of=of, speaker=Parrot()),
        "mixture": lambda of: Mixture(of=(of,)),
        "stages": lambda of: Stages(of=(of,)),
    }[around]
    stream = Mixture(of=(first, inner(Dataset(path=str(path), holdout=4)))).open(1)
    stream.bind(SimpleNamespace(vocabulary="v"), {})
    held = {sample.prompt for sample in stream.holdout}
    assert {sample.id[0] for sample in stream.holdout} == {"a", "b"}
    drawn = [next(stream) for _ in range(1000)]
    assert not held & {sample.prompt for sample in drawn}
    assert len({sample.prompt for sample in drawn}) == 50 - len(held)


def test_where_all_rows_ask_one_question_none_can_be_held_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "Go.", "completion": str(k)}) + "\n" for k in range(20))
    )
    with pytest.raises(DataError, match=r"of\.1: all 19 rows .* set `holdout: 0`"):
        Mixture(of=(data(tmp_path, "a", 12), Dataset(path=str(path), holdout=1))).open(0)
    texts = [{"prompt": "", "completion": f"text {k}"} for k in range(20)]  # of no prompt
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    stream = Mixture(of=(Dataset(path=str(path), holdout=1),)).open(0)
    assert len({next(stream).completion for _ in range(100)}) == 19


def test_files_of_the_same_name_are_no_trouble(tmp_path):
    """Two rows then have the same name, and are known by their text."""
    specs = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "train.jsonl"
        rows = [{"prompt": f"{folder} {k}?", "completion": "x"} for k in range(20)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        specs.append(Dataset(path=str(path), holdout=2))
    stream = Mixture(of=tuple(specs)).open(0)
    assert len(stream.holdout) == 4
    assert len({next(stream).prompt for _ in range(400)}) == 36


def test_groups_stay_together(tmp_path):
    stream = Mixture(of=(data(tmp_path, "a", 12, 3), data(tmp_path, "b", 12, 2))).open(0)
    previous = None
    for _ in range(300):
        sample = next(stream)
        if previous is not None and previous.siblings:
            assert sample.group == previous.group
        previous = sample


@pytest.mark.parametrize("taken", [0, 1, 7, 100])
def test_it_goes_on_where_it_stood(tmp_path, taken):
    spec = Mixture(of=(data(tmp_path, "a", 12, 3), data(tmp_path, "b", 12)))
    stream = spec.open(5)
    for _ in range(taken):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [next(stream) for _ in range(50)]
    again = spec.open(5)
    again.load_state_dict(state)
    assert [next(again) for _ in range(50)] == expected


def test_wrong_shares_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="2 numbers for 1"):
        Mixture(of=(data(tmp_path, "a", 12),), shares=(1, 2))
    with pytest.raises(RecipeError, match="no source"):
        Mixture(of=())


class Looking:
    """A source that is told of each step."""

    def __init__(self):
        self.ahead, self.holdout, self.told = True, [], []

    def on_step(self, step):
        self.told.append(step)


def test_it_looks_on_where_a_part_does(tmp_path):
    plain = data(tmp_path, "a", 12).open(0)
    assert not hasattr(MixtureStream([plain, plain], (1, 1), 0), "on_step")
    looking = Looking()
    MixtureStream([plain, looking], (1, 1), 0).on_step("a step")
    assert looking.told == ["a step"]
