"""Problems for the public ops on any device: inputs in float64, and what ours, plain PyTorch and the float64 reference
make of them, forward and backward."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_ext import (
    Layout,
    Potentials,
    assignment_cross_entropy,
    assignment_cross_entropy_reference,
    gram_loss,
    gram_loss_reference,
    rope_attention,
    rope_attention_reference,
    rope_rotate,
    rope_rotate_reference,
    sinkhorn_knopp,
    sinkhorn_knopp_reference,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """One op at one shape in one type.

    Args:
        op: its name.
        name: of the problem, unique.
        dtype: of the tensors that are rounded to it, the first `rounded` ones; the others are fp32.
        rounded: how many.
        draw: `draw(generator) -> tensors` in float64 on the CPU; the last one is the cotangent of the result, where
            there is a gradient.
        ours, plain, reference: functions of the tensors before the cotangent; the gradient is taken to the first one.
            `plain`: what PyTorch makes of them in `dtype`; `reference`: given float64 tensors of the same values.
        gradient: whether there is one.
    """

    op: str
    name: str
    dtype: torch.dtype
    rounded: int
    draw: Callable[[torch.Generator], tuple[Tensor, ...]]
    ours: Function
    plain: Function
    reference: Function
    gradient: bool = True

    def tensors(self, device: str, seed: int = 0) -> list[Tensor]:
        """Inputs on a device, in their types."""
        drawn = self.draw(torch.Generator().manual_seed(seed))
        types = [self.dtype] * self.rounded + [torch.float32] * (len(drawn) - self.rounded)
        return [tensor.to(device=device, dtype=dtype) for tensor, dtype in zip(drawn, types)]

    def run(self, function: Function, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """(result,) or (result, gradient of the first tensor)."""
        if not self.gradient:
            return (function(*tensors),)
        x, *others, cotangent = tensors
        x = x.detach().requires_grad_()
        out = function(x, *others)
        return out.detach(), torch.autograd.grad(out, x, cotangent.to(out.dtype))[0]

    def exact(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """The float64 results for the same (rounded) inputs."""
        return self.run(self.reference, [tensor.double() for tensor in tensors])


def problems(*, long: bool = True) -> Iterator[Problem]:
    """All of them; without `long` a few small ones for each op and type."""
    tokens = (1, 5, 6, 16, 54, 64, 65, 201, 261, 272, 273, 1029, 2309) if long else (6, 65)
    mixes = [[(2, count)] for count in tokens] + [[(3, 261), (4, 54), (1, 1029)] if long else [(2, 21), (3, 9)]]
    for dtype, width, mix in product(FLOATS, (64, 128), mixes):
        yield attention(dtype, mix, 2, width)
    for dtype, width in product(FLOATS, (64, 128)):
        yield rotation(dtype, mixes[-1], 3, width)
    shapes = [(1, 1, 8), (2, 49, 384), (3, 196, 192), (2, 256, 1024), (2, 300, 333)] if long else [(2, 49, 72)]
    for dtype, shape, clip in product(FLOATS, shapes, ("none", "both", "teacher")):
        yield gram(dtype, shape, clip)
    sizes = [(3, 2), (16, 1000), (128, 8192), (64, 70001), (300, 4096)] if long else [(16, 1000)]
    for dtype, (rows, prototypes) in product(FLOATS, sizes):
        yield sinkhorn(dtype, rows, prototypes)
    sizes = [(1, 1, 300, 4096), (10, 2, 8, 8192), (3, 2, 5, 70001), (1, 1, 2, 500)] if long else [(3, 2, 4, 1000)]
    for dtype, shape, weighted in product(FLOATS, sizes, (False, True)):
        yield cross_entropy(dtype, *shape, weighted)


def name(op: str, dtype: torch.dtype, *facts: object) -> str:
    return "-".join([op, str(dtype).removeprefix("torch."), *(str(fact).replace(" ", "") for fact in facts)])


def packed(groups: list[tuple[int, int]]) -> Layout:
    """(count, tokens), with five prefix tokens or fewer; an even number of patches lies on two lines."""
    prefix = min(5, *(tokens - 1 for _, tokens in groups))
    grids = [(count, 2 - (tokens - prefix) % 2, tokens - prefix) for count, tokens in groups]
    if prefix == 0:
        return Layout.uniform([(count, 1, patches) for count, _, patches in grids], prefix=0, tables="sequence")
    return Layout.uniform([(c, lines, p // lines) for c, lines, p in grids], prefix=prefix, tables="sequence")


def turn(generator: torch.Generator, rows: int, width: int) -> Tensor:
    """A rotary table (rows, 2, E/4), representable in fp32."""
    angles = 6.3 * torch.rand(rows, width // 4, dtype=torch.float64, generator=generator)
    return torch.stack([angles.cos(), angles.sin()], 1).float().double()


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def attention(dtype: torch.dtype, groups: list[tuple[int, int]], heads: int, width: int) -> Problem:
    layout, scale = packed(groups), width**-0.5
    layouts = {device: layout.to(device) for device in devices()}

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        qkv, rope = normal(generator, layout.tokens, 3, heads, width), turn(generator, layout.rope_rows, width)
        return qkv, rope, normal(generator, layout.tokens, heads, width)

    def plain(qkv: Tensor, rope: Tensor) -> Tensor:
        rotated, outs, first = rope_rotate_reference(qkv, rope, layouts[qkv.device.type]), [], 0
        for count, tokens in layout.groups:
            part = slice(first, first + count * tokens)
            parts = (rotated[part, 0], rotated[part, 1], qkv[part, 2])
            three = (x.unflatten(0, (count, tokens)).transpose(1, 2) for x in parts)
            outs.append(F.scaled_dot_product_attention(*three, scale=scale).transpose(1, 2).flatten(0, 1))
            first = part.stop
        return torch.cat(outs)

    return Problem(
        "rope_attention", name("rope_attention", dtype, groups, width), dtype, 1, draw,
        lambda x, rope: rope_attention(x, rope, layouts[x.device.type], scale=scale), plain,
        lambda x, rope: rope_attention_reference(x, rope, layouts[x.device.type], scale=scale),
    )  # fmt: skip


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def rotation(dtype: torch.dtype, groups: list[tuple[int, int]], heads: int, width: int) -> Problem:
    layout = packed(groups)
    layouts = {device: layout.to(device) for device in devices()}

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        qkv, rope = normal(generator, layout.tokens, 3, heads, width), turn(generator, layout.rope_rows, width)
        return qkv, rope, normal(generator, layout.tokens, 2, heads, width)

    def reference(x: Tensor, rope: Tensor) -> Tensor:
        return rope_rotate_reference(x, rope, layouts[x.device.type])

    title = name("rope_rotate", dtype, groups, width)
    ours = lambda x, rope: rope_rotate(x, rope, layouts[x.device.type])  # noqa: E731
    return Problem("rope_rotate", title, dtype, 1, draw, ours, reference, reference)


def gram(dtype: torch.dtype, shape: tuple[int, int, int], clip: str) -> Problem:
    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        teacher = normal(generator, *shape) + 0.5 * normal(generator, 1, 1, shape[2])  # mean similarity above zero
        return teacher + 0.2 * normal(generator, *shape), teacher, torch.ones((), dtype=torch.float64)

    def of(function: Function) -> Function:
        return lambda student, teacher: function(student, teacher, clip=clip)

    reference, title = of(gram_loss_reference), name("gram_loss", dtype, shape, clip)
    return Problem("gram_loss", title, dtype, 2, draw, of(gram_loss), reference, reference)


def sinkhorn(dtype: torch.dtype, rows: int, prototypes: int) -> Problem:
    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        return (normal(generator, rows, prototypes),)

    def of(function: Callable[..., Potentials]) -> Function:
        def run(logits: Tensor) -> Tensor:
            found = function(logits, temperature=0.07)
            return found.rows[:, None] + found.columns

        return run

    reference, title = of(sinkhorn_knopp_reference), name("sinkhorn_knopp", dtype, rows, prototypes)
    return Problem("sinkhorn_knopp", title, dtype, 1, draw, of(sinkhorn_knopp), reference, reference, gradient=False)


def cross_entropy(dtype: torch.dtype, crops: int, views: int, rows: int, prototypes: int, weighted: bool) -> Problem:
    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        student, teacher = normal(generator, crops, rows, prototypes), normal(generator, views, rows, prototypes)
        teacher = teacher.to(dtype).double()  # the op relies on assignments that sum to one
        found = sinkhorn_knopp_reference(teacher.flatten(0, 1), temperature=0.07)
        factors = torch.rand(rows, dtype=torch.float64, generator=generator)
        return student, teacher, found.rows, found.columns, factors, normal(generator, crops, views)

    def of(function: Function) -> Function:
        temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.07}

        def run(student: Tensor, teacher: Tensor, row: Tensor, column: Tensor, factors: Tensor) -> Tensor:
            weight = factors if weighted else None
            return function(student, teacher, Potentials(row, column), weight=weight, **temperatures)

        return run

    def exact(student: Tensor, teacher: Tensor, row: Tensor, column: Tensor, factors: Tensor) -> Tensor:
        """As the op is documented. The reference's form is equal only where the assignments sum to one exactly, and
        potentials rounded to fp32 are off by their own rounding: 4e-6 of a row where potentials are 40."""
        s = student / 0.1
        p = (teacher / 0.07 + row.view(views, rows, 1) + column).exp()
        each = s.logsumexp(-1)[:, None] - torch.einsum("abk,cbk->cab", p, s)  # (C, A, B)
        return (each * factors).sum(-1) if weighted else each.mean(-1)

    shape = (crops, views, rows, prototypes)
    title = name("assignment_cross_entropy", dtype, shape, "weighted" if weighted else "mean")
    ours, plain = of(assignment_cross_entropy), of(assignment_cross_entropy_reference)
    return Problem("assignment_cross_entropy", title, dtype, 2, draw, ours, plain, exact)
