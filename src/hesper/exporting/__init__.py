"""Export: a cut model as one graph, in a file that other runtimes execute, checked against PyTorch on real images."""

from hesper.exporting.formats import FORMATS, Runner, format_of
from hesper.exporting.notes import Notes
from hesper.exporting.parity import Parity
from hesper.exporting.run import Exported, export

__all__ = ["FORMATS", "Exported", "Notes", "Parity", "Runner", "export", "format_of"]
