"""The public ops on a GPU: against float64 by the accuracy rule, forward and backward, and twice bit for bit."""

import problems
import pytest
import torch
from accuracy import assert_accurate

from dinov3_ext import explain

ALL = list(problems.problems())


@pytest.mark.parametrize("problem", ALL, ids=[problem.name for problem in ALL])
def test_as_good_as_plain_torch(problem: problems.Problem, device: str) -> None:
    tensors = problem.tensors(device)
    ours, again = (problem.run(problem.ours, tensors) for _ in range(2))
    plain, exact = problem.run(problem.plain, tensors), problem.exact(tensors)
    for number, (first, second) in enumerate(zip(ours, again)):
        assert first.device.type == device, f"result {number} is on {first.device}"
        assert torch.equal(first, second), f"result {number}: two runs differ"
        assert_accurate(first, plain[number], exact[number], what=f"result {number}")


def test_the_kernels_are_what_runs(device: str) -> None:
    """Otherwise the tests above would test PyTorch."""
    if device == "cpu":
        pytest.skip("about CUDA kernels")
    for op in ("rope_attention", "rope_rotate", "gram_loss", "sinkhorn_knopp", "assignment_cross_entropy"):
        path = explain(op, device=device, dtype=torch.bfloat16)
        assert path.path == "kernel", f"{op}: {path}"


def test_offsets_past_two_to_the_31(device: str) -> None:
    """Rows a gigabyte apart, of which the last begins behind element 2^31."""
    if device == "cpu":
        pytest.skip("slow on a CPU: touches little, but maps 4.5 GB")
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of free GPU memory")
    problem = problems.sinkhorn(torch.bfloat16, 3, 4096)
    (logits,) = problem.tensors(device)
    wide = torch.empty(2 * 1_100_000_000 + 4096, dtype=torch.bfloat16, device=device)
    far = wide.as_strided((3, 4096), (1_100_000_000, 1)).copy_(logits)
    assert torch.equal(problem.ours(far), problem.ours(logits))
