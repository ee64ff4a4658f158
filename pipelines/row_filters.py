"""Which rows of a manifest are worth no download: rules over whole columns; the first that refuses a row names it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import RowFilters
from pipelines.ledger import Status


class Rule(NamedTuple):
    """A filter that is on: `refuses(value, bound)` is true for rows that end with `status`, null or false for others.

    `option` is its name in the configuration; `wants` the columns of the normalised manifest that `value` reads.
    """

    option: str
    status: Status
    wants: tuple[str, ...]
    value: Callable[..., pa.Array]
    refuses: Callable[[pa.Array, Any], pa.Array]
    text: str  # of the message: value, then this, then the bound


def rules(filters: RowFilters) -> list[Rule]:
    """The filters that are on."""
    sides = ("width", "height")
    every = [
        Rule("min_side", "filtered_size", sides, _short_side, pc.less, "is the short side, below"),
        Rule("max_aspect", "filtered_aspect", sides, _aspect, pc.greater, "is the aspect ratio, above"),
        Rule("max_punsafe", "filtered_unsafe", ("punsafe",), _itself, pc.greater, "is punsafe, above"),
        Rule("refuse_nsfw", "filtered_unsafe", ("nsfw",), _itself, _is_among, "is the NSFW label, one of"),
        Rule("min_similarity", "filtered_similarity", ("similarity",), _itself, pc.less, "is the similarity, below"),
        Rule("max_watermark", "filtered_watermark", ("watermark",), _itself, pc.greater, "is the watermark's, above"),
        Rule("min_aesthetic", "filtered_aesthetic", ("aesthetic",), _itself, pc.less, "is the aesthetic score, below"),
        Rule("languages", "filtered_language", ("language",), _itself, _is_not_among, "is the language, none of"),
        Rule("min_duration_s", "filtered_duration", ("duration_s",), _itself, pc.less, "s long, below"),
        Rule("max_duration_s", "filtered_duration", ("duration_s",), _itself, pc.greater, "s long, above"),
    ]
    return [rule for rule in every if getattr(filters, rule.option) not in (None, [])]


def verdicts(batch: pa.RecordBatch, filters: RowFilters) -> tuple[pa.Array, pa.Array]:
    """Status and message of each row of a normalised batch; null for those that no filter refuses."""
    status = message = pa.nulls(batch.num_rows, pa.string())
    for rule in rules(filters):
        bound = getattr(filters, rule.option)
        value = rule.value(*(batch.column(name) for name in rule.wants))
        typed = bound if isinstance(bound, list) else pa.scalar(bound, value.type)  # 0.1 as the column has it
        new = pc.and_(pc.fill_null(rule.refuses(value, typed), False), pc.is_null(status))
        limit = ", ".join(bound) if isinstance(bound, list) else f"{bound:g}"
        words = pc.binary_join_element_wise(value.cast(pa.string()), f"{rule.text} {limit}", " ")
        status, message = pc.if_else(new, rule.status, status), pc.if_else(new, words, message)
    return status, message


def _itself(value: pa.Array) -> pa.Array:
    return value


def _short_side(width: pa.Array, height: pa.Array) -> pa.Array:
    return pc.min_element_wise(width, height, skip_nulls=False)


def _aspect(width: pa.Array, height: pa.Array) -> pa.Array:
    long = pc.max_element_wise(width, height, skip_nulls=False).cast(pa.float32(), safe=False)
    return pc.divide(long, _short_side(width, height).cast(pa.float32(), safe=False))


def _is_among(value: pa.Array, labels: list[str]) -> pa.Array:
    return pc.is_in(pc.utf8_lower(value), pa.array([label.lower() for label in labels], pa.string()))


def _is_not_among(value: pa.Array, labels: list[str]) -> pa.Array:
    return pc.and_(pc.is_valid(value), pc.invert(_is_among(value, labels)))
