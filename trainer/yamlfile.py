"""Read one YAML mapping from a file, or say everything that is wrong with the file.

The safe loader, plus what it lacks: a key that is given twice is a problem instead of a silent loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from xflux_trainer.errors import ConfigError, Problem

MAX_BYTES = 1 << 20
"""A config is a few kilobytes; a weights file given by mistake is not read to its end."""


class _Loader(yaml.SafeLoader):
    """The safe loader, which also notes the keys that stand twice in one mapping."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.twice: list[tuple[str, int]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                self.twice.append((key.value, key.start_mark.line + 1))
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_mapping(path: str | Path) -> dict[Any, Any]:
    """The mapping that the file holds. Raises `ConfigError` with every problem that was found."""
    text = _read_text(Path(path))
    try:
        loader = _Loader(text)  # a control character is refused here already
        data = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(path, (_yaml_problem(error, text),)) from error
    except (RecursionError, ValueError, TypeError) as error:
        # The safe constructors raise these for nesting beyond all reason, for `2024-99-99` and the like.
        raise ConfigError(path, (Problem("", f"is not readable as YAML: {error}"),)) from error
    if loader.twice:
        raise ConfigError(
            path,
            tuple(
                Problem(key, f"stands a second time at line {line}", "Keep one of the two.")
                for key, line in loader.twice
            ),
        )
    if data is None:
        raise ConfigError(path, (Problem("", "is empty", "Start from examples/demo/train.yaml."),))
    if not isinstance(data, dict):
        seen = f"holds a {type(data).__name__} where `key: value` lines belong"
        raise ConfigError(path, (Problem("", seen, "Start from examples/demo/train.yaml."),))
    return data


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(path, (Problem("", "does not exist", "Check the path after --config."),)) from error
    except IsADirectoryError as error:
        raise ConfigError(path, (Problem("", "is a folder", "Name the YAML file inside it."),)) from error
    except OSError as error:
        raise ConfigError(path, (Problem("", f"cannot be read: {error.strerror}"),)) from error
    if len(raw) > MAX_BYTES or b"\0" in raw:
        raise ConfigError(path, (Problem("", "is not a text file", "Name the YAML file of the training run."),))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(path, (Problem("", "is not UTF-8 text", "Save it as UTF-8."),)) from error


def _yaml_problem(error: yaml.YAMLError, text: str) -> Problem:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return Problem("", f"is not YAML: {str(error).splitlines()[0]}")
    number = error.problem_mark.line + 1
    lines = text.splitlines()
    line = lines[number - 1] if number <= len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return Problem("", f"has a tab at line {number}", "YAML indents with spaces: replace the tab.")
    return Problem("", f"is not YAML at line {number}: {error.problem}", "Mend that line.")
