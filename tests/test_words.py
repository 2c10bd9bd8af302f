"""`key=value` words of the command line."""

from pathlib import Path

import pytest

from dinov3_train.words import Option, read

OPTIONS = {
    "recipe": Option(str, required=True, help="NAME or FILE.py"),
    "out": Option(Path, required=True, help="FOLDER"),
    "k": Option(int, 10, help="a whole number"),
}


def test_options_defaults_and_overrides():
    values, overrides = read(
        "pretrain", ["recipe=a", "run.steps=5", "out=runs/x=1", "optimizer.lr=1e-3"], OPTIONS, rest=True
    )
    assert values == {"recipe": "a", "out": Path("runs/x=1"), "k": 10}
    assert overrides == ["run.steps=5", "optimizer.lr=1e-3"]


def test_no_words():
    assert read("doctor", [], {}) == ({}, [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe"], "pretrain: expected name=value, got 'recipe'"),
        (["=3"], "pretrain: expected name=value, got '=3'"),
        (["recip=a"], "pretrain: unknown option 'recip'; nearest: recipe"),
        (["recipe=a", "out=b", "k=ten"], "pretrain: k expects a whole number, got 'ten'"),
        (["k=3"], "pretrain: missing recipe=NAME or FILE.py and out=FOLDER"),
        (["run.steps=3"], "pretrain: unknown option 'run.steps'"),  # a command that takes no config
    ],
)
def test_errors(words, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        read("pretrain", words, OPTIONS)


def test_an_unknown_option_of_a_command_with_config_mentions_the_keys():
    with pytest.raises(ValueError, match="unknown option 'steps'.*or a dotted config key"):
        read("pretrain", ["steps=3"], OPTIONS, rest=True)
