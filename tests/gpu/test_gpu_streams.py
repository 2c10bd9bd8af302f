"""The public ops inside CUDA graphs and on side streams, with the bits of a plain call, and under torch.compile."""

import problems
import pytest
import torch
from accuracy import assert_accurate

FEW = list(problems.problems(long=False))
KERNELS = [problem for problem in FEW if problem.dtype is torch.bfloat16]


def identities(which: list[problems.Problem]) -> dict:
    return {"argvalues": which, "ids": [problem.name for problem in which]}


@pytest.mark.parametrize("problem", **identities(FEW))
def test_captured_in_a_graph(problem: problems.Problem, gpu: str) -> None:
    """A host synchronisation or an allocation outside of the caching allocator would end the capture."""
    tensors, others = problem.tensors(gpu), problem.tensors(gpu, seed=1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem.run(problem.ours, tensors)  # warm-up, as CUDA graphs ask for
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run(problem.ours, tensors)
    for inputs in (others, problem.tensors(gpu)):
        expected = problem.run(problem.ours, inputs)
        for static, fresh in zip(tensors, inputs):
            static.copy_(fresh)
        for result in captured:
            result.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(*pair) for pair in zip(captured, expected))


@pytest.mark.parametrize("problem", **identities(FEW))
def test_on_a_side_stream(problem: problems.Problem, gpu: str) -> None:
    """Inputs that are still being made on the side stream: a launch on any other stream would read them too early."""
    tensors = problem.tensors(gpu)
    expected = problem.run(problem.ours, tensors)
    late = [torch.full_like(tensor, float("nan")) for tensor in tensors]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # clock cycles: some ten milliseconds
        for to, tensor in zip(late, tensors):
            to.copy_(tensor)
        results = problem.run(problem.ours, late)
    side.synchronize()
    assert all(torch.equal(*pair) for pair in zip(results, expected))


@pytest.mark.parametrize("problem", **identities(FEW))
def test_no_synchronisation(problem: problems.Problem, gpu: str) -> None:
    tensors = problem.tensors(gpu)
    problem.run(problem.ours, tensors)  # what is built once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.run(problem.ours, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("problem", **identities([p for p in KERNELS if "both" not in p.name and "mean" not in p.name]))
def test_compiled_in_one_graph(problem: problems.Problem, device: str) -> None:
    """Forward and backward: torch.compile takes the registered ops as they are."""
    tensors = problem.tensors(device)
    torch._dynamo.reset()
    found = problem.run(torch.compile(problem.ours, fullgraph=True), tensors)
    plain, exact = problem.run(problem.plain, tensors), problem.exact(tensors)
    for number, three in enumerate(zip(found, plain, exact)):
        assert_accurate(*three, what=f"result {number}")
