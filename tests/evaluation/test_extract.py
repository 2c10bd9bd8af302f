"""Features in source order, whatever the batch or the threads; unreadable images named; files that come back."""

import json
import warnings

import pytest
import torch

from dinov3_train.data.sources import open_source
from dinov3_train.evaluation.extract import Extracted, extract, load_features, save_features
from dinov3_train.evaluation.knn import evaluate_knn
from dinov3_train.evaluation.view import View

VIEW = View(size=16)


def expected_cls(source, numbers) -> torch.Tensor:
    return torch.stack([VIEW.normalized(VIEW.pixels(source.image(n))).mean(dim=(1, 2)) for n in numbers])


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (4, 3), (64, 2)])
def test_one_row_per_image_in_order(batch_size, workers, mean_colour, memory_source):
    source = memory_source(11, unlabelled=(4,))
    result = extract(mean_colour(), source, VIEW, batch_size=batch_size, workers=workers)
    torch.testing.assert_close(result.features, expected_cls(source, range(11)))
    assert result.labels.tolist() == [-1 if n == 4 else n % 2 for n in range(11)]
    assert result.names == tuple(source.name(n) for n in range(11))
    assert result.classes == ("dark", "bright")
    assert result.settings["size"] == 16
    assert result.settings["pooling"] == "cls"
    assert result.unreadable == ()


def test_poolings(mean_colour, memory_source):
    source = memory_source(5)
    kinds = {
        kind: extract(mean_colour(), source, VIEW, pooling=kind).features for kind in ("cls", "patch_mean", "cls+patch")
    }
    # 8 px patches tile 16 px: the mean of the patch means is the mean of the image.
    torch.testing.assert_close(kinds["patch_mean"], kinds["cls"])
    assert torch.equal(kinds["cls+patch"], torch.cat([kinds["cls"], kinds["patch_mean"]], dim=1))


def test_mode_gradients_and_progress(mean_colour, memory_source):
    backbone, seen = mean_colour().train(), []
    result = extract(
        backbone, memory_source(7), VIEW, batch_size=3, progress=lambda done, total: seen.append((done, total))
    )
    assert backbone.training
    assert backbone.modes == [False] * 3
    assert not result.features.requires_grad
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_bf16_is_close_and_kept_as_fp32(mean_colour, memory_source):
    source = memory_source(4)
    result = extract(mean_colour(), source, VIEW, precision="bf16")
    assert result.features.dtype == torch.float32
    torch.testing.assert_close(result.features, expected_cls(source, range(4)), rtol=2**-7, atol=2**-7)


def test_unreadable_images_are_left_out_and_named(mean_colour, memory_source):
    source = memory_source(9, damaged=(2, 3, 8))
    with pytest.warns(UserWarning, match="3 of 9 images are unreadable and left out: dark/2.png"):
        result = extract(mean_colour(), source, VIEW, batch_size=2)  # the second batch has no readable image
    assert result.names == tuple(source.name(n) for n in (0, 1, 4, 5, 6, 7))
    assert result.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert len(result.unreadable) == 3
    torch.testing.assert_close(result.features, expected_cls(source, (0, 1, 4, 5, 6, 7)))


def test_a_file_that_is_gone_is_named(tmp_path, mean_colour, memory_source):
    for number in range(3):
        path = tmp_path / memory_source(3).name(number)
        path.parent.mkdir(exist_ok=True)
        memory_source(3).image(number).save(path)
    source = open_source(tmp_path)
    (tmp_path / "dark" / "2.png").unlink()
    with pytest.warns(UserWarning, match=r"1 of 3 .*2\.png: No such file"):
        result = extract(mean_colour(), source, VIEW)
    assert result.classes == ("bright", "dark")
    assert result.labels.tolist() == [0, 1]


def test_refusals(mean_colour, memory_source):
    with pytest.raises(ValueError, match="pooling expects one of cls, patch_mean, cls.patch, got 'mean'"):
        extract(mean_colour(), memory_source(2), VIEW, pooling="mean")
    with pytest.raises(ValueError, match="precision expects one of fp32, bf16, got 'fp16'"):
        extract(mean_colour(), memory_source(2), VIEW, precision="fp16")
    with pytest.raises(ValueError, match="batch_size expects at least 1, got 0"):
        extract(mean_colour(), memory_source(2), VIEW, batch_size=0)
    with pytest.raises(ValueError, match="at least one readable image, got 0 entries"):
        extract(mean_colour(), memory_source(0), VIEW)
    with pytest.raises(ValueError, match="got 2 entries and none; first: dark/0.png"):
        extract(mean_colour(), memory_source(2, damaged=(0, 1)), VIEW)
    with pytest.raises(ValueError, match="expected features"):
        Extracted(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), ("a", "b", "c"))


@pytest.mark.parametrize("suffix", [".safetensors", ".npy"])
def test_files_come_back(tmp_path, suffix, mean_colour, memory_source):
    with pytest.warns(UserWarning, match="1 of 6"):
        result = extract(mean_colour(), memory_source(6, damaged=(1,), unlabelled=(2,)), VIEW)
    path = save_features(result, tmp_path / "new" / f"features{suffix}")
    again = load_features(path)
    assert torch.equal(again.features, result.features)
    assert torch.equal(again.labels, result.labels)
    assert (again.names, again.classes, again.unreadable) == (result.names, result.classes, result.unreadable)
    assert again.settings == json.loads(json.dumps(result.settings))
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.name + ".json"]


def test_loaded_features_compare_with_fresh_ones(tmp_path, mean_colour, memory_source):
    train = load_features(save_features(extract(mean_colour(), memory_source(8), VIEW), tmp_path / "train.npy"))
    assert evaluate_knn(train, extract(mean_colour(), memory_source(6), VIEW), k=[1]).at(1).accuracy == 1.0


def test_file_refusals(tmp_path, mean_colour, memory_source):
    result = extract(mean_colour(), memory_source(2), VIEW)
    with pytest.raises(ValueError, match=r"suffix of .safetensors or .npy, got .*features.csv"):
        save_features(result, tmp_path / "features.csv")
    with pytest.raises(ValueError, match="gone.npy does not exist"):
        load_features(tmp_path / "gone.npy")
    path = save_features(result, tmp_path / "features.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="was not written by save_features"):
        load_features(path)


def test_no_warning_without_a_reason(mean_colour, memory_source):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(mean_colour(), memory_source(3), VIEW)
