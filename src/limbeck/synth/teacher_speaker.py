"""A teacher that writes during training: a model on this machine, or one behind an API."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from limbeck.core.errors import RecipeError, ServerError
from limbeck.core.exchange import Question, Reply, Writer
from limbeck.core.protocols import Speaking
from limbeck.core.registry import register
from limbeck.core.types import Sample, Sampling, Turn
from limbeck.models.causal import CausalModel
from limbeck.models.writing import Continuation
from limbeck.teachers.local import LocalWriter


@register("speaker", "teacher")
@dataclass(frozen=True, kw_only=True)
class TeacherSpeaker:
    """A teacher answers the prompts, anew each time they are met.

    Its words are learnt as text, so it may have another tokenizer than the student. Answers that
    were cut at `max_tokens` or failed are left out. A server's are in its ledger: a run that goes
    on after a stop does not pay for them again.

    Attributes:
        teacher: its name in the recipe.
    """

    teacher: str

    def write(
        self,
        student: Speaking,
        teachers: Mapping[str, Any],
        prompts: Sequence[Sample],
        seeds: Sequence[int],
        sampling: Sampling,
    ) -> Sequence[Continuation | None]:
        """Its answer to each prompt; None for one that is left out.

        Raises:
            RecipeError: there is no such teacher, or it does not write.
            ServerError: not one answer could be had.
        """
        writer = _writer(teachers.get(self.teacher), self.teacher)
        places: dict[tuple[Turn, ...], list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(prompt.turns, []).append(place)
        # The draws of a call have one seed; what is asked twice is then told apart by its index.
        asked = replace(sampling, seed=seeds[0], scores=None) if seeds else sampling
        found: list[Continuation | None] = [None] * len(prompts)
        reasons: list[str] = []
        for n in sorted({len(mine) for mine in places.values()}):
            alike = [turns for turns, mine in places.items() if len(mine) == n]
            questions = [Question(id=prompts[places[turns][0]].id, prompt=turns) for turns in alike]
            for turns, replies in zip(alike, writer.answers(questions, asked, n), strict=True):
                for place, reply in zip(places[turns], replies, strict=True):
                    found[place] = _continuation(student, prompts[place], reply)
                    reasons += [reply.failure] if reply.failure else []
        if len(reasons) == len(prompts) > 0:
            raise ServerError(f"teacher {self.teacher!r} gave no answer at all: {reasons[0]}")
        return found


def _writer(teacher: Any, name: str) -> Writer:
    if isinstance(teacher, CausalModel):
        return LocalWriter(teacher)
    if not isinstance(teacher, Writer):
        raise RecipeError("source.speaker.teacher", f"{name!r} is no teacher that writes")
    return teacher


def _continuation(student: Speaking, prompt: Sample, reply: Reply) -> Continuation | None:
    if not reply.whole or not reply.text.strip():
        return None
    chat = any(turn.role for turn in prompt.turns)
    answer = Turn(text=reply.text, role="assistant" if chat else None, learn=True)
    read = student.encode(replace(prompt, turns=(*prompt.turns, answer)))
    ids = [token for token, learnt in zip(read.ids, read.learn, strict=True) if learnt]
    return Continuation(text=reply.text, ended=True, ids=ids)
