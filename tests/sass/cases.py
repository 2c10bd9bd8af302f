"""Calls of the public functions that between them reach every kernel: element types, head widths, sequence lengths of
the recipes and around each tile's edge, aligned and odd strides, with and without gradient. `all` for the whole,
`small` one small shape each (for the race verifier). Tensors are not initialised: nothing is computed from them.
"""

from collections.abc import Callable, Iterator
from itertools import product

import torch
from compiled import listed_sources
from torch import Tensor

import dinov3_ext
from dinov3_ext import ALONE, Collectives, Layout, Potentials

Case = tuple[str, Callable[[], object]]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
HALVES = FLOATS[:2]
TOKENS = (1, 5, 6, 16, 54, 64, 65, 144, 145, 201, 208, 261, 272, 273, 320, 321, 1029, 2309)


def all() -> Iterator[Case]:
    yield from sinkhorn(
        [
            (3, 7),
            (128, 65536),
            (32, 262144),
            (512, 4096),
            (1229, 8192),
            (4915, 65536),
            (512, 70001),
            (5000, 701),
            (0, 64),
        ]
    )
    shapes = [((10, 16), 2, 65536), ((1, 70), 1, 65536), ((1, 3), 1, 70001), ((2, 1), 2, 2)]
    yield from cross_entropy([*shapes, ((2, 3), 3, 64), ((2, 3), 3, 7)])
    yield from gram([(2, 1, 33), (2, 49, 384), (8, 256, 1024), (2, 300, 1023), (1, 2304, 4096), (2, 100, 96)])
    mixes = [[(4, tokens)] for tokens in TOKENS] + [[(32, 261), (128, 54)], [(2, 1029), (3, 201), (5, 65), (8, 5)]]
    yield from rope_attention(mixes, heads=3)
    yield from rope_rotate([*mixes[-2:], [(2, 1)]], heads=3)


def small() -> Iterator[Case]:
    yield from sinkhorn([(16, 512)])
    yield from cross_entropy([((2, 2), 2, 512)])
    yield from gram([(1, 64, 64)])
    yield from rope_attention([[(1, 54)], [(1, 261)], [(1, 330)]], heads=1)
    yield from rope_rotate([[(2, 21)]], heads=1)


def case(op: str, run: Callable[[], object], dtype: torch.dtype, shape: object) -> Iterator[Case]:
    """Nothing for an op without kernels: its composition would really run."""
    folder = "rope_attention" if op == "rope_rotate" else op
    if any(source.parent.name == folder for source in listed_sources("cuda_sources")):
        yield f"{op} {str(dtype).removeprefix('torch.')} {shape}", run


def sinkhorn(shapes: list[tuple[int, int]]) -> Iterator[Case]:
    """One rank alone, and the first of two."""
    two = Collectives(all_reduce=lambda tensor, op: tensor, all_gather=lambda tensor: tensor, rank=0, world_size=2)
    for dtype, (rows, prototypes), collectives in product(FLOATS, shapes, (ALONE, two)):

        def run() -> object:
            logits = torch.empty(rows, prototypes, dtype=dtype)
            return dinov3_ext.sinkhorn_knopp(logits, temperature=0.07, collectives=collectives)

        yield from case("sinkhorn_knopp", run, dtype, (rows, prototypes))


def cross_entropy(shapes: list[tuple[tuple[int, int], int, int]]) -> Iterator[Case]:
    for dtype, ((crops, images), views, prototypes), overwrite in product(FLOATS, shapes, (False, True)):

        def run() -> None:
            leaf = torch.empty(crops, images, prototypes, dtype=dtype, requires_grad=True)
            losses = dinov3_ext.assignment_cross_entropy(
                leaf * 1 if overwrite else leaf,
                torch.empty(views, images, prototypes, dtype=dtype),
                Potentials(torch.empty(views * images), torch.empty(prototypes)),
                student_temperature=0.1,
                teacher_temperature=0.07,
                weight=torch.empty(images) if overwrite else None,
                overwrite_student=overwrite,
            )
            losses.sum().backward()

        yield from case("assignment_cross_entropy", run, dtype, (crops, views, images, prototypes))


def gram(shapes: list[tuple[int, int, int]]) -> Iterator[Case]:
    for dtype, teacher_dtype, shape, clip in product(FLOATS, FLOATS[1:], shapes, ("none", "both", "teacher")):

        def run() -> None:
            teacher = torch.empty(shape, dtype=teacher_dtype)
            dinov3_ext.gram_loss(torch.empty(shape, dtype=dtype), teacher, clip=clip)
            dinov3_ext.gram_loss(torch.empty(shape, dtype=dtype, requires_grad=True), teacher, clip=clip).backward()

        yield from case("gram_loss", run, dtype, (*shape, clip))


def packed(groups: list[tuple[int, int]]) -> Layout:
    """A layout of (count, tokens): a grid of one line, with up to five prefix tokens."""
    layouts = [(count, 1, tokens - min(5, tokens - 1)) for count, tokens in groups]
    prefixes = {min(5, tokens - 1) for _, tokens in groups}
    if len(prefixes) == 1:
        return Layout.uniform(layouts, prefix=prefixes.pop(), tables="sequence")
    return Layout.uniform([(count, 1, tokens) for count, tokens in groups], prefix=0, tables="sequence")


def rope_attention(mixes: list[list[tuple[int, int]]], heads: int) -> Iterator[Case]:
    for dtype, width, groups in product(HALVES, (64, 128), mixes):

        def run() -> None:
            layout = packed(groups)
            qkv = torch.empty(layout.tokens, 3, heads, width, dtype=dtype, requires_grad=True)
            rope = torch.empty(layout.rope_rows, 2, width // 4)
            out: Tensor = dinov3_ext.rope_attention(qkv, rope, layout, scale=width**-0.5)
            out.sum().backward()

        yield from case("rope_attention", run, dtype, (groups, heads, width))


def rope_rotate(mixes: list[list[tuple[int, int]]], heads: int) -> Iterator[Case]:
    """Width 20 does not divide into vectors."""
    for dtype, width, groups in product(FLOATS, (20, 64, 128), mixes):

        def run() -> None:
            layout = packed(groups)
            qkv = torch.empty(layout.tokens, 3, heads, width, dtype=dtype, requires_grad=True)
            rope = torch.empty(layout.rope_rows, 2, width // 4)
            rotated: Tensor = dinov3_ext.rope_rotate(qkv, rope, layout)
            rotated.sum().backward()

        yield from case("rope_rotate", run, dtype, (groups, heads, width))
