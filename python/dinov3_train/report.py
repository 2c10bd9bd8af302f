"""Self-contained HTML pages: sections, pictures, curves and tables in one file that needs nothing from elsewhere.

Pictures are data URIs and curves are inline SVG. Pages follow the reader's light or dark setting, fit phones and print.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --card: #ffffff; --ink: #1a1c20; --faint: #626873; --line: #dcdee3;
  --s1: #0b62b0; --s2: #c2500a; --s3: #00805f; --s4: #9b3a86; --s5: #7d6200; --s6: #4b5563; }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #14161a; --card: #1c1f25; --ink: #eceef2; --faint: #a2a9b6;
  --line: #343943; --s1: #6cb6ff; --s2: #ff9f57; --s3: #4fd1a5; --s4: #e59ad3; --s5: #e8c547; --s6: #b8c0cc; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3rem 0 .4rem; }
p { max-width: 70ch; margin: .5rem 0 1rem; }
.lead { color: var(--faint); font-size: 1.1rem; }
figure { margin: 1.25rem 0; }
figure img, figure svg { display: block; width: 100%; height: auto; border-radius: 8px; }
figure.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem; }
figcaption, .legend { color: var(--faint); font-size: .9rem; margin-top: .5rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--wide)), 1fr)); gap: 1.25rem; }
.row { display: grid; grid-template-columns: repeat(var(--count), 1fr); gap: .6rem; margin: 1.25rem 0; }
.row figure, .gallery figure { margin: 0; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 1rem; margin: 1.5rem 0; }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem; }
.numbers b { display: block; font-size: 1.9rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.numbers span { color: var(--faint); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .45rem .9rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 600; }
a { color: var(--s1); }
svg text { fill: var(--faint); font-size: 13px; font-family: inherit; }
svg .title { fill: var(--ink); font-size: 15px; font-weight: 600; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2.25; stroke-linejoin: round; stroke-linecap: round; }
svg .raw { fill: none; stroke-width: 1; opacity: .3; }
.legend span { display: inline-block; margin-right: 1.25rem; }
.legend svg { display: inline-block; width: 2rem; height: .7rem; vertical-align: middle; margin-right: .4rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1rem; }
.charts figure.card { margin: 0; }
.signs { list-style: none; padding: 0; margin: 1.25rem 0; }
.signs li { background: var(--card); border: 1px solid var(--line); border-left: 5px solid var(--s2);
  border-radius: 8px; padding: .7rem 1rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
.signs li b { margin-right: .4em; }
.signs.good li { border-left-color: var(--s3); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem;
  font-size: .85rem; line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--s1); }
@media (max-width: 520px) { .charts svg text { font-size: 17px; } .charts svg .title { font-size: 19px; }
  th, td { padding-right: .6rem; } .numbers b { font-size: 1.5rem; } .row { gap: .3rem; } }
@media print { body { background: #fff; font-size: 11pt; } main { max-width: none; padding: 0; }
  figure, .row, .numbers, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""
DASHES = ("", "9 5", "2 5", "12 4 2 4", "5 3", "1 4")  # curves differ without colour too
COLORS = 6
SMALL = (440, 270)  # of charts that stand side by side


@dataclass(frozen=True)
class Link:
    """A table cell that leads elsewhere; nothing is loaded until the reader follows it."""

    text: str
    url: str


class Page:
    """A page that grows from top to bottom; every method returns the page. Texts are plain and are escaped here."""

    def __init__(self, title: str, lead: str = ""):
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"] + ([f'<p class="lead">{escape(lead)}</p>'] if lead else [])

    def section(self, heading: str, *paragraphs: str) -> Page:
        """A heading and the paragraphs under it."""
        self._parts.append(f"<h2>{escape(heading)}</h2>")
        return self.text(*paragraphs)

    def text(self, *paragraphs: str) -> Page:
        """Paragraphs."""
        self._parts += [f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs]
        return self

    def numbers(self, entries: Sequence[tuple[str, str]]) -> Page:
        """Large numbers side by side: (number, what it is)."""
        cells = "".join(f"<div><b>{escape(number)}</b><span>{escape(name)}</span></div>" for number, name in entries)
        self._parts.append(f'<div class="numbers">{cells}</div>')
        return self

    def picture(self, image: Image.Image, caption: str) -> Page:
        """One picture over the whole width."""
        self._parts.append(_figure(image, caption))
        return self

    def row(self, entries: Sequence[tuple[Image.Image, str]]) -> Page:
        """Pictures that belong together, side by side on every screen, each with its caption."""
        figures = "".join(_figure(image, caption) for image, caption in entries)
        self._parts.append(f'<div class="row" style="--count: {len(entries)}">{figures}</div>')
        return self

    def gallery(self, entries: Sequence[tuple[Image.Image, str]], *, width: int = 320) -> Page:
        """Pictures with captions, as many side by side as fit at no less than `width` pixels each."""
        figures = "".join(_figure(image, caption) for image, caption in entries)
        self._parts.append(f'<div class="gallery" style="--wide: {width}px">{figures}</div>')
        return self

    def curve(
        self,
        series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        *,
        title: str,
        x_label: str,
        caption: str = "",
        smooth: int = 1,
    ) -> Page:
        """Curves of (x, y) by name; with `smooth` above 1 a running mean over so many points, these faint behind it.

        Errors: ValueError for no finite point, or x and y of different length.
        """
        self._parts.append(
            f'<figure class="card">{curve_svg(series, title=title, x_label=x_label, smooth=smooth)}'
            f'<div class="legend">{_legend(list(series))}</div>{_caption(caption)}</figure>'
        )
        return self

    def charts(
        self, entries: Sequence[tuple[str, Mapping[str, tuple[Sequence[float], Sequence[float]]], str]], *, x_label: str
    ) -> Page:
        """Small curves side by side: (title, lines by name, caption) each, one legend for all.

        Lines of one name have one look in every chart.
        Errors: as `curve`.
        """
        names = list(dict.fromkeys(name for _, lines, _ in entries for name in lines))
        cards = "".join(
            f'<figure class="card">{curve_svg(lines, title=title, x_label=x_label, size=SMALL, names=names)}'
            f"{_caption(caption)}</figure>"
            for title, lines, caption in entries
        )
        legend = f'<div class="legend">{_legend(names)}</div>' if len(names) > 1 else ""
        self._parts.append(f'{legend}<div class="charts">{cards}</div>')
        return self

    def signs(self, entries: Sequence[tuple[str, str]], *, good: bool = False) -> Page:
        """What to see first: (word, text) each in a box of its own; `good` for all is well."""
        items = "".join(f"<li><b>{escape(word)}</b> {escape(text)}</li>" for word, text in entries)
        self._parts.append(f'<ul class="signs{" good" if good else ""}">{items}</ul>')
        return self

    def code(self, text: str, *, summary: str = "") -> Page:
        """Text as it is typed; with a `summary` folded away under it."""
        block = f"<pre>{escape(text)}</pre>"
        self._parts.append(f"<details><summary>{escape(summary)}</summary>{block}</details>" if summary else block)
        return self

    def embed(self, markup: str) -> Page:
        """HTML of the caller's own, taken as it is."""
        self._parts.append(markup)
        return self

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str | Link]]) -> Page:
        """A table of texts and links. Errors: ValueError for a row that is not as long as the header."""
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"Page.table: rows expect {len(header)} cells, got {len(row)}: {list(row)}")
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self._parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')
        return self

    def html(self) -> str:
        """The whole document."""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
            + "\n".join(self._parts)
            + "\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page (ASCII, other characters as references) under a temporary name and rename it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(self.html().encode("ascii", "xmlcharrefreplace"))
        partial.replace(path)
        return path


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, oldest first; a last line that a kill cut short is left out.

    Errors: ValueError for a missing file, or naming a damaged line before the last.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"read_metrics: expected a metrics.jsonl, {path} does not exist")
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"read_metrics: {path}: line {number} is not JSON: {error}") from error
    return rows


def series(rows: Sequence[Mapping], key: str, x: str = "step") -> tuple[list[float], list[float]]:
    """(x, y) of the rows that have both keys, as `Page.curve` takes them."""
    chosen = [row for row in rows if x in row and key in row]
    return [float(row[x]) for row in chosen], [float(row[key]) for row in chosen]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Means of the finite ones of `width` values centred on each; fewer at the ends; NaN where there is none."""
    before, after, means = (width - 1) // 2, width // 2 + 1, []
    for index in range(len(values)):
        near = [value for value in values[max(0, index - before) : index + after] if math.isfinite(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def curve_svg(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    smooth: int = 1,
    size: tuple[int, int] = (760, 340),
    names: Sequence[str] | None = None,
) -> str:
    """An SVG element with axes and one line for each entry; gaps where a value is not finite.

    size: width and height in units of 1/13 of a letter's height; names: of all lines that are to look different, in
    their order; None: the entries.
    """
    names = list(lines) if names is None else list(names)
    for name, (xs, ys) in lines.items():
        if len(xs) != len(ys):
            raise ValueError(f"curve: {name!r} expects as many x as y, got {len(xs)} and {len(ys)}")
    points = [(x, y) for xs, ys in lines.values() for x, y in zip(xs, ys) if math.isfinite(x) and math.isfinite(y)]
    if not points:
        raise ValueError(f"curve: {title!r} expects at least one finite point, got none")
    (width, height), left, right, top, bottom = size, 62 if size[0] > 600 else 80, 22, 40, 46
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points), 5 if width > 600 else 3)
    y_ticks = _ticks(min(y for _, y in points), max(y for _, y in points))

    def at(x: float, y: float) -> str:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return f"{left + across * (width - left - right):.1f},{height - bottom - up * (height - top - bottom):.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="title" x="{left}" y="22">{escape(title)}</text>')
    for tick in y_ticks:
        y = at(x_ticks[0], tick).split(",")[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x = at(tick, y_ticks[0]).split(",")[0]
        parts.append(f'<text x="{x}" y="{height - bottom + 20}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 8}" text-anchor="end">{escape(x_label)}</text>')
    for name, (xs, ys) in lines.items():
        number = names.index(name)
        if smooth > 1:
            parts += _polylines(xs, ys, at, f'class="raw" stroke="{_color(number)}"')
        ink = f'class="line" stroke="{_color(number)}" stroke-dasharray="{_dash(number)}"'
        parts += _polylines(xs, running_mean(ys, smooth) if smooth > 1 else ys, at, ink)
    return "".join(parts) + "</svg>"


def _polylines(xs, ys, at, attributes: str) -> list[str]:
    """One polyline for each run of finite points; a single point is a line of no length, which round caps show."""
    runs: list[list[str]] = [[]]
    for x, y in zip(xs, ys):
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append(at(x, y))
        elif runs[-1]:
            runs.append([])
    return [f'<polyline {attributes} points="{" ".join(run * 2 if len(run) == 1 else run)}"/>' for run in runs if run]


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that enclose [low, high]."""
    if high <= low:
        pad = abs(low) * 0.05 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _legend(names: list[str]) -> str:
    swatch = '<svg viewBox="0 0 32 10"><path d="M1 5H31" class="line" stroke="{}" stroke-dasharray="{}"/></svg>'
    entries = [swatch.format(_color(n), _dash(n)) + escape(name) for n, name in enumerate(names)]
    return "".join(f"<span>{entry}</span>" for entry in entries)


def _color(number: int) -> str:
    return f"var(--s{number % COLORS + 1})"


def _dash(number: int) -> str:
    return DASHES[number % len(DASHES)]


def _figure(image: Image.Image, caption: str) -> str:
    size = f'width="{image.width}" height="{image.height}"'
    return f'<figure><img src="{data_uri(image)}" {size} alt="{escape(caption)}">{_caption(caption)}</figure>'


def _caption(caption: str) -> str:
    return f"<figcaption>{escape(caption)}</figcaption>" if caption else ""


def _cell(cell: str | Link) -> str:
    return f'<a href="{escape(cell.url)}">{escape(cell.text)}</a>' if isinstance(cell, Link) else escape(cell)


def data_uri(image: Image.Image) -> str:
    """The picture as a data URI: PNG, or JPEG of quality 90 without chroma subsampling where that halves it.

    A picture with transparent parts is WebP of quality 90, so that the paper shows through in light and dark.
    """
    if image.mode == "RGBA":
        stream = io.BytesIO()
        image.save(stream, "webp", quality=90, method=6)
        return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "png", optimize=True)
    image.convert("RGB").save(jpeg, "jpeg", quality=90, subsampling=0, optimize=True)
    kind, data = ("jpeg", jpeg) if 2 * jpeg.tell() < png.tell() else ("png", png)  # maps of patches stay exact
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
