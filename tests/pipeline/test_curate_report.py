"""`dinov3 curate report` on what `curate run` and its single stages leave behind."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture(scope="module")
def run_folder(start_dinov3, recipe_file, image_folder, tmp_path_factory):
    """A run whose backbone sees the pool."""
    out = tmp_path_factory.mktemp("seeing") / "run"
    process = start_dinov3("pretrain", f"recipe={recipe_file}", f"data={image_folder}", f"out={out}", "run.steps=1")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return out


@pytest.fixture(scope="module")
def pool(image_folder, tmp_path_factory):
    """The images, five of them twice."""
    root = shutil.copytree(image_folder, tmp_path_factory.mktemp("twice") / "pool")
    for path in sorted((root / "blobs").glob("*.png"))[:5]:
        shutil.copy(path, root / "blobs" / f"copy-{path.name}")
    return root


@pytest.fixture(scope="module")
def curated(start_dinov3, run_folder, pool, image_folder, tmp_path_factory):
    """The folder of a whole `curate run`."""
    out = tmp_path_factory.mktemp("curated") / "out"
    words = [f"pool={pool}", f"seeds={image_folder / 'stripes'}", f"backbone={run_folder}", "target=12", "clusters=6,2"]
    process = start_dinov3("curate", "run", *words, f"out={out}", "threshold=0.99999")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return out


def test_the_page_of_a_run(dinov3, curated, tmp_path):
    page = tmp_path / "page.html"
    status, text, error = dinov3("curate", "report", f"manifest={curated / 'manifest.parquet'}", f"out={page}")
    assert status == 0, error
    assert text.startswith(f"wrote {page}: ")
    html = page.read_text()
    assert "images kept of 65 from 2 sources" in html  # 45 of the pool, 20 of the seed set
    assert "group " in html
    assert "Retrieved around seeds" in html
    assert "The largest clusters" in html
    assert "clusters" in html


def test_a_manifest_moved_away_shows_what_was_kept(dinov3, curated, tmp_path):
    shutil.copy(curated / "manifest.parquet", tmp_path / "moved.parquet")
    words = (f"manifest={tmp_path / 'moved.parquet'}", f"out={tmp_path / 'page.html'}")
    status, _, error = dinov3("curate", "report", *words)
    assert status == 0, error
    assert "only what was kept" in (tmp_path / "page.html").read_text()
    folders = (
        f"data={curated / 'embeddings' / 'pool'}",
        f"clusters={curated / 'clusters'}",
        f"keep={curated / 'duplicates'}",
    )
    status, _, error = dinov3("curate", "report", *words, *folders)
    assert status == 0, error
    assert "images kept of 65 from 2 sources." in (tmp_path / "page.html").read_text()


def test_the_page_of_single_stages(dinov3, curated, tmp_path):
    manifest, data = tmp_path / "sample.parquet", curated / "embeddings" / "pool"
    words = (f"data={data}", f"clusters={curated / 'clusters'}", f"keep={curated / 'duplicates'}", "target=8")
    status, _, error = dinov3("curate", "sample", *words, f"out={manifest}")
    assert status == 0, error
    status, _, error = dinov3("curate", "report", f"manifest={manifest}", f"out={tmp_path / 'page.html'}")
    assert status == 0, error
    assert "8 images kept of 45" in (tmp_path / "page.html").read_text()


def test_what_cannot_be(dinov3, curated, tmp_path):
    manifest = curated / "manifest.parquet"
    (tmp_path / "cut.parquet").write_bytes(manifest.read_bytes()[:200])
    for words, parts in (
        ((f"manifest={tmp_path / 'no.parquet'}", f"out={tmp_path / 'p.html'}"), ("no.parquet", "does not exist")),
        ((f"manifest={tmp_path / 'cut.parquet'}", f"out={tmp_path / 'p.html'}"), ("no readable Parquet",)),
        ((f"manifest={manifest}", f"out={tmp_path / 'p.txt'}"), (".html", "p.txt")),
        ((f"manifest={manifest}", f"out={tmp_path / 'p.html'}", f"clusters={tmp_path}"), ("holds no clusters",)),
        (
            (f"manifest={manifest}", f"out={tmp_path / 'p.html'}", f"data={curated / 'embeddings' / 'stripes'}"),
            ("are not in", "expected the embeddings it was made of"),
        ),
        ((f"manifest={manifest}", f"out={tmp_path / 'p.html'}", f"keep={tmp_path}"), ("no finished search",)),
    ):
        status, _, error = dinov3("curate", "report", *words)
        assert status == 2, words
        assert all(part in error for part in parts), error
        assert error.count("\n") == 1
