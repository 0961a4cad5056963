"""Default ports."""

from __future__ import annotations

from typing import Final

RENDEZVOUS: Final = 29400  # of the rendezvous store
