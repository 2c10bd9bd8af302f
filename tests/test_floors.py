"""The house's own rules: imports point down, one op has one stem everywhere, every config field is read."""

import ast
import dataclasses
import re
import typing
from pathlib import Path

import pytest

from dinov3_train import config

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "python" / "dinov3_train"
EXT = ROOT / "dinov3_ext"

LEAF = 0  # may be imported by every floor of dinov3_train; import none of it but other leaves
FLOORS = {
    **dict.fromkeys(("config", "schedule", "report", "counter", "words"), LEAF),
    **dict.fromkeys(("models", "losses", "data"), 2),
    **dict.fromkeys(("train", "distill", "curation", "evaluation"), 3),
    **dict.fromkeys(("build", "planning", "validation", "weights", "distillation"), 4),  # all that reads Config
    **dict.fromkeys(("cli_curate", "commands_curate"), 5),
    **dict.fromkeys(("studies", "commands_health", "commands_pictures", "run_report"), 5),
    **dict.fromkeys(("commands_evaluate", "presets"), 5),
    **dict.fromkeys(
        ("recipes", "cli", "commands", "demo", "demo_stages", "doctor", "photographs", "__init__", "__main__"), 5
    ),
    **dict.fromkeys(("commands_export",), 5),
    **dict.fromkeys(("stages", "refinement", "gram_choice"), 5),
}
FRAMEWORKS = ("torch", "c10", "ATen", "pybind11", "Python", "binding")
# Native sources that are still to be written; nothing else may be missing.
AWAITED = (
    "csrc/ops/assignment_cross_entropy/assignment_cross_entropy_cpu.cpp",
    "csrc/ops/gram_loss/gram_loss_cpu.cpp",
)
OP_FILES = ("{op}.h", "{op}_cpu.cpp", "{op}_cuda.cu", "{op}_torch.cpp")


def modules() -> list[Path]:
    return sorted(TRAIN.rglob("*.py"))


def part_of(path: Path) -> str:
    """First name below dinov3_train: the folder, or the module itself."""
    return path.relative_to(TRAIN).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int]]:
    """(absolute dotted name, line) of everything a file imports, inside functions too; `from a import b` gives a.b."""
    package = ["dinov3_train", *path.relative_to(TRAIN).parts[:-1]] if path.is_relative_to(TRAIN) else []
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
    return found


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in modules()} <= set(FLOORS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(TRAIN)))
def test_imports_point_down(path: Path) -> None:
    floor = FLOORS[part_of(path)]
    for name, line in imports(path):
        names = name.split(".")
        assert names[0] not in ("tests", "benchmarks"), f"{path}:{line} imports {name}"
        if names[0] != "dinov3_train" or len(names) < 2 or names[1] not in FLOORS:
            continue
        below = FLOORS[names[1]]
        assert below <= floor, f"{path}:{line} (floor {floor}) imports {name} (floor {below})"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(TRAIN)))
def test_only_the_upper_floors_know_config_and_only_training_knows_ranks(path: Path) -> None:
    floor = FLOORS[part_of(path)]
    for name, line in imports(path):
        if floor in (2, 3):
            assert name != "dinov3_train.config.Config", f"{path}:{line} imports Config; build.py reads it"
        if floor == 2:
            assert not name.startswith("torch.distributed"), f"{path}:{line} imports {name}; take Collectives instead"
    if floor == 2:
        assert "torch.distributed" not in path.read_text(), f"{path} names torch.distributed"


@pytest.mark.parametrize("path", sorted(EXT.rglob("*.py")), ids=lambda path: str(path.relative_to(EXT)))
def test_the_ops_know_nothing_above_them(path: Path) -> None:
    for name, line in imports(path):
        assert not name.startswith(("dinov3_train", "torch.distributed")), f"{path}:{line} imports {name}"


def test_torch_stays_out_of_kernels() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_dir() or path.name.endswith("_torch.cpp") or path.parent.name == "binding":
            continue
        if path == ROOT / "csrc" / "emulator" / "module.cpp":  # the binding of a library that only the tests build
            continue
        includes = re.findall(r'#include [<"]([^>"]+)', path.read_text())
        wrong = [name for name in includes if name.startswith(FRAMEWORKS)]
        assert not wrong, f"{path} includes {wrong}"


def test_inline_ptx_only_in_the_primitives() -> None:
    wrong = [
        str(path)
        for path in (ROOT / "csrc").rglob("*.cu*")
        if path.name != "primitives.cuh" and re.search(r"\basm\b", path.read_text())
    ]
    assert not wrong


def test_every_native_source_is_in_the_list_of_cmake() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text()
    sources = [path for suffix in ("cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{suffix}")]
    missing = [str(path) for path in sources if path.relative_to(ROOT).as_posix() not in listed]
    assert not [path for path in missing if "emulator" not in path]


@pytest.mark.parametrize("folder", sorted((ROOT / "csrc" / "ops").iterdir()), ids=lambda path: path.name)
def test_an_op_has_one_stem_everywhere(folder: Path) -> None:
    op = folder.name
    wanted = [folder / name.format(op=op) for name in OP_FILES]
    wanted += [ROOT / f"{place}{op}.py" for place in ("dinov3_ext/ops/", "tests/ops/test_", "benchmarks/ops/bench_")]
    missing = [path.relative_to(ROOT).as_posix() for path in wanted if not path.is_file()]
    assert [path for path in missing if path not in AWAITED] == []


def ops() -> list[Path]:
    return sorted(path for path in (EXT / "ops").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", ops(), ids=lambda path: path.stem)
def test_a_python_op_has_a_reference_and_a_test(path: Path) -> None:
    functions = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert {path.stem, f"{path.stem}_reference"} <= functions
    assert (ROOT / "tests/ops" / f"test_{path.stem}.py").is_file()


def sections(cls: type) -> dict[str, type]:
    """Every dataclass reachable from `cls`, by name."""
    found = {cls.__name__: cls}
    for hint in typing.get_type_hints(cls).values():
        for kind in config.sections_of(hint):
            found |= sections(kind)
    return found


def test_every_config_field_is_read_somewhere() -> None:
    read = {
        node.attr
        for path in modules()
        if path.name != "config.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    unread = [
        f"{name}.{field.name}"
        for name, cls in sections(config.Config).items()
        for field in dataclasses.fields(cls)
        if field.name not in read
    ]
    assert not unread, f"nobody reads {', '.join(unread)}"
