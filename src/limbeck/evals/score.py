"""A measured figure with its uncertainty, and the two interval methods that make it.

Tokens of one text are not independent, so an interval that counts tokens is far too narrow. Here
the *sample* is the unit that was drawn: figures per token are ratios of two per-sample sums, and
their standard error comes from how the samples differ.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Better = Literal["higher", "lower"]
Interval = tuple[float, float]

Z95 = 1.959963984540054
"""97.5% quantile of the standard normal distribution."""

FEWEST_SAMPLES = 3
"""Below this a spread between samples says nothing, and no interval is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One figure that an evaluation found.

    Attributes:
        value: the figure itself.
        n: how many units it is over: rows, bytes or problems (see `unit` and the evaluation).
        interval95: lower and upper end of the 95% confidence interval; None where there were too
            few samples to give one.
        better: which direction is good.
        unit: such as `share`, `nats` or `bits/byte`.
    """

    value: float
    n: int
    interval95: Interval | None
    better: Better
    unit: str

    def to_json(self) -> dict[str, Any]:
        """JSON values; a figure that is not finite is null."""
        interval = finite_interval(self.interval95)
        return {
            "value": finite(self.value),
            "n": self.n,
            "interval95": None if interval is None else list(interval),
            "better": self.better,
            "unit": self.unit,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Score":
        """The score that `to_json` wrote; a null value comes back as NaN."""
        value, interval = found["value"], found["interval95"]
        return cls(
            value=math.nan if value is None else value,
            n=found["n"],
            interval95=None if interval is None else (interval[0], interval[1]),
            better=found["better"],
            unit=found["unit"],
        )


def finite(value: float) -> float | None:
    """The value; None for NaN and infinity."""
    return value if math.isfinite(value) else None


def finite_interval(interval: Interval | None) -> Interval | None:
    """The interval; None where an end is NaN or infinite."""
    return interval if interval is not None and all(map(math.isfinite, interval)) else None


def wilson_interval(share: float, n: float, z: float = Z95) -> Interval:
    """Interval of a proportion, never outside [0, 1] and never empty at 0 or 1.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    Source: Wilson, "Probable inference, the law of succession, and statistical inference",
    JASA 22 (1927). `n` may be fractional: an effective number of independent trials.

    >>> low, high = wilson_interval(0.5, 100)
    >>> round(low, 4), round(high, 4)
    (0.4038, 0.5962)
    """
    if not 0 <= share <= 1 or n <= 0:
        raise ValueError(f"a proportion of {share} over {n} trials has no interval")
    middle = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    below, above = (middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)
    # Rounding may not push an end past the value it surrounds.
    return max(0.0, min(below, share)), min(1.0, max(above, share))


def ratio_interval(sums: Sequence[float], sizes: Sequence[float]) -> tuple[float, Interval | None]:
    """Sum of `sums` over sum of `sizes`, with an interval that takes samples as the unit.

    R = sum y / sum x,   se(R)^2 = m/(m-1) * sum (y_i - R x_i)^2 / (sum x)^2

    over the m samples that have a size; the interval is R +- t se(R), where t is Student's
    quantile for m - 1 degrees of freedom.

    Args:
        sums: each sample's total, such as its nats.
        sizes: each sample's size, such as its tokens.

    Raises:
        ValueError: all sizes are zero.

    Source: the linearised (delta-method) variance of a ratio estimator for clusters of unequal
    size; Cochran, "Sampling Techniques" (3rd ed., 1977), sections 6.3 and 9A.
    """
    value, error, samples = _ratio(sums, sizes)
    if samples < FEWEST_SAMPLES or not math.isfinite(error):
        return value, None
    reach = student_t95(samples - 1) * error
    return value, (value - reach, value + reach)


def share_interval(hits: Sequence[float], sizes: Sequence[float]) -> tuple[float, Interval | None]:
    """Like `ratio_interval` for a share: Wilson's interval at the effective number of trials.

    n_eff = p(1-p) / se(p)^2, at most the number of rows; where all rows agree (p is 0 or 1) the
    spread says nothing, and n_eff is the number of samples.

    Source: Dean and Pagano, "Evaluating confidence interval methods for binomial proportions in
    clustered surveys", Journal of Survey Statistics and Methodology 3 (2015).
    """
    value, error, samples = _ratio(hits, sizes)
    if samples < FEWEST_SAMPLES or not math.isfinite(error):
        return value, None
    spread = value * (1 - value)
    effective = float(samples)
    if spread > 0:
        rows = sum(sizes)
        effective = rows if error == 0 else min(rows, max(1.0, spread / error**2))
    return value, wilson_interval(value, effective, student_t95(samples - 1))


def student_t95(freedom: int) -> float:
    """97.5% quantile of Student's t distribution, within 0.1% from 4 degrees of freedom on.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.5.

    >>> round(student_t95(10), 3), round(student_t95(100), 3)
    (2.228, 1.984)
    """
    z, v = Z95, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / v + second / v**2 + third / v**3 + fourth / v**4


def _ratio(sums: Sequence[float], sizes: Sequence[float]) -> tuple[float, float, int]:
    """Ratio, its standard error and the number of samples with a size."""
    pairs = [(y, x) for y, x in zip(sums, sizes, strict=True) if x > 0]
    total = math.fsum(x for _, x in pairs)
    if total <= 0:
        raise ValueError("a ratio over nothing: no sample has a size")
    samples = len(pairs)
    if not all(math.isfinite(y) for y, _ in pairs):
        return math.nan, math.nan, samples
    value = math.fsum(y for y, _ in pairs) / total
    squares = math.fsum((y - value * x) ** 2 for y, x in pairs)
    error = math.sqrt(squares * samples / max(samples - 1, 1)) / total
    return value, error, samples
