"""`dinov3 study NAME`: from words to the function of a study."""

from __future__ import annotations

import difflib
from pathlib import Path

from .. import words as word_options
from ..words import Option

NAMES = {
    "data": "curated sets against the raw pool: the same recipe and steps on sets of one size, judged by k-NN",
    "gram-teacher": "iteration, resolution and weight of the Gram teacher, judged by a dense probe and coherence",
    "dense-regularizers": "Gram anchoring against KoLeo on patches, more iBOT, a dense head, features, nothing",
}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


COMMON = {
    "out": Option(Path, required=True, help="FOLDER"),
    "seeds": Option(_numbers, default=(0,), help="seeds of the training, commas between several"),
    "minutes": Option(float, help="wall-clock of this call; the same command goes on"),
}


def run_named(name: str | None, words: list[str]) -> None:
    """Run the study `name`, or list the studies there are. Errors: ValueError naming the nearest studies or options."""
    if name is None:
        for known, about in NAMES.items():
            print(f"{known:19} {about}")
        return
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.3) or list(NAMES)
        raise ValueError(f"study: no study named {name!r}; nearest: {', '.join(close)} (dinov3 study lists all)")
    from . import data, dense_regularizers, gram_teacher  # heavy, and only one of them runs

    module, kind = {
        "data": (data, data.DataStudy),
        "gram-teacher": (gram_teacher, gram_teacher.GramTeacherStudy),
        "dense-regularizers": (dense_regularizers, dense_regularizers.DenseRegularizerStudy),
    }[name]
    values, overrides = word_options.read(f"study {name}", words, module.OPTIONS | COMMON, rest=True)
    common = {key: values.pop(key) for key in COMMON}
    asked = kind(**values, overrides=tuple(overrides))
    results = module.run(asked, common["out"], seeds=common["seeds"], minutes=common["minutes"])
    if results.rows:
        print(
            f"\n{results.table()}\nwrote {common['out'] / 'table.md'}, results.json, results.csv and plot.png beside it"
        )
