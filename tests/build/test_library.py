"""Where the native library is found: beside the package, else installed; stale or missing ones are named."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dinov3_ext
from dinov3_ext import _library, _paths
from dinov3_ext._digest import source_digest

METADATA = "Metadata-Version: 2.1\nName: dinov3-ext\nVersion: 0.1.0\n"
ROOT = Path(__file__).resolve().parents[2]


def python(code: str, folder: Path, path: Path) -> subprocess.CompletedProcess:
    """Runs `code` in `folder` with only `path` before the environment's own packages."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def sources_only(tmp_path: Path) -> Path:
    """A checkout in which nothing has been built."""
    package = tmp_path / "dinov3_ext"
    for file in (ROOT / "dinov3_ext").rglob("*.py"):
        copy = package / file.relative_to(ROOT / "dinov3_ext")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return tmp_path


def installed_elsewhere(folder: Path) -> Path:
    """What an installer leaves behind in a site-packages folder: metadata and the library."""
    site = folder / "site"
    (site / "dinov3_ext").mkdir(parents=True)
    library = Path(_library.module.__file__)
    (site / "dinov3_ext" / library.name).symlink_to(library)
    (site / "dinov3_ext-0.1.0.dist-info").mkdir()
    (site / "dinov3_ext-0.1.0.dist-info" / "METADATA").write_text(METADATA)
    return site


def test_the_library_is_there_and_fresh() -> None:
    info = dinov3_ext.build_info()
    assert info["problem"] == ""
    assert not info["stale"], f"stale library {info['library']}: build again with `pip install .`"
    assert Path(info["library"]).is_file()


def test_sources_do_not_hide_the_installed_library(sources_only: Path) -> None:
    site = installed_elsewhere(sources_only / "elsewhere")
    code = "import dinov3_ext; print(dinov3_ext.__file__); print(dinov3_ext.build_info()['library'])"
    done = python(code, sources_only, site)
    assert done.returncode == 0, done.stderr
    package, library = done.stdout.split()
    assert Path(package).parent == sources_only / "dinov3_ext"
    assert Path(library).parent == site / "dinov3_ext"


def test_metadata_without_a_library_is_passed_over(sources_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The egg-info that a build leaves in the repository names the distribution too, but holds no library."""
    bare = sources_only / "dinov3_ext.egg-info"
    bare.mkdir()
    (bare / "PKG-INFO").write_text(METADATA)
    site = installed_elsewhere(sources_only / "elsewhere")
    monkeypatch.setattr(_library, "FOLDER", sources_only / "dinov3_ext")
    monkeypatch.setattr(sys, "path", [str(sources_only), str(site), *sys.path])
    assert _library.find().parent == site / "dinov3_ext"


def test_without_a_library_import_works_and_the_op_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "module", None)
    monkeypatch.setattr(_library, "problem", "no native library")
    with pytest.raises(ImportError, match=r"sinkhorn_knopp: no native library; .*use\(\"reference\"\)"):
        dinov3_ext.sinkhorn_knopp(torch.zeros(2, 3), temperature=1.0)
    assert dinov3_ext.explain("sinkhorn_knopp").path == "missing"
    assert dinov3_ext.build_info() == {
        "library": None,
        "problem": "no native library",
        "torch": torch.__version__,
        "cuda": None,
    }
    with dinov3_ext.use("reference"):
        dinov3_ext.sinkhorn_knopp(torch.zeros(2, 3), temperature=1.0)
    dinov3_ext.sinkhorn_knopp(torch.zeros(2, 3, dtype=torch.float64), temperature=1.0)


def test_a_stale_library_is_named(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.h").write_text("// one")
    assert source_digest(tmp_path) == ""  # no CMakeLists.txt: not a checkout
    (tmp_path / "CMakeLists.txt").write_text("# build")
    digest = source_digest(tmp_path)
    assert len(digest) == 16
    assert _library.stale_text(digest, tmp_path, Path("lib.so")) == ""
    (tmp_path / "csrc" / "a.h").write_text("// two")
    text = _library.stale_text(digest, tmp_path, Path("lib.so"))
    assert "stale native library lib.so" in text
    assert digest in text
    assert "pip install ." in text
    assert _library.stale_text(digest, tmp_path / "csrc", Path("lib.so")) == ""  # installed: no sources beside it


def test_the_emulator_is_refused_and_unknown_names_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paths, "_libraries", [_paths.NATIVE])  # as if no other test had loaded the emulator
    with pytest.raises(RuntimeError, match="emulator"), dinov3_ext.use("emulator"):
        pass
    with pytest.raises(ValueError, match='"reference" or "emulator"; got \'eager\''), dinov3_ext.use("eager"):
        pass
    with pytest.raises(ValueError, match="op must be one of assignment_cross_entropy, gram_loss"):
        dinov3_ext.explain("koleo")
    with pytest.raises(ValueError, match="set_cpu_variant: name must be one that this CPU runs"):
        _library.module.set_cpu_variant("avx1024")
