"""One training step: what moves and what does not, clipping, accumulation, non-finite steps, precision."""

import re
from dataclasses import replace

import pytest
import torch
from tiny_training import STILL, VALUES, batch, gradients, settings, state

from dinov3_train.losses import LossPart
from dinov3_train.train.step import clip_per_module, train_step


def snapshot(found) -> dict[str, torch.Tensor]:
    """Every number that training changes, copied."""
    tensors = {f"student.{name}": value for name, value in found.student.state_dict().items()}
    tensors |= {f"teacher.{name}": value for name, value in found.teacher.state_dict().items()}
    for index, entry in enumerate(found.optimizer.state.values()):
        tensors |= {f"optimizer.{index}.{name}": value for name, value in entry.items()}
    return {name: value.detach().clone() for name, value in tensors.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def nan_loss(outputs, targets, record, collectives):
    return [LossPart("broken", outputs.cls.sum() * float("nan"), 1.0)]


def infinite_loss(outputs, targets, record, collectives):
    return [LossPart("broken", outputs.cls.sum() * 0.0 + float("inf"), 1.0)]


def nan_gradient(outputs, targets, record, collectives):
    return [LossPart("broken", (outputs.cls * 0.0).sum().sqrt(), 1.0)]  # 0, with the gradient 0 / 0


def test_a_step_moves_student_and_teacher():
    found = state()
    before = snapshot(found)
    report = train_step(found, [batch(range(4), batch_size=4)], VALUES, settings())
    after = snapshot(found)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert report.finite
    assert not still
    assert (found.step, found.images, found.skipped) == (1, 4, 0)
    for name, value in after.items():
        if name.startswith("teacher."):
            old, new = before[name], after[name.replace("teacher.", "student.")]
            assert torch.equal(value, torch.lerp(old, new, 1.0 - VALUES.momentum))  # of the student after its update


def test_the_report_holds_the_parts_and_their_weighted_total():
    report = train_step(state(), [batch(range(4), batch_size=4)], VALUES, settings())
    losses = {name: float(value) for name, value in report.losses.items()}
    assert losses.keys() == {"loss", "dino_global", "dino_local", "ibot", "koleo"}
    # two global and three local crops: 2 and 6 pairs
    total = 2 / 8 * losses["dino_global"] + 6 / 8 * losses["dino_local"] + losses["ibot"] + 0.1 * losses["koleo"]
    assert losses["loss"] == pytest.approx(total, rel=1e-6)
    assert report.gradient_norms.keys() == {"backbone", "dino_head", "ibot_head"}


def test_without_local_crops():
    report = train_step(state(), [batch(range(4), batch_size=4, local_crops=0)], VALUES, settings())
    assert report.finite
    assert report.losses.keys() == {"loss", "dino_global", "ibot", "koleo"}


def test_a_step_is_a_function_of_its_inputs():
    """Twice the same from the same state, whatever the global random state is, which is left alone."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        start = torch.get_rng_state()
        made = state()
        for step in range(2):
            train_step(made, [batch(range(4), batch_size=4, step=step)], VALUES, settings())
        assert torch.equal(torch.get_rng_state(), start)
        found.append(snapshot(made))
    assert same(*found)


def test_the_draws_of_the_next_step_differ():
    """Same weights, same images, another step number: drop path differs, so the gradients do."""
    found = []
    for step in (0, 1):
        made = state()
        made.step = step
        train_step(made, [batch(range(4), batch_size=4)], replace(VALUES, learning_rate=0.0), settings())
        found.append(gradients(made)["backbone.blocks.0.attn.proj.weight"])
    assert not torch.equal(*found)


def test_the_teacher_gets_no_gradient():
    found = state()
    train_step(found, [batch(range(4), batch_size=4)], VALUES, settings())
    assert all(parameter.grad is None for parameter in found.teacher.parameters())
    assert not found.teacher.training
    assert found.student.training


def test_rates_of_zero_leave_the_student_as_it_is():
    found = state()
    before = snapshot(found)
    train_step(
        found,
        [batch(range(4), batch_size=4)],
        replace(VALUES, learning_rate=0.0, prototype_rate=0.0, backbone_rate=0.0),
        settings(),
    )
    after = snapshot(found)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("student."))


@pytest.mark.parametrize("term", [nan_loss, infinite_loss, nan_gradient])
def test_a_non_finite_step_changes_nothing(term):
    """Student, teacher and optimiser keep their bits, also after good steps; the counters count."""
    found = state()
    record = batch(range(4), batch_size=4)
    train_step(found, [record], VALUES, settings())
    before, rates = snapshot(found), [group["lr"] for group in found.optimizer.param_groups]
    for skipped in (1, 2):
        report = train_step(found, [record], replace(VALUES, learning_rate=1.0), settings(terms=(term,)))
        assert not report.finite
        assert found.skipped == skipped
        assert same(before, snapshot(found))
    assert [group["lr"] for group in found.optimizer.param_groups] == rates
    assert (found.step, found.images) == (3, 12)
    assert train_step(found, [record], VALUES, settings()).finite
    assert found.skipped == 0
    assert all(value.isfinite().all() for value in snapshot(found).values())


def test_one_bad_micro_batch_skips_the_whole_step():
    found = state()
    before = snapshot(found)

    def bad_second(outputs, targets, record, collectives):
        return nan_loss(outputs, targets, record, collectives) if int(record.indices[0]) else []

    halves = [batch(range(4), batch_size=8), batch(range(4, 8), batch_size=8)]
    assert not train_step(found, halves, VALUES, settings(batch_size=8, terms=(bad_second,))).finite
    assert same(before, snapshot(found))


def test_the_run_stops_after_max_skipped_and_says_where():
    found, record = state(), batch(range(4), batch_size=4)
    before = snapshot(found)
    for _ in range(2):
        train_step(found, [record], VALUES, settings(terms=(nan_loss,)))
    with pytest.raises(RuntimeError) as caught:
        train_step(found, [record], VALUES, settings(terms=(nan_loss,)))
    said = str(caught.value)
    assert "stopped at step 2: 3 steps in a row" in said
    assert "broken = nan" in said
    assert "backbone = nan" in said
    assert re.search(r"dino_global = \d\.\d+, .*ibot = \d\.\d+", said)  # the healthy parts too
    for name in record.names:
        assert name in said
    assert same(before, snapshot(found))


def test_a_good_step_in_between_starts_the_count_anew():
    found, record = state(), batch(range(4), batch_size=4)
    for terms in ((nan_loss,), (nan_loss,), (), (nan_loss,), (nan_loss,)):
        train_step(found, [record], VALUES, settings(terms=terms))
    assert found.skipped == 2


def test_each_module_is_clipped_to_its_own_norm():
    found = state()
    train_step(found, [batch(range(4), batch_size=4)], VALUES, settings())
    raw = gradients(found)

    def norm(values: dict[str, torch.Tensor], module: str) -> float:
        return sum(float(v.double().square().sum()) for n, v in values.items() if n.startswith(module + ".")) ** 0.5

    exact = {module: norm(raw, module) for module in ("backbone", "dino_head", "ibot_head")}
    clip = sorted(exact.values())[1]  # one module above, one at, one below
    reported = clip_per_module(found.student, clip)
    clipped = gradients(found)
    for module, value in exact.items():
        assert float(reported[module]) == pytest.approx(value, rel=1e-5)  # before clipping
        assert norm(clipped, module) == pytest.approx(min(value, clip), rel=1e-5)
        factor = min(1.0, clip / value)
        for name in raw:
            if name.startswith(module + "."):
                torch.testing.assert_close(clipped[name], raw[name] * factor, rtol=1e-5, atol=0)


def test_no_clip_leaves_gradients_alone():
    found = state()
    train_step(found, [batch(range(4), batch_size=4)], VALUES, settings(clip=None))
    raw = gradients(found)
    clip_per_module(found.student, None)
    assert all(torch.equal(raw[name], value) for name, value in gradients(found).items())


def test_two_micro_batches_give_the_mean_of_their_gradients():
    """Each of them as a step of its own over the same global batch of 8: same draws, same Sinkhorn-Knopp."""
    halves = [batch(range(4), batch_size=8), batch(range(4, 8), batch_size=8)]
    single, losses = [], []
    for half in halves:
        made = state()
        losses.append(train_step(made, [half], VALUES, settings(batch_size=8)).losses)
        single.append(gradients(made))
    made = state()
    report = train_step(made, halves, VALUES, settings(batch_size=8))
    assert made.images == 8
    for name, value in gradients(made).items():
        mean = (single[0][name] + single[1][name]) / 2
        # the same sums; halved before instead of after, which is exact but for the last addition
        torch.testing.assert_close(value, mean, rtol=1e-6, atol=1e-6 * float(mean.abs().max()))
    for name, value in report.losses.items():
        torch.testing.assert_close(value, (losses[0][name] + losses[1][name]) / 2, rtol=1e-6, atol=0)


def test_the_loss_falls_when_a_batch_is_repeated():
    found, record = state(), batch(range(4), batch_size=4)
    values = replace(VALUES, learning_rate=3e-3, prototype_rate=3e-3, momentum=0.99)
    losses = [float(train_step(found, [record], values, settings(clip=3.0)).losses["loss"]) for _ in range(30)]
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]


def test_bf16_autocast():
    """Weights, gradients and moments stay fp32. bf16 keeps 8 bits: a loss near 4 within 2 %, gradients mostly alike."""
    record, found = batch(range(4), batch_size=4), {}
    for autocast in (None, torch.bfloat16):
        made = state()
        report = train_step(made, [record], VALUES, settings(autocast=autocast))
        assert report.finite
        assert {value.dtype for value in snapshot(made).values()} == {torch.float32}
        assert {value.dtype for value in report.losses.values()} == {torch.float32}
        found[autocast] = report.losses, gradients(made)
    exact, rounded = found[None], found[torch.bfloat16]
    for name, value in exact[0].items():
        torch.testing.assert_close(rounded[0][name], value, rtol=0.02, atol=0.02)
    for name, value in exact[1].items():
        cosine = torch.nn.functional.cosine_similarity(rounded[1][name].flatten(), value.flatten(), dim=0)
        assert cosine > 0.95 or value.abs().max() < 1e-4, name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the compiler's own guards
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks(backend):
    """As `run.compile` compiles blocks. aot_eager runs the same operations, inductor fuses them: roundings of fp32."""
    record, found = batch(range(4), batch_size=4), []
    for compiled in (False, True):
        made = state(STILL)
        if compiled:
            for network in (made.student, made.teacher):
                network.backbone.blocks[1].compile(backend=backend)
        report = train_step(made, [record], VALUES, settings())
        found.append((report.losses, gradients(made)))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=1e-5, atol=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))
    torch._dynamo.reset()
