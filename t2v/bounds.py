"""What a value of the configuration may be; what may not is a ValueError of one line: the key, what it is, why not."""

import math


def at_least(least: float, config: object, *names: str) -> None:
    """Every named field is `least` or more, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name}: {value} is {f'below {least}' if value < least else 'not a number'}")


def above_zero(config: object, *names: str) -> None:
    """Every named field is more than 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}: {getattr(config, name)} is not above 0")


def finite(config: object, *names: str) -> None:
    """Every named field is neither infinite nor NaN."""
    for name in names:
        if not math.isfinite(getattr(config, name)):
            raise ValueError(f"{name}: {getattr(config, name)} is not a finite number")


def fraction(config: object, *names: str) -> None:
    """Every named field, or every part of one that is a tuple, is in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not all(0 <= part < 1 for part in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name}: {value} is not in [0, 1)")
