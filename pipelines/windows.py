"""Where in a video its windows lie: the first is uniform over all that fit, the others over what is left free."""

import random


class Places:
    """The starts, in seconds, at which a window of `length_s` still fits into a video `slack_s` longer than that.

    They are drawn from `key` alone: the same key, and the same places taken out, give the same windows.
    """

    def __init__(self, slack_s: float, length_s: float, key: str) -> None:
        self._free = [(0.0, slack_s)]
        self._length_s = length_s
        self._random = random.Random(key)

    def draw(self) -> float | None:
        """A start, uniform over the free ones; None if there are none."""
        if not self._free:
            return None
        offset = self._random.random() * sum(end - begin for begin, end in self._free)
        for begin, end in self._free:
            if offset <= end - begin:
                return begin + offset
            offset -= end - begin
        return self._free[-1][1]

    def avoid(self, begin_s: float, end_s: float) -> None:
        """No further window has anything of this stretch of the video in it."""
        low, high = begin_s - self._length_s, end_s
        parts = [part for begin, end in self._free for part in ((begin, min(end, low)), (max(begin, high), end))]
        self._free = [(begin, end) for begin, end in parts if begin <= end]


def sample_id(row_id: str, window: int) -> str:
    """The row_id of a window in the latent shards: the first one's is its row's own."""
    return f"{row_id}+{window}" if window else row_id


def row_id_of(sample: str) -> str:
    """The row that a sample of the latent shards came of."""
    row_id, plus, window = sample.rpartition("+")
    return row_id if plus and window.isdecimal() else sample
