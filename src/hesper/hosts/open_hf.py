"""Hugging Face classifiers by name or folder: built from their config, with or without weights, and their preprocessing.

A run must open without network, so config and preprocessing travel with it, as text (the *blueprint*).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hesper.errors import JobError, UsageError
from hesper.hosts import open_host
from hesper.hosts.hf_vit import CLASSIFIERS, Logits
from hesper.hosts.refusal import refused
from hesper.hosts.weights import first_line, listed

CONFIG, PREPROCESSING = "config", "preprocessing"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
LOGGERS = ("transformers", "huggingface_hub")


def library() -> ModuleType:
    """The transformers package; UsageError names the extra that brings it."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError("Hugging Face models need the package transformers; install it with pip install 'hesper[hf]'.") from error
    return transformers


def pretrained(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A classifier as logits, and its preprocessing.

    Raises:
        UsageError: it is of no supported type, or its file lacks weights.
        JobError: it cannot be fetched or read.
    """
    config = _config(name)
    prepared = _preprocessing(name, config)
    with _quiet(), _fetching(name):
        # Half-precision files too are opened in full: their measured drift would otherwise be mostly rounding.
        options = {"dtype": torch.float32, "output_loading_info": True, **_where(name)}
        model, report = _class(config).from_pretrained(name, config=config, **options)
    lacking = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
    if lacking:
        raise UsageError(f"The weights of {name} lack {listed(lacking)}; give a model that was trained to classify.")
    return Logits(model, _size(prepared)), prepared


def untrained(name: str, state: Mapping[str, Tensor]) -> tuple[Logits, dict[str, Any]]:
    """The architecture of ``name`` for weights of ``state``, whose classifier says how many classes there are; its preprocessing."""
    config = _config(name)
    heads = [tensor for key, tensor in state.items() if key.endswith("classifier.weight") and tensor.ndim]
    if heads:
        config.num_labels = len(heads[0])
    prepared = _preprocessing(name, config)
    return Logits(_class(config)(config), _size(prepared)), prepared


def build(blueprint: Mapping[str, str], name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The untrained classifier of a blueprint, and its preprocessing; UsageError where the blueprint is not one."""
    transformers = library()
    try:
        prepared = json.loads(blueprint[PREPROCESSING])
        words = json.loads(blueprint[CONFIG])
        config = transformers.AutoConfig.for_model(words.pop("model_type"), **words)
        return Logits(_class(config)(config), _size(prepared)), prepared
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"The run does not say how {name} is built ({first_line(error)}); restore it or make the run again.") from error


def blueprint(module: Logits, prepared: Mapping[str, Any]) -> dict[str, str]:
    """What :func:`build` makes the same classifier from."""
    words = {**module.model.config.to_dict(), "architectures": [type(module.model).__name__]}
    return {CONFIG: json.dumps(words, sort_keys=True), PREPROCESSING: json.dumps(prepared, sort_keys=True)}


def default_preprocessing(module: Logits) -> dict[str, Any]:
    """The preprocessing of the model's kind, where none came with its weights."""
    return _default(module.model.config, module.image_size)


def _config(name: str) -> Any:
    transformers = library()
    with _quiet(), _fetching(name):
        config = transformers.AutoConfig.from_pretrained(name, **_where(name))
    with torch.device("meta"):
        # An unsupported model is refused before its weights are fetched.
        open_host(Logits(_class(config)(config)))
    return config


def _class(config: Any) -> Any:
    """The class its config names, if that is a supported one."""
    kind = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if kind not in CLASSIFIERS:
        raise refused(kind)
    return getattr(library(), kind)


def _preprocessing(name: str, config: Any) -> dict[str, Any]:
    """The image processor saved with the model; where there is none (not where it cannot be fetched), its kind's."""
    transformers = library()
    with _quiet(), _fetching(name):
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(name, **_where(name))
        except OSError:
            if _has_processor(name):
                raise
            return _default(config, _pair(config.image_size))
        return _words(processor, config)


def _has_processor(name: str) -> bool:
    import huggingface_hub  # transformers brings it

    if Path(name).is_dir():
        return any((Path(name) / file).is_file() for file in PROCESSORS)
    return any(huggingface_hub.file_exists(name, file) for file in PROCESSORS)


def _default(config: Any, size: tuple[int, int]) -> dict[str, Any]:
    """The image processor of the config's kind, for images of ``size``."""
    transformers = library()
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    # With registers or without, DINOv2 sees the same images; transformers lists only the latter.
    known = type(config) if type(config) in IMAGE_PROCESSOR_MAPPING else transformers.Dinov2Config
    kinds: Any = IMAGE_PROCESSOR_MAPPING[known]
    return {**_words(kinds["torchvision"](), config), "input_size": [3, *size]}


def _words(processor: Any, config: Any) -> dict[str, Any]:
    """An image processor in the words timm's transforms are made from."""
    resized, cropped = _sides(processor.size), None
    if getattr(processor, "do_center_crop", None):
        cropped = _sides(processor.crop_size)
    size = cropped or resized
    # Only DINOv2 interpolates its positions; the others take images of one size.
    if size is None or not str(config.model_type).startswith("dinov2"):
        size = _pair(config.image_size)
    short = getattr(processor.size, "shortest_edge", None) or (min(resized) if resized else min(size))
    unit = 255 * float(processor.rescale_factor) if processor.do_rescale else 255.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    keeps_ratio = getattr(processor.size, "shortest_edge", None) is not None
    return {
        "input_size": [3, *map(int, size)],
        "interpolation": {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(int(processor.resample), "bicubic"),
        "mean": [float(value) / unit for value in mean],
        "std": [float(value) / unit for value in std],
        # timm divides by this share and rounds down: a hair more keeps it from the next smaller size.
        "crop_pct": min(size) / (max(short, min(size)) + 1e-6) if processor.do_resize else 1.0,
        "crop_mode": "center" if keeps_ratio else "squash",
    }


def _sides(size: Any) -> tuple[int, int] | None:
    height, width = getattr(size, "height", None), getattr(size, "width", None)
    return None if height is None or width is None else (int(height), int(width))


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)


def _size(prepared: Mapping[str, Any]) -> tuple[int, int]:
    _, height, width = prepared["input_size"]
    return int(height), int(width)


def _where(name: str) -> dict[str, Any]:
    return {"local_files_only": True} if Path(name).is_dir() else {}


@contextlib.contextmanager
def _fetching(name: str) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # hub, network, disk and formats each raise their own kinds
        raise JobError(
            f"The model hf:{name} could not be read or fetched ({first_line(error)}); give a folder saved by save_pretrained."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own notes and progress bars: what matters is said in one sentence."""
    transformers = library()
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    bar = "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if not bar:
            transformers.utils.logging.enable_progress_bar()
