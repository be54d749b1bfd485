"""Losses between hidden states: of each row, of rows of one sample, of all rows together.

[n, d] in, one value a row out; argument order is always (student, teacher). Values are computed in
float32 whatever the inputs, and in float64 when one of them is; autocast does not touch them.
Gradients flow into both arguments; who wants none in the teacher detaches it.

`hidden_correlation`, `linear_cka` and `cka_loss` look at all rows together, so a row's value
depends on which other rows are there.
"""

from typing import Any

import torch
from torch import Tensor

from limbeck.losses.blocks import Blocks
from limbeck.losses.shared import widened

__all__ = [
    "cka_loss",
    "hidden_correlation",
    "hidden_cosine",
    "hidden_mse",
    "hsic",
    "linear_cka",
    "similarity",
    "unbiased_gram",
]

FEWEST_ROWS = 4
"""The debiased estimator of HSIC has n - 3 in its denominator."""


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference: 1 / d * sum_j (s_j - t_j)^2.

    Args:
        student: [n, d].
        teacher: [n, d].

    Returns:
        [n] >= 0; 0 with zero gradient where both are equal.

    Raises:
        ValueError: shapes differ.

    Source: Jiao et al., "TinyBERT" (arXiv 1909.10351), L_hidn.

    >>> hidden_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
    tensor([2.])
    """
    student, teacher = both(student, teacher, same_width=True)
    return (student - teacher).square().mean(-1)


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(s, t): the direction, whatever the lengths.

    Args:
        student: [n, d]; a vector of zeros has cosine 0 with all others, and no gradient.
        teacher: [n, d].

    Returns:
        [n] in [0, 2].

    Raises:
        ValueError: shapes differ.

    Source: Sanh et al., "DistilBERT" (arXiv 1910.01108), L_cos.

    >>> hidden_cosine(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.ones(2, 1) * torch.eye(2)[0])
    tensor([0., 1.])
    """
    student, teacher = both(student, teacher, same_width=True)
    return 1 - (_unit(student) * _unit(teacher)).sum(-1)


def hidden_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Each row's part in 1 - mean_j corr(s_j, t_j), where corr is Pearson's over the rows.

    1 - n / d * sum_j a_ij b_ij, with a and b each unit's values less their mean, of length 1 over
    the rows. The mean of it over rows is 1 - the mean correlation. It does not see the scale, sign
    apart, or the offset of a unit. A unit that is constant in one of them has correlation 0.

    Args:
        student: [n, d].
        teacher: [n, d]; unit j is compared with the student's unit j.

    Returns:
        [n]; single values may be negative, and their mean is in [0, 2]. With one row all units are
        constant: 1 without gradient.

    Raises:
        ValueError: shapes differ.

    >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 5.0]])
    >>> hidden_correlation(x, 3 * x + 1).mean().abs() < 1e-6
    tensor(True)
    """
    student, teacher = both(student, teacher, same_width=True)
    products = _unit(_centred(student), dim=0) * _unit(_centred(teacher), dim=0)
    return 1 - len(student) * products.mean(-1)


def similarity(student: Tensor, teacher: Tensor, sample: Tensor) -> Tensor:
    """Mean squared difference of a row's cosines with the other rows of its sample.

    1 / (m - 1) * sum_{j != i} (cos(s_i, s_j) - cos(t_i, t_j))^2, over the m rows of a sample. It
    asks how the rows lie to each other, so the widths may differ, and turning or scaling either
    space changes nothing.

    Args:
        student: [n, d].
        teacher: [n, w].
        sample: [n] which sample each row is of.

    Returns:
        [n] in [0, 4]; 0 for a row that is alone.

    Raises:
        ValueError: the numbers of rows differ.

    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation" (arXiv 1907.09682), there
    between the samples of a batch and here between the tokens of a sample.

    >>> turned = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> rows = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> similarity(rows, rows @ turned, torch.tensor([0, 0]))
    tensor([0., 0.])
    """
    student, teacher = both(student, teacher)
    blocks = Blocks.of(sample)
    with exact(student):
        ours, theirs = (blocks.scatter(_unit(x)) for x in (student, teacher))
        square = (ours @ ours.mT - theirs @ theirs.mT).square()
    others = square.sum(-1) - square.diagonal(dim1=-2, dim2=-1)
    return blocks.gather(others / (blocks.lengths[:, None] - 1).clamp(min=1))


def hsic(student: Tensor, teacher: Tensor, *, debiased: bool = True) -> Tensor:
    """Hilbert-Schmidt independence criterion of two sets of features, with linear kernels.

    Biased: |X'Y|_F^2 / (n - 1)^2 with columns less their mean. Debiased: with K = XX', L = YY',
    both with zeros on the diagonal,

        (tr KL + (1'K1)(1'L1) / ((n-1)(n-2)) - 2 / (n-2) 1'KL1) / (n (n-3))

    Taking off the columns' mean changes nothing there and makes the row sums of XX' zero, which
    leaves |X'Y|_F^2 and the diagonals. |X'Y|_F^2 is computed from d x w or from n x n products,
    whichever is fewer.

    Args:
        student: [n, d].
        teacher: [n, w].
        debiased: the estimator whose mean over draws of rows does not depend on n.

    Returns:
        One number; debiased, it may be negative.

    Raises:
        ValueError: the numbers of rows differ, or are fewer than 4 (2 where biased).

    Source: Song et al., "Feature Selection via Dependence Maximization" (JMLR 13, 2012).
    """
    student, teacher = both(student, teacher)
    n = _enough(student, debiased)
    x, y = _centred(student), _centred(teacher)
    width = x.shape[1] * y.shape[1]
    with exact(student):
        if width <= n * (x.shape[1] + y.shape[1]):
            cross = (x.T @ y).square().sum()
        else:
            cross = ((x @ x.T) * (y @ y.T)).sum()
    if not debiased:
        return cross / (n - 1) ** 2
    a, b = x.square().sum(-1), y.square().sum(-1)
    diagonals = (a * b).sum()
    sums = a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * diagonals / (n - 2)
    return (cross - diagonals + sums) / (n * (n - 3))


def unbiased_gram(values: Tensor) -> Tensor:
    """U-centred products of all rows: the debiased `hsic` is the sum of two of these, multiplied.

    With k_ij = x_i . x_j, r_i = sum_{j != i} k_ij and s = sum_i r_i, off the diagonal

        k_ij - (r_i + r_j) / (n - 2) + s / ((n - 1) (n - 2))

    and 0 on it. Where many sets of features are compared, each one's matrix is made once.

    Args:
        values: [n, d].

    Returns:
        [n, n]; rows sum to 0. sum(A * B) / (n (n - 3)) is the debiased `hsic`.

    Raises:
        ValueError: there are fewer than 4 rows.

    Source: Szekely and Rizzo, "Partial Distance Correlation with Methods for Dissimilarities"
    (arXiv 1310.2926).
    """
    n = _enough(values)
    values, _ = both(values, values)
    centred = _centred(values)
    with exact(values):
        products = (centred @ centred.T).fill_diagonal_(0.0)
    sums = products.sum(0)
    offset = sums.sum() / ((n - 1) * (n - 2))
    return (products - (sums[:, None] + sums) / (n - 2) + offset).fill_diagonal_(0.0)


def linear_cka(student: Tensor, teacher: Tensor, *, debiased: bool = True) -> Tensor:
    """Centred kernel alignment: HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)).

    1 where one is the other turned, scaled and moved. Biased, it comes near 1 for any two sets of
    features that are wider than there are rows; debiased, unrelated ones give about 0.

    Args:
        student: [n, d].
        teacher: [n, w].
        debiased: see `hsic`.

    Returns:
        One number, at most 1; biased, at least 0. It is 0 without gradient where one of them does
        not vary over the rows.

    Raises:
        ValueError: as `hsic`.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited" (arXiv
    1905.00414); debiased as in Nguyen et al., "Do Wide and Deep Networks Learn the Same Things?"
    (arXiv 2010.15327).

    >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 5.0], [4.0, 1.0], [0.0, 0.0]])
    >>> round(linear_cka(x, -3 * x.flip(1) + 1).item(), 5)
    1.0
    """
    student, teacher = both(student, teacher)
    _enough(student, debiased)
    x, y = _scaled(student), _scaled(teacher)
    cross = hsic(x, y, debiased=debiased)
    ours, theirs = hsic(x, x, debiased=debiased), hsic(y, y, debiased=debiased)
    least = 100 * torch.finfo(x.dtype).eps  # more than rounding leaves of an exact 0
    varies = (ours > least) & (theirs > least)
    return torch.where(varies, cross / torch.where(varies, ours * theirs, 1.0).sqrt(), 0.0)


def cka_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - debiased linear CKA, the same for each row.

    Args:
        student: [n, d].
        teacher: [n, w].

    Returns:
        [n], equal values. With fewer than 4 rows there is no estimate: 0 with zero gradient.

    Raises:
        ValueError: the numbers of rows differ.

    Source: as `linear_cka`.
    """
    student, teacher = both(student, teacher)
    if len(student) < FEWEST_ROWS:
        return student[:, :0].sum(-1) + teacher[:, :0].sum(-1)
    return (1 - linear_cka(student, teacher)).expand(len(student))


def both(student: Tensor, teacher: Tensor, *, same_width: bool = False) -> tuple[Tensor, Tensor]:
    """`widened` hidden states.

    Raises:
        ValueError: they are not [n, d] and [n, w] of the same n rows, a width is 0, or the widths
            differ where they must not.
    """
    fits = student.ndim == teacher.ndim == 2 and len(student) == len(teacher)
    fits = fits and (not same_width or student.shape == teacher.shape)
    if not fits or 0 in (student.shape[1], teacher.shape[1]):
        raise ValueError(
            "hidden states must be [n, d]"
            + (" of one shape" if same_width else " of the same rows")
            + f"; they are {list(student.shape)} (student) and {list(teacher.shape)} (teacher)"
        )
    return widened(student, teacher)


def exact(like: Tensor) -> Any:
    """A block in which matrix products keep their type, where the model runs under autocast."""
    return torch.autocast(like.device.type, enabled=False)


def _enough(values: Tensor, debiased: bool = True) -> int:
    """The number of rows."""
    n, fewest = len(values), FEWEST_ROWS if debiased else 2
    if n < fewest:
        raise ValueError(f"{n} rows are too few; at least {fewest} are needed")
    return n


def _unit(vectors: Tensor, dim: int = -1) -> Tensor:
    """Of length 1; zeros stay zeros, without a gradient."""
    square = vectors.square().sum(dim, keepdim=True)
    there = square > torch.finfo(vectors.dtype).tiny
    return vectors * torch.where(there, torch.where(there, square, 1.0).rsqrt(), 0.0)


def _centred(values: Tensor) -> Tensor:
    """[n, d] less each column's mean; exactly 0 where a column is constant but for rounding."""
    centred = values - values.mean(0)
    size, left = (x.detach().square().sum(0).sqrt() for x in (values, centred))
    return centred * (left > 10 * torch.finfo(values.dtype).eps * size)


def _scaled(values: Tensor) -> Tensor:
    """Centred, rows with a mean square length of 1: CKA's fourth powers then stay in range.

    The scale has no gradient, as CKA does not depend on it.
    """
    centred = _centred(values)
    square = centred.detach().square().sum(-1).mean()
    return centred / torch.where(square > 0, square, 1.0).sqrt()
