"""The rule that picks a Gram teacher from scores, and what it warns of."""

import numpy as np
import pytest

from dinov3_train.evaluation.gram_teacher import Choice, Score, choose, plot, table


def score(step: int, mean: float, *, spread: float = 0.01, images: int = 50) -> Score:
    """Scores of the same images: a common difficulty, a mean, and a little noise of the checkpoint's own."""
    common = np.random.default_rng(0).normal(0, 0.2, images)
    own = np.random.default_rng(step + 1).normal(0, spread, images)
    quality = mean + (common - common.mean()) + (own - own.mean())
    return Score(step=step, path=f"run/history/step_{step}", quality=quality, shown={"locality": 0.5})


UNTRAINED = score(0, 0.10)
RISE_AND_FALL = [score(100, 0.20), score(200, 0.30), score(300, 0.25), score(400, 0.15)]


def test_the_best_is_taken_and_the_spread_between_images_does_not_hide_it():
    choice = choose(RISE_AND_FALL, UNTRAINED)
    assert (choice.step, choice.path, choice.warnings) == (200, "run/history/step_200", ())
    assert "0.3000" in choice.reason
    assert choose(RISE_AND_FALL[::-1], UNTRAINED) == choice


def test_of_equals_the_earliest():
    choice = choose([*RISE_AND_FALL, score(150, 0.2995)], UNTRAINED)
    assert choice.step == 150
    assert "earliest" in choice.reason
    assert choose([*RISE_AND_FALL, score(150, 0.29)], UNTRAINED).step == 200


@pytest.mark.parametrize(
    ("scores", "named", "warning"),
    [
        ([score(100, 0.2), score(200, 0.3)], None, "no degradation"),
        ([score(100, 0.2), score(300, 0.3), score(400, 0.2)], None, "late, from step 300 of 400"),
        (RISE_AND_FALL, 400, "already degraded: step 400 scores 0.1500, step 200 0.3000"),
        (RISE_AND_FALL, 400, "late, from step 400 of 400"),
        ([score(100, 0.1), score(200, 0.08), score(300, 0.05)], None, "no better than untrained"),
    ],
)
def test_warnings(scores, named, warning):
    path = None if named is None else f"run/history/step_{named}"
    choice = choose(scores, UNTRAINED, named=path)
    assert any(warning in line for line in choice.warnings), choice.warnings
    if named is not None:
        assert choice.step == named


def test_single_figures_as_of_a_labelled_set():
    scores = [Score(step=s, path=str(s), quality=np.array([q])) for s, q in ((1, 0.2), (2, 0.3), (3, 0.25))]
    choice = choose(scores, Score(step=0, path="0", quality=np.array([0.1])))
    assert (choice.step, choice.warnings) == (
        2,
        ("the Gram teacher is late, from step 2 of 3; what later steps have worn off it cannot give back",),
    )


def test_one_score_is_no_choice():
    with pytest.raises(ValueError, match="at least 2 checkpoints, got 1"):
        choose(RISE_AND_FALL[:1], UNTRAINED)


def test_table_and_plot(tmp_path):
    choice = choose(RISE_AND_FALL, UNTRAINED)
    headings, rows = table(RISE_AND_FALL, UNTRAINED, "found", choice.step)
    assert headings == ["step", "found", "locality"]
    assert [row[0] for row in rows] == ["0, the start", "100", "200", "300", "400"]
    assert [row[1].endswith("\u2190") for row in rows] == [False, False, True, False, False]
    plot(RISE_AND_FALL, UNTRAINED, "patches found again", choice, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert isinstance(choice, Choice)
