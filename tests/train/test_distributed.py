"""Two ranks equal one: gloo on the loopback, the same global batches, losses, gradients and weights compared."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_rank import BROKEN, CASES, run

from dinov3_ext import ALONE
from dinov3_train.train.distributed import any_rank, barrier, ranks

WORLD_SIZE = 2
SECONDS = 240  # a rank that waits for one that died must not hang the tests


@pytest.fixture(scope="module", name="two_ranks")
def two_ranks_fixture(tmp_path_factory) -> list[dict]:
    """What each of two ranks saw in every case, from one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("one_rank.py")
    shared = os.environ | {
        "WORLD_SIZE": str(WORLD_SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * WORLD_SIZE, "\n".join(said)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.fixture(scope="module", name="alone")
def alone_fixture():
    """This process as the only rank."""
    with ranks() as here:
        yield here


def test_without_a_launcher_a_process_is_alone(alone):
    assert (alone.rank, alone.world_size, alone.first) == (0, 1, True)
    assert alone.collectives is ALONE
    assert any_rank((True, False), alone.collectives, alone.device) == [True, False]
    barrier()


def test_exchanges(two_ranks):
    for rank, seen in enumerate(found["exchanges"] for found in two_ranks):
        assert seen["place"] == (rank, 2, rank == 0, rank, 2)
        assert seen["gathered"].tolist() == [[1.0, 0.0], [2.0, -1.0]]
        # rank r's loss is (r + 1)^2 sum x^2, so the rows' gradients are summed with 1 + 4
        assert seen["gradient"].tolist() == [[10.0, 0.0], [20.0, -10.0]][rank : rank + 1]
        assert seen["sum"].tolist() == [2.0, 1.0]
        assert seen["max"].tolist() == [1.0, 1.0]
        assert seen["kept"].tolist() == [1.0, float(rank)]  # the argument is left alone
        assert (seen["any"], seen["none"]) == (True, False)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one(two_ranks, alone, name):
    """Drop path 0.3, rotary shift, jitter and rescale, Sinkhorn-Knopp, masks and KoLeo groups included.

    Only the order of summation differs: matrix products of half as many rows, sums over ranks. fp32 keeps 6e-8 of a
    number; measured 2e-7 of a loss and 1.2e-6 of a gradient's largest entry, ten times that is allowed.
    """
    whole = run(CASES[name], alone)
    assert whole["finite"]
    for found in (each[name] for each in two_ranks):
        assert found["finite"]
        assert found["losses"].keys() == whole["losses"].keys()
        for part, value in whole["losses"].items():
            torch.testing.assert_close(found["losses"][part], value, rtol=2e-6, atol=1e-6, msg=part)
        assert found["gradients"].keys() == whole["gradients"].keys()
        for parameter, value in whole["gradients"].items():
            limit = 1e-5 * float(value.abs().max()) + 1e-7
            assert float((found["gradients"][parameter] - value).abs().max()) <= limit, parameter
    check_same_bits(two_ranks, name)


@pytest.mark.parametrize("name", BROKEN)
def test_a_non_finite_value_on_one_rank_skips_the_step_on_both(two_ranks, name):
    for found in (each[name] for each in two_ranks):
        assert (found["finite"], found["skipped"], found["moved"]) == (False, 1, False)
    check_same_bits(two_ranks, name)


def check_same_bits(two_ranks: list[dict], name: str) -> None:
    """Student and teacher are equal to the bit on both ranks: else they would drift apart."""
    first, second = (each[name] for each in two_ranks)
    for network in ("weights", "teacher"):
        assert all(torch.equal(value, second[network][key]) for key, value in first[network].items())


def test_the_cases_would_notice_a_rank_that_kept_to_itself(alone):
    """A group over all images and a group within a rank give other gradients: the comparison is not empty."""
    over_all, within = (run(CASES[name], alone) for name in ("a group over all ranks", "groups within a rank"))
    assert any(
        not torch.allclose(value, within["gradients"][name], rtol=1e-2) for name, value in over_all["gradients"].items()
    )
