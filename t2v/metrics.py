"""What the scores are made of: Gaussians of features, the Frechet distance between two of them, and alignment.

Nothing here knows a network, a file or a frame: features come in as arrays, numbers go out.

    n samples    d width of a feature    r rows of a factor    p prompts    f frames    k classes
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Gaussian:
    """Mean and covariance of a stream of features, in float64 and in memory that does not grow with n.

    The scatter, sum (x - mean)(x - mean)^T, is held as a factor [r, d] with factor^T factor = scatter. As long as
    n < d the factor is smaller than the scatter, and it spares the distance all square roots of matrices. A QR
    decomposition folds it back to d rows whenever it has grown to 2 d.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean: Array = np.zeros(width)
        self._rows: list[Array] = []

    @property
    def width(self) -> int:
        return len(self.mean)

    def add(self, features: NDArray) -> None:
        """Takes in features [n, d]. Raises ValueError on another width and on values that are not finite."""
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(f"features of shape {features.shape} do not fit statistics of width {self.width}")
        if not np.isfinite(features).all():
            raise ValueError("features hold values that are not finite")
        if len(features):
            rows = features.astype(np.float64)
            mean = rows.mean(axis=0)
            self._absorb(len(rows), mean, rows - mean)

    def merge(self, other: "Gaussian") -> None:
        """Takes in all that another has seen, as if it had been added here (Chan et al. 1979, eq. 2.1)."""
        if other.width != self.width:
            raise ValueError(f"statistics of width {other.width} do not merge into width {self.width}")
        if other.count:
            self._absorb(other.count, other.mean, other.factor())

    def factor(self) -> Array:
        """A matrix [r, d], r <= d + 1, whose transpose times itself is the scatter."""
        if sum(map(len, self._rows)) > self.width + 1:
            self._rows = [np.asarray(np.linalg.qr(np.concatenate(self._rows), mode="r"))]
        elif len(self._rows) > 1:
            self._rows = [np.concatenate(self._rows)]
        return self._rows[0] if self._rows else np.zeros((0, self.width))

    def _absorb(self, count: int, mean: Array, rows: Array) -> None:
        total = self.count + count
        shift = mean - self.mean
        self._rows += [rows, np.sqrt(self.count * count / total) * shift[None]]
        self.mean = self.mean + shift * (count / total)
        self.count = total
        if sum(map(len, self._rows)) > 2 * self.width:
            self.factor()


def frechet_distance(a: Gaussian, b: Gaussian, ddof: int = 1) -> float:
    """How far apart two Gaussians are: |mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^(1/2)) (Dowson & Landau 1982, eq. 4).

    In squared units of the features, 0 or more, lower is closer; it falls with n even between equal distributions, so
    only distances of equal n compare. Covariances divide by n - `ddof`. With A = F_a^T F_a and B = F_b^T F_b the trace
    of (A B)^(1/2) is the sum of the singular values of F_a F_b^T: they are the square roots of the eigenvalues of
    A^(1/2) B A^(1/2), whatever the rank, and were never squared.

    Raises ValueError on different widths and on too few samples.
    """
    if a.width != b.width:
        raise ValueError(f"features of width {a.width} and {b.width} cannot be compared")
    for side in (a, b):
        if side.count <= ddof:
            raise ValueError(f"{side.count} samples are too few for a covariance: at least {ddof + 1} are needed")
    factor_a = a.factor() / np.sqrt(a.count - ddof)
    factor_b = b.factor() / np.sqrt(b.count - ddof)
    shared = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    spread = np.square(factor_a).sum() + np.square(factor_b).sum() - 2 * shared
    return max(float(np.square(a.mean - b.mean).sum() + spread), 0.0)


def alignment_score(frames: Sequence[NDArray], texts: NDArray) -> float:
    """How well frames show what their prompts say: mean over prompts of the mean over frames of the cosine.

    `frames` holds one array [f, d] a prompt, `texts` is [p, d], both of one embedding space. In [-1, 1], unscaled,
    negative cosines count as they are (GODIVA, arXiv 2104.14806, 4.2; CLIPScore's factor and clamp are another score).
    Raises ValueError when the two do not pair up.
    """
    if not len(frames) or len(frames) != len(texts):
        raise ValueError(f"{len(frames)} clips and {len(texts)} texts do not pair up")
    cosines = [_unit(images) @ _unit(text) for images, text in zip(frames, texts, strict=True)]
    return float(np.mean([clip.mean() for clip in cosines]))


def conse(probabilities: NDArray, class_vectors: NDArray, top: int = 10) -> NDArray:
    """Places a frame among texts: where the names of its likeliest classes lie, weighted by their probabilities.

    A classifier's probabilities [f, k] for frames and the vectors [k, d] of its classes' names -> [f, d], in the space
    of the names (ConSE, arXiv 1312.5650, eq. 2).
    """
    likeliest = np.argsort(-probabilities, axis=1)[:, :top]
    weights = np.take_along_axis(probabilities, likeliest, axis=1)
    return np.einsum("ft,ftd->fd", weights / weights.sum(axis=1, keepdims=True), class_vectors[likeliest])


def _unit(vectors: NDArray) -> Array:
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
