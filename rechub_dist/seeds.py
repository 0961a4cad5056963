"""Seeds of torch generators that are derived from names and counters instead of being drawn."""

from __future__ import annotations

import hashlib


def seed_from(text: str) -> int:
    """A 56-bit seed, the same for the same text in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
