"""Light values that name a model: what a recipe says of a student or a teacher, before loading."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from limbeck.core.errors import RecipeError
from limbeck.core.registry import register
from limbeck.core.types import Needs

DType = Literal["float32", "bfloat16", "float16"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
Positive = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (PEFT) instead of training all weights."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    targets: str | tuple[str, ...] = "all-linear"


@register("student", "causal")
@dataclass(frozen=True, kw_only=True)
class CausalStudent:
    """A causal language model to train: exactly one of `name`, `from` and `config`.

    Attributes:
        name: folder or hub id of a pretrained model.
        from_: name of the teacher (`from: big`, or `from: teacher` for the only one) whose
            `layers` are copied into a new, shallower model.
        layers: which of that teacher's layers to keep, counted from 0.
        config: a transformers configuration (`model_type` and sizes) for new, random weights.
        tokenizer: folder or hub id; by default the model's own, or the first teacher's.
        revision: branch, tag or commit on the hub.
        max_length: tokens a sample may have; longer ones are cut, and that is counted.
        dtype: in which the forward pass computes. Trained weights are kept in float32.
        attention: the kernel; by default the one that transformers takes.
        lora: train low-rank adapters instead of all weights.
        quantize: load frozen base weights in 4 or 8 bit (bitsandbytes); asks for `lora`.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        compile: run `torch.compile` on the layers.
        trust_remote_code: let the model's folder bring Python code that is then executed.
    """

    name: str | None = None
    from_: Annotated[str | None, Field(alias="from")] = None
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    revision: str | None = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    dtype: DType = "float32"
    attention: Attention | None = None
    lora: Lora | None = None
    quantize: Literal["4bit", "8bit"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    trust_remote_code: bool = False


@register("teacher", "local")
@dataclass(frozen=True, kw_only=True)
class LocalTeacher:
    """A causal language model on this machine that reads and speaks.

    Attributes:
        name: folder or hub id.
        tokenizer: folder or hub id; by default the model's own.
        revision: branch, tag or commit on the hub.
        dtype: of its weights; `auto` keeps the stored one.
        max_length: tokens of a sample that it reads where its tokenizer is another than the
            student's; by default as many as the student.
        attention: the kernel; by default the one that transformers takes.
        device: such as `cuda:1` or `cpu`; by default the student's.
        quantize: load weights in 4 or 8 bit (bitsandbytes).
        trust_remote_code: let the model's folder bring Python code that is then executed.
    """

    offers: ClassVar[Needs] = frozenset(
        {"logits", "projection", "chosen", "boundary", "hidden", "attention", "text"}
    )

    name: str
    tokenizer: str | None = None
    revision: str | None = None
    dtype: DType | Literal["auto"] = "auto"
    max_length: Annotated[int | None, Field(ge=2)] = None
    attention: Attention | None = None
    device: str | None = None
    quantize: Literal["4bit", "8bit"] | None = None
    trust_remote_code: bool = False


Keep = Literal["sampled", "topk", "chosen", "hidden", "full"]

KEPT: dict[Keep, Needs] = {
    "sampled": frozenset({"sparse"}),
    "topk": frozenset({"sparse"}),
    "chosen": frozenset({"chosen"}),
    "hidden": frozenset({"logits", "projection"}),
    "full": frozenset({"logits"}),
}
"""What a cache offers, by what it keeps."""


@register("teacher", "cache")
@dataclass(frozen=True, kw_only=True)
class CachedTeacher:
    """A teacher that ran once (`limbeck cache RECIPE`): what it said is read from a folder.

    Attributes:
        path: the folder.
        of: the teacher that fills it.
        keep: of each learnt token's distribution: `sampled` random draws (unbiased, the smallest),
            the `topk` likeliest tokens and the rest's mass, the log-probability of the `chosen`
            token alone, the `hidden` state that the output head reads (exact logits), or the
            `full` logits.
        k: draws, or likeliest tokens.
        temperature: at which the distribution is softened, for `sampled` and `topk`.
        seed: of the draws.
        dtype: of numbers that `chosen`, `hidden` and `full` store; `auto` is the teacher's own.
    """

    parts: ClassVar[Mapping[str, str]] = {"of": "teacher"}

    path: Annotated[str, Field(min_length=1)]
    of: LocalTeacher
    keep: Keep = "sampled"
    k: Positive = 50
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: DType | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.temperature != 1.0 and "sparse" not in self.offers:
            raise RecipeError("temperature", "only goes with `keep: sampled` or `keep: topk`")

    @property
    def offers(self) -> Needs:
        """What it can say, which follows from what it keeps."""
        return KEPT[self.keep]


@dataclass(frozen=True, kw_only=True)
class TokenPrice:
    """US dollars for a million tokens. What is not said is not known, which is not 0."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    input: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    output: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None


def _address(value: Any) -> Any:
    """What is wrong is not repeated: there may be a password in it."""
    if not isinstance(value, str) or not re.fullmatch(r"https?://[^\s@]+", value):
        reason = "an address such as https://api.openai.com/v1 is wanted, without user and password"
        raise RecipeError("", reason)
    return value


def _variable(value: Any) -> Any:
    """What is wrong is not repeated: it may be the key itself."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value, re.ASCII):
        reason = "the name of an environment variable is wanted, such as OPENAI_API_KEY; the key"
        raise RecipeError("", f"{reason} itself has no place in a recipe")
    return value


@register("teacher", "server")
@dataclass(frozen=True, kw_only=True)
class ServerTeacher:
    """A model behind an OpenAI-compatible API: a provider, vLLM, or another server.

    Attributes:
        url: base of the API, such as `https://api.openai.com/v1`.
        model: its name there.
        key_variable: name of the environment variable that holds the API key; the key itself has
            no place in a recipe. It may be unset for a server on this machine.
        api: `chat` sends messages; `completions` sends plain text.
        ledger: file in which every request and answer is recorded. Recipes that share it share
            answers and budget: what is known is never asked for again.
        price: what a million tokens cost.
        budget_usd: the run stops before it could spend more than this; asks for a price.
        in_flight: most requests at the same time; fewer while the server says that it is too much.
        requests_per_minute, tokens_per_minute: the account's limits, where there are any.
        timeout_seconds: for one answer.
        attempts: how often a request is sent before it counts as failed.
        extra: more parameters to send with each request, such as `{top_k: -1}`.
        terms: under which terms the answers may be used, for the card of the data.
        tokenizer: folder or hub id of the same tokenizer as the server's, which lets it read:
            give the probabilities of text that it did not write. It takes `api: completions` and a
            server that can, such as vLLM.
        top_logprobs: how many of the likeliest tokens it is asked for at each place that it reads;
            with 0 it tells the text's own alone. vLLM allows 20 unless it is told otherwise.
    """

    temperature: ClassVar[float] = 1.0
    """Of the distributions that it tells when it reads."""

    url: Annotated[str, BeforeValidator(_address)]
    model: Annotated[str, Field(min_length=1)]
    key_variable: Annotated[str, BeforeValidator(_variable)] = "OPENAI_API_KEY"
    api: Literal["chat", "completions"] = "chat"
    ledger: Annotated[str, Field(min_length=1)] = "ledger.sqlite"
    price: TokenPrice = TokenPrice()
    budget_usd: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    in_flight: Positive = 16
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 120.0
    attempts: Positive = 6
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    terms: str | None = None
    tokenizer: str | None = None
    top_logprobs: Annotated[int, Field(ge=0)] = 20

    @property
    def offers(self) -> Needs:
        """What it can say: it writes, and with a tokenizer it reads."""
        if self.tokenizer is None:
            return frozenset({"text"})
        return frozenset({"text", "chosen", *(["sparse"] if self.top_logprobs else [])})

    @property
    def identity(self) -> Mapping[str, Any]:
        """What of it decides its words; not its price, say, which may change between two runs."""
        kept = ("url", "model", "api", "tokenizer", "top_logprobs")
        return {**{name: getattr(self, name) for name in kept}, "extra": dict(self.extra)}

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.api != "completions":
            raise RecipeError("tokenizer", "lets it read, which takes `api: completions`")
        known = self.price.input is not None and self.price.output is not None
        if self.budget_usd is not None and not known:
            raise RecipeError("budget_usd", "needs price.input and price.output to be kept")


How = Literal["mixture", "geometric", "route"]
Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@register("teacher", "ensemble")
@dataclass(frozen=True, kw_only=True)
class EnsembleTeacher:
    """Several teachers of the recipe that speak as one.

    Attributes:
        of: names of other teachers, each with its weight; weights are divided by their sum.
        how: `mixture` of the probabilities, sum_k w_k p_k; `geometric` mean of them, proportional
            to prod_k p_k^w_k; or `route`, where each sample is read by the teacher that has the
            name of its channel alone, and by the first where none has.
    """

    offers: ClassVar[Needs] = frozenset({"logits", "chosen"})

    of: Mapping[str, Share]
    how: How = "mixture"

    @property
    def shares(self) -> Mapping[str, float]:
        """The weights divided by their sum."""
        total = sum(self.of.values())
        return {name: weight / total for name, weight in self.of.items()}


@register("teacher", "self")
@dataclass(frozen=True, kw_only=True)
class SelfTeacher:
    """The student itself, of some time; rows may have `privileged` text that only it reads.

    Attributes:
        update: `frozen` is the student before training (what it must not forget); `live` the
            student of this step; `ema` one that follows it slowly.
        decay: of `ema`: share of its weights that stays in each step.
    """

    offers: ClassVar[Needs] = LocalTeacher.offers

    update: Literal["frozen", "ema", "live"] = "ema"
    decay: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.99


def model_of(teacher: Any) -> Any:
    """The specification of the model behind a teacher: what a cache was made of, or itself."""
    return teacher.of if isinstance(teacher, CachedTeacher) else teacher
