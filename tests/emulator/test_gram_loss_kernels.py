"""CUDA kernels of gram_loss, run by the emulator: accuracy, clips, short rows, strides, schedules, counted work."""

from types import ModuleType

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

import dinov3_ext
from dinov3_ext import _library, gram_loss, gram_loss_reference

CLIPS = ("none", "both", "teacher")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATCHES = (1, 2, 5, 16, 49, 63, 64, 65, 128, 129, 196, 256, 300)
WIDTHS = (8, 31, 64, 65, 100, 384)
# Every number of patches, every width, one image or three.
SHAPES = [(3 if i % 3 == 1 else 1, patches, WIDTHS[i % len(WIDTHS)]) for i, patches in enumerate(PATCHES)]
MATRIX = [(images, n, d) for images in (1, 3) for n in PATCHES for d in (*WIDTHS, 1024)]


def features(
    shape: tuple[int, int, int], apart: float, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(student, teacher), `apart` from each other; similarities of both signs."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(shape, dtype=torch.float64, generator=generator) + 0.2
    student = teacher + apart * torch.randn(shape, dtype=torch.float64, generator=generator)
    return student.to(dtype), teacher.to(dtype)


def loss_and_gradient(function, student: Tensor, teacher: Tensor, clip: str) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    loss = function(student, teacher, clip=clip)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def emulated(student: Tensor, teacher: Tensor, clip: str = "none") -> tuple[Tensor, Tensor]:
    with dinov3_ext.use("emulator"):
        return loss_and_gradient(gram_loss, student, teacher, clip)


def exact(student: Tensor, teacher: Tensor, clip: str = "none") -> tuple[Tensor, Tensor]:
    return loss_and_gradient(gram_loss_reference, student.double(), teacher.double(), clip)


def check_accuracy(shape: tuple[int, int, int], dtype: torch.dtype, *, truncated: bool = False) -> None:
    """The accuracy rule for the losses and for the gradients of all draws together, each divided by a power of two near
    the true one. One loss, or the gradient of a few patches, hangs on so few similarities that the error of plain
    PyTorch may be next to nothing by chance: few patches get more draws."""
    for apart in (0.3, 0.03):
        results: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"losses": [], "gradients": []}
        for draw in range(24 if shape[1] <= 16 else 9 if shape[1] <= 129 else 3):
            student, teacher = features(shape, apart, dtype, draw)
            clip = CLIPS[draw % 3]
            ours = emulated(student, teacher, clip)
            plain = loss_and_gradient(gram_loss_reference, student, teacher, clip)
            true = exact(student, teacher, clip)
            assert ours[0].dtype is torch.float32
            assert ours[1].dtype is dtype
            if shape[1] == 1:  # a row with itself
                assert ours[0] == 0
                assert ours[1].abs().max() == 0
                continue
            for what, *three in zip(results, ours, plain, true, strict=True):
                largest = three[2].abs().max()  # 0 where clips leave nothing of two patches
                scale = 2.0 ** -torch.log2(largest).floor().item() if largest else 1.0
                results[what].append(tuple(x.double().mul(scale).to(x.dtype).flatten() for x in three))
        for what, several in results.items():
            if not several:
                continue
            ours, plain, true = (torch.cat(column) for column in zip(*several, strict=True))
            if what == "losses" and truncated:  # the bias of cutting off, some 2e-7: counted, and a tensor core's own
                torch.testing.assert_close(ours.double(), true, rtol=1e-6, atol=0)
                continue
            slack = 1.0
            if what == "losses" and shape[1] <= 16:
                # The emulator adds 32 products one by one, plain PyTorch in 8 or 16 lanes: with so few similarities
                # that shows (1.2 of what the rule allows).
                slack *= 1.5
            if shape[2] <= 8 and dtype is torch.float32:
                # A pair of fp16 numbers holds 23 of fp32's 24 bits; plain PyTorch's sum of 8 products hardly rounds
                # (1.3 of what the rule allows).
                slack *= 1.5
            plain = true + slack * (plain.double() - true)
            assert_accurate(ours, plain, true, what=f"{what} {apart}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(emulator: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_accuracy(shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MATRIX, ids=str)
def test_accuracy_of_the_full_matrix(emulator: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_accuracy(shape, dtype)


@pytest.mark.parametrize("shape", [(1, 65, 384), (1, 196, 100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_where_tensor_cores_cut_off(
    emulator: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Sums that a tensor core rounds towards zero: the two levels of summation keep that small."""
    emulator.configure(products="truncated")
    check_accuracy(shape, dtype, truncated=True)


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_teacher_of_another_type(emulator: ModuleType, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = features((2, 70, 40), 0.1)
    student, teacher = student.to(dtype), teacher.to(teacher_dtype)
    ours, true = emulated(student, teacher), exact(student, teacher)
    plain = loss_and_gradient(gram_loss_reference, student, teacher, "none")
    assert ours[1].dtype is dtype
    assert_accurate(ours[1], plain[1], true[1])
    torch.testing.assert_close(ours[0].double(), true[0], rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", CLIPS)
def test_short_and_zero_rows(emulator: ModuleType, dtype: torch.dtype, clip: str) -> None:
    """Rows not longer than 1e-12 are divided by that; their gradient is some 1e12 times that of the others."""
    student, teacher = features((2, 66, 48), 0.3, dtype)
    student[0, 3] = teacher[0, 5] = student[1, 65] = 0
    student[0, 64] *= 1e-14
    teacher[1, 7] *= 1e-14
    short = torch.zeros(2, 66, dtype=torch.bool)
    short[0, 3] = short[1, 65] = short[0, 64] = True
    ours, true = emulated(student, teacher, clip), exact(student, teacher, clip)
    plain = loss_and_gradient(gram_loss_reference, student, teacher, clip)
    for rows in (short, ~short):
        assert_accurate(ours[1][rows], plain[1][rows], true[1][rows])
    torch.testing.assert_close(ours[0].double(), true[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_similarities_of_exactly_zero_pass_the_gradient(emulator: ModuleType, dtype: torch.dtype) -> None:
    student, teacher = torch.eye(8, dtype=dtype)[None], torch.ones(1, 8, 8, dtype=dtype)
    clipped, free = emulated(student, teacher, "both"), emulated(student, teacher)
    assert torch.equal(clipped[1], free[1])
    assert clipped[1].abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [2.0**-20, 2.0**10])
def test_scales_of_rows_cost_nothing(emulator: ModuleType, dtype: torch.dtype, scale: float) -> None:
    """Rows are scaled by powers of two, exactly: the loss is bit-equal, the gradient the inverse scale of it."""
    if dtype is torch.float16 and scale < 1:
        pytest.skip("fp16 features of that size lose bits before they are read")
    student, teacher = features((1, 20, 24), 0.1, dtype)
    ours, scaled = emulated(student, teacher), emulated(student * scale, teacher * scale)
    assert torch.equal(ours[0], scaled[0])
    if dtype is not torch.float16:
        assert torch.equal(ours[1], scaled[1] * scale)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_reaches_the_loss(emulator: ModuleType, dtype: torch.dtype, value: float) -> None:
    for which in (0, 1):
        for patches in (1, 9):
            both = features((2, patches, 16), 0.1, dtype)
            both[which][1, 0, 3] = value
            assert emulated(*both)[0].isnan()


def strided(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs of (2, 37, 40) that are not contiguous."""
    wide = features((2, 37, 100), 0.1, dtype)
    columns = features((2, 40, 37), 0.1, dtype)
    images = features((37, 2, 40), 0.1, dtype)
    one = features((1, 37, 40), 0.1, dtype)
    return {
        "columns 8 to 48 of 100": (wide[0][..., 8:48], wide[1][..., 8:48]),
        "columns 3 to 43 of 100": (wide[0][..., 3:43], wide[1][..., 5:45]),
        "every second column": (wide[0][..., :80:2], wide[1][..., 1:81:2]),
        "transposed": (columns[0].mT, columns[1].mT),
        "images inside": (images[0].transpose(0, 1), images[1].transpose(0, 1)),
        "one image twice": (one[0].expand(2, -1, -1), one[1].expand(2, -1, -1)),
        "one teacher row": (wide[0][..., :40], wide[1][:, :1, :40].expand(-1, 37, -1)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", strided(torch.float32))
def test_strides(emulator: ModuleType, name: str, dtype: torch.dtype) -> None:
    student, teacher = strided(dtype)[name]
    ours, true = emulated(student, teacher), exact(student, teacher)
    plain = loss_and_gradient(gram_loss_reference, student, teacher, "none")
    assert_accurate(ours[1], plain[1], true[1])
    torch.testing.assert_close(ours[0].double(), true[0], rtol=2e-6, atol=0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_past_32_bits(emulator: ModuleType, axis: int) -> None:
    """Strides that reach behind 2^31 elements; the untouched storage between costs no memory."""
    shape, far = (2, 3, 8), 2**30 + 8
    strides = [24, 8, 1]
    strides[axis] = -(-(2**31 + 64) // (shape[axis] - 1)) if axis < 2 else far // 2
    inputs = []
    for x in features(shape, 0.1, torch.bfloat16):
        last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        view = torch.empty(last + 1, dtype=torch.bfloat16).as_strided(shape, strides)
        assert last >= 2**31
        inputs.append(view.copy_(x))
    expected = emulated(*(x.contiguous() for x in inputs))
    ours = emulated(*inputs)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[1], expected[1], rtol=2e-2, atol=0)


def test_several_chunks_of_images(emulator: ModuleType) -> None:
    """1025 images of one small tile: chunks of 513 and 512."""
    student, teacher = features((1025, 3, 8), 0.3, torch.float32)
    ours, true = emulated(student, teacher), exact(student, teacher)
    plain = loss_and_gradient(gram_loss_reference, student, teacher, "none")
    assert_accurate(ours[1], plain[1], true[1])
    torch.testing.assert_close(ours[0].double(), true[0], rtol=1e-6, atol=0)
    launches = {name: count["launches"] for name, count in counts(emulator).items()}
    assert launches == {"gram_pack": 4, "gram_tiles": 2, "gram_gradient": 2, "gram_sum": 1}


@pytest.mark.parametrize("shape", [(2, 65, 70), (1, 196, 40), (3, 20, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schedules_change_nothing(emulator: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    student, teacher = features(shape, 0.1, dtype)
    expected = emulated(student, teacher, "both")
    for seed in range(20):
        emulator.configure(seed=seed, cp_async="now" if seed % 2 else "late", threads=1 + seed % 3 // 2)
        ours = emulated(student, teacher, "both")
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1], expected[1])


def test_the_loss_is_the_same_without_gradient(emulator: ModuleType) -> None:
    student, teacher = features((2, 130, 40), 0.1, torch.float32)
    with dinov3_ext.use("emulator"):
        alone = gram_loss(student, teacher)
    assert "gram_gradient" not in counts(emulator)
    assert torch.equal(alone, emulated(student, teacher)[0])


def counts(emulator: ModuleType) -> dict[str, dict[str, int]]:
    """Counters by the kernel's name without template arguments."""
    summed: dict[str, dict[str, int]] = {}
    for name, count in emulator.counters().items():
        (stem,) = [stem for stem in ("gram_pack", "gram_tiles", "gram_gradient", "gram_sum") if stem in name]
        old = summed.setdefault(stem, dict.fromkeys(count, 0))
        summed[stem] = {key: old[key] + value for key, value in count.items()}
    return summed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 96), (1, 129, 100), (1, 256, 384), (2, 196, 64)], ids=str)
def test_counted_work(emulator: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    images, patches, width = shape
    emulated(*features(shape, 0.1, dtype))
    counted = counts(emulator)
    parts, size = (2, 4) if dtype is torch.float32 else (1, 2)
    tile = 128 if patches in (256, 196) else 64
    blocks = -(-patches // tile)
    tiles = blocks * (blocks + 1) // 2
    packed_width = -(-width // tile) * tile
    per_step = (tile // 16) * (tile // 8) * 2 * (3 if parts == 2 else 1)  # two times 16 deep
    warps = tile // 16

    def loads(rows_of_warp: int) -> int:  # of one block and step: left and right operands of 32 columns
        return warps * parts * 2 * (rows_of_warp // 16 + 2)

    steps = -(-width // 32)
    work = counted["gram_tiles"]
    assert work["mma"] == images * tiles * 2 * steps * per_step
    assert work["ldmatrix"] == images * tiles * 2 * steps * loads(64 if tile == 128 else 32)
    operand = parts * tile * 32 * 2
    assert work["copy_async_bytes"] == images * 2 * steps * operand * (2 * tiles - blocks)
    entries = images * tiles * parts * tile * tile * 2  # half of N x N, one or two 16-bit numbers
    assert entries <= work["global_written_bytes"] <= entries + images * (blocks * blocks * tile + tiles) * 4

    work = counted["gram_gradient"]
    grids, deep = images * blocks * (packed_width // tile), -(-patches // 32)
    assert work["mma"] == grids * deep * per_step
    assert work["ldmatrix"] == grids * deep * loads(64 if tile == 128 else 32)
    assert work["copy_async_bytes"] == grids * deep * 2 * operand
    grad_size = 2 if dtype is torch.bfloat16 else 4  # fp16 gradients wait for the loss scale in fp32
    assert work["global_written_bytes"] == images * patches * width * grad_size
    assert work["global_written_sectors"] <= images * patches * width * grad_size // 32 + images

    work = counted["gram_pack"]
    assert work["mma"] == 0
    assert work["global_read_bytes"] == 2 * 2 * images * patches * width * size  # for the norm, and to pack
    assert work["global_read_sectors"] <= 2 * (images * patches * width * size // 32 + 2)
    assert work["global_written_bytes"] == images * patches * (2 * parts * packed_width * 2 + 6 * 4)

    for name, work in counted.items():
        assert work["ldmatrix_conflicts"] == work["copy_async_conflicts"] == 0, name
        assert work["bank_conflicts"] == 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_and_compiled_in_one_graph(emulator: ModuleType, dtype: torch.dtype) -> None:
    student, teacher = features((2, 20, 24), 0.1, dtype)
    student.requires_grad_()
    torch.library.opcheck(torch.ops.dinov3_ext_emulator.gram_loss.default, (student, teacher, "both", True))
    with dinov3_ext.use("emulator"):
        compiled = torch.compile(lambda x: 3 * gram_loss(x, teacher), fullgraph=True)
        (ours,) = torch.autograd.grad(compiled(student), student)
        (eager,) = torch.autograd.grad(3 * gram_loss(student, teacher), student)
        with torch.autocast("cpu", torch.bfloat16):
            (cast,) = torch.autograd.grad(3 * gram_loss(student, teacher), student)
    torch.testing.assert_close(ours, eager)
    assert torch.equal(cast, eager)


def test_a_scaled_fp16_loss_keeps_small_gradients(emulator: ModuleType) -> None:
    """Unscaled they would be below what fp16 holds."""
    student, teacher = features((4, 64, 64), 0.01, torch.float16)
    student.requires_grad_()
    with dinov3_ext.use("emulator"):
        (ours,) = torch.autograd.grad(2.0**16 * gram_loss(student, teacher), student)
    (true,) = torch.autograd.grad(2.0**16 * gram_loss_reference(student.double(), teacher.double()), student)
    (plain,) = torch.autograd.grad(2.0**16 * gram_loss_reference(student, teacher), student)
    assert (true / 2.0**16).half().eq(0).float().mean() > 0.01
    assert_accurate(ours, plain, true.double())


def test_errors_of_the_native_op_name_the_rule(emulator: ModuleType) -> None:
    op = torch.ops.dinov3_ext_emulator.gram_loss
    x = torch.zeros(2, 3, 4)
    for call, message in [
        (lambda: op(x[0], x[0], "none", True), r"gram_loss: student must be \(S, N, D\)"),
        (lambda: op(x, x[:, :2], "none", True), r"teacher must have the student's shape \(2, 3, 4\); got \(2, 2, 4\)"),
        (lambda: op(x, x, "student", True), "clip must be none, both or teacher; got student"),
        (lambda: op(x.double(), x, "none", True), "student must be float32, bfloat16 or float16"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.skipif(_library.module is None, reason="the plan is asked of the native library")
def test_the_workspace_is_about_one_image() -> None:
    plan = _library.module.gram_loss_plan
    for parts in (1, 2):
        for images, patches, width in [(16, 2304, 1024), (16, 2304, 4096), (3, 8192, 1024), (128, 256, 1024)]:
            planned = plan(images=images, patches=patches, width=width, parts=parts, gradient=True)
            rounded = -(-patches // planned["tile"]) * planned["tile"]
            # F of one image: its lower triangle of tiles, less than N x N in fp32.
            one = planned["tiles"] * parts * planned["tile"] ** 2 * 2
            assert one <= parts * rounded * (rounded + planned["tile"])
            assert planned["chunk"] * one <= planned["entries_bytes"] <= planned["chunk"] * one + 256
            if patches >= 2048:
                assert planned["chunk"] == 1
            # Small images: tiles for two rounds of a large GPU, at most.
            assert planned["chunk"] == 1 or planned["chunk"] * planned["tiles"] <= 1024
            packed = 2 * parts * patches * width * 2
            assert planned["workspace_bytes"] <= 1.1 * (planned["chunk"] * packed + planned["entries_bytes"]) + 2**22
            assert plan(images, patches, width, parts, False)["entries_bytes"] == 0


def test_places_of_tiles(emulator: ModuleType) -> None:
    """Every tile of up to 500 blocks, and both ends of rows up to the most that there can be (2^22 patches)."""
    places = torch.ops.dinov3_ext_probes.places
    rows, columns = torch.tril_indices(500, 500)  # row by row
    assert torch.equal(places(torch.zeros(()), 0, len(rows)), torch.stack([rows, columns], 1).int())
    for row in (501, 1023, 1024, 2047, 4095, 4096, 16383, 16384, 32766, 32767):
        first = row * (row + 1) // 2
        found = places(torch.zeros(()), first - 2, 4).tolist()
        assert found == [[row - 1, row - 2], [row - 1, row - 1], [row, 0], [row, 1]]
        assert places(torch.zeros(()), first + row, 1).tolist() == [[row, row]]
