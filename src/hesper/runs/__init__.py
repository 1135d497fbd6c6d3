"""Runs: folders that hold a plan, its weights and the record of everything done with them."""

from hesper.runs.environment import environment
from hesper.runs.files import sha256_file, write_bytes, write_text
from hesper.runs.folder import MODEL, PLAN, RECORD, REPORT, RunFolder, new_folder, new_run, once_written, open_run, seal
from hesper.runs.record import Entry, append, read, utc_now

__all__ = [
    "MODEL",
    "PLAN",
    "RECORD",
    "REPORT",
    "Entry",
    "RunFolder",
    "append",
    "environment",
    "new_folder",
    "new_run",
    "once_written",
    "open_run",
    "read",
    "seal",
    "sha256_file",
    "utc_now",
    "write_bytes",
    "write_text",
]
