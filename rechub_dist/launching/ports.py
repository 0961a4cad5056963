"""Ports that are known beforehand."""

from __future__ import annotations

from typing import Final

RENDEZVOUS: Final = 29400  # where hosts meet, unless another port is given
