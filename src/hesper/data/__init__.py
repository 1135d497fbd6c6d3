"""Images from folders, tar shards and Hugging Face data sets: in a fixed order, hashed, decoded lazily, the unreadable ones named."""

from hesper.data.folder import class_folders, open_folder
from hesper.data.images import (
    ImageSet,
    LoadedBatch,
    Skipped,
    Source,
    Transform,
    check_labels,
    read_class_map,
    require_readable,
    split,
)
from hesper.data.loading import Batches, batches
from hesper.data.places import open_images

__all__ = [
    "Batches",
    "ImageSet",
    "LoadedBatch",
    "Skipped",
    "Source",
    "Transform",
    "batches",
    "check_labels",
    "class_folders",
    "open_folder",
    "open_images",
    "read_class_map",
    "require_readable",
    "split",
]
