"""Geometry of the report's line charts: points in the data's units become paths and ticks in percent of the plot.

The page draws the paths in a stretched SVG and sets the words beside it as HTML, so that text keeps its size on any
screen.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

Points = list[tuple[float, float]]
Logged = Iterable[tuple[float, float | None]]  # None where an interval measured nothing
Tick = tuple[float, str]  # percent along the axis, label
MOST_POINTS = 400  # of one curve: a longer log is drawn by the means of neighbours
LABEL_GAP = 9.0  # percent of the plot's height that one line of text takes


@dataclass
class Curve:
    """One line as SVG path data, as logged (`raw`) and its running mean (`smooth`), with the latter's ends."""

    name: str
    raw: str
    smooth: str
    first: float
    last: float
    label_y: float


@dataclass
class Chart:
    """Curves that share their axes; ticks in percent from the left and from the top."""

    curves: list[Curve]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def chart(series: dict[str, Logged], log: bool = False) -> Chart | None:
    """Lay out `series` (x ascending) on common axes, or None when no series has two points to join.

    A logarithmic axis (values above 0 only) gives equal height to every halving of a loss; a linear one starts at 0.
    """
    usable = {name: thinned(kept) for name, points in series.items() if len(kept := _finite(points, log)) > 1}
    if not usable:
        return None
    xs = [x for points in usable.values() for x, _ in points]
    ys = [y for points in usable.values() for _, y in points]
    low, high = (min(ys) / 1.15, max(ys) * 1.05) if log else (0.0, max(ys) * 1.15 or 1.0)
    left, right = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        span = math.log(high / low) if log else high - low
        return 100 * (x - left) / (right - left or 1), 100 - 100 * (math.log(y / low) if log else y - low) / span

    curves = []
    for name, points in usable.items():
        mean = running_mean(points)
        first, last = mean[0][1], mean[-1][1]
        curves.append(Curve(name, _path(points, place), _path(mean, place), first, last, place(right, last)[1]))
    _spread(curves)
    x_ticks = [(place(x, high)[0], compact(x)) for x in even_ticks(left, right, 5)]
    y_ticks = halving_ticks(low, high) if log else []
    if len(y_ticks) < 3:  # a linear axis, or a range within one power of ten
        y_ticks = even_ticks(low, high, 4)
    return Chart(curves, x_ticks, [(place(left, y)[1], f"{y:g}") for y in y_ticks])


def thinned(points: Points) -> Points:
    """The means of groups of neighbours, of as few as leave no more than MOST_POINTS."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def running_mean(points: Points) -> Points:
    """Mean over a centred window of about an eighth of the points, cut off at both ends."""
    half = len(points) // 16
    windows = (points[max(0, index - half) : index + half + 1] for index in range(len(points)))
    return [(x, fmean(y for _, y in window)) for (x, _), window in zip(points, windows, strict=True)]


def even_ticks(low: float, high: float, at_most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], at most `at_most` + 1 of them."""
    if high <= low:
        return [low]
    rough = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough * 0.999)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def halving_ticks(low: float, high: float) -> list[float]:
    """The numbers 1, 2 and 5 times powers of ten within [low, high]."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for unit in (1, 2, 5) if low <= (tick := unit * 10.0**power) <= high]


def compact(value: float) -> str:
    """A count in at most four characters and a unit: 850, 1.2k, 374M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def _finite(points: Logged, log: bool) -> Points:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y) and (y > 0 or not log)]


def _path(points: Points, place: Callable[[float, float], tuple[float, float]]) -> str:
    return "M" + "L".join(f"{px:.2f} {py:.2f}" for px, py in (place(x, y) for x, y in points))


def _spread(curves: list[Curve]) -> None:
    """Move the end labels apart, downwards, until none covers another."""
    ordered = sorted(curves, key=lambda curve: curve.label_y)
    for above, below in pairwise(ordered):
        below.label_y = max(below.label_y, above.label_y + LABEL_GAP)
