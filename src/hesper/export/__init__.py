"""Export: a cut model as one graph, in a file that other runtimes execute, checked against PyTorch on real images."""

from hesper.export.formats import FORMATS, Runner, format_of
from hesper.export.notes import Notes
from hesper.export.parity import Parity
from hesper.export.run import Exported, export

__all__ = ["FORMATS", "Exported", "Notes", "Parity", "Runner", "export", "format_of"]
