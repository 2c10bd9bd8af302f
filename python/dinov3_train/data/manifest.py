"""The manifest: a Parquet file that picks images out of other sources, one row an image, with where each came from.

`dinov3 curate` writes it and `data=FILE.parquet` reads it; `data=FILE.parquet:part=NAME` takes the rows of one part.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

from .sources import split_commas

SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # as in `data=`, absolute where it is a path
        ("index", pa.int64()),  # number of the image in that source
        ("name", pa.string()),  # the source's name of it: a source that has changed since is found out by this
        ("width", pa.int32()),  # pixels
        ("height", pa.int32()),
        ("hash", pa.string()),  # `content_hash`
        ("cluster_path", pa.list_(pa.int32())),  # cluster numbers, top level first; empty when not clustered
        ("retrieval_seed", pa.string()),  # name of the seed image it was retrieved for; empty when none
        ("duplicate_group", pa.int64()),  # images of one number are duplicates of each other; -1 when none
        ("part", pa.string()),  # "clustering", "retrieval", "raw", or the name of a set
    ]
)
METADATA = b"dinov3"  # file-level key: JSON of the settings that made the manifest


def write_manifest(path: str | Path, blocks: Iterable[Mapping[str, Sequence]], settings: Mapping) -> Path:
    """Write a manifest under a temporary name and rename it, so that a file of this name is always whole.

    Args:
        path: ends in .parquet.
        blocks: mappings of every column of `SCHEMA` to values (n,), one after another; n may differ. Relative paths in
            `source` and `name` are written as absolute ones, so that the manifest works from any folder.
        settings: whatever made it, as JSON.

    Returns the path. Errors: ValueError for a suffix, column or value that does not fit; OSError for a full disk.
    """
    path = Path(path)
    if path.suffix.lower() != ".parquet":
        raise ValueError(f"manifest: expected a file that ends in .parquet, got {str(path)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    schema = SCHEMA.with_metadata({METADATA: json.dumps(settings)})
    try:
        with parquet.ParquetWriter(partial, schema, compression="zstd") as writer:
            for block in blocks:
                writer.write_table(_table(block, schema))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_manifest(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a manifest, all columns of `SCHEMA` or those named.

    Errors: ValueError for a file that is missing, damaged, no Parquet, or lacks a column or its type.
    """
    wanted = list(columns or SCHEMA.names)
    with _opened(path) as file:
        found = file.schema_arrow
        missing = [name for name in wanted if name not in found.names]
        if missing:
            raise ValueError(
                f"manifest: {path} lacks the columns {', '.join(missing)}; it has {', '.join(found.names)}"
            )
        try:
            table = file.read(columns=wanted)
            return table.select(wanted).cast(pa.schema([SCHEMA.field(name) for name in wanted]))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"manifest: {path} cannot be read: {_one_line(error)}") from error


def read_column(path: str | Path, name: str) -> pa.ChunkedArray | None:
    """One column of a manifest, of `SCHEMA` or any other that someone has added; None where it has none of that name.

    Errors: ValueError for a file that is missing, damaged or no Parquet.
    """
    with _opened(path) as file:
        if name not in file.schema_arrow.names:
            return None
        try:
            return file.read(columns=[name])[name]
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"manifest: {path} cannot be read: {_one_line(error)}") from error


def manifest_settings(path: str | Path) -> dict:
    """The settings that made a manifest; empty where it does not say."""
    with _opened(path) as file:
        text = (file.schema_arrow.metadata or {}).get(METADATA, b"{}")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"manifest: {path}: its settings are no JSON: {_one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"manifest: {path}: its settings expect a JSON object, got {type(settings).__name__}")
    return settings


def content_hash(data: bytes | Image.Image) -> str:
    """SHA-256 of an image file's bytes, as hexadecimal text; of a source without files: of size, mode and pixels."""
    if isinstance(data, Image.Image):
        data = f"{data.mode} {data.width} {data.height} ".encode() + data.tobytes()
    return hashlib.sha256(data).hexdigest()


def absolute_spec(spec: str) -> str:
    """A source as in `data=`, with its relative paths made absolute; URLs and names stay as they are."""
    if spec.startswith("torchvision:"):
        head, *options = spec.split(":")
        pairs = [option.partition("=") for option in options]
        return ":".join(
            [head, *(k + e + (absolute_name(os.path.expanduser(v)) if k == "root" else v) for k, e, v in pairs)]
        )
    if os.path.exists(os.path.expanduser(spec)):  # a comma may belong to its name
        return absolute_name(os.path.expanduser(spec))
    return ",".join(absolute_name(os.path.expanduser(part)) for part in split_commas(spec))


def absolute_name(name: str) -> str:
    """The name that a source gives an image once its paths are absolute, as text that Parquet takes."""
    if "://" not in name and not name.startswith("torchvision:"):
        name = os.path.join(os.getcwd(), name)
    return valid_text(name)


def valid_text(name: str) -> str:
    """The name as Parquet takes it: bytes of a file name that are no UTF-8 are written as backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _table(block: Mapping[str, Sequence], schema: pa.Schema) -> pa.Table:
    if set(block) != set(schema.names):
        raise ValueError(f"manifest: expected the columns {', '.join(schema.names)}, got {', '.join(block)}")
    specs = {spec: absolute_spec(spec) for spec in set(block["source"])}
    columns = dict(block)
    columns["source"] = [specs[spec] for spec in block["source"]]
    columns["name"] = [absolute_name(name) for name in block["name"]]
    try:
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(f"manifest: a value does not fit its column: {_one_line(error)}") from error


def _opened(path: str | Path) -> parquet.ParquetFile:
    if not Path(path).is_file():
        raise ValueError(f"manifest: {path} does not exist")
    try:
        return parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"manifest: {path} is no readable Parquet file: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
