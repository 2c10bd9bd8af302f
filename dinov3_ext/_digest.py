"""One number for the native sources, compiled into the library and compared when it is loaded. Imports no torch."""

import hashlib
from pathlib import Path


def source_digest(root: str | Path) -> str:
    """16 hexadecimal digits of CMakeLists.txt and everything under csrc; "" where `root` holds no such sources."""
    root = Path(root)
    files = [root / "CMakeLists.txt", *sorted(path for path in (root / "csrc").rglob("*") if path.is_file())]
    if not all(path.is_file() for path in files) or len(files) == 1:
        return ""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
