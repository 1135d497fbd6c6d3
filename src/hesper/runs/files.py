"""Files written whole or not at all, and their fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path

__all__ = ["sha256_file", "write_bytes", "write_text"]

_CHUNK = 1 << 20


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` atomically: a reader sees the old file or the new one; OSError leaves the old one."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync_folder(target.parent)


def write_text(path: str | Path, text: str) -> None:
    """``write_bytes`` for text, as UTF-8 with line ends as given."""
    write_bytes(path, text.encode("utf-8"))


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's content, 64 hex digits, read in pieces of 1 MiB."""
    total = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(_CHUNK):
            total.update(piece)
    return total.hexdigest()


def sync_folder(path: Path) -> None:
    """Make a rename inside ``path`` survive a power cut, where the system lets folders be synchronised."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
