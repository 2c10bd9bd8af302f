"""`dinov3 curate ...`: its commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import words as word_options
from .words import Option

PLAIN = {"no_args_is_help": True, "rich_markup_mode": None}  # brackets in help texts are meant
curate_app = typer.Typer(help="From a raw pool of images to a balanced training set.", **PLAIN)
Words = Annotated[list[str] | None, typer.Argument(help="name=value options", show_default=False)]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


EMBED = {
    "size": Option(int, help="side in pixels; default: the backbone's own"),
    "pooling": Option(str, default="cls", help="cls, patch_mean or cls+patch"),
    "precision": Option(str, default="fp32", help="fp32 or bf16"),
    "shard": Option(int, default=16384, help="images of a shard, what a kill loses at most"),
    "batch": Option(int, default=64, help="images of a forward pass"),
    "max_unreadable": Option(float, default=0.01, help="share of images that may be unreadable"),
}
CLUSTER = {
    "iterations": Option(int, default=20, help="of Lloyd's, per level"),
    "resampling": Option(int, default=3, help="rounds of resampling, per level"),
    "nearest": Option(int, default=10, help="points of a cluster taken by a round of resampling"),
    "start": Option(str, default="k-means++", help="k-means++ or random"),
    "seed": Option(int, default=0, help="seed"),
}
RETRIEVE = {
    "neighbours": Option(int, default=4, help="images for each seed image"),
    "per_set": Option(int, help="most images for a seed set"),
    "per_cluster": Option(int, default=10000, help="most images of a cluster, retrieval=clusters"),
    "min_seeds": Option(int, default=1, help="seeds a cluster must hold, retrieval=clusters"),
    "least_similarity": Option(float, default=-1.0, help="cosine below which nothing is retrieved"),
}
THRESHOLD = "cosine from which two images are near duplicates"


@curate_app.command("embed")
def embed(words: Words = None) -> None:
    """Embeddings of every image, in shards: backbone=SPEC data=PATH out=FOLDER [size=N] [pooling=cls]."""
    from .commands_curate import embed as run

    options = EMBED | {
        "backbone": Option(str, required=True, help="RUN, FILE, hf:ID or timm:NAME"),
        "step": Option(int, help="checkpoint step of a run; default: the newest"),
        "data": Option(str, required=True, help="PATH, commas between several"),
        "out": Option(Path, required=True, help="FOLDER"),
    }
    run(**_read("embed", words, options))


@curate_app.command("dedup")
def dedup(words: Words = None) -> None:
    """Duplicates within and across sets: data=FOLDER[,...] out=FOLDER [trusted=...] [held_out=...] [threshold=0.97]."""
    from .commands_curate import dedup as run

    options = {
        "data": Option(str, required=True, help="FOLDER of embeddings, commas between several"),
        "trusted": Option(str, default="", help="embeddings of sets whose image of a pair is kept"),
        "held_out": Option(str, default="", help="embeddings of evaluation sets: nothing like them is kept"),
        "threshold": Option(float, default=0.97, help=THRESHOLD),
        "out": Option(Path, required=True, help="FOLDER"),
    }
    run(**_read("dedup", words, options))


@curate_app.command("cluster")
def cluster(words: Words = None) -> None:
    """Hierarchical k-means: data=FOLDER clusters=2000,100 out=FOLDER [keep=DUPLICATES] [iterations=20]."""
    from .commands_curate import cluster as run

    options = CLUSTER | {
        "data": Option(str, required=True, help="FOLDER of embeddings"),
        "clusters": Option(_numbers, required=True, help="K1,K2,... (clusters of each level, of images first)"),
        "keep": Option(Path, help="FOLDER of curate dedup: only what it keeps is clustered"),
        "out": Option(Path, required=True, help="FOLDER"),
    }
    run(**_read("cluster", words, options))


@curate_app.command("sample")
def sample(words: Words = None) -> None:
    """Balanced sample: data=FOLDER target=N out=FILE.parquet [clusters=FOLDER] [keep=DUPLICATES] [method=random]."""
    from .commands_curate import sample as run

    options = {
        "data": Option(str, required=True, help="FOLDER of embeddings"),
        "target": Option(int, required=True, help="N images"),
        "clusters": Option(Path, help="FOLDER of curate cluster; without it images are drawn as the pool has them"),
        "keep": Option(Path, help="FOLDER of curate dedup, the one the clusters were made with"),
        "method": Option(str, default="random", help="random or closest (to the centroid)"),
        "seed": Option(int, default=0, help="seed"),
        "out": Option(Path, required=True, help="FILE.parquet"),
    }
    run(**_read("sample", words, options))


@curate_app.command("retrieve")
def retrieve(words: Words = None) -> None:
    """Images like seed sets: data=FOLDER seeds=FOLDER[,...] out=FILE.parquet [neighbours=4] [clusters=FOLDER]."""
    from .commands_curate import retrieve as run

    options = RETRIEVE | {
        "data": Option(str, required=True, help="FOLDER of embeddings"),
        "seeds": Option(str, required=True, help="FOLDER of embeddings of a seed set, commas between several"),
        "clusters": Option(Path, help="FOLDER of curate cluster: take images of the clusters that hold seeds"),
        "keep": Option(Path, help="FOLDER of curate dedup: only what it keeps is retrieved"),
        "seed": Option(int, default=0, help="seed"),
        "out": Option(Path, required=True, help="FILE.parquet"),
    }
    run(**_read("retrieve", words, options))


@curate_app.command("run")
def run(words: Words = None) -> None:
    """The whole chain: pool=PATH target=N out=FOLDER [seeds=PATH,...] [held_out=PATH,...] [backbone=SPEC]."""
    from .commands_curate import DEFAULT_BACKBONE
    from .commands_curate import run as run_chain

    options = (
        EMBED
        | CLUSTER
        | RETRIEVE
        | {
            "pool": Option(str, required=True, help="PATH, commas between several"),
            "target": Option(int, required=True, help="N images of the pool"),
            "out": Option(Path, required=True, help="FOLDER"),
            "seeds": Option(str, default="", help="trusted sets to retrieve around, commas between several"),
            "held_out": Option(str, default="", help="evaluation sets, commas between several"),
            "backbone": Option(str, default=DEFAULT_BACKBONE, help="RUN, FILE, hf:ID or timm:NAME"),
            "step": Option(int, help="checkpoint step of a run; default: the newest"),
            "clusters": Option(_numbers, default=(), help="K1,K2,... (clusters of each level, of images first)"),
            "threshold": Option(float, help=f"{THRESHOLD}; default: measured on re-encoded images"),
            "retrieval": Option(str, default="nearest", help="nearest or clusters"),
            "retrieval_share": Option(float, default=0.5, help="share of the target that retrieval may fill"),
            "method": Option(str, default="random", help="random or closest (to the centroid)"),
        }
    )
    run_chain(**_read("run", words, options))


@curate_app.command("report")
def report(words: Words = None) -> None:
    """A page of what was kept and what was not: manifest=FILE out=PAGE.html [data=FOLDER] [clusters=...] [keep=...]."""
    from .commands_curate import report as run

    options = {
        "manifest": Option(Path, required=True, help="FILE.parquet"),
        "out": Option(Path, required=True, help="PAGE.html"),
        "data": Option(Path, help="FOLDER of curate embed; default: beside the manifest, or what the manifest says"),
        "clusters": Option(Path, help="FOLDER of curate cluster; default: likewise"),
        "keep": Option(Path, help="FOLDER of curate dedup; default: likewise"),
        "seed": Option(int, default=0, help="of the images shown"),
    }
    run(**_read("report", words, options))


def _read(command: str, words: list[str] | None, options: dict[str, Option]) -> dict[str, object]:
    return word_options.read(f"curate {command}", words or [], options)[0]
