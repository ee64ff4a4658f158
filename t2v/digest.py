"""Names made of values: whatever follows from equal values has the same name, in every process and on every day."""

import hashlib
import json
from typing import Any


def digest_of(value: Any, digits: int = 16) -> str:
    """Hex digits (an even number of them) that stand for a value, by its JSON with sorted keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=digits // 2).hexdigest()
