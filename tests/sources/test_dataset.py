"""Data: the forms of a row, files and folders, order, resume, and errors that name the place."""

import datetime
import json
import multiprocessing
import os
import re
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from limbeck.core.errors import DataError, RecipeError
from limbeck.core.types import Turn
from limbeck.sources import Dataset
from limbeck.sources.dataset import to_sample
from limbeck.sources.files import content_sha256, open_rows


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def ids(stream, count):
    return [next(stream).id for _ in range(count)]


def test_three_forms_of_a_row():
    text = to_sample({"text": "abc"}, "n")
    assert [(t.text, t.learn) for t in text.turns] == [("abc", True)]
    plain = to_sample({"prompt": "a", "completion": "b", "id": 7, "weight": 2, "channel": "x"}, "n")
    assert (plain.id, plain.weight, plain.channel, plain.completion) == ("7", 2.0, "x", "b")
    chat = to_sample(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "n"
    )
    assert [(t.role, t.learn) for t in chat.turns] == [("user", False), ("assistant", True)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{oops", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"question": "a"}, "a row needs"),
        ({"prompt": 3, "completion": "b"}, "`prompt` is int"),
        ({"messages": [{"role": "user"}]}, "not {role, content}"),
        ({"messages": []}, "`messages` is empty"),
        ({"text": "a \ud83d"}, "`text` holds half a character"),
        ({"prompt": "a", "completion": "b", "rationale": "\udc00"}, "`rationale` holds half a"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "`messages` holds half a"),
        ({"text": "a", "id": "\ud83d"}, "`id` holds half a character"),
        ({"text": "a", "group": "\ud83d"}, "`group` holds half a character"),
        ({"text": "a", "channel": "\ud83d"}, "`channel` holds half a character"),
        (
            {"messages": [{"role": "user", "content": "a"}], "privileged": "\ud83d"},
            "`privileged` holds half a character",
        ),
        ({"messages": [{"role": "\ud83d", "content": "a"}]}, "`messages` holds half a"),
        ({"messages": [{"role": None, "content": "a"}]}, "not {role, content}"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "message with `tool_calls`.*write the call into its `content`",
        ),
        (
            {"prompt": "a", "completion": [{"content": None, "function_call": {"name": "f"}}]},
            "`completion` holds a message with `function_call`",
        ),
        ({"text": "a", "weight": -1}, "`weight` is -1"),
        ({"text": "a", "weight": 10**400}, "`weight` is 10{59},"),
        ({"text": "a", "score": 10**400}, "`score` is 10{59},"),
        ({"text": "a", "weight": True}, "`weight` is True"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, row, reason):
    path = write(tmp_path / "d.jsonl", [{"text": "fine"}, "", row])
    with pytest.raises(DataError, match=reason) as error:
        Dataset(path=path).open(0)
    assert str(error.value).startswith(f"{path}:3: ")


def test_missing_empty_and_unknown_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Dataset(path=str(tmp_path / "none.jsonl")).open(0)
    with pytest.raises(DataError, match="no rows"):
        Dataset(path=write(tmp_path / "e.jsonl", [])).open(0)
    (tmp_path / "x.xml").write_text("<a/>")
    with pytest.raises(DataError, match="unknown kind"):
        Dataset(path=str(tmp_path / "x.xml")).open(0)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a readable Parquet"):
        Dataset(path=str(tmp_path / "bad.parquet")).open(0)


def test_a_message_may_have_a_place_for_calls_with_none_in_it():
    empty = {"role": "user", "content": "a", "tool_calls": [], "function_call": None}
    assert to_sample({"messages": [empty]}, "n").turns == (Turn(text="a", role="user"),)


def test_a_column_without_a_value_is_not_the_rows_form():
    nothing = dict.fromkeys(["messages", "prompt", "completion", "text"])
    assert to_sample({**nothing, "prompt": "a", "completion": "b"}, "n").completion == "b"
    assert to_sample({**nothing, "text": "a"}, "n").turns[0].text == "a"
    with pytest.raises(ValueError, match="`messages` is NoneType"):
        to_sample(nothing, "n")


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 10**5], ids=["digits", "brackets"])
def test_json_that_no_one_can_read_names_its_line(tmp_path, value):
    path = write(tmp_path / "d.jsonl", [{"text": "a"}, f'{{"text": "a", "more": {value}'])
    with pytest.raises(DataError, match=r"d\.jsonl:2: not JSON: "):
        Dataset(path=path).open(0)


def test_columns_are_renamed(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"question": "a", "answer": "b"}])
    dataset = Dataset(path=path, columns={"prompt": "question", "completion": "answer"})
    assert next(dataset.open(0)).completion == "b"
    with pytest.raises(DataError, match="no column 'nope'"):
        Dataset(path=path, columns={"prompt": "nope"}).open(0)


def test_columns_may_be_swapped_and_used_twice(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"prompt": "a", "completion": "b"}])
    swapped = {"prompt": "completion", "completion": "prompt", "answer": "prompt"}
    sample = next(Dataset(path=path, columns=swapped).open(0))
    assert (sample.prompt[0].text, sample.completion, sample.answer) == ("b", "a", "a")


def test_a_column_that_no_row_has_is_refused(make_recipe):
    source = {"path": "rows.jsonl", "columns": {"rational": "thoughts"}}
    with pytest.raises(RecipeError, match=r"^source\.columns\.rational: .*'rationale'"):
        make_recipe(source=source)


def test_a_forked_process_reads_at_the_same_time(tmp_path):
    """One open file has one place for all who inherited it."""
    lines = [{"text": f"row {index} " + "x" * (index % 997)} for index in range(2000)]
    rows = open_rows(write(tmp_path / "a.jsonl", lines), "train")
    child = multiprocessing.get_context("fork").Process(target=read_all, args=(rows, lines, 20))
    child.start()
    try:
        read_all(rows, lines, 20)
    finally:
        child.join()
    assert child.exitcode == 0


def read_all(rows, lines, times):
    for _ in range(times):
        for index, line in enumerate(lines):
            assert rows[index] == line


def table(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return str(path)


def test_parquet_and_folders(tmp_path):
    table(tmp_path / "b.parquet", text=[f"p{i}" for i in range(5)])
    write(tmp_path / "a.jsonl", [{"text": f"j{i}"} for i in range(5)])
    stream = Dataset(path=str(tmp_path), holdout=0).open(0)
    texts = {next(stream).turns[0].text for _ in range(10)}
    assert texts == {f"{letter}{i}" for letter in "pj" for i in range(5)}


def test_a_table_is_read_from_its_file_and_from_nowhere_else(tmp_path, monkeypatch):
    """Whatever its time says, and whatever its name looks like."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "lang=en").mkdir()
    path = tmp_path / "lang=en" / "d[1].parquet"
    table(path, text=["old"] * 3)
    times = os.stat(path)
    assert open_rows(str(path), "train")[0] == {"text": "old"}
    table(path, text=["new"] * 3)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    rows = open_rows(str(path), "train")
    assert [dict(rows[k]) for k in range(len(rows))] == [{"text": "new"}] * 3
    assert not (tmp_path / "cache").exists()
    with pytest.raises(IndexError):
        rows[3]


def test_a_column_of_a_table_that_nobody_reads_harms_nobody(tmp_path):
    """What Python has no value for is named where it is read."""
    late = pyarrow.array([2**45] * 3).cast(pyarrow.timestamp("s"))
    pictures = [{"bytes": b"not an image", "path": None}] * 3
    messages = [[{"role": "user", "content": "a", "more": k}] for k in range(3)]
    path = table(tmp_path / "d.parquet", messages=messages, image=pictures, late=late)
    assert Dataset(path=path, holdout=0).open(0).training[2].turns[0].text == "a"
    with pytest.raises(DataError, match=r"d\.parquet\[0\]: "):
        Dataset(path=path, columns={"id": "late"}).open(0)
    with pytest.raises(DataError, match=r"\[0\]: a row needs .*; it has `question`, `late`"):
        Dataset(path=table(tmp_path / "e.parquet", question=["a"] * 3, late=late)).open(0)


def test_a_table_with_one_name_for_two_columns_is_refused(tmp_path):
    twice = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet: two columns have the name 'text'"):
        Dataset(path=str(tmp_path / "d.parquet")).open(0)


def test_an_answer_may_hold_what_json_has_no_word_for(tmp_path):
    day = datetime.date(2020, 1, 2)
    path = table(tmp_path / "d.parquet", text=["a"], answer=[{"day": day, "n": 1}])
    assert next(Dataset(path=path, holdout=0).open(0)).answer == '{"day": "2020-01-02", "n": 1}'


def test_a_folder_of_generated_rows_is_no_folder_of_files(tmp_path):
    """It holds every row twice, and failed ones too."""
    rows = [{"text": str(k)} for k in range(3)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert len(Dataset(path=str(tmp_path), holdout=0).open(0)) == 3
    for name in ("card.json", "failed.jsonl"):
        (tmp_path / name).write_text("")
        with pytest.raises(DataError, match=r"name rows\.jsonl in it, or .* `kind: generated`"):
            Dataset(path=str(tmp_path)).open(0)
        assert len(Dataset(path=path, holdout=0).open(0)) == 3
        (tmp_path / name).unlink()


def test_a_row_keeps_its_name_where_its_file_is_moved(tmp_path):
    table(tmp_path / "b.parquet", text=["p", "q"])
    write(tmp_path / "a.jsonl", [{"text": "j"}])
    moved = shutil.copytree(tmp_path, tmp_path / "there")
    for folder in (tmp_path, moved):
        stream = Dataset(path=str(folder), holdout=0).open(0)
        assert [s.id for s in stream.training] == ["a.jsonl:1", "b.parquet[0]", "b.parquet[1]"]
        one = Dataset(path=str(folder / "b.parquet"), holdout=0).open(0)
        assert [s.id for s in one.training] == ["b.parquet[0]", "b.parquet[1]"]
    broken = write(tmp_path / "c.jsonl", [{"text": 1}])
    with pytest.raises(DataError, match=f"^{re.escape(broken)}:1: "):  # an error says where
        Dataset(path=broken).open(0)


def test_what_a_file_or_folder_holds_decides_its_hash(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "j"}])
    write(tmp_path / "b.jsonl", [{"text": "k"}])
    (tmp_path / "README.md").write_text("not a row")
    moved = shutil.copytree(tmp_path, tmp_path / "there")
    whole, one = content_sha256(str(tmp_path)), content_sha256(str(tmp_path / "a.jsonl"))
    assert whole == content_sha256(str(moved))
    assert one == content_sha256(str(moved / "a.jsonl"))
    write(moved / "b.jsonl", [{"text": "l"}])
    (moved / "a.jsonl").rename(moved / "c.jsonl")
    assert whole != content_sha256(str(moved))
    assert one != content_sha256(str(moved / "c.jsonl"))  # rows have its name
    assert content_sha256("somebody/data") is None


def test_each_epoch_visits_every_row_once_in_its_own_order(tmp_path):
    stream = Dataset(path=write(tmp_path / "d.jsonl", [{"text": str(i)} for i in range(30)])).open(
        3
    )
    count = len(stream)
    assert count + len(stream.holdout) == 30
    first, second = ids(stream, count), ids(stream, count)
    assert first != second
    assert sorted(first) == sorted(second)
    assert len(set(first)) == count
    assert not set(first) & {sample.id for sample in stream.holdout}


def test_resume_at_any_row_continues_the_same_stream(tmp_path):
    dataset = Dataset(path=write(tmp_path / "d.jsonl", [{"text": str(i)} for i in range(7)]))
    whole = ids(dataset.open(1), 40)
    for cut in (0, 1, 6, 7, 8, 20):
        stream = dataset.open(1)
        ids(stream, cut)
        again = dataset.open(1)
        again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert ids(again, 40 - cut) == whole[cut:]


def test_groups_are_held_out_whole_and_no_more_of_them_than_are_asked_for(tmp_path):
    rows = [{"text": f"{g} {k}", "group": f"{g}"} for k in range(8) for g in range(125)]
    stream = Dataset(path=write(tmp_path / "d.jsonl", rows)).open(0)
    assert len(stream.holdout) == 64
    assert len({sample.group for sample in stream.holdout}) == 8
    assert not {s.group for s in stream.holdout} & {s.group for s in stream.training}
    few = Dataset(path=write(tmp_path / "e.jsonl", rows[:375]), holdout=13).open(0)
    assert len(few.holdout) == 15  # five groups of three, of which the last goes beyond
    assert len(few) == 360
    none = Dataset(path=str(tmp_path / "d.jsonl"), holdout=0).open(0)
    assert (len(none.holdout), len(none)) == (0, 1000)


def test_rows_without_groups_are_held_out_as_they_ever_were(tmp_path):
    """A run that is resumed, or compared with an earlier one, must find the same ones."""
    path = write(tmp_path / "d.jsonl", [{"text": str(k)} for k in range(100)])
    held = Dataset(path=path, holdout=5).open(3).holdout
    assert [sample.turns[0].text for sample in held] == ["13", "21", "58", "94", "96"]


def test_held_out_rows_may_have_their_own_file(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"text": "a"}] * 3)
    other = write(tmp_path / "h.jsonl", [{"text": "b"}] * 2)
    stream = Dataset(path=path, holdout=other).open(0)
    assert [s.turns[0].text for s in stream.holdout] == ["b", "b"]
    assert len(stream) == 3


def test_what_is_privileged_comes_before_the_rest():
    plain = to_sample({"privileged": "psst ", "prompt": "a", "completion": "b"}, "1")
    assert plain.privileged == (Turn(text="psst "),)
    chat = to_sample(
        {"privileged": "psst", "prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "1"
    )
    assert chat.privileged == (Turn(text="psst", role="system"),)
    assert chat.turns[-1] == Turn(text="b", role="assistant", learn=True)
    with pytest.raises(ValueError, match="privileged"):
        to_sample({"privileged": 3, "text": "a"}, "1")


def test_a_rationale_is_learnt_before_the_completion():
    sample = to_sample({"prompt": "é", "rationale": "so ", "completion": "b", "answer": 7}, "1")
    assert sample.completion == "so b"
    assert sample.parts == ((2, "rationale"), (5, "answer"))
    assert sample.answer == "7"
    with pytest.raises(ValueError, match="both are text"):
        to_sample({"prompt": "a", "rationale": "so", "completion": []}, "1")


def test_score_and_group(tmp_path):
    row = {"text": "a", "group": 3, "score": -1.5}
    assert (to_sample(row, "1").group, to_sample(row, "1").score) == ("3", -1.5)
    for bad in (True, "x", float("nan")):
        with pytest.raises(ValueError, match="score"):
            to_sample({**row, "score": bad}, "1")


def test_a_split_is_asked_of_the_hub_alone(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n')
    for path in (tmp_path, tmp_path / "test.jsonl"):
        with pytest.raises(DataError, match="files have no `split`; name the file or folder"):
            Dataset(path=str(path), split="test").open(0)
