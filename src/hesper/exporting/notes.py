"""What an exported file says about itself: enough to prepare images for it and to know which plan it carries out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hesper.errors import UsageError

__all__ = ["KEY", "Notes", "Precision"]

KEY = "hesper"
"""Under which name the notes lie in a file's own metadata."""

Precision = Literal["fp32", "fp16"]

SCHEMA = 1


@dataclass(frozen=True)
class Notes:
    """The notes of an exported file.

    ``plan`` is the plan's hash, None for a dense model; ``macs`` the mean multiply-accumulates of an image, as measured on real ones;
    ``adaptive`` says whether counts adapt to the image; ``largest_batch`` is 1, or None where any number of images goes;
    ``preprocessing`` is in the words of timm's ``create_transform``.
    """

    model: str
    plan: str | None
    precision: Precision
    macs: float
    macs_dense: float
    adaptive: bool
    largest_batch: int | None
    classes: int
    image_size: tuple[int, int]
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def loads(cls, text: str | None, where: object) -> Notes:
        """From what :meth:`dumps` gave; UsageError, naming ``where``, for anything else.

        Example:
            >>> scale = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
            >>> notes = Notes("vit_tiny_patch16_224", None, "fp32", 1e9, 1e9, False, None, 1000, (224, 224), scale)
            >>> Notes.loads(notes.dumps(), "vit.onnx").image_size
            (224, 224)
        """
        try:
            values = json.loads(text or "")
            if values["schema"] > SCHEMA:
                raise UsageError(f"{where} was exported by a newer hesper; upgrade hesper.")
            own = cls(**{**values, "image_size": tuple(values["image_size"])})
            if len(own.preprocessing["mean"]) != len(own.preprocessing["std"]) or own.largest_batch not in (1, None):
                raise ValueError("preprocessing without mean and std")
            return own
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{where} was not exported by hesper; make it with 'hesper export RUN --out FILE'.") from error
