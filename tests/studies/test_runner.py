"""The runner of studies: order, budget, resume by arm, intervals, what is written."""

from __future__ import annotations

import csv
import io
import json
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dinov3_train.studies.results import Score, difference, grouped_score, interval, ratio_score
from dinov3_train.studies.runner import Arm, Study, run_study


class Trainer:
    """Arms that write a number into their folder; keeps what was called."""

    def __init__(self, quality: dict[str, float], unfinished: tuple[str, ...] = (), seconds: float = 0.0):
        self.quality, self.unfinished, self.seconds, self.calls = quality, unfinished, seconds, []

    def arm(self, name: str) -> Arm:
        def train(seed, folder, minutes, console):
            self.calls.append((name, seed, minutes))
            time.sleep(self.seconds)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "value").write_text(str(self.quality[name] + 0.01 * seed))
            return f"{name}-{seed}" not in self.unfinished

        return Arm(name, f"what {name} is", train)

    def study(self, **settings) -> Study:
        def measure(folder, seed):
            share = float((folder / "value").read_text())
            right = (np.random.default_rng(1).random(400) < share).astype(float)  # the same images for every run
            return {"k-NN": grouped_score(right, np.arange(400) % 4), "loss": Score(1 - share)}

        return Study("test", "Does it work?", [self.arm(name) for name in self.quality], measure, settings)


def quiet() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=200), stream


def test_all_arms_of_a_seed_before_the_next_seed_and_what_is_written(tmp_path):
    trainer = Trainer({"raw": 0.5, "curated": 0.6})
    results = run_study(trainer.study(steps=3), tmp_path / "s", seeds=(0, 1), console=quiet()[0])
    assert [call[:2] for call in trainer.calls] == [("raw", 0), ("curated", 0), ("raw", 1), ("curated", 1)]
    assert all(minutes is None for *_, minutes in trainer.calls)
    with (tmp_path / "s" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in rows] == [
        ("raw", "0"),
        ("raw", "1"),
        ("curated", "0"),
        ("curated", "1"),
    ]
    written = json.loads((tmp_path / "s" / "results.json").read_text())
    assert written["settings"] == {"steps": 3}
    assert float(rows[0]["k-NN"]) == results.scores("raw", "k-NN", [0])[0].value == written["runs"][0]["k-NN"]
    table = (tmp_path / "s" / "table.md").read_text()
    assert "| arm | seeds | k-NN | loss | k-NN minus raw |" in table
    assert "bootstrap over test images" in table
    curated = next(line for line in table.splitlines() if line.startswith("| curated"))
    assert curated.count("|") == 6
    assert "| +0." in curated
    assert Image.open(tmp_path / "s" / "plot.png").width > 700


def test_finished_runs_are_kept_and_new_seeds_are_added(tmp_path):
    first = Trainer({"a": 0.5, "b": 0.6})
    run_study(first.study(), tmp_path / "s", seeds=(0,), console=quiet()[0])
    second = Trainer({"a": 0.9, "b": 0.9})
    results = run_study(second.study(), tmp_path / "s", seeds=(0, 1), console=quiet()[0])
    assert [call[:2] for call in second.calls] == [("a", 1), ("b", 1)]
    assert results.scores("a", "loss", [0])[0].value == pytest.approx(0.5)
    assert results.scores("a", "loss", [1])[0].value == pytest.approx(0.09)


def test_an_unfinished_run_stops_the_call_and_goes_on_in_the_next(tmp_path):
    console, stream = quiet()
    stopped = Trainer({"a": 0.5, "b": 0.6, "c": 0.7}, unfinished=("b-0",))
    results = run_study(stopped.study(), tmp_path / "s", seeds=(0,), minutes=5, console=console)
    assert [call[0] for call in stopped.calls] == ["a", "b"]
    assert 0 < stopped.calls[1][2] <= 5
    assert "b, seed 0 is not finished; 2 runs are left, the same command goes on" in stream.getvalue()
    assert results.seeds("b") == []
    again = Trainer({"a": 0.5, "b": 0.6, "c": 0.7})
    run_study(again.study(), tmp_path / "s", seeds=(0,), console=quiet()[0])
    assert [call[0] for call in again.calls] == ["b", "c"]


def test_the_budget_of_a_call(tmp_path):
    console, stream = quiet()
    trainer = Trainer({"a": 0.5, "b": 0.6}, seconds=0.1)
    run_study(trainer.study(), tmp_path / "s", seeds=(0,), minutes=0.001, console=console)
    assert [call[0] for call in trainer.calls] == ["a"]
    assert "the budget is spent; 1 runs are left" in stream.getvalue()


def test_intervals_over_seeds():
    runs = [Score(value) for value in (0.50, 0.52, 0.54)]
    whole = interval(runs)
    half = 4.302653 * 0.02 / np.sqrt(3)  # Student's t of 2 degrees of freedom, 97.5 %
    assert (whole.mean, whole.kind) == (pytest.approx(0.52), "seeds")
    assert (whole.low, whole.high) == (pytest.approx(0.52 - half), pytest.approx(0.52 + half))
    apart = difference([Score(v + 0.1) for v in (0.50, 0.52, 0.54)], runs)  # paired: the seeds' spread cancels
    assert (apart.low, apart.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_intervals_over_items_cover_what_a_binomial_says():
    generator = np.random.default_rng(0)
    right, groups = (generator.random(2000) < 0.3).astype(float), np.zeros(2000, dtype=int)
    whole = interval([grouped_score(right, groups)])
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 2000)
    assert whole.kind == "items"
    assert whole.low == pytest.approx(right.mean() - half, abs=0.003)
    assert whole.high == pytest.approx(right.mean() + half, abs=0.003)
    other = grouped_score(np.maximum(right, generator.random(2000) < 0.05), groups)
    apart = difference([other], [grouped_score(right, groups)])
    assert apart.low > 0.0  # paired by item: only the few that changed spread
    assert apart.high - apart.low < whole.high - whole.low


def test_a_grouped_score_is_the_mean_over_groups():
    assert grouped_score([1, 1, 1, 0], [0, 0, 0, 1]).value == 0.5
    with pytest.raises(ValueError, match="at least one item"):
        grouped_score([], [])
    with pytest.raises(ValueError, match="a group for each item, got 1 and 0"):
        Score(1.0, [1.0], [])


def test_intervals_of_ratios_are_those_of_a_loop_over_resampled_images():
    generator = np.random.default_rng(0)
    wholes = generator.integers(0, 50, (60, 3)).astype(float)
    wholes[:, 2] = 0.0  # a class that does not occur
    parts = np.floor(wholes * generator.random((60, 3)))
    score = ratio_score(parts, wholes)
    assert score.value == pytest.approx(np.mean(parts.sum(0)[:2] / wholes.sum(0)[:2]))
    found = []
    for _ in range(2000):
        rows = generator.integers(0, 60, 60)
        found.append(np.mean(parts[rows].sum(0)[:2] / wholes[rows].sum(0)[:2]))
    whole = interval([score])
    assert whole.kind == "items"
    assert (whole.low, whole.high) == pytest.approx(np.quantile(found, [0.025, 0.975]), abs=0.01)
    apart = difference([ratio_score(np.minimum(parts + 1, wholes), wholes)], [score])  # every image a little better
    assert 0 < apart.low < apart.mean < apart.high
    assert apart.high - apart.low < 0.3 * (whole.high - whole.low)
    with pytest.raises(ValueError, match="a whole for each part, got 1 and 0"):
        Score(1.0, parts=[[1.0]])


def test_a_number_alone_has_no_interval(tmp_path):
    assert interval([Score(0.5)]).low is None
    assert difference([Score(0.5)], [Score(0.4)]).low is None
    one, fewer = grouped_score([1, 0, 1], [0, 0, 1]), grouped_score([1, 0], [0, 1])  # of other items: not paired
    assert difference([one], [fewer]).low is None
    assert difference([one], [ratio_score(np.ones((3, 2)), np.full((3, 2), 2))]).low is None
    study = Study("s", "q", [Trainer({"a": 0.5}).arm("a")], lambda folder, seed: {"x": Score(0.5)})
    results = run_study(study, tmp_path / "s", seeds=(0,), console=quiet()[0])
    assert "| a | 1 | 0.5000 |  |" in results.table()
    json.loads((tmp_path / "s" / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"seeds": ()}, r"seeds expects different numbers, got \[\]"),
        ({"seeds": (1, 1)}, r"got \[1, 1\]"),
        ({"seeds": (0,), "minutes": 0}, "minutes expects a number above 0, got 0"),
    ],
)
def test_calls_that_cannot_be(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        run_study(Trainer({"a": 0.5}).study(), tmp_path / "s", **call)
    assert not (tmp_path / "s").exists()


def test_a_folder_of_another_study(tmp_path):
    trainer = Trainer({"a": 0.5})
    run_study(trainer.study(steps=3), tmp_path / "s", seeds=(0,), console=quiet()[0])
    with pytest.raises(ValueError, match=r"begun with other settings \(steps: 3 there, 4 asked\)"):
        run_study(trainer.study(steps=4), tmp_path / "s", seeds=(0,), console=quiet()[0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no study"):
        run_study(trainer.study(), tmp_path / "full", seeds=(0,), console=quiet()[0])
    with pytest.raises(ValueError, match="arms of different names"):
        run_study(Study("s", "q", [], lambda *_: {}), tmp_path / "new", seeds=(0,))
