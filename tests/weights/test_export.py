"""Every form of export comes back the same through its own library, and a wrong one leaves nothing behind."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from small_backbones import MEAN, STD, largest_difference

from dinov3_train.models.vit import Features
from dinov3_train.weights import export as exporting
from dinov3_train.weights import licences, resolve
from dinov3_train.weights.export import export
from dinov3_train.weights.formats import official_keys

NEEDS = {"hf": "transformers", "timm": "timm", "onnx": "onnxruntime", "meta": "torch", "safetensors": "safetensors"}
SUFFIX = {"hf": "", "timm": "", "onnx": ".onnx", "meta": ".pth", "safetensors": ".safetensors"}
EXACT = 1e-4  # of a standard deviation near 1: two libraries' fp32 roundings over two blocks; a wrong table gives 0.1


@pytest.mark.parametrize("kind", ["vit", "swiglu", "convnext"])
@pytest.mark.parametrize("to", ["hf", "timm", "meta", "safetensors"])
def test_round_trip(small, tmp_path, to, kind):
    pytest.importorskip(NEEDS[to])
    found, out = small(kind), tmp_path / f"model{SUFFIX[to]}"
    done = export(found, to, out)
    assert done.path == out
    assert done.difference < EXACT * done.deviation
    assert done.deviation > 0.3
    back = resolve(out)
    assert largest_difference(back.backbone, found.backbone) == 0.0
    assert (back.mean, back.std, back.size, back.licence) == (MEAN, STD, 64, "a test's own")
    assert back.architecture == found.architecture
    assert "a test" in back.origin
    note = out / "LICENSE.txt" if out.is_dir() else out.with_name(out.name + ".license.txt")
    assert "Licence of these weights: a test's own" in note.read_text()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["vit", pytest.param("convnext", marks=pytest.mark.slow)])
def test_onnx_at_any_number_and_size_of_images(small, tmp_path, kind):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    import onnxruntime

    found, out = small(kind), tmp_path / "model.onnx"
    done = export(found, "onnx", out)
    assert done.difference < EXACT * done.deviation
    assert len(set(done.sizes)) == 2
    session = onnxruntime.InferenceSession(str(out))
    for count, height, width in ((3, 32, 32), (1, 96, 64)):
        images = torch.randn(count, 3, height, width)
        cls, _, patches = session.run(["cls", "registers", "patches"], {"images": images.numpy()})
        expected = found.backbone.features(images)
        torch.testing.assert_close(torch.from_numpy(cls), expected.cls, rtol=0, atol=EXACT)
        torch.testing.assert_close(torch.from_numpy(patches), expected.patches, rtol=0, atol=EXACT)
    assert session.get_modelmeta().custom_metadata_map["licence"] == "a test's own"
    assert json.loads((tmp_path / "model.onnx.json").read_text())["mean"] == list(MEAN)


def test_biases_make_a_qkvb_model_of_timm_and_none_the_released_one(small, tmp_path):
    timm = pytest.importorskip("timm")
    found = small()
    export(found, "timm", tmp_path / "with")
    for block in found.backbone.blocks:
        block.attn.qkv.bias.zero_()
    export(found, "timm", tmp_path / "without")
    names = [json.loads((tmp_path / name / "config.json").read_text())["architecture"] for name in ("with", "without")]
    assert names == ["vit_small_patch16_dinov3_qkvb", "vit_small_patch16_dinov3"]
    model = timm.create_model(f"local-dir:{tmp_path / 'with'}", pretrained=True, num_classes=0)
    assert tuple(model.pretrained_cfg["mean"]) == MEAN


def test_meta_has_the_keys_of_released_files(small, tmp_path):
    found = small(untie_local_cls_norm=True)
    export(found, "meta", tmp_path / "x.pth")
    keys = set(torch.load(tmp_path / "x.pth"))
    assert keys == official_keys(found.architecture)
    assert {"rope_embed.periods", "blocks.1.attn.qkv.bias_mask", "local_cls_norm.weight", "storage_tokens"} < keys


def test_heads_go_with_our_own_file_only(small, tmp_path):
    found = small(heads=True)
    done = export(found, "safetensors", tmp_path / "x.safetensors", heads=True)
    back = resolve(done.path)
    for name, head in found.heads.items():
        assert back.heads[name].head == head.head
        assert all(torch.equal(v, back.heads[name].state_dict()[key]) for key, v in head.state_dict().items())
    without = export(found, "safetensors", tmp_path / "y.safetensors")
    assert "projection heads" in without.lost
    assert resolve(without.path).heads is None
    assert not any("head" in key for key in load_file(without.path))
    with pytest.raises(ValueError, match="heads=true goes with to=safetensors only"):
        export(found, "meta", tmp_path / "x.pth", heads=True)
    with pytest.raises(ValueError, match="a test has no heads"):
        export(small(), "safetensors", tmp_path / "z.safetensors", heads=True)


def test_the_licence_of_released_weights_goes_along(small, official, tmp_path):
    pytest.importorskip("transformers")
    export(resolve(official), "hf", tmp_path / "model")
    assert "license_name: dinov3-license" in (tmp_path / "model" / "README.md").read_text()
    assert licences.DINOV3 in (tmp_path / "model" / "LICENSE.txt").read_text()
    assert resolve(tmp_path / "model").licence == licences.DINOV3


def test_features_that_differ_leave_nothing_behind(small, tmp_path, monkeypatch):
    found = small()
    for spoilt in (lambda t: t + 0.01, lambda t: t * float("nan"), lambda t: t[..., :-1]):

        def see(images, spoilt=spoilt):
            right = found.backbone.features(images)
            return Features(right.cls, right.registers, spoilt(right.patches), right.grid)

        form = exporting.Format("x", ".pth", exporting.FORMATS["meta"].write, lambda *_, see=see: see)
        monkeypatch.setitem(exporting.FORMATS, "meta", form)
        with pytest.raises(ValueError, match="read back.*nothing was written"):
            export(found, "meta", tmp_path / "x.pth")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        ("coreml", "x", "to expects one of hf, timm, meta, safetensors, onnx, got 'coreml'"),
        ("onnx", "x.pth", "ends in .onnx for onnx"),
        ("hf", "x.onnx", "expects a folder for hf"),
        ("meta", "there.pth", "exists; expected a new path"),
    ],
)
def test_wrong_words(small, tmp_path, to, name, message):
    (tmp_path / "there.pth").write_text("mine")
    with pytest.raises(ValueError, match=message):
        export(small(), to, tmp_path / name)
    assert (tmp_path / "there.pth").read_text() == "mine"


def test_what_a_form_cannot_hold_is_said(small, tmp_path):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="norms with eps 1e-5"):
        export(small(norm_eps=1e-6), "timm", tmp_path / "x")
    done = export(small(untie_local_cls_norm=True), "timm", tmp_path / "x")
    assert done.lost == ("the norm of local crops (training only)", "the mask token (training only)")
    biased = small(mask_k_bias=False)
    biased.backbone.blocks[0].attn.qkv.bias.fill_(1.0)
    with pytest.raises(ValueError, match="the K third of blocks.0.attn.qkv.bias is not zero"):
        export(biased, "hf", tmp_path / "y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


def test_the_suffix_says_the_format_and_nothing_says_none(tmp_path):
    from dinov3_train.commands_export import export_weights

    small = {"backbone": "nowhere", "step": None, "heads": False}
    with pytest.raises(
        ValueError, match=r"export: expected to=hf, timm, meta, safetensors or onnx for out=.*model, got"
    ):
        export_weights(**small, to=None, out=tmp_path / "model")
    with pytest.raises(ValueError, match="nowhere"):  # the format is known: what is missing is the backbone
        export_weights(**small, to=None, out=tmp_path / "model.safetensors")
