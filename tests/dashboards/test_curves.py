import math

import pytest

from dashboards.curves import LABEL_GAP, MOST_POINTS, chart, compact, even_ticks, halving_ticks, running_mean, thinned


def places(path: str) -> list[tuple[float, float]]:
    return [tuple(map(float, point.split())) for point in path.removeprefix("M").split("L")]  # type: ignore[misc]


def test_equal_ratios_are_equal_heights_on_a_logarithmic_axis() -> None:
    drawn = chart({"videos": [(0, 8.0), (10, 4.0), (20, 2.0)]}, log=True)
    (x0, y0), (x1, y1), (x2, y2) = places(drawn.curves[0].raw)
    assert (x0, x1, x2) == (0, 50, 100)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.02) and 0 < y0 < y2 < 100


def test_intervals_without_a_number_are_left_out() -> None:
    drawn = chart({"images": [(1, None), (2, 0.5), (3, math.nan), (4, 0.25), (5, 0.0)]}, log=True)
    assert len(places(drawn.curves[0].raw)) == 2
    assert chart({"images": [(1, None), (2, 0.5)]}, log=True) is None


def test_a_constant_and_a_zero_series_can_be_drawn() -> None:
    assert chart({"value": [(1, 0.0), (2, 0.0)]}).curves[0].last == 0
    assert chart({"value": [(5, 3.0), (5, 3.0)]}, log=True).curves[0].last == 3


def test_end_labels_keep_clear_of_each_other() -> None:
    drawn = chart({"videos": [(0, 1.0), (1, 0.1001)], "images": [(0, 1.0), (1, 0.1)]}, log=True)
    videos, images = drawn.curves
    assert images.label_y - videos.label_y >= LABEL_GAP


def test_ticks_are_round_and_within_the_axis() -> None:
    assert even_ticks(320, 19200, 5) == [5000, 10000, 15000]
    assert even_ticks(0, 0.03, 4) == [0, 0.01, 0.02, 0.03]
    assert halving_ticks(0.06, 1.1) == [0.1, 0.2, 0.5, 1.0]


def test_a_long_log_is_drawn_by_means_of_neighbours() -> None:
    line = [(float(x), 2.0 * x) for x in range(MOST_POINTS * 3)]
    assert thinned(line)[:2] == [(1.0, 2.0), (4.0, 8.0)] and len(thinned(line)) == MOST_POINTS
    assert thinned(line[:MOST_POINTS]) == line[:MOST_POINTS]


def test_a_narrow_logarithmic_axis_has_ticks_too() -> None:
    drawn = chart({"videos": [(0, 1.0), (1, 0.75)]}, log=True)
    assert [label for _, label in drawn.y_ticks] == ["0.7", "0.8", "0.9", "1"]


def test_running_mean_keeps_a_line_and_calms_noise() -> None:
    line = [(float(x), 2.0) for x in range(40)]
    assert running_mean(line) == line
    noisy = [(float(x), float(x % 2)) for x in range(64)]
    assert all(0.3 < y < 0.7 for _, y in running_mean(noisy))


@pytest.mark.parametrize(("value", "text"), [(850, "850"), (1200, "1.2k"), (373_800_000, "374M"), (2e9, "2B")])
def test_counts_are_compact(value: float, text: str) -> None:
    assert compact(value) == text
