"""Static proof: what the compiler made of every kernel, and what every op would launch, for GPUs that are not here.

Kernels are found in CMakeLists.txt and in the compiled cubins, launches by recording what the public functions launch:
a kernel that lands later is covered by being listed. sm_90 by default, sm_80 and sm_120 with -m slow.
`python tests/sass/table.py` prints the figures.
"""

import importlib.util

import compiled
import launches
import pytest
import rules

slow = pytest.mark.slow
pytestmark = [
    pytest.mark.skipif(compiled.missing_tool() is not None, reason=str(compiled.missing_tool())),
    pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=slow), pytest.param(120, marks=slow)]),
]


def test_machine_code_keeps_the_rules(architecture: int) -> None:
    kernels = compiled.all_kernels(architecture)
    assert kernels, "CMakeLists.txt lists no kernel"
    launched = {launch.symbol for launch in launches.all_launches(architecture)}
    broken = [
        f"{kernel.name}: {sentence}"
        for kernel in kernels
        for sentence in rules.machine_code(kernel, launched=kernel.symbol in launched)
    ]
    assert not broken, "\n" + "\n".join(broken)


def test_every_op_has_a_kernel_of_each_kind(architecture: int) -> None:
    """A pattern of rules.py that no kernel matches would check nothing."""
    kernels = compiled.all_kernels(architecture)
    for op in {kernel.op for kernel in kernels} & rules.TENSOR_CORES.keys():
        for dtype in ("",) if op in rules.FLOAT16_PRODUCTS else ("bfloat16", "float16"):
            assert any(k.op == op and dtype in k.name and k.count("HMMA") for k in kernels), f"{op} {dtype}: no HMMA"
            assert any(k.op == op and dtype in k.name and k.count("LDGSTS") for k in kernels), (
                f"{op} {dtype}: no LDGSTS"
            )
    assert any(rules.VECTOR.search(kernel.name) and kernel.count(r"LDG\.E.*128") for kernel in kernels)


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    if importlib.util.find_spec("dinov3_ext._C") is None:
        pytest.skip("the public functions need the native library: pip install . builds it")


def test_launches_fit(architecture: int) -> None:
    broken = list(rules.fits(launches.all_launches(architecture), compiled.all_kernels(architecture), architecture))
    assert not broken, "\n" + "\n".join(broken)


def test_every_kernel_is_launched(architecture: int) -> None:
    """By some case on some architecture: a kernel that nothing launches is dead code, or cases.py lacks its shape."""
    launched = {launch.symbol for other in compiled.ARCHITECTURES for launch in launches.all_launches(other)}
    never = [kernel.name for kernel in compiled.all_kernels(architecture) if kernel.symbol not in launched]
    assert not never, f"no case launches {', '.join(never)}"
