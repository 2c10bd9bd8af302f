"""Headless Chromium for pages: a screenshot at any width in either theme, the page after its scripts, the console."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SETTINGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--allow-file-access-from-files",
    "--virtual-time-budget=4000",
    "--enable-logging=stderr",
)
CONSOLE = re.compile(r"CONSOLE[:(][^\"]*\"(.*)\", source:")


def browser() -> str | None:
    """The path of a Chromium, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def screenshot(page: Path, picture: Path, *, widths: tuple[int, ...], height: int, dark: bool) -> list[str]:
    """Write a PNG of the page as readers with windows of these widths in pixels see it, side by side.

    The page is shown in frames, since a window of Chromium cannot be narrower than 500 pixels. Returns the console's
    lines.
    """
    frame = picture.with_suffix(".frame.html")
    source = escape(page.resolve().as_uri())
    frames = [
        f'<iframe src="{source}" style="border:0;width:{width}px;height:{height}px"></iframe>' for width in widths
    ]
    frame.write_text(f'<body style="margin:0;display:flex">{"".join(frames)}')
    lines = _run(
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--window-size={sum(widths)},{height}",
        f"--screenshot={picture}",
        frame.resolve().as_uri(),
    )[1]
    frame.unlink()
    return lines


def after_scripts(page: Path, script: str = "", *, fragment: str = "") -> tuple[str, list[str]]:
    """The page's HTML once its scripts, and then `script`, have run; and the console's lines."""
    copy = page.with_suffix(".scripted.html")
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    dumped = _run("--dump-dom", copy.resolve().as_uri() + fragment)
    copy.unlink()
    return dumped


def _run(*words: str) -> tuple[str, list[str]]:
    done = subprocess.run([browser(), *SETTINGS, *words], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, CONSOLE.findall(done.stderr)
