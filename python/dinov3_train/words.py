"""`key=value` words of the command line: options of a command with types and defaults, the rest for the config."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One `name=value` a command takes. `parse` turns text into the value; `required` ones have no default."""

    parse: Callable[[str], object]
    default: object = None
    required: bool = False
    help: str = ""


def read(
    command: str, words: list[str], options: dict[str, Option], *, rest: bool = False
) -> tuple[dict[str, object], list[str]]:
    """Split words into the command's options and, if `rest`, dotted overrides of the config.

    Errors: ValueError for a word without `=`, an unknown name (naming the nearest), a value that does not parse, or a
        required option that is missing.
    """
    values = {name: option.default for name, option in options.items()}
    given, overrides = set(), []
    for word in words:
        name, separator, text = word.partition("=")
        if not separator or not name:
            raise ValueError(f"{command}: expected name=value, got {word!r}")
        if name in options:
            values[name] = _parsed(command, name, text, options[name])
            given.add(name)
        elif rest and "." in name:
            overrides.append(word)
        else:
            close = difflib.get_close_matches(name, options, n=3, cutoff=0.4) or list(options)
            dotted = ", or a dotted config key" if rest else ""
            raise ValueError(f"{command}: unknown option {name!r}; nearest: {', '.join(close)}{dotted}")
    missing = [f"{name}={option.help}" for name, option in options.items() if option.required and name not in given]
    if missing:
        raise ValueError(f"{command}: missing {' and '.join(missing)}")
    return values, overrides


def _parsed(command: str, name: str, text: str, option: Option) -> object:
    try:
        return option.parse(text)
    except ValueError as error:
        raise ValueError(f"{command}: {name} expects {option.help or option.parse.__name__}, got {text!r}") from error
