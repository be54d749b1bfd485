"""Problems with known answers: the model writes, and we count what is right."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from limbeck.core.errors import DataError
from limbeck.core.registry import register
from limbeck.core.text import until
from limbeck.core.types import Sample, Sampling, Turn
from limbeck.evals.reading import tell_once
from limbeck.evals.score import Score, wilson_interval
from limbeck.evals.verifiers import Match, Verifier

Problem = tuple[Sample, str]


@register("eval", "task")
@dataclass(frozen=True, kw_only=True)
class Task:
    """Share of a file's problems that the model answers correctly, by greedy decoding.

    The file has one JSON object a line, with `prompt` (a string, or a list of messages with `role`
    and `content`) and `answer` (a string or a number); other keys are ignored.

    Attributes:
        name: of the score in the report.
        path: the JSONL file.
        match: `exact` compares whole texts but for white space; `last_number` compares the last
            number of completion and answer by value; `regex` compares the text that the group of
            `pattern` catches at its first match; `choice` the option that is chosen, whose options
            are read from the prompt; `math`, `json` and `arithmetic` are in `evals.verifiers`.
        pattern: for `regex`, with one group.
        stop: a completion ends before the first of these strings; for models that go on with a
            next question.
        limit: how many problems, from the file's start; None takes all.
        max_tokens: longest completion.
        temperature: of the sampling; 0 is greedy.
        seed: of the sampling.
    """

    needs_teacher: ClassVar[bool] = False

    name: Annotated[str, Field(min_length=1)]
    path: str
    match: Match = "exact"
    pattern: str | None = None
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    limit: Annotated[int, Field(gt=0)] | None = None
    max_tokens: Annotated[int, Field(gt=0)] = 256
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        _ = self.verifier  # which finds what is wrong with it

    @property
    def verifier(self) -> Verifier:
        """What compares."""
        return Verifier(match=self.match, pattern=self.pattern)

    @property
    def gives(self) -> tuple[str, ...]:
        """Names of its scores."""
        return (self.name,)

    def check(self) -> None:
        """Read the file once, so that a bad row is found before training.

        Raises:
            DataError: naming file and line.
        """
        self.problems()

    def measure(self, model: Any, teacher: Any, holdout: Sequence[Sample]) -> dict[str, Score]:
        """Accuracy over n problems; absent where the model does not write text.

        Raises:
            DataError: the file is missing, empty or has a bad line.
        """
        del teacher, holdout
        if not hasattr(model, "speak"):
            tell_once(f"{self.name} is not measured: {model.name} does not write text")
            return {}
        problems = self.problems()
        sampling = Sampling(
            max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed
        )
        completions = model.speak([sample for sample, _ in problems], sampling)
        prompts = ["\n".join(turn.text for turn in sample.turns) for sample, _ in problems]
        right = sum(self.judge(completions, [answer for _, answer in problems], prompts))
        share = right / len(problems)
        return {
            self.name: Score(
                value=share,
                n=len(problems),
                interval95=wilson_interval(share, len(problems)),
                better="higher",
                unit="share",
            )
        }

    def judge(
        self, completions: Sequence[str], answers: Sequence[str], prompts: Sequence[str] = ()
    ) -> list[bool]:
        """Which completions are right; `choice` looks for the options in the prompts."""
        texts = [until(text, self.stop) for text in completions]
        return [verdict.right for verdict in self.verifier.check_all(texts, answers, prompts)]

    def problems(self) -> list[Problem]:
        """The file's problems, up to `limit`.

        Raises:
            DataError: `path:line: reason`.
        """
        problems: list[Problem] = []
        try:
            with Path(self.path).expanduser().open(encoding="utf-8-sig") as file:
                lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
                for number, line in islice(lines, self.limit):
                    problems.append(self._problem(line, f"{self.path}:{number}"))
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8 text: {error.reason}") from error
        if not problems:
            raise DataError(f"{self.path}: no problems in it; give rows with `prompt` and `answer`")
        return problems

    def _problem(self, line: str, place: str) -> Problem:
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{place}: not a JSON object")
        for key in ("prompt", "answer"):
            if key not in row:
                raise DataError(f"{place}: no `{key}`; it has {', '.join(row) or 'nothing'}")
        answer: Any = row["answer"]
        if self.match == "json" and not isinstance(answer, str):
            answer = json.dumps(answer)
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise DataError(f"{place}: `answer` must be a string or a number")
        answer = str(answer)
        if wrong := self.verifier.problem_with(answer):
            raise DataError(f"{place}: `answer` {wrong}")
        turns = _turns(row["prompt"], place)
        name = f"{Path(self.path).name}:{place.rpartition(':')[2]}"
        return Sample(id=name, turns=turns), answer


def _turns(prompt: Any, place: str) -> tuple[Turn, ...]:
    if isinstance(prompt, str) and prompt:
        return (Turn(text=prompt),)
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"{place}: `prompt` must be a string or a list of messages, not empty")
    turns: list[Turn] = []
    for message in prompt:
        role, content = (
            (message.get("role"), message.get("content"))
            if isinstance(message, dict)
            else (None, None)
        )
        if not isinstance(role, str) or not isinstance(content, str) or not role:
            raise DataError(f"{place}: each message of `prompt` needs `role` and `content` strings")
        turns.append(Turn(text=content, role=role))
    return tuple(turns)
