"""A teacher behind an API, against a mock that misbehaves: nothing lost, nothing paid twice."""

import base64
import json
import logging
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest

from limbeck.core.errors import BudgetError, RecipeError, ServerError
from limbeck.core.exchange import Question, Writer
from limbeck.core.specs import ServerTeacher, TokenPrice
from limbeck.core.types import Sampling, Turn
from limbeck.teachers import server as module
from limbeck.teachers.client import Client
from limbeck.teachers.mock import KINDS, Faults, MockTeacher
from limbeck.teachers.mock.minds import Bad, Canned
from limbeck.teachers.probe import Capabilities
from limbeck.teachers.server import Server

SAMPLING = Sampling(max_tokens=30, temperature=1.0, seed=3)
PRICE = TokenPrice(input=1.0, output=2.0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.001)


def spec_of(mock, tmp_path, **fields):
    settings = {"in_flight": 8, "attempts": 30, "timeout_seconds": 5.0, **fields}
    return ServerTeacher(
        url=mock.url, model="m", ledger=str(tmp_path / "ledger.sqlite"), price=PRICE, **settings
    )


def questions(count, start=0):
    for k in range(start, start + count):
        yield Question(id=f"q{k}", prompt=(Turn(text=f"question {k}", role="user"),))


def ask(spec, count=5, n=1, sampling=SAMPLING):
    with Server(spec, display=False) as server:
        assert isinstance(server, Writer)
        return list(server.answers(questions(count), sampling, n))


def chats(mock):
    """Requests that were not the probe's."""
    return [r for r in mock.requests if "sea" not in str(r["body"]["messages"])]


def test_answers_come_in_order_with_everything_that_is_known_of_them(tmp_path):
    with MockTeacher() as mock:
        found = ask(spec_of(mock, tmp_path), 20, 3)
    assert [[(r.question, r.index) for r in group] for group in found] == [
        [(f"q{k}", i) for i in range(3)] for k in range(20)
    ]
    reply = found[0][0]
    assert (reply.finish, reply.model, reply.fingerprint) == ("stop", "mock-1", "fp_mock")
    assert len({r.text for group in found for r in group}) == 60
    tokens = sum(r.completion_tokens for r in found[0])
    usd = sum(r.usd for r in found[0])
    assert usd == pytest.approx((found[0][0].prompt_tokens + 2 * tokens) / 1e6)


def test_a_stop_string_is_never_in_an_answer_even_where_the_server_leaves_it(tmp_path):
    """As `transformers serve` does; what is recorded is what came, and is cut when it is read."""
    sampling = replace(SAMPLING, stop=("END", " |"))
    with MockTeacher(lambda asked: "one END two | three") as mock:
        spec = spec_of(mock, tmp_path)
        for _ in range(2):
            assert [(r.text, r.finish) for (r,) in ask(spec, 2, sampling=sampling)] == [
                ("one ", "stop")
            ] * 2
        assert [r.text for (r,) in ask(spec, 1)] == ["one END two | three"]


def test_what_is_known_is_never_asked_for_again(tmp_path):
    with MockTeacher() as mock:
        spec = spec_of(mock, tmp_path)
        first = ask(spec, 6, 2)
        sent = len(mock.requests)
        assert ask(spec, 6, 2) == first
        assert len(mock.requests) == sent
        more = ask(spec, 6, 5)  # only the three that are new
        asked = mock.requests[sent:]
        assert [r["body"]["n"] for r in asked] == [3] * 6
        assert [group[:2] for group in more] == [list(group) for group in first]
        assert all(len({r.text for r in group}) == 5 for group in more)
        ask(spec, 6, 2, Sampling(max_tokens=31, temperature=1.0, seed=3))
        assert len(mock.requests) == sent + 12  # another setting is another question


def test_an_answer_that_was_cut_is_data(tmp_path):
    with MockTeacher() as mock:
        found = ask(spec_of(mock, tmp_path), 8, 1, Sampling(max_tokens=3, temperature=1.0))
        cut = [r for (r,) in found if r.finish == "length"]
        assert cut
        assert all(r.text and r.failure is None and not r.whole for r in cut)
        assert len(chats(mock)) == 8


def test_a_server_of_one_answer_at_a_time(tmp_path):
    class One:
        """Refuses n > 1."""

        def __init__(self):
            self.canned = Canned()

        def answer(self, asked):
            if asked.n > 1:
                raise Bad(400, "n must be 1")
            return self.canned.answer(asked)

    with MockTeacher(One()) as mock:
        found = ask(spec_of(mock, tmp_path), 4, 3)
        assert all(len({r.text for r in group}) == 3 for group in found)
        assert len(chats(mock)) == 12


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "timeout"])
def test_each_fault_is_overcome_and_nothing_is_paid_twice(kind, tmp_path):
    faults = Faults(rate=0.4, kinds=(kind,), seed=5)
    with MockTeacher(faults=faults) as mock:
        spec = spec_of(mock, tmp_path)
        scored = Sampling(max_tokens=30, temperature=1.0, seed=3, scores=2)
        found = ask(spec, 12, 2, scored)
        assert [[r.index for r in group] for group in found] == [[0, 1]] * 12
        assert all(r.failure is None for group in found for r in group), kind
        if kind not in ("bang", "length"):
            assert all(r.whole and r.scores for group in found for r in group)
        else:
            assert any(r.finish == "length" or set(r.text) == {"!"} for g in found for r in g)
        sent = len(mock.requests)
        assert ask(spec, 12, 2, scored) == found
        assert len(mock.requests) == sent
        with Server(spec, display=False) as server:
            totals = server.totals
        # What is known to have been spent, and the worst case of what is not, is all of the bill.
        billed = mock.billed_usd(PRICE)
        assert totals.spent_usd <= billed + 1e-9
        assert billed <= totals.spent_usd + totals.reserved_usd + 1e-9


def test_a_server_that_is_silent_is_not_waited_for(tmp_path):
    faults = Faults(rate=0.3, kinds=("timeout",), seed=2, hold_seconds=1.0)
    with MockTeacher(faults=faults) as mock:
        found = ask(spec_of(mock, tmp_path, timeout_seconds=0.3), 8)
        assert all(r.whole for (r,) in found)
        assert any(r["fault"] for r in mock.requests)


def test_a_question_that_always_fails_says_why_and_is_asked_again(tmp_path):
    with MockTeacher() as mock:
        spec = spec_of(mock, tmp_path, attempts=2)
        ask(spec, 1)  # the probe
        mock.faults = Faults(rate=1.0, kinds=("500",))
        found = ask(spec, 3)
        assert [r.failure is None for (r,) in found] == [True, False, False]
        assert "status 500" in found[1][0].failure
        assert "2 attempts" in found[1][0].failure
        mock.faults = Faults()
        assert all(r.whole for (r,) in ask(spec, 3))


def test_the_budget_is_not_passed_however_many_are_under_way(tmp_path):
    with MockTeacher(latency_seconds=0.02) as mock:
        spec = spec_of(mock, tmp_path, in_flight=256, budget_usd=0.004)
        got = []
        with (
            Server(spec, display=False) as server,
            pytest.raises(BudgetError, match="raise budget"),
        ):
            got.extend(server.answers(questions(3000), SAMPLING, 1))
        assert got
        assert mock.billed_usd(PRICE) <= 0.004
        # What was answered before the end is kept: the same budget gives the same answers.
        with Server(spec, display=False) as server:
            again = list(islice(server.answers(questions(3000), SAMPLING, 1), len(got)))
        assert again == got
        assert mock.billed_usd(PRICE) <= 0.004


def test_a_budget_lets_all_run_that_fits(tmp_path):
    """Reservations are worst cases, and more than what is spent: one has to wait for them."""
    with MockTeacher(latency_seconds=0.01) as mock:
        spec = spec_of(mock, tmp_path, in_flight=64, budget_usd=0.05)
        assert len(ask(spec, 300)) == 300
        assert 0.01 < mock.billed_usd(PRICE) < 0.05


def test_a_server_without_a_key_a_model_or_a_hope_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with MockTeacher(key="right-key-123") as mock:
        with pytest.raises(ServerError, match="environment variable OPENAI_API_KEY"):
            ask(spec_of(mock, tmp_path))
        monkeypatch.setenv("OPENAI_API_KEY", "right-key-123")
        assert len(ask(spec_of(mock, tmp_path))) == 5
        far = ServerTeacher(url=mock.url + "/nowhere", model="m", ledger=str(tmp_path / "l"))
        with pytest.raises(ServerError, match="has no model"):
            ask(far)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(RecipeError, match="OPENAI_API_KEY is not set"):
        Server(ServerTeacher(url="https://example.org/v1", model="m")).__enter__()


def test_the_key_is_nowhere(tmp_path, monkeypatch, caplog, capfd):
    key = "sk-canary-4711-very-secret"
    monkeypatch.setenv("MY_KEY", key)
    faults = Faults(rate=0.3, seed=1)
    with caplog.at_level(logging.DEBUG), MockTeacher(faults=faults, key=key) as mock:
        found = ask(spec_of(mock, tmp_path, key_variable="MY_KEY"), 10)
        monkeypatch.setenv("MY_KEY", key + "x")  # wrong: what the server says of it is shown
        with pytest.raises(ServerError) as caught:
            ask(spec_of(mock, tmp_path / "other", key_variable="MY_KEY"), 1)
        said = str(caught.value) + repr(found) + repr(mock.requests)
    out = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    everything = (said + caplog.text + out.out + out.err).encode() + written
    for form in (key, quote(key), base64.b64encode(key.encode()).decode()):
        assert form.encode() not in everything


def test_questions_are_taken_as_they_are_needed_and_a_consumer_may_leave(tmp_path):
    taken = []

    def endless():
        for question in questions(10**6):
            taken.append(question)
            yield question

    with MockTeacher() as mock:
        with Server(spec_of(mock, tmp_path), display=False) as server:
            replies = server.answers(endless(), SAMPLING)
            for _ in range(3):
                next(replies)
            replies.close()
        assert len(taken) < 100
        assert threading.active_count() < 10


class Slow:
    """Canned words, each after what a function of the text does; one answer at a time."""

    def __init__(self, meanwhile):
        self.meanwhile, self.canned = meanwhile, Canned()

    def answer(self, asked):
        if asked.n > 1:
            raise Bad(400, "n must be 1")
        text = asked.prompt[-1].text
        if "sea" not in text:
            self.meanwhile(text)
        return self.canned.answer(asked)


def until(condition):
    """Wait for it, but not for ever."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)


def test_ctrl_c_waits_for_all_that_is_under_way_the_head_of_the_line_too(tmp_path, ctrl_c, ends):
    def meanwhile(text):
        if text == "question 0":
            until(lambda: len(chats(mock)) == 5)
            ctrl_c()
            time.sleep(0.1)

    with MockTeacher(Slow(meanwhile)) as mock:
        spec = spec_of(mock, tmp_path)
        with pytest.raises(KeyboardInterrupt):
            ask(spec)
        assert ends() == ["answered"] * 5
        assert len(ask(spec)) == 5
        assert len(chats(mock)) == 5


def test_ctrl_c_waits_for_the_requests_of_earlier_steps_and_lets_none_of_them_send_more(
    tmp_path, ctrl_c, ends
):
    def meanwhile(text):
        if text.startswith("judge"):  # behind whom there are three more questions
            until(lambda: len(chats(mock)) == 7)
            ctrl_c()
        elif int(text.split()[-1]) > 3:
            stopping.wait(5)
            time.sleep(0.05)

    def judge(replies):
        for (reply,) in replies:
            turn = Turn(text=f"judge {reply.question}", role="user")
            yield Question(id=reply.question, prompt=(turn,))

    def two_steps(spec):
        with (
            Server(spec, display=False, stopping=stopping) as first,
            Server(replace(spec, in_flight=1), display=False, stopping=stopping) as second,
        ):
            list(second.answers(judge(first.answers(questions(9), SAMPLING)), SAMPLING))

    stopping = threading.Event()
    with MockTeacher(Slow(meanwhile)) as mock:
        with pytest.raises(KeyboardInterrupt):
            two_steps(spec_of(mock, tmp_path, in_flight=2))
        assert ends() == ["answered"] * 7
        assert len(chats(mock)) == 7


def test_a_second_ctrl_c_gives_up_what_is_under_way(tmp_path, ctrl_c, ends):
    def meanwhile(text):
        if text == "question 0":
            until(lambda: len(chats(mock)) == 5)
            ctrl_c()
            stopping.wait(5)
            time.sleep(0.05)
            ctrl_c()
        given_up.wait(10)

    stopping, given_up = threading.Event(), threading.Event()
    with MockTeacher(Slow(meanwhile)) as mock:
        server = Server(spec_of(mock, tmp_path), display=False, stopping=stopping)
        with pytest.raises(KeyboardInterrupt), server:
            list(server.answers(questions(5), SAMPLING))
        assert ends() == ["failed"] * 5
        given_up.set()


def test_a_fatal_answer_does_not_end_the_other_requests_of_its_question(tmp_path, ends):
    def meanwhile(text):
        if next(number) == 2:
            until(lambda: len(chats(mock)) == 4)
            raise Bad(402, "no credit")
        until(lambda: len(chats(mock)) == 4)
        time.sleep(0.1)

    number = iter(range(4))
    with MockTeacher(Slow(meanwhile)) as mock:
        with pytest.raises(ServerError, match="no money left"):
            ask(spec_of(mock, tmp_path), 1, 4)
        assert sorted(ends()) == ["answered"] * 3 + ["failed"]


def test_what_a_consumer_that_left_has_not_waited_for_is_recorded(tmp_path, ends):
    left = threading.Event()
    with MockTeacher(Slow(lambda text: text == "question 0" or left.wait(5))) as mock:
        with Server(spec_of(mock, tmp_path, in_flight=3), display=False) as server:
            replies = server.answers(questions(9), SAMPLING)
            next(replies)
            until(lambda: len(chats(mock)) == 4)
            replies.close()
            left.set()
        assert ends() == ["answered"] * 4
        assert len(chats(mock)) == 4


def test_the_same_question_twice_is_asked_once(tmp_path):
    def same(count):
        return [
            Question(id=f"q{k}", prompt=(Turn(text="the same", role="user"),)) for k in range(count)
        ]

    with MockTeacher(latency_seconds=0.03) as mock:
        spec = spec_of(mock, tmp_path)
        found = []
        for n in (2, 2, 3):
            with Server(spec, display=False) as server:
                found.append(list(server.answers(same(5), SAMPLING, n)))
        assert [r["body"]["n"] for r in chats(mock)] == [2, 1]
    assert found[0] == found[1]
    assert [[r.question for r in group] for group in found[0]] == [[f"q{k}"] * 2 for k in range(5)]
    assert len({r.text for group in found[2] for r in group}) == 3


def test_a_prompt_that_is_flagged_is_a_failed_row_where_the_key_is_good(tmp_path):
    def meanwhile(text):
        if text == "question 3" or flags["all"]:
            raise Bad(403, "your input was flagged")

    flags = {"all": False}
    with MockTeacher(Slow(meanwhile)) as mock:
        spec = spec_of(mock, tmp_path)
        for _ in range(2):  # in the second run it is all that is asked
            failures = [r.failure for (r,) in ask(spec)]
            assert failures.count(None) == 4
            assert failures[3] == "status 403: your input was flagged"
        assert len(chats(mock)) == 6
        flags["all"] = True
        with pytest.raises(ServerError, match="refuses the key"):
            ask(spec, sampling=replace(SAMPLING, seed=4))


def test_tools_and_schemas_count_in_the_worst_case(tmp_path):
    with MockTeacher() as mock:
        tools = {"tools": ["a tool " * 1000]}
        with pytest.raises(BudgetError):
            ask(spec_of(mock, tmp_path, budget_usd=0.005, extra=tools))
        assert not mock.requests
        assert ask(spec_of(mock, tmp_path, budget_usd=0.05, extra=tools))
        assert ask(spec_of(mock, tmp_path / "other", budget_usd=0.005))


def test_a_key_that_an_error_with_status_200_repeats_is_not_kept(tmp_path, monkeypatch):
    key = "sk-canary-4711-very-secret"

    async def post(self, path, asked):
        return json.dumps({"error": {"message": f"upstream refused {key}"}}).encode()

    monkeypatch.setenv("MY_KEY", key)
    monkeypatch.setattr(Client, "post", post)
    here = SimpleNamespace(url="http://127.0.0.1:1/v1")
    with Server(spec_of(here, tmp_path, key_variable="MY_KEY", attempts=1), display=False) as one:
        one.capabilities = Capabilities()
        ((reply,),) = one.answers(questions(1), SAMPLING)
    assert reply.failure == "an error with status 200: upstream refused *** (1 attempts)"
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"upstream refused" in written
    assert key.encode() not in written


def test_a_question_with_half_a_character_fails_alone(tmp_path):
    half = Question(id="half", prompt=(Turn(text="smile \ud83d", role="user"),))
    with MockTeacher() as mock, Server(spec_of(mock, tmp_path), display=False) as server:
        found = list(server.answers([*questions(2), half, *questions(2, 2)], SAMPLING, 2))
    assert [group[0].failure is None for group in found] == [True, True, False, True, True]
    assert [r.failure for r in found[2]] == [module.HALF] * 2


def test_without_prices_nothing_is_said_to_be_free(tmp_path):
    with MockTeacher() as mock:
        spec = ServerTeacher(url=mock.url, model="m", ledger=str(tmp_path / "l.sqlite"))
        with Server(spec, display=False) as server:
            (group,) = server.answers(questions(1), SAMPLING)
            assert group[0].usd is None
            assert server.spent_usd is None


def test_what_the_server_can_do_is_found_out_once(tmp_path):
    with MockTeacher() as mock:
        spec = spec_of(mock, tmp_path)
        with Server(spec, display=False) as server:
            list(server.answers(questions(1), SAMPLING))
            found = server.capabilities
        assert (found.n, found.seed, found.logprobs, found.prefix) == (True,) * 4
        probed = len(mock.requests) - len(chats(mock))
        assert 0 < probed < 12
        ask(spec, 2)
        assert len(mock.requests) - len(chats(mock)) == probed


def test_a_ledger_may_be_shared_with_one_who_was_killed(tmp_path):
    """Killed in the middle: known answers are kept, and no more is asked again than was lost."""
    import os
    import random
    import signal
    import subprocess
    import sys

    script = Path(__file__).with_name("asking.py")
    log = tmp_path / "mock.jsonl"
    draw = random.Random(0)
    with MockTeacher(latency_seconds=0.01, log_path=log) as mock:
        spec = spec_of(mock, tmp_path)
        ask(spec, 1)
        command = [sys.executable, str(script), mock.url, spec.ledger, "120"]
        kills = 0
        for _ in range(4):
            with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ}) as child:
                child.stdout.readline()  # it has begun
                time.sleep(draw.uniform(0.02, 0.25))
                child.send_signal(signal.SIGKILL)
                kills += child.wait() < 0
        found = ask(spec, 120, 1, Sampling(max_tokens=30, temperature=1.0, seed=9))
        assert kills
        assert all(r.whole for (r,) in found)
        asked = [r for r in chats(mock) if "question" in str(r["body"])]
        assert len(asked) <= 1 + 120 + kills * spec.in_flight
        assert json.loads(log.read_text().splitlines()[0])["path"] == "/v1/chat/completions"
