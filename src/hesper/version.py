"""Which Hesper this is: stands in every plan and record."""

from __future__ import annotations

__version__ = "0.1.0"
