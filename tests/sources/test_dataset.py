"""Data: the forms of a row, files and folders, order, resume, and errors that name the place."""

import json
import multiprocessing
import re
import shutil

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
        ({"text": "a", "weight": -1}, "`weight` is -1"),
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


def test_parquet_and_folders(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [f"p{i}" for i in range(5)]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    write(tmp_path / "a.jsonl", [{"text": f"j{i}"} for i in range(5)])
    stream = Dataset(path=str(tmp_path), holdout=0).open(0)
    texts = {next(stream).turns[0].text for _ in range(10)}
    assert texts == {f"{letter}{i}" for letter in "pj" for i in range(5)}


def test_a_row_keeps_its_name_where_its_file_is_moved(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["p", "q"]}), tmp_path / "b.parquet")
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
