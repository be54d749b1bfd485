"""Sums of losses over rows, chunk by chunk, with their gradient made on the way forward.

Of a chunk of rows, both heads' logits are made in two reused buffers. Losses and their gradient
are taken block by block within the processor's cache; the gradient takes the place of the
student's logits, and goes on to hidden states and head at once. Nothing is computed twice: the
rows' weights are known before, so `backward` has only to multiply by a number.

    extra memory = v d * 4 (the head's gradient, where it trains) + two chunks + n d

Source of the idea to chunk at the head: Hsu et al., "Liger Kernel" (arXiv 2410.10989); Wijmans et
al., "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.losses import kernels, pages, sums
from limbeck.losses.projection import Projection
from limbeck.losses.sparse import Sparse

PROJECTED_COLUMNS = 2**16
"""Columns of float32 logits that a CPU makes at a time: products of fewer took longer."""

ALIGNED_COLUMNS = 64
"""Rows of a GPU's buffers are padded to a multiple of this."""

LINE_BYTES = 64
"""Rows of a CPU's buffers take an odd number of these: columns of a row's length that is a round
number would share a few sets of the cache."""

STRIPE_ELEMENTS = 2**22
"""Entries of a head's gradient that are added at a time, where products are not in float32."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is taken at a time.

    Attributes:
        chunk_bytes: of a chunk's logits of one model: enough for fast products, little beside a
            head, whose gradient is read and written once a chunk.
        chunk_rows: of a chunk at most, where no more are needed for fast products.
        block_elements: logits whose losses are taken together, which bounds what lies between one
            pass over them and the next.
    """

    chunk_bytes: int
    chunk_rows: int
    block_elements: int


CPU = Sizes(chunk_bytes=150 * 2**20, chunk_rows=512, block_elements=2**18)
"""Some arrays of a block fit a core's cache."""

GPU = Sizes(chunk_bytes=640 * 2**20, chunk_rows=2**16, block_elements=2**24)
"""Only small vocabularies come to so many rows: elsewhere the bytes decide."""


def sizes(device: str) -> Sizes:
    """Those of a kind of device, such as `cpu` or `cuda`."""
    return CPU if device == "cpu" else GPU


@dataclass(frozen=True, kw_only=True)
class RowTerm:
    """One loss over all rows.

    Attributes:
        loss: (student [r, v] logits, teacher [r, w] logits or None, index of the r rows) -> [r].
        weight: [n] float32; a row of weight 0 does not count, whatever its loss. On the host, a GPU
            need not be waited for to know which rows do.
        factor: of the term in the total: a number, or a tensor without dimensions.
        teacher: key of the teacher whose logits the loss reads; None where it reads none.
        kernel: (student, teacher) -> ([r], [r, v]), the same loss with its gradient; see
            `kernels.py`. The teacher is `Softened`, or these rows of `beside`.
        beside: what a kernel reads where there are no logits of a teacher: [n] labels, or what is
            known of n distributions.
        temperature, scale_by_t2: of the kernel.
    """

    loss: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    weight: Tensor
    factor: Tensor | float = 1.0
    teacher: str | None = None
    kernel: kernels.Kernel | None = None
    beside: Tensor | Sparse | None = None
    temperature: float = 1.0
    scale_by_t2: bool = True


class Chunked(torch.autograd.Function):
    """(total, sums of the terms); see `fused.sum_over_rows`. Gradients wait in the context."""

    @staticmethod
    def forward(
        ctx: Any,
        work: "Work",
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_hidden: Tensor | None,
        low_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """All of the work; the inputs are the student's parts that may want a gradient."""
        inputs = (hidden, weight, bias, low_hidden, low_weight)
        gradients = [
            None if x is None or not x.requires_grad else work.empty_gradient(x, of_rows)
            for x, of_rows in zip(inputs, (True, False, False, True, False), strict=True)
        ]
        for rows in work.chunks():
            gradient = work.losses(rows)
            if any(g is not None for g in gradients):
                work.backward(rows, gradient, gradients)
        ctx.gradients, ctx.norm = gradients, work.norm
        ctx.types = [None if x is None else x.dtype for x in inputs]
        ctx.mark_non_differentiable(work.sums)
        return (work.sums * work.factors).sum(), work.sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What was found, times the gradient of the total."""
        if ctx.gradients is None:
            raise RuntimeError("a fused loss gives its gradient once only")
        found, ctx.gradients = ctx.gradients, None
        factor = upstream[0] * ctx.norm
        return (
            None,
            *(
                None if gradient is None else sums.times(gradient, factor, dtype)
                for gradient, dtype in zip(found, ctx.types, strict=True)
            ),
        )


class Work:
    """What one call needs: buffers, weights, sums.

    Within, float16 gradients are divided by `norm`, the largest weight, so that they can be held.
    It is a power of two: multiplying by it again rounds nothing.
    """

    def __init__(
        self,
        student: Projection,
        teachers: Mapping[str, Projection | Tensor],
        terms: Sequence[RowTerm],
        chunk_rows: int | None,
        run: "Run",
    ) -> None:
        self.student = _ready(student)
        self.teachers = {
            name: _ready(teacher) if isinstance(teacher, Projection) else teacher.detach()
            for name, teacher in teachers.items()
        }
        self.terms, self.run = terms, run
        self.has_kernels = all(term.kernel is not None for term in terms)
        device = student.hidden.device
        self.exact = torch.promote_types(student.hidden.dtype, torch.float32)
        weights = torch.stack([t.weight.to(terms[0].weight.device, self.exact) for t in terms])
        self.weights = weights.to(device, non_blocking=True)
        self.factors = torch.stack(
            [torch.as_tensor(t.factor, dtype=self.exact, device=device) for t in terms]
        )
        self.sums = torch.zeros_like(self.factors)
        self.pulls = self.weights * self.factors[:, None]
        self.norm: Tensor | float = 1.0
        if student.hidden.dtype == torch.float16:
            largest = self.pulls.abs().max() if self.pulls.numel() else self.sums.new_zeros(())
            tiny = torch.finfo(self.exact).tiny
            self.norm = largest.clamp(min=tiny).log2().ceil().exp2()
            self.pulls = self.pulls / self.norm
        # Prompts and padding are often half of all rows: they are gone before anything is done.
        self.index = (weights > 0).any(0).nonzero().flatten().to(device, non_blocking=True)
        self.buffers: dict[str, Tensor] = {}
        self.sizes = sizes(device.type)
        row_bytes = self.student.vocabulary * self.student.hidden.dtype.itemsize
        self.usual_rows = min(max(1, self.sizes.chunk_bytes // row_bytes), self.sizes.chunk_rows)
        self.chunk_rows = chunk_rows or self.usual_rows

    def chunks(self) -> Iterator[Tensor]:
        """Indices of the rows of each chunk; all chunks are of about the same size."""
        parts = -(-len(self.index) // self.chunk_rows)
        yield from self.index.tensor_split(parts) if parts else ()

    def losses(self, rows: Tensor) -> Tensor:
        """Add the rows' losses to the sums; returns the gradient to the logits, [c, v]."""
        logits, theirs = self._made(rows)
        values = self._by_blocks(logits, theirs, rows)
        if self.has_kernels and not self.run.sure and not bool(values.isfinite().all()):
            # Where a model rules tokens out, the definition knows what to do: from here on. And
            # where there is no such token, it says so.
            self.has_kernels = False
            logits, theirs = self._made(rows)
            values = self._by_blocks(logits, theirs, rows)
        weights = self.weights[:, rows]
        self.sums += (weights * torch.where(weights > 0, values, 0.0)).sum(-1)
        return logits

    def _made(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's and the teachers' logits of a chunk, which its losses overwrite."""
        theirs = {name: self._logits(name, t, rows) for name, t in self.teachers.items()}
        return self._logits("", self.student, rows), theirs

    def _by_blocks(self, logits: Tensor, theirs: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Losses [k, c] of a chunk; their gradient takes the place of its logits."""
        # Written in place: what outlives a block must not come to lie between its temporaries.
        values = self.pulls.new_empty(len(self.terms), len(rows))
        run, losses = (self.run, by_kernels) if self.has_kernels else (Run(), by_definition)
        step = max(1, self.sizes.block_elements // logits.shape[1]) if run.by_blocks else len(rows)
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            others = {name: t[part] for name, t in theirs.items()}
            index = rows[part]
            pulls = self.pulls[:, index]
            values[:, part] = run.take(losses, self, logits[part], others, pulls, index)
        return values

    def _logits(self, name: str, of: Projection | Tensor, rows: Tensor) -> Tensor:
        """Logits before scale and cap, in this name's buffer."""
        if isinstance(of, Tensor):
            # Row by row, as kernels read it: taking rows keeps the order in which the whole lies.
            return of[rows.to(of.device)].to(rows.device).contiguous()
        rows = rows.to(of.hidden.device)
        hidden = of.hidden[rows]
        if name not in self.buffers or len(self.buffers[name]) < len(rows):
            self.buffers[name] = self._buffer(len(rows), of.vocabulary, hidden)
        out = self.buffers[name][: len(rows), : of.vocabulary]
        striped = out.device.type == "cpu" and out.dtype == torch.float32
        step = PROJECTED_COLUMNS if striped else of.vocabulary
        for first in range(0, of.vocabulary, step):
            columns = slice(first, first + step)
            head = of.weight[columns].T
            if of.bias is None:
                torch.mm(hidden, head, out=out[:, columns])
            else:
                torch.addmm(of.bias[columns], hidden, head, out=out[:, columns])
        if of.low_hidden is not None and of.low_weight is not None:
            out.addmm_(of.low_hidden[rows], of.low_weight.T)
        return out.to(self.student.hidden.device)

    def _buffer(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Room for logits; each row begins where products and wide loads want it."""
        if like.device.type != "cpu":
            return like.new_empty(rows, columns + -columns % ALIGNED_COLUMNS)
        row_bytes = (-(-columns * like.dtype.itemsize // LINE_BYTES) | 1) * LINE_BYTES
        shape = (rows, row_bytes // like.dtype.itemsize)
        most = self.usual_rows * row_bytes
        room = pages.empty(shape, like.dtype, like.device, at_most_bytes=most)
        room[:, columns:] = 0  # products in bfloat16 multiply what is behind a row by 0
        return room

    def empty_gradient(self, of: Tensor, of_rows: bool) -> Tensor:
        """Rows get their gradient once; a head's is the sum over all rows, and kept exact."""
        return pages.zeros(of.shape, of.dtype if of_rows else self.exact, of.device)

    def backward(self, rows: Tensor, gradient: Tensor, into: Sequence[Tensor | None]) -> None:
        """From the gradient of a chunk's logits to hidden states and heads."""
        student, (hidden, weight, bias, low_hidden, low_weight) = self.student, into
        if hidden is not None:
            hidden[rows] = (gradient @ student.weight).to(hidden.dtype)
        if weight is not None:
            _add_outer(weight, gradient, student.hidden[rows])
        if bias is not None:
            bias += gradient.sum(0, dtype=bias.dtype)
        if student.low_hidden is None or student.low_weight is None:
            return
        if low_hidden is not None:
            low_hidden[rows] = (gradient @ student.low_weight).to(low_hidden.dtype)
        if low_weight is not None:
            _add_outer(low_weight, gradient, student.low_hidden[rows])


def in_place(
    losses: Callable[..., tuple[Tensor, Tensor]],
    work: Work,
    logits: Tensor,
    theirs: Mapping[str, Tensor],
    pulls: Tensor,
    rows: Tensor,
) -> Tensor:
    """Losses of a block, whose gradient takes the place of its logits; `Work` runs it per block.

    Args:
        losses: `by_kernels` or `by_definition`.
        work: whose terms, scales and soft caps are meant.
        logits: [r, v] of the student, before scale and cap; overwritten.
        theirs: [r, w] logits by teacher, before scale and cap; overwritten.
        pulls, rows: as in `by_kernels`.

    Returns:
        [k, r] values; not finite where `by_kernels` met logits that are not.
    """
    shaped = _shaped(logits.to(work.exact), work.student)
    teachers = {name: _shaped(t.to(work.exact), work.teachers[name]) for name, t in theirs.items()}
    bend = _bend(shaped, work.student)
    values, gradient = losses(shaped, teachers, work.terms, pulls, rows)
    if bend is not None:
        gradient = gradient.mul_(bend)
    if gradient is not logits:
        logits.copy_(gradient)
    return values


class Run(NamedTuple):
    """Who takes the losses of a chunk.

    Attributes:
        take: `in_place`, or what does the same faster.
        by_blocks: it makes several passes, so it is given blocks that fit the processor's cache.
        sure: its values are finite if hidden states are, so no one need wait for a GPU to look.
    """

    take: Callable[..., Tensor] = in_place
    by_blocks: bool = True
    sure: bool = False


def by_kernels(
    student: Tensor,
    teachers: Mapping[str, Tensor],
    terms: Sequence[RowTerm],
    pulls: Tensor,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """All terms' losses of a block and their gradient; all terms have a kernel.

    Args:
        student: [r, v] logits; overwritten, and so are the teachers'.
        teachers: [r, w] logits by name.
        terms: k of them.
        pulls: [k, r], what each loss counts in the gradient.
        rows: [r], which rows these are.

    Returns:
        values: [k, r]; not finite where logits are not.
        gradient: [r, v] to the student's logits.
    """
    keys = [_softened_keys(term, student, teachers) for term in terms]
    softened = _softened({"": student, **teachers}, keys, terms)
    values: list[Tensor] = []
    whole: Tensor | None = None
    for index, (term, pull) in enumerate(zip(terms, pulls, strict=True)):
        assert term.kernel is not None
        for key in keys[index]:
            softened[key].last = not any(key in later for later in keys[index + 1 :])
        if term.teacher is None:
            assert term.beside is not None
            theirs: Any = term.beside[rows]
        else:
            theirs = softened[keys[index][1]]
        value, gradient = term.kernel(softened[keys[index][0]], theirs)
        scale, slope = kernels.scales(term.temperature, term.scale_by_t2)
        values.append(value.mul_(scale))
        gradient = gradient.mul_((pull * slope)[:, None])
        width = gradient.shape[1]
        if whole is None and width == student.shape[1]:
            whole = gradient
        else:
            whole = torch.zeros_like(student) if whole is None else whole
            whole[:, :width] += gradient
    assert whole is not None
    return torch.stack(values), whole


Key = tuple[str, float, int]
"""Whose logits (the student's are ""), at which temperature, and how many columns."""


def _softened_keys(
    term: RowTerm, student: Tensor, teachers: Mapping[str, Tensor]
) -> tuple[Key, ...]:
    """What a term reads: the student, and its teacher if it has one."""
    if term.teacher is None:
        return (("", term.temperature, student.shape[1]),)
    width = min(student.shape[1], teachers[term.teacher].shape[1])
    return tuple((name, term.temperature, width) for name in ("", term.teacher))


def _softened(
    logits: Mapping[str, Tensor], keys: Sequence[Sequence[Key]], terms: Sequence[RowTerm]
) -> dict[Key, kernels.Softened]:
    """All of them; each takes the place of its logits where those serve no other."""
    several = {key for pair in keys for key in pair}
    read = {
        key
        for pair, term in zip(keys, terms, strict=True)
        if getattr(term.kernel, "func", term.kernel) in kernels.OF_LOGITS
        for key in pair
    }
    found: dict[Key, kernels.Softened] = {}
    in_the_open = not torch.compiler.is_compiling()  # which sees to memory by itself
    for key in several:
        name, temperature, width = key
        alone = in_the_open and sum(other[0] == name for other in several) == 1
        whole = logits[name]
        cut = whole if width == whole.shape[1] else whole[:, :width]
        if temperature != 1:
            cut = cut.div_(temperature) if alone else cut / temperature
        spare = alone or (in_the_open and temperature != 1)
        found[key] = kernels.Softened(cut, spare=spare and key not in read)
    return found


def by_definition(
    student: Tensor,
    teachers: Mapping[str, Tensor],
    terms: Sequence[RowTerm],
    pulls: Tensor,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same for losses of any kind and for any logits, by automatic differentiation."""
    leaf = student.detach().requires_grad_()
    with torch.enable_grad():
        values = torch.stack(
            [term.loss(leaf, teachers.get(term.teacher or ""), rows) for term in terms]
        )
        total = (pulls * torch.where(pulls != 0, values, 0.0)).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
    return values.detach().to(student.dtype), gradient


def _ready(projection: Projection) -> Projection:
    """Detached, and all in the type that the hidden states are computed in.

    A model's own head, which stays, is moved into huge pages for this call and all that follow.
    """
    dtype = projection.hidden.dtype
    if isinstance(projection.weight, nn.Parameter) and projection.weight.dtype == dtype:
        pages.gather(projection.weight)

    def cast(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().to(dtype)

    return replace(
        projection,
        hidden=projection.hidden.detach(),
        weight=pages.cast(projection.weight, dtype),
        bias=cast(projection.bias),
        low_hidden=cast(projection.low_hidden),
        low_weight=cast(projection.low_weight),
    )


def _shaped(logits: Tensor, of: Projection | Tensor) -> Tensor:
    """Scale and soft cap."""
    if isinstance(of, Tensor):
        return logits
    if of.scale != 1.0:
        logits = logits * of.scale
    return logits if of.soft_cap is None else (logits / of.soft_cap).tanh_().mul_(of.soft_cap)


def _bend(shaped: Tensor, of: Projection) -> Tensor | float | None:
    """The derivative of scale and soft cap; None where they change nothing."""
    if of.soft_cap is not None:
        return (shaped / of.soft_cap).square_().neg_().add_(1).mul_(of.scale)
    return None if of.scale == 1.0 else of.scale


def _add_outer(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total [v, d] += gradient [c, v]^T hidden [c, d], summed in the type of the total."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.T, hidden)
        return
    if total.is_cuda and torch.version.hip is None:
        torch.addmm(total, gradient.T, hidden, out_dtype=total.dtype, out=total)
        return
    stripe = max(1, STRIPE_ELEMENTS // total.shape[1])
    shape = (min(stripe, len(total)), total.shape[1])
    part = pages.empty(shape, gradient.dtype, gradient.device)
    for first in range(0, len(total), stripe):
        into = total[first : first + stripe]
        columns = gradient[:, first : first + stripe].T
        sums.add(into, torch.mm(columns, hidden, out=part[: len(into)]))
