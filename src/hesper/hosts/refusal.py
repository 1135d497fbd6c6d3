"""Why a model's type is not supported, in words."""

from __future__ import annotations

from hesper.errors import UsageError

WINDOWS = "its attention runs within windows of a regular grid, which tokens that leave would break"
STAGES = "it pools its grid of tokens between stages, so every token must stay in its place"
BIAS = "its attention adds a bias for every pair of places, which merged tokens do not have"
CONVOLUTIONS = "it mixes neighbouring tokens by convolutions, which need the whole grid"
NO_CLASSIFIER = "it gives features and no class scores; use its ...ForImageClassification"
NO_ATTENTION = "it has no attention whose tokens could leave"
UNKNOWN = "its parts are not known to compose"

# Beginnings of type names: the families' variants differ only in how they end.
REASONS = {
    "Swin": WINDOWS,
    "MaxxVit": WINDOWS,
    "VitDet": WINDOWS,
    "VisionTransformerSAM": WINDOWS,
    "GlobalContextVit": WINDOWS,
    "Nest": WINDOWS,
    "Twins": WINDOWS,
    "DaVit": WINDOWS,
    "VOLO": WINDOWS,
    "Hiera": STAGES,
    "MultiScaleVit": STAGES,
    "PoolingVisionTransformer": STAGES,
    "PyramidVisionTransformer": STAGES,
    "Pvt": STAGES,
    "Segformer": STAGES,
    "Levit": STAGES,
    "Beit": BIAS,
    "Data2VecVision": BIAS,
    "VisionTransformerRelPos": BIAS,
    "ConVit": BIAS,
    "CoaT": CONVOLUTIONS,
    "Cvt": CONVOLUTIONS,
    "EfficientFormer": CONVOLUTIONS,
    "MobileViT": CONVOLUTIONS,
    "Xcit": "its attention runs between channels, so there are no attention weights of tokens",
    "Cait": "its class token enters only the last blocks",
    "CrossVit": "it runs two streams of tokens that exchange class tokens",
    "ViTModel": NO_CLASSIFIER,
    "DeiTModel": NO_CLASSIFIER,
    "Dinov2Model": NO_CLASSIFIER,
    "Dinov2WithRegistersModel": NO_CLASSIFIER,
    "CLIPVisionModel": NO_CLASSIFIER,
    "ResNet": NO_ATTENTION,
    "ConvNext": NO_ATTENTION,
    "EfficientNet": NO_ATTENTION,
    "MobileNet": NO_ATTENTION,
    "MlpMixer": NO_ATTENTION,
}


def reason_for(name: str) -> str:
    """Why a model of the type called ``name`` is refused.

    >>> reason_for("SwinTransformerV2")
    'its attention runs within windows of a regular grid, which tokens that leave would break'
    """
    found = [beginning for beginning in REASONS if name.startswith(beginning)]
    return REASONS[max(found, key=len)] if found else UNKNOWN


def refused(name: str) -> UsageError:
    """The error that refuses a model of the type called ``name``."""
    return UsageError(
        f"A model of type {name} is not supported, since {reason_for(name)}; use one of timm's VisionTransformer or Eva models, or "
        "Hugging Face's ViT, DeiT or Dinov2 for image classification."
    )
