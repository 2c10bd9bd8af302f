"""Attention over packed sequences of several lengths, with axial rotary position embedding."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dinov3_ext import _library
from dinov3_ext._paths import (
    Path,
    Question,
    architecture_of,
    emulator_forced,
    explains,
    for_each_library,
    native_ops,
    reference_forced,
)

KERNEL_WIDTHS = (64, 128)
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
ROTATE_DTYPES = (torch.float32, *KERNEL_DTYPES)
CPU_WIDTH_STEP = 16  # the CPU kernels take heads whose width is a multiple of it
CPU_TERMS = "the CPU kernels take fp32, bf16 and fp16, head widths that are multiples of 16, and AVX2 or better"
CPU_PRODUCTS_TOKENS = 320  # the longest sequence whose scores the composition writes out on a CPU
SEQUENCE_COLUMNS = ("first token", "tokens", "prefix length", "first y-row", "first x-row", "grid width")


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each sequence of a packed token list lies and which rows of the rotary table it reads; built on the host.

    Args:
        sequences: int32 CPU Tensor (S, 6): first token, tokens, prefix length (tokens in front that are not rotated:
            CLS and registers), first y-row, first x-row, grid width. Patch token n of a sequence reads the rows
            `first y-row + n // grid width` and `first x-row + n % grid width` of the table.
        groups: `(count, tokens)` of each run of equally long, consecutive sequences, in order.
    """

    sequences: Tensor
    groups: tuple[tuple[int, int], ...]
    device_sequences: Tensor = field(init=False, repr=False)
    """`sequences` on the device of `to`."""
    token_rows: Tensor = field(init=False, repr=False)
    """int64 CPU Tensor (tokens, 2): y-row and x-row of each token; -1 for a prefix token."""
    rope_rows: int = field(init=False, repr=False)
    """Rows that the rotary table must have at least."""

    def __post_init__(self) -> None:
        _check_layout(self.sequences, self.groups)
        token_rows = _token_rows(self.sequences)
        object.__setattr__(self, "device_sequences", self.sequences.contiguous())
        object.__setattr__(self, "token_rows", token_rows)
        object.__setattr__(self, "rope_rows", int(token_rows.max()) + 1 if len(token_rows) else 0)

    @classmethod
    def uniform(
        cls, groups: Sequence[tuple[int, int, int]], *, prefix: int, tables: str = "group", first_row: int = 0
    ) -> "Layout":
        """Layout of crop groups whose tokens lie one sequence after another.

        The rotary table that goes with it holds, for each group in order, h y-rows and then w x-rows; with
        `tables="sequence"` it holds h + w rows for every sequence, so that each may have its own random box.

        Args:
            groups: `(count, h, w)` of each group: sequences, patch rows, patch columns. Empty groups are left out.
            prefix: tokens in front of the patches, 1 + R.
            tables: `"group"`: one table per group; `"sequence"`: one per sequence.
            first_row: row of the table where the first group begins.
        Returns:
            a `Layout` of sum(count * (prefix + h * w)) tokens.
        """
        if tables not in ("group", "sequence"):
            raise ValueError(f'Layout.uniform: tables must be "group" or "sequence"; got {tables!r}')
        columns, kept, token, row = [], [], 0, first_row
        for count, height, width in groups:
            if count < 0 or height < 1 or width < 1 or prefix < 0:
                raise ValueError(
                    "Layout.uniform: groups and prefix must be count >= 0, h >= 1, w >= 1, prefix >= 0; "
                    f"got group ({count}, {height}, {width}), prefix {prefix}"
                )
            tokens = prefix + height * width
            each = np.arange(count, dtype=np.int64)
            rows = row + each * (height + width if tables == "sequence" else 0)  # (count,)
            table = np.empty((count, 6), np.int32)
            for column, values in enumerate((token + each * tokens, tokens, prefix, rows, rows + height, width)):
                table[:, column] = values
            columns.append(table)
            token += count * tokens
            row += (height + width) * (count if tables == "sequence" else 1)
            if count:
                kept.append((count, tokens))
        return cls(torch.from_numpy(np.concatenate([np.zeros((0, 6), np.int32), *columns])), tuple(kept))

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences together."""
        return sum(count * tokens for count, tokens in self.groups)

    @property
    def device(self) -> torch.device:
        """Where `device_sequences` lies; the rest stays on the host."""
        return self.device_sequences.device

    def to(self, device: str | torch.device) -> "Layout":
        """The same layout with its table of sequences on `device`."""
        if self.device == torch.device(device):
            return self
        moved = copy.copy(self)
        object.__setattr__(moved, "device_sequences", self.sequences.to(device, non_blocking=True))
        return moved

    def select(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple["Layout", Tensor]:
        """Keeps some sequences and packs their tokens again from 0 (drop path).

        Args:
            indices: sequence numbers, strictly increasing, host values.
        Returns:
            (layout of the kept sequences on the host, int64 CPU Tensor (kept tokens,) that gathers them:
            `x[token_index]`). The kept sequences read the same rows of the rotary table as before.
        Raises:
            ValueError: indices out of range or not strictly increasing.
        """
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        total = self.sequences.shape[0]
        if chosen.size and (chosen[0] < 0 or chosen[-1] >= total or (np.diff(chosen) <= 0).any()):
            raise ValueError(
                f"Layout.select: indices must be strictly increasing within 0 .. {total - 1}; got {chosen.tolist()}"
            )
        old = self.sequences.numpy()[chosen]  # (kept, 6)
        lengths = old[:, 1].astype(np.int64)
        firsts = np.cumsum(lengths) - lengths
        token_index = np.repeat(old[:, 0] - firsts, lengths) + np.arange(lengths.sum())
        new = old.copy()
        new[:, 0] = firsts
        groups, begin = [], 0
        for count, tokens in self.groups:
            kept = int(((chosen >= begin) & (chosen < begin + count)).sum())
            begin += count
            if kept:
                groups.append((kept, tokens))
        return Layout(torch.from_numpy(new), tuple(groups)), torch.from_numpy(token_index)


def rope_attention(qkv: Tensor, rope: Tensor, layout: Layout, *, scale: float) -> Tensor:
    """Self-attention inside each sequence of a packed list, q and k rotated by their patch's row and column.

    out = softmax(scale * R(q) R(k)^T) v, per sequence and head. R turns the pair (e, e + E/2) by the angle of
    component e; the first E/4 components take the token's y-row, the next E/4 its x-row; prefix tokens are not turned.
    q and k are rotated in fp32 and rounded once. Under autocast the autocast type is used.

    Args:
        qkv: (tokens, 3, H, E) query, key, value; fp32, bf16, fp16 or fp64; E a multiple of 4.
        rope: (rows, 2, E/4) cosines and sines; fp32 (fp64 for fp64 qkv). No gradient.
        layout: where the sequences lie; `layout.tokens` tokens.
        scale: factor of the scores, usually E ** -0.5.
    Returns:
        (tokens, H, E) in the type of qkv (or of autocast).
    Raises:
        ValueError: wrong shape, type or device.
    """
    _check_inputs("rope_attention", qkv, rope, layout)
    if reference_forced():
        return rope_attention_reference(qkv, rope, layout, scale=scale)
    if qkv.dtype is torch.float32 and torch.is_autocast_enabled(qkv.device.type):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    if _on_gpu(qkv) and qkv.dtype in ROTATE_DTYPES:
        _library.require("rope_attention")
        return _attend_on_gpu(qkv, rope.contiguous(), layout, scale)
    if scale > 0 and _has_cpu_kernel("rope_attention", qkv):
        table, groups = layout.device_sequences, _flat(layout.groups)
        return native_ops().rope_attention(qkv, rope.contiguous(), table, groups, scale)[0]
    return _attend_by_group(_rotate(qkv, rope, layout), qkv, layout.groups, scale)


def rope_attention_reference(qkv: Tensor, rope: Tensor, layout: Layout, *, scale: float) -> Tensor:
    """The plain twin of `rope_attention`: every sequence on its own, the score matrix written out.

    Args, result: as `rope_attention`; in fp64 everything is fp64, otherwise sums are fp32 and the result is rounded
    to the type of qkv.
    """
    _check_inputs("rope_attention_reference", qkv, rope, layout)
    query, key = rope_rotate_reference(qkv, rope, layout).unbind(1)
    wide = torch.float64 if qkv.dtype is torch.float64 else torch.float32
    outs = []
    with torch.autocast(qkv.device.type, enabled=False):
        lengths = layout.sequences[:, 1].tolist()
        # split, not slices: the backward of each slice fills a gradient of all tokens (9 s instead of 1 for a step)
        for parts in zip(*(x.split(lengths) for x in (query, key, qkv[:, 2]))):
            q, k, v = (part.to(wide).transpose(0, 1) for part in parts)  # (H, T, E)
            weights = (scale * (q @ k.transpose(1, 2))).softmax(-1)  # (H, T, T)
            outs.append((weights @ v).transpose(0, 1).to(qkv.dtype))
    return torch.cat(outs) if outs else qkv.new_empty(0, *qkv.shape[2:])


def rope_rotate(qkv: Tensor, rope: Tensor, layout: Layout) -> Tensor:
    """Query and key turned by their patch's row and column; v is not read.

    out[e] = x[e] cos - x[e + E/2] sin,  out[e + E/2] = x[e + E/2] cos + x[e] sin,  in fp32, rounded once.

    Args, errors: as `rope_attention`.
    Returns:
        (tokens, 2, H, E) in the type of qkv.
    """
    _check_inputs("rope_rotate", qkv, rope, layout)
    if reference_forced():
        return rope_rotate_reference(qkv, rope, layout)
    if (_on_gpu(qkv) and qkv.dtype in ROTATE_DTYPES) or _has_cpu_kernel("rope_rotate", qkv):
        _library.require("rope_rotate")
        return native_ops().rope_rotate(qkv, rope.contiguous(), layout.device_sequences, _flat(layout.groups))
    return _rotate(qkv, rope, layout)


def rope_rotate_reference(qkv: Tensor, rope: Tensor, layout: Layout) -> Tensor:
    """The plain twin of `rope_rotate`: full tables of cosines and sines, sequence by sequence."""
    _check_inputs("rope_rotate_reference", qkv, rope, layout)
    wide = torch.float64 if qkv.dtype is torch.float64 else torch.float32
    outs = []
    pieces = qkv[:, :2].split(layout.sequences[:, 1].tolist())  # (T, 2, H, E) each
    for qk, (_, tokens, prefix, y_row, x_row, width) in zip(pieces, layout.sequences.tolist()):
        patch = torch.arange(tokens - prefix, device=qkv.device)
        y, x = rope[y_row + patch // max(width, 1)], rope[x_row + patch % max(width, 1)]  # (N, 2, E/4) each
        cos, sin = torch.cat([y, x], -1).to(wide)[:, :, None, None].unbind(1)  # (N, 1, 1, E/2) each
        low, high = qk[prefix:].to(wide).chunk(2, -1)  # (N, 2, H, E/2) each
        turned = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
        outs.append(torch.cat([qk[:prefix], turned.to(qkv.dtype)]))
    return torch.cat(outs) if outs else qkv.new_empty(0, 2, *qkv.shape[2:])


# ---- GPUs (and, in the emulator, CPU tensors) ----


def _on_gpu(qkv: Tensor) -> bool:
    return qkv.device.type == "cuda" or (qkv.device.type == "cpu" and emulator_forced())


@torch.compiler.assume_constant_result
def _composed_tokens(device: torch.device) -> int:
    """Tokens of a sequence from which on PyTorch's attention is taken."""
    return _library.module.rope_attention_composed_tokens(architecture_of(device))


def _attend_on_gpu(qkv: Tensor, rope: Tensor, layout: Layout, scale: float) -> Tensor:
    """Own kernels where there are some; else the rotation's kernel, then PyTorch's attention."""
    has_kernel = qkv.dtype in KERNEL_DTYPES and qkv.shape[3] in KERNEL_WIDTHS and scale > 0
    limit = _composed_tokens(qkv.device) if has_kernel else 0
    runs: list[tuple[bool, list[tuple[int, int]]]] = []  # neighbouring groups that take the same path, together
    for group in layout.groups:
        # A branch, by which a compiled graph is guarded.
        kernel = True if group[1] < limit else False
        if not runs or runs[-1][0] is not kernel:
            runs.append((kernel, []))
        runs[-1][1].append(group)
    ops, outs, token, sequence = native_ops(), [], 0, 0
    for kernel, part in runs:
        end = token + sum(count * tokens for count, tokens in part)
        end_sequence = sequence + sum(count for count, _ in part)
        x, table = qkv[token:end], layout.device_sequences[sequence:end_sequence]
        if kernel:
            outs.append(ops.rope_attention(x, rope, table, _flat(part), scale)[0])
        else:
            outs.append(_attend_by_group(ops.rope_rotate(x, rope, table, _flat(part)), x, part, scale))
        token, sequence = end, end_sequence
    if len(outs) == 1:
        return outs[0]
    return torch.cat(outs) if outs else qkv.new_empty(0, *qkv.shape[2:])


def _flat(groups: Sequence[tuple[int, int]]) -> list[int]:
    """count0, tokens0, count1, tokens1, ...: what the registered ops take."""
    return [number for group in groups for number in group]


# ---- CPUs ----


def _has_cpu_kernel(op: str, qkv: Tensor) -> bool:
    """Whether the CPU kernels serve it. In fp32, bf16 and fp16 they are faster than the composition at every length
    measured, 54 to 1029 tokens (benchmarks/FACTS.md); the portable code is not, PyTorch's own products win there.

    Raises:
        ImportError: they would, and the native library is not built.
    """
    if qkv.device.type != "cpu" or qkv.dtype not in ROTATE_DTYPES or qkv.shape[3] % CPU_WIDTH_STEP:
        return False
    _library.require(op)
    return _cpu_variant() != "portable"


@torch.compiler.assume_constant_result
def _cpu_variant() -> str:
    return _library.module.cpu_variant()


# ---- PyTorch operations ----


def _attend_by_group(rotated: Tensor, qkv: Tensor, groups: Sequence[tuple[int, int]], scale: float) -> Tensor:
    """(tokens, 2, H, E) rotated, (tokens, 3, H, E) -> (tokens, H, E): one attention per group."""
    query, key = rotated.unbind(1)  # 2 x (tokens, H, E)
    outs, first = [], 0
    for count, tokens in groups:
        part = slice(first, first + count * tokens)
        q, k, v = (x[part].unflatten(0, (count, tokens)).transpose(1, 2) for x in (query, key, qkv[:, 2]))
        out = _attend(q, k, v, scale)  # (count, H, T, E)
        outs.append(out.transpose(1, 2).flatten(0, 1))  # (count * T, H, E)
        first = part.stop
    return torch.cat(outs) if outs else qkv.new_empty(0, *qkv.shape[2:])


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v of equally long sequences, (count, H, T, E) each.

    Plain products on a CPU up to CPU_PRODUCTS_TOKENS: PyTorch's fused CPU attention spends 5 to 9 times as long in its
    bf16 backward at 14 to 69 tokens (benchmarks/FACTS.md). Sums and softmax are fp32 inside either.
    """
    if q.device.type == "cpu" and q.shape[2] <= CPU_PRODUCTS_TOKENS:
        return torch.matmul(torch.matmul(q * scale, k.transpose(-1, -2)).softmax(-1), v)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _rotate(qkv: Tensor, rope: Tensor, layout: Layout) -> Tensor:
    """All sequences at once: (tokens, 3, H, E) -> (tokens, 2, H, E)."""
    rope = rope.to(torch.promote_types(rope.dtype, qkv.dtype))  # fp32, or fp64 for fp64 qkv
    quarter = rope.shape[2]
    still = torch.stack([rope.new_ones(quarter), rope.new_zeros(quarter)])  # (2, E/4), row -1: prefix tokens
    rows = torch.cat([rope, still[None]])[layout.token_rows.to(rope.device)]  # (tokens, y|x, cos|sin, E/4)
    cos, sin = rows.transpose(1, 2).flatten(2).unbind(1)  # (tokens, E/2) each
    cos = torch.cat([cos, cos], -1)[:, None, None]  # (tokens, 1, 1, E)
    sin = torch.cat([-sin, sin], -1)[:, None, None]
    return _Rotation.apply(qkv, cos, sin)


class _Rotation(torch.autograd.Function):
    """x cos + swapped(x) sin over whole rows, where swapped exchanges the halves: half the time of working on strided
    halves (6.6 against 13.2 ms for 8832 tokens x 3 heads x 64 on one core). The backward turns the other way."""

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(qkv[:, :2], cos, sin)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        turned = _turned(gradient, cos, -sin)  # (tokens, 2, H, E)
        return torch.cat([turned, torch.zeros_like(turned[:, :1])], 1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype, copy=True)  # (tokens, 2, H, E), fp32
    swapped = wide.roll(x.shape[-1] // 2, -1)
    return wide.mul_(cos).addcmul_(swapped, sin).to(x.dtype)


def _token_rows(sequences: Tensor) -> Tensor:
    """(S, 6) -> int64 (tokens, 2): rows of the rotary table, -1 for prefix tokens."""
    _, lengths, prefix, y_row, x_row, width = sequences.numpy().astype(np.int64).T  # (S,) each
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    each = np.repeat(np.arange(len(lengths)), lengths)  # (tokens,) sequence number
    patch, wide = within - prefix[each], np.maximum(width[each], 1)
    rows = np.stack([y_row[each] + patch // wide, x_row[each] + patch % wide], 1)
    rows[patch < 0] = -1
    return torch.from_numpy(rows)


def _check_layout(sequences: Tensor, groups: tuple[tuple[int, int], ...]) -> None:
    if sequences.ndim != 2 or sequences.shape[1] != 6 or sequences.dtype is not torch.int32 or sequences.is_cuda:
        raise ValueError(
            f"Layout: sequences must be an int32 CPU tensor (S, 6) = {', '.join(SEQUENCE_COLUMNS)}; "
            f"got {sequences.dtype} {tuple(sequences.shape)} on {sequences.device}"
        )
    table = sequences.numpy().astype(np.int64)
    expected = np.repeat([t for _, t in groups], [c for c, _ in groups]) if groups else np.zeros(0, np.int64)
    if not np.array_equal(table[:, 1], expected):
        raise ValueError(
            "Layout: groups must list (count, tokens) of consecutive sequences; "
            f"got groups {groups} for sequences of {table[:, 1].tolist()} tokens"
        )
    if not np.array_equal(table[:, 0], np.cumsum(table[:, 1]) - table[:, 1]):
        raise ValueError(f"Layout: sequences must lie one after another from token 0; got {table[:, 0].tolist()}")
    if (table < 0).any() or (table[:, 2] > table[:, 1]).any():
        raise ValueError(f"Layout: need 0 <= prefix length <= tokens and no negative entry; got {table.tolist()}")


def _check_inputs(op: str, qkv: Tensor, rope: Tensor, layout: Layout) -> None:
    if qkv.ndim != 4 or qkv.shape[1] != 3 or qkv.shape[3] % 4:
        raise ValueError(f"{op}: qkv must be (tokens, 3, H, E) with E a multiple of 4; got {tuple(qkv.shape)}")
    if not qkv.is_floating_point():
        raise ValueError(f"{op}: qkv must be floating point; got {qkv.dtype}")
    if rope.ndim != 3 or rope.shape[1:] != (2, qkv.shape[3] // 4):
        raise ValueError(f"{op}: rope must be (rows, 2, E/4) = (rows, 2, {qkv.shape[3] // 4}); got {tuple(rope.shape)}")
    if rope.dtype is not torch.float32 and not (rope.dtype is torch.float64 and qkv.dtype is torch.float64):
        raise ValueError(f"{op}: rope must be float32 (float64 for a float64 qkv); got {rope.dtype}")
    if rope.shape[0] < layout.rope_rows:
        raise ValueError(f"{op}: rope must have at least {layout.rope_rows} rows for this layout; got {rope.shape[0]}")
    if layout.tokens != qkv.shape[0]:
        raise ValueError(f"{op}: layout must have as many tokens as qkv, {qkv.shape[0]}; got {layout.tokens}")
    if qkv.device != rope.device or qkv.device != layout.device:
        raise ValueError(
            f"{op}: qkv, rope and layout must be on one device; got {qkv.device}, {rope.device}, {layout.device} "
            "(layout.to(device) moves it)"
        )


@explains("rope_attention", "T", "H", "E")
def _explain_attention(question: Question) -> Path:
    if question.device.type == "cpu" and (kernel := _explain_cpu_kernel("rope_attention", question)):
        return kernel
    if question.device.type != "cuda" or question.dtype not in ROTATE_DTYPES:
        products = (
            f"plain products up to {CPU_PRODUCTS_TOKENS} tokens, scaled_dot_product_attention beyond; {CPU_TERMS}"
            if question.device.type == "cpu"
            else "one scaled_dot_product_attention"
        )
        return Path("rope_attention", "composition", f"rotated in PyTorch, then per crop group {products}")
    if missing := _missing_cuda("rope_attention"):
        return missing
    composed = "own CUDA kernel for the rotation, then PyTorch's scaled_dot_product_attention per crop group"
    if question.dtype not in KERNEL_DTYPES:
        return Path("rope_attention", "composition", f"{composed}: attention kernels take bf16 and fp16")
    if question.shape is None or question.architecture is None:
        return Path(
            "rope_attention",
            "kernel",
            "own CUDA kernels for E = 64 and 128; tiles, and where PyTorch's attention is taken instead, depend on "
            "shape and architecture",
        )
    tokens, _, width = question.shape
    name = str(question.dtype).removeprefix("torch.")
    plan = _library.module.rope_attention_plan(name, width, tokens, question.architecture)
    if plan["path"] == "composed":
        reason = "this length" if width in KERNEL_WIDTHS else f"no attention kernel for E = {width}"
        return Path("rope_attention", "composition", f"{composed}: {reason} on sm_{question.architecture}")
    memory = f"{plan['warps']} warps and {plan['shared_bytes'] / 1024:.0f} KB of shared memory a block"
    if plan["path"] == "resident":
        reason = f"keys and values of {plan['pairs']} (sequence, head) pairs resident in a block, {memory}"
    else:
        reason = f"rotated first, then keys and values streaming past {plan['rows']} queries, {memory}"
    back = _library.module.rope_attention_backward_plan(width, tokens, question.architecture)
    memory = f"{back['warps']} warps and {back['shared_bytes'] / 1024:.0f} KB a block"
    return Path("rope_attention", "kernel", f"own CUDA kernel: {reason}; backward {back['path']}, {memory}")


@explains("rope_rotate", "T", "H", "E")
def _explain_rotate(question: Question) -> Path:
    if question.device.type == "cpu" and (kernel := _explain_cpu_kernel("rope_rotate", question)):
        return kernel
    if question.device.type != "cuda" or question.dtype not in ROTATE_DTYPES:
        return Path("rope_rotate", "composition", f"PyTorch operations over all sequences at once; {CPU_TERMS}")
    return _missing_cuda("rope_rotate") or Path("rope_rotate", "kernel", "own CUDA kernel, one warp a token")


def _explain_cpu_kernel(op: str, question: Question) -> Path | None:
    """None where the composition serves it."""
    if question.dtype not in ROTATE_DTYPES or (question.shape and question.shape[2] % CPU_WIDTH_STEP):
        return None
    if _library.module is None:
        return Path(op, "missing", _library.problem)
    variant = _library.module.cpu_variant()
    if variant == "portable":
        return None
    why = "" if question.shape else f"; {CPU_TERMS}"
    return Path(op, "kernel", f"own CPU kernel, {variant}{why}")


def _missing_cuda(op: str) -> Path | None:
    if _library.module is None:
        return Path(op, "missing", _library.problem)
    if _library.build_info()["cuda"] is None:
        return Path(op, "missing", "the library was built without nvcc: no CUDA kernels")
    return None


# ---- fakes and backwards of the registered ops ----


def _saveable(table: Tensor) -> Tensor:
    """Tables outlive a step, and may have been built in inference mode, whose tensors autograd refuses to keep."""
    return table.clone() if table.is_inference() else table


@for_each_library
def _register(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)
    fake, autograd = torch.library.register_fake, torch.library.register_autograd

    @fake(f"{namespace}::rope_rotate")
    def _(qkv: Tensor, rope: Tensor, sequences: Tensor, groups: list[int]) -> Tensor:
        return qkv.new_empty(qkv.shape[0], 2, *qkv.shape[2:])

    @fake(f"{namespace}::rope_rotate_backward")
    def _(grad: Tensor, rope: Tensor, sequences: Tensor, groups: list[int]) -> Tensor:
        return grad.new_empty(grad.shape)

    @fake(f"{namespace}::rope_attention")
    def _(qkv: Tensor, rope: Tensor, sequences: Tensor, groups: list[int], scale: float) -> tuple[Tensor, Tensor]:
        tokens, _, heads, width = qkv.shape
        return qkv.new_empty(tokens, heads, width), qkv.new_empty(heads, tokens, dtype=torch.float32)

    @fake(f"{namespace}::rope_attention_backward")
    def _(
        grad: Tensor,
        qkv: Tensor,
        rope: Tensor,
        sequences: Tensor,
        groups: list[int],
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> Tensor:
        return qkv.new_empty(qkv.shape)

    def keep_rotation(ctx, inputs: tuple, output: Tensor) -> None:
        _, rope, sequences, ctx.groups = inputs
        ctx.save_for_backward(_saveable(rope), _saveable(sequences))

    def turn_back(ctx, grad: Tensor) -> tuple:
        turned = ops.rope_rotate_backward(grad, *ctx.saved_tensors, ctx.groups)  # (tokens, 2, H, E)
        return F.pad(turned, (0, 0, 0, 0, 0, 1)), None, None, None  # v is not read

    autograd(f"{namespace}::rope_rotate", turn_back, setup_context=keep_rotation)

    def keep_attention(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        qkv, rope, sequences, ctx.groups, ctx.scale = inputs
        ctx.save_for_backward(qkv, _saveable(rope), _saveable(sequences), *output)
        ctx.set_materialize_grads(False)

    def attention_backward(ctx, grad: Tensor | None, _: None) -> tuple:
        if grad is None:
            return None, None, None, None, None
        qkv, rope, sequences, out, lse = ctx.saved_tensors
        of_qkv = ops.rope_attention_backward(grad, qkv, rope, sequences, ctx.groups, out, lse, ctx.scale)
        return of_qkv, None, None, None, None

    autograd(f"{namespace}::rope_attention", attention_backward, setup_context=keep_attention)

    @register_flop_formula(ops.rope_attention)
    def _(qkv: torch.Size, rope: torch.Size, sequences: torch.Size, groups: list[int], *_, **__) -> int:
        return _products(2, qkv, groups)

    @register_flop_formula(ops.rope_attention_backward)
    def _(
        grad: torch.Size, qkv: torch.Size, rope: torch.Size, sequences: torch.Size, groups: list[int], *_, **__
    ) -> int:
        return _products(4, qkv, groups)  # the scores, made again, are a fifth that the gradient itself does not need


def _products(number: int, qkv: torch.Size, groups: list[int]) -> int:
    """FLOPs of `number` products of all sequences and heads, a multiplication and an addition each."""
    scores = sum(count * tokens**2 for count, tokens in zip(groups[::2], groups[1::2]))
    return 2 * number * scores * qkv[2] * qkv[3]
