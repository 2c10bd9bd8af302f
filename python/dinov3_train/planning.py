"""`dinov3 plan`: memory of one rank and FLOPs of one step, counted from the config without building the model."""

from __future__ import annotations

from rich.table import Table

from .config import Config
from .distillation import sizes_of, student_configs, student_cost
from .models.architectures import ARCHITECTURES
from .models.flops import backbone_flops, backbone_parameters, head_parameters, training_flops
from .validation import check_settings, counted_crops, memory
from .weights import resolve

PARTS = {
    "weights": "student, and its copies in the activation type",
    "teachers": "EMA teacher",
    "gradients": "",
    "optimizer": "AdamW's two moments",
    "activations": "of the backbone, kept for backward",
    "heads": "their activations and logits",
    "images": "crops of one micro-batch",
}


def plan_table(config: Config, ranks: int) -> Table:
    """A table of parameters, memory by part, and FLOPs.

    Errors: ValueError for settings that cannot work together.
    """
    if ranks < 1:
        raise ValueError(f"plan: ranks expects at least 1, got {ranks}")
    if config.distillation.students:
        return _distillation_table(config, ranks)
    check_settings(config, ranks)
    run, heads = config.run, (config.dino_head, config.ibot_head)
    images = run.batch_size // (ranks * run.accumulate)
    backbone = backbone_parameters(config.backbone)
    both_heads = sum(head_parameters(config.backbone.embed_dim, head) for head in heads)
    estimate = memory(config, ranks)
    table = Table(
        title=f"{config.recipe}: {ranks} x {images} images, {run.accumulate} micro-batches", title_justify="left"
    )
    for name in ("", "value", "note"):
        table.add_column(name, justify="right" if name == "value" else "left")
    table.add_row("backbone", f"{backbone:,}", f"parameters of {config.backbone.name}/{config.backbone.patch_size}")
    table.add_row("both heads", f"{both_heads:,}", "parameters, DINO and iBOT")
    table.add_section()
    for part, note in PARTS.items():
        table.add_row(f"memory: {part}", _gib(getattr(estimate, part)), note)
    table.add_row("memory: total", _gib(estimate.total), "estimate; leave 10 % for allocator and workspaces")
    table.add_section()
    flops: dict[str, float] = {}
    for share, crops in counted_crops(config):
        counted = training_flops(config.backbone, heads, crops, config.masking, images=images * run.accumulate)
        flops = {part: flops.get(part, 0.0) + share * value for part, value in counted.items()}
    for part, value in flops.items():
        if value:
            note = "per step and GPU" + (", recomputation not included" if part == "total" else "")
            table.add_row(f"FLOPs: {part}", _tflop(value), note)
    table.add_row(
        "FLOPs: run", f"{flops['total'] * ranks * run.steps / 1e18:.3g} EFLOP", f"{run.steps:,} steps on all GPUs"
    )
    return table


def _distillation_table(config: Config, ranks: int) -> Table:
    """Teacher and students of a distillation: groups of ranks, memory and FLOPs of a rank of each."""
    described = ARCHITECTURES.get(config.distillation.teacher)
    if described is None and config.distillation.teacher:
        described = resolve(config.distillation.teacher).architecture
    students = student_configs(config, (described or config.backbone).patch_size)
    sizes, batch = sizes_of(config, students, ranks), config.run.batch_size
    table = Table(title=f"{config.recipe}: batch {batch} on {ranks} ranks", title_justify="left")
    for name in ("", "value", "note"):
        table.add_column(name, justify="right" if name == "value" else "left")
    teacher_flops, seen = 0.0, config.distillation.teacher_size or config.crops.global_size
    if described is None:
        table.add_row("teacher", "", "not named (teacher=RUN), so not counted")
    else:
        teacher_flops = backbone_flops(described, [(config.crops.globals * batch / ranks, seen, seen)])
        table.add_row("teacher", f"{backbone_parameters(described):,}", f"parameters of {described.name}, at {seen} px")
        table.add_row("memory: teacher", _gib(4 * backbone_parameters(described)), "per rank, weights")
        table.add_row("FLOPs: teacher", _tflop(teacher_flops), f"per step and rank, {batch / ranks:.3g} images")
    for number, (name, student) in enumerate(students.items()):
        size = ranks if sizes is None else sizes[number]
        check_settings(student, size)
        table.add_section()
        group = f"{size} of {ranks} ranks, {batch // size} images each" if sizes else "on every rank, one after another"
        table.add_row(name, f"{backbone_parameters(student.backbone):,}", f"parameters; {group}")
        table.add_row("memory: total", _gib(memory(student, size).total), "per rank, without the teacher")
        flops = student_cost(student) * batch / size
        table.add_row("FLOPs: total", _tflop(flops + teacher_flops), "per step and rank, with its share of the teacher")
    return table


def _gib(value: int) -> str:
    return f"{value / 2**30:.2f} GiB"


def _tflop(value: float) -> str:
    return f"{value / 1e12:.3g} TFLOP"
