"""The command line: each verb reads files, calls one function and writes files.

Nothing here imports torch before a verb needs it, so that help and ``hesper show`` answer at once.
"""

from hesper.cli.group import main

__all__ = ["main"]
