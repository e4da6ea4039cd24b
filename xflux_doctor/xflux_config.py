"""X-Flux's YAML as OmegaConf reads it: untyped, `1e-5` a number, a key that stands twice an error.

Source: omry/omegaconf@v2.3.0:omegaconf/_utils.py, get_yaml_loader.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_LARGEST = 1 << 20
"""A configuration file over 1 MiB is some other file."""


class _Loader(yaml.SafeLoader):
    """OmegaConf's reading of YAML: `1e-5` is a number, and a key that stands twice stops it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.YAMLError(f"found duplicate key {key.value} (line {key.start_mark.line + 1})")
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_config(path: Path | None) -> tuple[dict[str, Any] | None, str]:
    """The config's keys and values; or why there are none."""
    if path is None:
        return None, ""
    try:
        if path.stat().st_size > _LARGEST:
            return None, f"{path} is no configuration file"
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a safe loader
    except OSError as error:
        return None, f"{path} cannot be read: {error.strerror}"
    except yaml.MarkedYAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        return None, f"{path} is not YAML{line}: {error.problem}"
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        return None, f"{path} cannot be read as YAML: {str(error).splitlines()[0]}"
    if not isinstance(values, dict):
        return None, f"{path} holds {type(values).__name__}, not keys and values"
    return {str(key): value for key, value in values.items()}, ""
