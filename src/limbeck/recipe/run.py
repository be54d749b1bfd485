"""One run from recipe to report: assemble the parts, measure, train, measure again, write down."""

import json
import logging
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from limbeck.core.errors import BudgetError, DataError, LimbeckError, RecipeError, ServerError
from limbeck.core.exchange import Writer
from limbeck.core.files import write_json, write_text
from limbeck.core.protocols import Reader
from limbeck.core.specs import CachedTeacher, EnsembleTeacher, SelfTeacher, ServerTeacher
from limbeck.core.types import Sample, sites
from limbeck.evals import Agreement, Score, openings, run_suite, tokens_per_second
from limbeck.evals.reading import as_student, tell_once
from limbeck.models.causal import CausalModel
from limbeck.models.load import DTYPES, load_student, load_teacher, save_student
from limbeck.models.packing import packing
from limbeck.objectives import CrossEntropy
from limbeck.recipe.cache import open_cache
from limbeck.recipe.check import Facts, check
from limbeck.recipe.document import Document
from limbeck.recipe.folder import claimed
from limbeck.recipe.generate import check_generated
from limbeck.recipe.learnt import warnings
from limbeck.recipe.plots import draw
from limbeck.recipe.ready import ready_terms
from limbeck.recipe.report import Arms, Report, make_report
from limbeck.recipe.resolve import describe, dump, generation_of, sha256, training_sha256
from limbeck.recipe.schema import Recipe, Term
from limbeck.teachers.ensemble import Ensemble, behind
from limbeck.teachers.itself import Itself, needs_copy
from limbeck.teachers.server import Server
from limbeck.teachers.server_reader import ServerReader
from limbeck.train.batches import Batches
from limbeck.train.checkpoint import Checkpoints
from limbeck.train.listeners import Display, Evaluate, Interruption, Metrics
from limbeck.train.loop import State, Trainer, trained_parameters
from limbeck.train.mesh import Mesh, whole_state
from limbeck.train.optim import LossScale, adamw, rate_factor
from limbeck.train.prepare import Preparation
from limbeck.train.profile import Profile

log = logging.getLogger(__name__)

CURVE_POINTS = 10
"""How often agreement is measured on the way, for the curve in the report."""

CURVE_SAMPLES = 32
"""Held-out samples of that curve; the report's own figures use all."""

SPEED_TOKENS = 64
"""Longest answer of those from which generation speed is measured."""

FP16_SCALE = 2.0**16
"""Where fp16 loss scaling starts; it finds its own level within a few steps."""


def run(
    recipe: Recipe, out: Path, resume: bool = False, document: Document | None = None
) -> Report:
    """Distil as the recipe says; leaves student, metrics, checkpoints and report in `out`.

    `document` is where the recipe came from, so that errors can name its lines.

    Raises:
        RecipeError: the recipe cannot work, `out` is in use, or holds another recipe's run.
        LimbeckError: it failed on the way; the message says what to do.
    """
    document = document or Document({}, {})
    facts = check(recipe, document)
    with ExitStack() as stack:
        mesh = Mesh(recipe.train.parallel, recipe.train.device)
        stack.callback(mesh.close)
        stack.enter_context(claimed(out, resume, recipe, mesh))
        mesh.barrier()
        try:
            return _Run(recipe, facts, out, mesh, document, stack).go()
        except torch.OutOfMemoryError as error:
            raise LimbeckError(
                "out of memory: raise train.accumulate (now "
                f"{recipe.train.accumulate}) or lower train.batch_tokens, and run again with"
                f" --resume; {str(error).splitlines()[0]}"
            ) from error


LABELS = (Term(objective=CrossEntropy()),)
"""The terms of the control arm."""


@dataclass
class Arm:
    """A student that was trained, and how that went."""

    student: CausalModel
    state: State
    preparation: Preparation
    warnings: tuple[str, ...]


class _Run:
    """The parts of one run, opened once and shared by its arms; `stack` closes them."""

    def __init__(
        self,
        recipe: Recipe,
        facts: Facts,
        out: Path,
        mesh: Mesh,
        document: Document,
        stack: ExitStack,
    ) -> None:
        self.recipe, self.facts, self.out, self.mesh = recipe, facts, out, mesh
        self.document = document
        # Data first: it is quick to check, and a wrong row should not cost the loading of weights.
        check_generated(generation_of(recipe, document.file))
        self.source = recipe.source.open(recipe.seed)
        given = getattr(self.source, "given", self.source)
        self.starts = {source: source.state_dict() for source in (self.source, given)}
        self.holdout: list[Sample] = self.source.holdout
        for evaluation in recipe.evals:
            evaluation.check()
        ensembles = {n: s for n, s in recipe.readers.items() if isinstance(s, EnsembleTeacher)}
        self.teachers: dict[str, Reader] = {
            name: open_cache(recipe, facts, name, self.source, mesh.device, document)
            if isinstance(spec, CachedTeacher)
            else self.load_teacher(name)
            for name, spec in recipe.models.items()
        }
        for name, spec in ensembles.items():
            self.teachers[name] = Ensemble(spec, self.teachers)
        for name, spec in recipe.readers.items():
            if isinstance(spec, ServerTeacher):
                self.teachers[name] = self.open_server(name, spec, stack)
        self.writers: dict[str, Writer] = {}
        if isinstance(speaker := recipe.teachers.get(recipe.speaker or ""), ServerTeacher):
            with self.naming(str(recipe.speaker)):
                writer = stack.enter_context(Server(speaker, display=False))
            self.writers[str(recipe.speaker)] = writer
        self.first_teacher = next(iter(self.teachers), None)
        self.visitor: CausalModel | None = None

    def go(self) -> Report:
        """Measure, train, measure, train the control, report."""
        student = self.new_student()
        self.teach_itself(student)
        self.check_labels(student)
        if self.mesh.main:  # first, so that what lies in the folder has its recipe beside it
            write_text(self.out / "recipe.yaml", dump(self.recipe))
        folder = self.out / "terms"
        terms = ready_terms(
            self.recipe, student, self.teachers, self.source, folder, self.mesh, self.document
        )
        if getattr(self.recipe.source, "adaptive", None) and self.curve(student) is None:
            raise self.document.error(
                "source.adaptive",
                "follows the KL on held-out samples, which is not measured here: that takes"
                " `holdout` rows and, as the first teacher, a model on this machine with the"
                " student's tokenizer. Take a ramp as `share` instead",
            )
        scores: dict[str, dict[str, Score]] = {}
        if self.first_teacher is not None:
            scores["teacher"] = self.measured("teacher", None)
        scores["before"] = self.measured("before", student)
        self.release()
        arm = self.train(student, terms, self.out, "distilling")
        self.save(arm.student)
        scores["after"] = self.measured("after", arm.student)
        teacher = self.teacher() if self.recipe.evals else None
        speeds = self.speeds({"student": arm.student, "teacher": teacher})
        if self.recipe.compare == "labels":
            del teacher
            self.release()
            control = self.train(self.new_student(), LABELS, self.out / "control", "labels only")
            scores["control"] = self.measured("control", control.student)
        report = make_report(
            self.recipe,
            recipe_sha256=sha256(self.recipe),
            teacher=self.teacher_facts(),
            student={"name": arm.student.name, "parameters": self.facts.student.parameters},
            arms=Arms(**scores),
            state=arm.state,
            preparation=arm.preparation,
            speeds=speeds,
            peak_memory_bytes=peak_memory(self.mesh.device),
            devices=self.mesh.size,
            servers_usd=self.paid_usd(),
            warnings=arm.warnings,
        )
        if self.mesh.main:
            draw(self.out, report, self.out / "metrics.jsonl")
            report.write(self.out)
        self.mesh.barrier()
        return report

    def paid_usd(self) -> float | None:
        """What the accounts of all servers have spent; None where there is none, or no price."""
        asked = [*self.teachers.values(), *self.writers.values()]
        servers = {(s.spec.ledger, s.account): s for s in asked if hasattr(s, "account")}
        spent = [server.spent_usd for server in servers.values()]
        return None if not spent or None in spent else sum(spent)

    def load_teacher(self, name: str) -> CausalModel:
        """The model behind a teacher."""
        recipe, mesh = self.recipe, self.mesh
        teacher = load_teacher(self.facts.models[name], mesh.device, recipe.student.max_length)
        if mesh.parallel == "fsdp":
            teacher.module = mesh.wrap(teacher.module, trains=False)
        return teacher

    def open_server(self, name: str, spec: ServerTeacher, stack: ExitStack) -> Reader:
        """A teacher behind an API, which has shown that it reads."""
        tokenizer, length = self.facts.teachers[name].tokenizer, self.recipe.student.max_length
        with self.naming(name):
            reader = ServerReader(spec, tokenizer, max_length=length, device=self.mesh.device)
            stack.enter_context(reader)
            needs = [term.objective.needs for term in self.recipe.terms if term.teacher == name]
            reader.check(frozenset[str]().union(*needs))
        return reader

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """An error at a field of a teacher's says whose it is, and in which line."""
        try:
            yield
        except RecipeError as error:
            document = self.document or Document({}, {})
            raise document.error(f"teachers.{name}.{error.field}", error.reason) from None

    def teacher(self) -> CausalModel | None:
        """The first teacher as a model that can be asked anything; None where there is none.

        That of a cache is loaded for a measurement and stays until `release`.
        """
        if self.first_teacher is None:
            return None
        teacher = self.teachers[self.first_teacher]
        if isinstance(teacher, CausalModel):
            return teacher
        server = isinstance(self.recipe.teachers[self.first_teacher], ServerTeacher)
        if server or self.first_teacher in self.facts.gone:
            where = "behind a server" if server else "gone"
            tell_once(
                f"the weights of teacher {self.first_teacher!r} are {where}; what needs them is not"
                " measured"
            )
            return None
        if self.visitor is None:
            self.visitor = self.load_teacher(self.first_teacher)
        return self.visitor

    def release(self) -> None:
        """Let go of the model behind a cache: training does not need it."""
        if self.visitor is not None:
            self.visitor = None
            if self.mesh.device.type == "cuda":
                torch.cuda.empty_cache()

    def new_student(self, *, trains: bool = True) -> CausalModel:
        """The student before training; the same weights each time."""
        recipe, models = self.recipe, self.facts.models
        student = load_student(recipe.student, models, self.mesh.device, recipe.seed)
        student.module = self.mesh.wrap(student.module, trains=trains, compute=student.autocast)
        return student

    def teach_itself(self, student: CausalModel) -> None:
        """Make the teachers that are the student itself."""
        for name, spec in self.recipe.readers.items():
            if isinstance(spec, SelfTeacher):
                adapters = self.recipe.student.lora is not None
                copy = None
                if needs_copy(spec, adapters=adapters):
                    copy = self.new_student(trains=False)
                self.teachers[name] = Itself(spec, student, copy)

    def check_labels(self, student: CausalModel) -> None:
        """See to it that a control arm has something to learn, before the distillation's hours.

        Raises:
            RecipeError: prompts alone are given, or all completions are cut off.
        """
        given = getattr(self.source, "given", None)
        if self.recipe.compare != "labels" or given is None:
            return
        try:
            Batches(given, student, 1, self.recipe.seed).next(1)
        except DataError as error:
            reason = f"what the source is given has no labels to train a control arm on: {error}"
            raise self.document.error("compare", f"{reason}; or leave `compare` out") from None
        given.load_state_dict(self.starts[given])

    def train(self, student: CausalModel, terms: Sequence[Term], folder: Path, title: str) -> Arm:
        """Train one arm from its newest checkpoint, or from the start."""
        recipe, train, mesh = self.recipe, self.recipe.train, self.mesh
        source = self.source if terms is not LABELS else getattr(self.source, "given", self.source)
        source.load_state_dict(self.starts[source])
        batches = Batches(source, student, train.batch_tokens, recipe.seed)
        checkpoints = Checkpoints(
            folder / "checkpoints",
            recipe=training_sha256(recipe),
            every=train.save_every,
            keep=train.keep,
        )
        heard = {n: r for n, r in self.teachers.items() if n in {t.teacher for t in terms}}
        if bind := getattr(source, "bind", None):
            bind(student, {**self.teachers, **self.writers}, mesh)
        # What changes with the steps: a teacher that follows the student, a source that looks on.
        changing = {**{f"teachers.{name}": r for name, r in heard.items()}, "source": source}
        parameters = trained_parameters(student.module, terms)
        half = recipe.student.dtype == "float16"
        trainer = Trainer(
            student=student,
            readers=heard,
            batches=batches,
            terms=terms,
            optimizer=adamw(parameters, rate=train.learning_rate, decay=train.weight_decay),
            rate=partial(_rate, recipe),
            mesh=mesh,
            steps=train.steps,
            clip=train.clip,
            accumulate=train.accumulate,
            patience=train.patience,
            seed=recipe.seed,
            logits=train.logits,
            balance=train.balance,
            carried={name: part for name, part in changing.items() if hasattr(part, "tensors")},
            state=State(scale=LossScale(FP16_SCALE if half else 1.0, active=half)),
        )
        checkpoints.trainer = trainer
        done = checkpoints.resume()
        if done and mesh.main:
            log.info("%s: going on from step %d", title, done)
        with ExitStack() as stack:
            listeners: list[Any] = []
            readers = [reader for named in trainer.readers.values() for reader in behind(named)]
            own = [r.copy if isinstance(r, Itself) else r for r in readers]
            models = [m for m in (student, *own) if isinstance(m, CausalModel)]
            # Scores of all heads over a packed line would be its length squared.
            maps = any(sites(term.objective.asks, "attention") for term in terms)
            stack.enter_context(packing("never" if maps else train.packing, models))
            if train.profile and mesh.main:
                profile = Profile(folder / "profile", train.steps - done)
                listeners.append(stack.enter_context(profile))
            if (curve := self.curve(student)) is not None:
                listeners.append(Evaluate(curve, max(1, train.steps // CURVE_POINTS)))
            listeners += [part for part in changing.values() if hasattr(part, "on_step")]
            if mesh.main:
                listeners.append(stack.enter_context(Metrics(folder / "metrics.jsonl", done)))
                listeners.append(stack.enter_context(Display(title, train.steps, done)))
            advice = f"go on with: limbeck run RECIPE --out {self.out} --resume"
            listeners.append(checkpoints)
            listeners.append(stack.enter_context(Interruption(mesh, checkpoints.save, advice)))
            trainer.listeners = listeners
            try:
                trainer.train()
            except (BudgetError, ServerError):
                # The others of several processes may be in the middle of a step.
                if trainer.state.step and mesh.size == 1:
                    checkpoints.save()
                    log.info("a checkpoint of step %d was written; %s", trainer.state.step, advice)
                raise
        found = warnings(folder / "metrics.jsonl", terms) if mesh.main else ()
        for line in found:
            log.warning("%s: %s", title, line)
        return Arm(student, trainer.state, trainer.preparation, found)

    def curve(self, student: CausalModel) -> Any:
        """Measures agreement on a few held-out samples, where there is a teacher to agree with."""
        few = self.holdout[:CURVE_SAMPLES]
        teacher = self.teachers.get(self.first_teacher or "")
        # A cache knows the training rows alone, and its model is gone while the student trains.
        if not isinstance(teacher, CausalModel) or not few:
            return None
        if teacher.vocabulary != student.vocabulary:
            return None
        few = [s for s in few if student.encode(as_student(s)).rows and teacher.encode(s).rows]
        if not few:
            tell_once(
                f"agreement on the way is not measured: of the first {CURVE_SAMPLES} held-out"
                " samples none has a learnt token"
            )
            return None
        return lambda: {
            name: score.value for name, score in Agreement().measure(student, teacher, few).items()
        }

    def measured(self, arm: str, model: CausalModel | None) -> dict[str, Score]:
        """The evaluations' scores of one model; a resumed run does not measure again.

        None stands for the first teacher.
        """
        path = self.out / "evals.json"
        asked = [describe(evaluation) for evaluation in self.recipe.evals]
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if known.get("evals") != asked:  # a resume may ask for others
            known = {"evals": asked}
        if arm not in known:
            asks = any(evaluation.needs_teacher for evaluation in self.recipe.evals)
            teacher = self.teacher() if asks or (model is None and self.recipe.evals) else None
            asked_of = model or teacher
            scores: dict[str, Score] = {}
            if asked_of is not None:
                scores = run_suite(self.recipe.evals, asked_of, teacher, self.holdout)
            known[arm] = {name: score.to_json() for name, score in scores.items()}
            self.mesh.barrier()
            if self.mesh.main:
                write_json(path, known)
            self.mesh.barrier()
        return {name: Score.from_json(value) for name, value in known[arm].items()}

    def speeds(self, models: Mapping[str, CausalModel | None]) -> dict[str, float | None]:
        """Tokens a second that each model writes, all of them behind the same held-out prompts."""
        there = {name: model for name, model in models.items() if model is not None}
        prompts: list[Sample] = []
        if self.recipe.evals and self.holdout:
            prompts = openings([*there.values()], self.holdout[:CURVE_SAMPLES], SPEED_TOKENS)
            if not prompts:
                tell_once(
                    "speed is not measured: no held-out prompt is there that is not empty and"
                    f" leaves room for {SPEED_TOKENS} tokens"
                )
        return {
            name: tokens_per_second(there[name], prompts, SPEED_TOKENS) if name in there else None
            for name in models
        }

    def save(self, student: CausalModel) -> None:
        """Write the student's folder."""
        weights = whole_state(student.transformer)
        if self.mesh.main:
            save_student(student, weights, self.out / "student", DTYPES[self.recipe.student.dtype])
        self.mesh.barrier()

    def teacher_facts(self) -> Mapping[str, Any] | None:
        """Name and size of the first teacher."""
        name = self.first_teacher
        if name is None:
            return None
        parameters = self.facts.teachers[name].parameters
        return {"name": self.teachers[name].name, "parameters": parameters or None}


def _rate(recipe: Recipe, step: int) -> float:
    train = recipe.train
    return train.learning_rate * rate_factor(train.schedule, step, train.steps, train.warmup)


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the process that started this one once held
        lines = status.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
