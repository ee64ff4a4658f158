"""The Frechet distance against SciPy's matrix square root, streamed statistics against whole ones, alignment."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from t2v.metrics import Gaussian, alignment_score, frechet_distance


def features(count: int, width: int, seed: int) -> np.ndarray:
    """Correlated features far from the origin, of which a one-pass variance would lose digits."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(100, 3, size=width)


def gaussian(rows: np.ndarray) -> Gaussian:
    statistics = Gaussian(rows.shape[1])
    statistics.add(rows)
    return statistics


def reference_distance(a: np.ndarray, b: np.ndarray, ddof: int) -> float:
    covariance_a, covariance_b = np.cov(a.T, ddof=ddof), np.cov(b.T, ddof=ddof)
    root = sqrtm(covariance_a @ covariance_b)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariance_a + covariance_b - 2 * root.real))


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize(("count_a", "count_b"), [(300, 200), (20, 300), (20, 15), (70, 70)])
def test_distance_agrees_with_the_matrix_square_root(count_a: int, count_b: int, ddof: int) -> None:
    a, b = features(count_a, 64, seed=1), features(count_b, 64, seed=2)
    assert frechet_distance(gaussian(a), gaussian(b), ddof) == pytest.approx(reference_distance(a, b, ddof), rel=1e-6)


def test_distance_of_equal_samples_is_zero_and_of_a_shift_its_square() -> None:
    a = features(100, 16, seed=1)
    spread = np.trace(np.cov(a.T))
    assert 0 <= frechet_distance(gaussian(a), gaussian(a)) < 1e-9 * spread
    assert frechet_distance(gaussian(a), gaussian(a + 3)) == pytest.approx(16 * 9)


def test_parts_merge_to_the_whole_in_bounded_memory() -> None:
    rows = features(1000, 32, seed=3)
    streamed, left, right = Gaussian(32), Gaussian(32), Gaussian(32)
    for start in range(0, 1000, 7):
        streamed.add(rows[start : start + 7])
        (left if start % 2 else right).add(rows[start : start + 7])
    left.merge(right)
    left.merge(Gaussian(32))
    for parts in (streamed, left):
        assert parts.count == 1000
        np.testing.assert_allclose(parts.mean, rows.mean(0), rtol=1e-12)
        factor = parts.factor()
        np.testing.assert_allclose(factor.T @ factor / 999, np.cov(rows.T), rtol=1e-9, atol=1e-9)
        assert sum(map(len, parts._rows)) <= 64


def test_statistics_refuse_what_they_cannot_use() -> None:
    one = gaussian(features(1, 4, seed=0))
    with pytest.raises(ValueError, match="1 samples are too few"):
        frechet_distance(one, gaussian(features(9, 4, seed=0)))
    with pytest.raises(ValueError, match="width 4 and 5"):
        frechet_distance(gaussian(features(9, 4, seed=0)), gaussian(features(9, 5, seed=0)))
    with pytest.raises(ValueError, match=r"shape \(9, 5\) do not fit statistics of width 4"):
        one.add(features(9, 5, seed=0))
    with pytest.raises(ValueError, match="not finite"):
        one.add(np.full((2, 4), np.nan))


def test_alignment_averages_frames_then_prompts() -> None:
    texts = np.array([[1.0, 0.0], [0.0, 2.0]])
    frames = [np.array([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), np.array([[1.0, 1.0]])]
    assert alignment_score(frames, texts) == pytest.approx((0 + np.sqrt(0.5)) / 2)
    with pytest.raises(ValueError, match="2 clips and 1 texts"):
        alignment_score(frames, texts[:1])
