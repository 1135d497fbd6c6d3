"""Opening by name, and runs of every library: made, opened again without network, evaluated."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from torchvision import transforms

import hesper
from cli_helpers import QUICK, write_images
from cli_helpers import hesper as command
from families import HF, family, logits_of
from hesper.errors import JobError, UsageError
from hesper.hosts.open import check_rebuildable, open_model, rebuild, wrap
from hesper.plan import Budget

SETTINGS = hesper.Settings(Budget("macs", 0.9, 0.9), rank=4)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "calib", 8)


def saved(folder: Path, kind: str, **processor: Any) -> Path:
    model: Any = family(kind)
    model.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
}
CROPPER = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 53},
    "do_center_crop": True,
    "crop_size": {"height": 40, "width": 40},
    "resample": 3,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((150, 90), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", HF)
@torch.no_grad()
def test_a_saved_classifier_opens_as_itself(kind: str, tmp_path: Path) -> None:
    opened = open_model(f"hf:{saved(tmp_path, kind)}")
    x = torch.randn(2, 3, *opened.ref.anatomy.image_size)
    assert opened.ref.library == "hf" and opened.ref.name == str(tmp_path) and not opened.host.module.training
    assert torch.equal(opened.host.module(x), logits_of(family(kind), x))


def test_a_file_in_half_precision_opens_in_full(tmp_path: Path) -> None:
    model: Any = family("hf_vit")
    model.half().save_pretrained(tmp_path)
    assert {t.dtype for t in open_model(f"hf:{tmp_path}").host.module.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(("kind", "words", "size"), [("hf_vit", PROCESSOR, 32), ("hf_dinov2", CROPPER, 40)])
def test_preprocessing_is_what_the_image_processor_says(kind: str, words: dict[str, Any], size: int, tmp_path: Path) -> None:
    opened = open_model(f"hf:{saved(tmp_path, kind, **words)}")
    ours = opened.transform(picture())
    assert opened.ref.anatomy.image_size == (size, size) and opened.ref.anatomy.grid == (size // 8, size // 8)
    assert opened.mean == pytest.approx(words["image_mean"]) and opened.std == pytest.approx(words["image_std"])
    edge = (32, 32) if kind == "hf_vit" else 53
    steps: list[Any] = [
        transforms.Resize(edge, transforms.InterpolationMode.BILINEAR if kind == "hf_vit" else transforms.InterpolationMode.BICUBIC)
    ]
    steps += [transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(words["image_mean"], words["image_std"])]
    torch.testing.assert_close(ours, transforms.Compose(steps)(picture()))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(picture(), return_tensors="pt")["pixel_values"][0]
    # Their resizing works on tensors and ours on pictures: pixels may round apart.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)


def test_without_an_image_processor_the_kinds_own_is_taken(tmp_path: Path) -> None:
    opened = open_model(f"hf:{saved(tmp_path, 'hf_vit')}")
    assert opened.mean == opened.std == (0.5, 0.5, 0.5)
    assert opened.transform(picture()).shape == (3, 32, 32)


def test_an_image_processor_that_cannot_be_read_is_not_replaced_by_another(tmp_path: Path) -> None:
    (saved(tmp_path, "hf_vit") / "preprocessor_config.json").write_text("{ torn")
    with pytest.raises(JobError, match="could not be read"):
        open_model(f"hf:{tmp_path}")


def test_a_file_of_weights_brings_its_number_of_classes(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "hf_dinov2")
    state = dict(family("hf_dinov2").state_dict())
    state |= {"classifier.weight": torch.ones(7, 48), "classifier.bias": torch.ones(7)}
    safetensors.torch.save_file(state, tmp_path / "seven.safetensors")
    opened = open_model(f"hf:{folder}", weights=tmp_path / "seven.safetensors")
    assert opened.ref.anatomy.classes == 7 and bool((opened.host.module.model.classifier.weight == 1).all())


def tiny(name: str, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 3}
    return timm.create_model(name, **{**shape, **options})


@pytest.fixture(
    params=[
        "deit_tiny_distilled_patch16_224",
        "vit_pe_core_tiny_patch16_384",
        "vit_xsmall_patch16_clip_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_rope_mixed_224",
        "hf:hf_vit",
        "hf:hf_deit_teacher",
        "hf:hf_dinov2_registers",
    ]
)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    name = request.param
    if name.startswith("hf:"):
        return open_model(f"hf:{saved(tmp_path / 'model', name.removeprefix('hf:'))}")
    return wrap(name, tiny(name))


@torch.no_grad()
def test_a_run_opens_again_as_what_was_pruned(opened: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_rebuildable(opened)
    run = hesper.prune(opened, calib=images, out=tmp_path / "run", settings=SETTINGS)
    shutil.rmtree(tmp_path / "model", ignore_errors=True)  # a run needs no other place
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    cut, x = hesper.load(run.path), torch.randn(2, 3, 32, 32)
    assert run.plan.tokens and cut.run(x).logits.shape == (2, opened.ref.anatomy.classes)
    found = hesper.evaluate(run.path, data=images, labelled=False)
    first = hesper.load(run.path)
    assert torch.equal(first(x), cut(x)) and 0 < found.macs.mean() < cut.dense_macs
    with safe_open(run.path / "model.safetensors", framework="pt") as file:
        module, _ = rebuild(run.plan.model, file.metadata() or {})
    assert module.state_dict().keys() == opened.host.module.state_dict().keys()


def test_the_command_line_takes_hf_names(images: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "hf_vit")
    result = command("prune", f"hf:{folder}", "--calib", images, "--macs", 0.9, "--out", tmp_path / "run", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert command("show", tmp_path / "run").exit_code == 0
    assert command("report", tmp_path / "run", "--out", tmp_path / "report.html").exit_code == 0
    shown = command("eval", f"hf:{folder}", "--data", images, "--no-labels", "--json")
    assert shown.exit_code == 0 and json.loads(shown.stdout)["agreement"] == 1


def test_what_hugging_face_cannot_give_is_one_sentence(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        JobError, match=r"^The model hf:some/where could not be read or fetched \(.*\); give a folder saved by save_pretrained"
    ):
        open_model("hf:some/where")
    result = command("eval", "hf:some/where", "--data", images)
    assert result.exit_code == 1 and result.stdout == "" and len(result.stderr.strip().splitlines()) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(JobError, match="could not be read"):
        open_model(f"hf:{tmp_path / 'empty'}")


def test_other_classes_and_lacking_weights_are_refused(tmp_path: Path) -> None:
    swin = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], architectures=["SwinForImageClassification"]
    )
    swin.save_pretrained(tmp_path / "swin")
    with pytest.raises(UsageError, match="type SwinForImageClassification is not supported, since its attention runs within windows"):
        open_model(f"hf:{tmp_path / 'swin'}")
    bare: Any = family("hf_vit")
    bare.vit.save_pretrained(tmp_path / "bare")
    with pytest.raises(UsageError, match="ViTModel is not supported, since it gives features and no class scores"):
        open_model(f"hf:{tmp_path / 'bare'}")
    config = json.loads((tmp_path / "bare" / "config.json").read_text()) | {"architectures": ["ViTForImageClassification"]}
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"lack classifier\.bias, classifier\.weight"):
        open_model(f"hf:{tmp_path / 'bare'}")


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match=r"need the package transformers; install it with pip install 'hesper\[hf\]'"):
        open_model("hf:anything")


def test_a_model_that_its_library_would_build_otherwise_is_refused() -> None:
    model: Any = family("hf_vit")
    opened = wrap("mine", model)
    model.vit.layers[0].mlp.fc1.bias = None
    with pytest.raises(UsageError, match=r"transformers's mine is not built like the model given \(.*fc1\.bias"):
        check_rebuildable(opened)
    check_rebuildable(wrap("test_vit", timm.create_model("test_vit", num_classes=3, drop_path_rate=0.1)))
    with pytest.raises(UsageError, match=r"timm's test_vit is not built like the model given \(blocks\.0\.mlp\.act"):
        check_rebuildable(wrap("test_vit", timm.create_model("test_vit", num_classes=3, act_layer=torch.nn.SiLU)))
