"""Every kind of source, and every way in which one can be wrong."""

from __future__ import annotations

import http.server
import importlib.util
import io
import os
import pickle
import re
import threading
import time
from pathlib import Path

import pytest
from pictures import encode, picture, write_tar
from PIL import Image

from dinov3_train.data.sources import expand_braces, open_source, split_commas


def names(source) -> list[str]:
    return [source.name(number) for number in range(len(source))]


def test_folder_labels_are_the_first_folder_level(photographs):
    source = open_source(photographs)
    assert len(source) == 24
    assert source.classes == ["bird", "cat", "dog"]
    assert names(source) == sorted(names(source))
    for number in range(24):
        assert source.name(number).split(os.sep)[-2] == source.classes[source.label(number)]
        assert Image.open(io.BytesIO(source.read(number))).size == (72, 56)
    with pytest.raises(IndexError, match="24 is outside 0 to 23"):
        source.name(24)


def test_folder_takes_any_case_and_depth_and_leaves_hidden_files(tmp_path):
    (tmp_path / "a" / "b" / ".cache").mkdir(parents=True)
    for name in ("top.PNG", "a/one.JpEg", "a/b/two.TIFF", "a/b/.hidden.png", "a/b/.cache/x.png", "a/notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    source = open_source(tmp_path)
    assert [os.path.relpath(name, tmp_path) for name in names(source)] == ["a/b/two.TIFF", "a/one.JpEg", "top.PNG"]
    assert [source.label(number) for number in range(3)] == [0, 0, None]


def test_folder_follows_links_once_and_ends_in_loops(tmp_path):
    (tmp_path / "data" / "x").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.jpg").write_bytes(encode(picture(1)))
    (tmp_path / "data" / "x" / "near.jpg").write_bytes(encode(picture(2)))
    (tmp_path / "data" / "x" / "parent").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a_linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a_second").symlink_to(tmp_path / "data" / "x")
    (tmp_path / "data" / "file.jpg").symlink_to(tmp_path / "elsewhere" / "far.jpg")
    (tmp_path / "data" / "itself").symlink_to(tmp_path / "data" / "itself")
    source = open_source(tmp_path / "data")
    found = [os.path.relpath(name, tmp_path / "data") for name in names(source)]
    assert found == ["a_linked/far.jpg", "file.jpg", "x/near.jpg"]
    assert all(source.read(number) for number in range(3))


def test_names_that_are_not_utf8_survive(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    try:
        with open(path, "wb") as stream:
            stream.write(encode(picture(1)))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert open_source(tmp_path).read(0) == encode(picture(1))


def test_list_with_relative_paths_and_labels(tmp_path, photographs):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one.jpg").write_bytes(b"one")
    absolute = photographs / "cat" / "001.jpg"
    (tmp_path / "list.txt").write_text(f"sub/one.jpg\t7\n\n{absolute}\n")
    source = open_source(tmp_path / "list.txt")
    assert source.read(0) == b"one"
    assert source.name(1) == str(absolute)
    assert [source.label(0), source.label(1), source.classes] == [7, None, None]
    (tmp_path / "named.txt").write_text(f"sub/one.jpg\tzebra\n{absolute}\tape\n")
    named = open_source(tmp_path / "named.txt")
    assert named.classes == ["ape", "zebra"]
    assert [named.label(0), named.label(1)] == [1, 0]


def test_shards_give_images_labels_and_extras(shards):
    source = open_source(f"{shards}/part-{{000..002}}.tar")
    assert len(source) == 12
    for number in range(12):
        assert source.name(number).startswith(f"{shards}/part-{number // 4:03}.tar:deep/{number:04}.")
        assert source.read(number) == encode(picture(number))
        assert source.label(number) == number % 5
        assert source.read_extra(number, "json") == b'{"number": %d}' % number
        assert Image.open(io.BytesIO(source.read_extra(number, ".mask.png"))).getpixel((0, 0)) == number
        assert source.read_extra(number, "txt") is None


def test_masks_and_depths_beside_images_are_no_images(tmp_path):
    (tmp_path / "cat").mkdir()
    for name in ("a.jpg", "a.mask.png", "a.depth.png", "b.c.jpg", "b.c.mask.png", "b.mask.png", "Mask.png"):
        (tmp_path / "cat" / name).write_bytes(name.encode())
    source = open_source(tmp_path)
    assert [name.rsplit("/", 1)[1] for name in names(source)] == ["Mask.png", "a.jpg", "b.c.jpg"]
    assert source.read_extra(1, "mask.png") == source.read_extra(1, ".mask.png") == b"a.mask.png"
    assert source.read_extra(1, "depth.png") == b"a.depth.png"
    assert source.read_extra(2, "mask.png") == b"b.c.mask.png"  # its own, before that of everything up to the first dot
    (tmp_path / "cat" / "b.c.mask.png").unlink()
    assert source.read_extra(2, "mask.png") == b"b.mask.png"
    assert source.read_extra(0, "mask.png") is None


def test_fields_come_from_the_json_beside_an_image(shards, tmp_path):
    source = open_source([f"{shards}/part-000.tar", f"{shards}/part-001.tar"])
    assert [source.field(number, "number") for number in range(8)] == list(range(8))
    assert source.field(0, "absent") is None
    (tmp_path / "a.jpg").write_bytes(b"a")
    folder = open_source(tmp_path)
    assert folder.field(0, "place") is None
    for text, message in (("{", "its .json cannot be read"), ("[1]", "got list"), ('{"place": [1]}', "as place, got")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=rf"data: .*a.jpg: .*{message}"):
            folder.field(0, "place")
    (tmp_path / "a.json").write_text('{"place": "north"}')
    assert folder.field(0, "place") == "north"


def test_every_way_to_name_shards(shards, tmp_path):
    expected = names(open_source(f"{shards}/part-{{000..002}}.tar"))
    (tmp_path / "shards.txt").write_text("".join(f"{shards}/part-00{number}.tar\n" for number in range(3)))
    relative = os.path.relpath(shards, tmp_path)
    (tmp_path / "relative.txt").write_text("".join(f"{relative}/part-00{number}.tar\n" for number in range(3)))
    for spec in (
        f"{shards}/part-*.tar",
        f"{shards}/part-{{000,001,002}}.tar",
        f"{shards}/part-000.tar,{shards}/part-{{001..002}}.tar",
        [f"{shards}/part-00{number}.tar" for number in range(3)],
        str(tmp_path / "shards.txt"),
    ):
        assert names(open_source(spec)) == expected, spec
    assert len(open_source(tmp_path / "relative.txt")) == 12
    remote = open_source(f"file://{shards}/part-{{000..002}}.tar")
    assert [remote.read(number) for number in range(12)] == [encode(picture(number)) for number in range(12)]
    assert len(open_source(f"file://{shards}/part-*.tar")) == 12


class _Ranges(http.server.BaseHTTPRequestHandler):
    """Serves the files of `folder`, parts of them on request, as object stores do."""

    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.folder / self.path.split("?")[0].lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(part[1]), int(part[2] or len(data) - 1)) if part else (0, len(data) - 1)
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data[first : last + 1])))
        self.end_headers()
        if body:
            self.wfile.write(data[first : last + 1])

    def log_message(self, *_) -> None:
        """Silence."""


def test_shards_over_http_in_this_process_and_in_a_forked_one(shards):
    pytest.importorskip("aiohttp", reason="fsspec reads http(s):// through aiohttp")
    handler = type("Handler", (_Ranges,), {"folder": shards})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        source = open_source(f"http://127.0.0.1:{server.server_port}/part-{{000..001}}.tar?key=x")
        assert len(source) == 8
        assert source.read(5) == encode(picture(5))
        child = os.fork()
        if child == 0:
            os._exit(0 if all(source.read(n) == encode(picture(n)) for n in range(8)) else 1)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(ValueError, match=r"cannot open shard http://.*/gone.tar"):
            open_source(f"http://127.0.0.1:{server.server_port}/gone.tar")
    finally:
        server.shutdown()


def test_braces_and_commas():
    assert expand_braces("a{08..11}b{x,y}") == [f"a{n}b{c}" for n in ("08", "09", "10", "11") for c in "xy"]
    assert split_commas("a{1,2}.tar, b.tar,") == ["a{1,2}.tar", "b.tar"]
    with pytest.raises(ValueError, match="empty range"):
        expand_braces("x{3..1}.tar")


def test_a_source_survives_pickling_with_open_handles(shards):
    source = open_source(f"{shards}/part-001.tar")
    data = source.read(2)
    assert pickle.loads(pickle.dumps(source)).read(2) == data


def test_a_forked_process_reads_with_handles_of_its_own(shards):
    source = open_source(f"{shards}/part-*.tar")
    source.read(0)
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            right = all(source.read(n % 12) == encode(picture(n % 12)) for n in range(120))
            os._exit(0 if right else 1)
        children.append(child)
    assert all(source.read(n % 12) == encode(picture(n % 12)) for n in range(120))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_a_truncated_tar_names_shard_and_byte(shards, tmp_path):
    whole = (shards / "part-000.tar").read_bytes()
    last = whole.rstrip(b"\0")
    for length in (len(last) - 700, len(last) - 1500, 1536 + 300, 700):
        cut = tmp_path / f"cut-{length}.tar"
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"shard .*cut-{length}.tar is (truncated|damaged).*byte \d+") as raised:
            open_source(cut)
        assert "\n" not in str(raised.value)


def test_a_tar_cut_between_members_is_said_to_lack_its_end(shards, tmp_path):
    whole = (shards / "part-000.tar").read_bytes()
    (tmp_path / "short.tar").write_bytes(whole[:1024])  # the first member, a label of one byte
    with (
        pytest.warns(UserWarning, match=r"short.tar has no end mark after byte 1024: it may be truncated"),
        pytest.raises(ValueError, match="no image in shard"),
    ):
        open_source(tmp_path / "short.tar")


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed here")
def test_a_url_whose_package_is_missing_says_so():
    for spec in ("s3://bucket/x.tar", "s3://bucket/x-*.tar"):
        with pytest.raises(ValueError, match=r"s3://bucket/x.*(?i:install s3fs)"):
            open_source(spec)


def test_a_damaged_header_is_not_taken_for_the_end(shards, tmp_path):
    data = bytearray((shards / "part-000.tar").read_bytes())
    data[1024:1536] = b"\xff" * 512
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"bad.tar is damaged at byte 1024 of"):
        open_source(tmp_path / "bad.tar")


def test_tars_that_are_none_or_hold_no_image(tmp_path):
    (tmp_path / "text.tar").write_bytes(b"hello" * 300)
    with pytest.raises(ValueError, match="is no uncompressed tar"):
        open_source(tmp_path / "text.tar")
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="is no uncompressed tar"):
        open_source(tmp_path / "empty.tar")
    write_tar(tmp_path / "bare.tar", {"a.cls": b"1", "a.mask.png": b"x"})
    with pytest.raises(ValueError, match=r"no image in shard .*bare.tar: its suffixes.* cls, mask.png"):
        open_source(tmp_path / "bare.tar")


def test_samples_without_an_image_are_said_to_be_left_out(tmp_path):
    write_tar(tmp_path / "some.tar", {"a.cls": b"1", "b.cls": b"2", "b.jpg": b"x"})
    with pytest.warns(UserWarning, match="1 samples without an image, such as a, are left out"):
        source = open_source(tmp_path / "some.tar")
    assert len(source) == 1
    assert source.label(0) == 2


def test_a_label_that_is_no_number(tmp_path):
    source = open_source(write_tar(tmp_path / "x.tar", {"a.cls": b"cat", "a.jpg": b"x"}))
    with pytest.raises(ValueError, match=r"x.tar:a.jpg: expected .cls to hold a class number, got b'cat'"):
        source.label(0)


def test_torchvision_by_name(photographs):
    source = open_source("torchvision:FakeData:size=6:num_classes=3")
    assert len(source) == 6
    assert source.read(2).size == (224, 224)
    assert 0 <= source.label(2) < 3
    assert source.name(2) == "torchvision:FakeData[2]"
    folder = open_source(f"torchvision:ImageFolder:root={photographs}")
    assert folder.classes == ["bird", "cat", "dog"]
    assert folder.label(23) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:CIFAR11:root=x", "no dataset 'CIFAR11'; nearest: CIFAR10"),
        ("torchvision:CIFAR10", "expected root=PATH"),
        ("torchvision:CIFAR10:root=nowhere:splitt=train", "expected options out of download, root, train"),
        ("torchvision:CIFAR10:root=nowhere:split=test", "Dataset not found.*download=true"),
        ("torchvision:ImageFolder:root=nowhere", "nowhere"),
    ],
)
def test_wrong_torchvision_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        open_source(spec)


def test_several_sources_are_one(photographs, shards, tmp_path):
    other = tmp_path / "other"
    (other / "ant").mkdir(parents=True)
    (other / "dog").mkdir()
    (other / "ant" / "a.jpg").write_bytes(b"a")
    (other / "dog" / "d.jpg").write_bytes(b"d")
    both = open_source([photographs, other])
    assert len(both) == 26
    assert both.classes == ["ant", "bird", "cat", "dog"]
    assert [both.label(0), both.label(24), both.label(25)] == [1, 0, 3]
    assert both.read(25) == b"d"
    mixed = open_source([photographs, shards / "part-000.tar"])
    assert mixed.read_extra(24, "cls") == b"0"
    with pytest.raises(ValueError, match="has label 0 without a name"):
        mixed.label(24)


def test_missing_and_empty(tmp_path, photographs):
    with pytest.raises(ValueError, match=rf"{photographs}/dig does not exist; {photographs} holds dog"):
        open_source(photographs / "dig")
    with pytest.raises(ValueError, match="does not exist"):
        open_source(tmp_path / "part-{000..001}.tar")
    with pytest.raises(ValueError, match=r"no image below .* it holds no files at all"):
        open_source(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(ValueError, match=r"it holds .md \(1\); expected avif, bmp"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="is a file of another kind"):
        open_source(tmp_path / "notes.md")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="is empty"):
        open_source(tmp_path / "empty.txt")
    (tmp_path / "lost.txt").write_text("gone/1.jpg\ngone/2.jpg\n")
    with pytest.raises(ValueError, match=r"none of its first 2 paths exists, such as .*gone/1.jpg"):
        open_source(tmp_path / "lost.txt")
    with pytest.raises(ValueError, match="got none"):
        open_source([])


def test_the_index_of_ten_thousand_members_takes_moments(tmp_path):
    write_tar(tmp_path / "many.tar", {f"{n:05}.{kind}": b"1" for n in range(5000) for kind in ("jpg", "cls")})
    start = time.process_time()
    source = open_source(tmp_path / "many.tar")
    assert len(source) == 5000
    assert source.label(4999) == 1
    assert time.process_time() - start < 10  # measured .6 s; the bound only catches a quadratic index
