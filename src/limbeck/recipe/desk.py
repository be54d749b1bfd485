"""Opens what the steps of a recipe work with: its teachers as writers and readers."""

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from limbeck.core.errors import RecipeError
from limbeck.core.exchange import Writer
from limbeck.core.protocols import Reader
from limbeck.core.registry import did_you_mean
from limbeck.core.specs import CachedTeacher, CausalStudent, LocalTeacher, ServerTeacher
from limbeck.ledger.store import Ledger
from limbeck.models.causal import CausalModel
from limbeck.models.facts import facts_of_tokenizer
from limbeck.models.load import load_student, load_teacher
from limbeck.recipe.card import plus
from limbeck.teachers.identity import weight_files, weights_sha256
from limbeck.teachers.local import LocalWriter
from limbeck.teachers.recorded import Recorded
from limbeck.teachers.server import Server
from limbeck.teachers.server_reader import ServerReader

STUDENT = "student"
"""The name under which steps ask the recipe's own student."""

ANSWERS = ".answers.sqlite"
"""Where a folder of generated rows keeps what models on this machine wrote."""


class Teachers:
    """The teachers of a recipe by name, each opened once, when it is first asked for.

    Args:
        teachers: their specifications.
        student: the recipe's student, if it has one.
        folder: where what local models write is recorded.
        seed: of a student with new weights.
        stack: closes what was opened.
    """

    def __init__(
        self,
        teachers: Mapping[str, Any],
        student: CausalStudent | None,
        folder: Path,
        seed: int,
        stack: ExitStack,
    ) -> None:
        self.specs, self.student, self.seed = teachers, student, seed
        self.folder, self.stack = folder, stack
        self._models: dict[str, CausalModel] = {}
        self._writers: dict[str, Writer] = {}
        self._readers: dict[str, ServerReader] = {}
        self._ledger: Ledger | None = None
        self._stopping = threading.Event()

    def writer(self, name: str) -> Writer:
        """A teacher that writes, and whose words are recorded.

        Raises:
            RecipeError: there is none of this name, or it does not write.
        """
        if name not in self._writers:
            spec = self.spec(name)
            if isinstance(spec, ServerTeacher):
                with _naming(name):
                    server = self.stack.enter_context(Server(spec, stopping=self._stopping))
                self._writers[name] = server
            else:
                self._writers[name] = self._local(name)
        return self._writers[name]

    def reader(self, name: str) -> Reader:
        """A teacher that reads.

        Raises:
            RecipeError: there is none of this name, or it only writes.
            ServerError: it is a server that does not read.
        """
        spec = self.spec(name)
        if not isinstance(spec, ServerTeacher):
            return self._model(name)
        if spec.tokenizer is None:
            raise RecipeError(
                f"teachers.{name}.tokenizer",
                "a step wants this server to read, for which its tokenizer must be here",
            )
        if name not in self._readers:
            with _naming(name):
                self._readers[name] = self._reading(spec, spec.tokenizer)
        return self._readers[name]

    @property
    def read_usd(self) -> float | None:
        """What servers took for the texts that they read; None where a price is not known."""
        return reduce(plus, (reader.read_usd for reader in self._readers.values()), 0.0)

    def spec(self, name: str) -> Any:
        """The specification of a teacher, or of the student; nothing is opened.

        Raises:
            RecipeError: there is none of this name, or it does not write.
        """
        if name == STUDENT and name not in self.specs:
            if self.student is None:
                raise RecipeError(STUDENT, "a step asks the student, and the recipe has none")
            return self.student
        if name not in self.specs:
            raise RecipeError("teachers", f"no {name!r}; {did_you_mean(name, list(self.specs))}")
        spec = self.specs[name]
        if isinstance(spec, CachedTeacher):
            spec = spec.of
        if not isinstance(spec, LocalTeacher | ServerTeacher):
            raise RecipeError(f"teachers.{name}", f"a teacher of kind {spec.kind!r} does not write")
        return spec

    def _reading(self, spec: ServerTeacher, tokenizer: str) -> ServerReader:
        of = facts_of_tokenizer(tokenizer).tokenizer
        reader = ServerReader(spec, of, max_length=self._length, display=True)
        self.stack.enter_context(reader)
        reader.check(frozenset({"chosen"}))
        return reader

    def _local(self, name: str) -> Writer:
        model = self._model(name)
        if self._ledger is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._ledger = self.stack.enter_context(Ledger(self.folder / ANSWERS))
        return Recorded(LocalWriter(model), self._ledger, self._identity(name, model))

    def _model(self, name: str) -> CausalModel:
        if name not in self._models:
            spec = self.spec(name)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            if isinstance(spec, CausalStudent):
                local = {n: s for n, s in self.specs.items() if isinstance(s, LocalTeacher)}
                model = load_student(spec, local, device, self.seed)
                model.module.requires_grad_(False).eval()
            else:
                model = load_teacher(spec, device, spec.max_length or self._length)
            self._models[name] = model
        return self._models[name]

    @property
    def _length(self) -> int:
        """Tokens that a reader keeps of a row."""
        return self.student.max_length if self.student else 4096

    def _identity(self, name: str, model: CausalModel) -> str:
        """Changes with the weights, the tokenizer, and how they compute."""
        spec = self.spec(name)
        weights = weights_sha256(weight_files(spec)) if getattr(spec, "name", None) else None
        if weights is None:  # new weights, or of a teacher's layers
            digest = hashlib.sha256()
            for parameter in model.module.parameters():
                raw = parameter.detach().cpu().contiguous().view(torch.uint8)
                digest.update(raw.numpy().tobytes())
            weights = digest.hexdigest()
        parts = [weights, model.vocabulary, str(getattr(spec, "dtype", ""))]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """An error at a field of a teacher's says whose it is."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"teachers.{name}.{error.field}", error.reason) from None
