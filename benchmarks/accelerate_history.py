"""Which accelerate release knows which key and which word of its file, read out of the releases' own wheels.

Run it to check xflux_doctor/accelerate_sections.py: it downloads the wheels of the releases below (or of those named)
into a folder with pip, reads their sources by syntax tree without importing anything, and prints for every key and
word the first release that has it and, where it is gone again, the first that has it not.

    python benchmarks/accelerate_history.py --wheels DIR [RELEASE ...]
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.version import Version

from xflux_doctor.accelerate_keys import accepted_keys, distributed_types
from xflux_doctor.accelerate_sections import DYNAMO_BACKENDS, FLAGS, known_flags

RELEASES = (
    "0.10.0 0.11.0 0.12.0 0.13.0 0.14.0 0.15.0 0.16.0 0.17.0 0.18.0 0.19.0 0.20.0 0.21.0 0.22.0 0.23.0 0.24.0 0.25.0 "
    "0.26.0 0.27.0 0.28.0 0.29.0 0.30.0 0.30.1 0.31.0 0.32.0 0.33.0 0.34.0 1.0.0 1.1.0 1.2.0 1.3.0 1.4.0 1.5.0 1.6.0 "
    "1.7.0 1.8.0 1.9.0 1.10.0 1.11.0 1.12.0 1.13.0 1.14.0 1.15.0"
).split()
SECTIONS = {
    "deepspeed_config": ("deepspeed_", "zero", "offload_", "gradient_"),
    "fsdp_config": ("fsdp_", "offload_params", "min_num_params", "sharding_strategy"),
    "fp8_config": ("fp8_",),
    "dynamo_config": ("dynamo_",),
    "megatron_lm_config": ("megatron_lm_",),
    "mpirun_config": ("mpirun_",),
    "parallelism_config": ("parallelism_config_",),
    "tp_config": ("tp_",),
    "ipex_config": ("ipex", "use_xpu"),
}
"""How the launch flags of a section begin."""
ENUMS = ("DistributedType", "DynamoBackend", "PrecisionType", "ComputeEnvironment")
WORDS = ("FSDP_SHARDING_STRATEGY", "FSDP_AUTO_WRAP_POLICY", "FSDP_BACKWARD_PREFETCH", "FSDP_STATE_DICT_TYPE",
         "DEEPSPEED_MULTINODE_LAUNCHERS", "TORCH_DYNAMO_MODES")  # fmt: skip
Names = dict[str, set[str]]


def download(folder: Path, releases: list[str]) -> None:
    """Wheels that are not there yet, each alone and without what it depends on."""
    for release in releases:
        if not (folder / f"accelerate-{release}-py3-none-any.whl").exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*pip, "--dest", str(folder), f"accelerate=={release}"], check=True)


def names(wheel: Path) -> Names:
    """{table: names} of one release."""
    found: Names = {}
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}
    trees = {name: ast.parse(text) for name, text in texts.items() if name.startswith("accelerate/")}
    for name, tree in trees.items():
        if (
            name.startswith("accelerate/commands/config/config_args")
            or name == "accelerate/commands/config/__init__.py"
        ):
            found |= {"top level": set(fields(tree, ("BaseConfig", "ClusterConfig"))) - {"to_dict"}}
            found["default JSON file"] = set(strings_at(tree, "default_json_config_file"))
        if name == "accelerate/commands/launch.py":
            found |= flags(tree)
        if name == "accelerate/utils/launch.py":  # a key that has no flag
            found["read only from files"] = set(re.findall(r'getattr\(args, "(fsdp_\w+)", None\)', texts[name]))
        if name.startswith("accelerate/utils"):
            for table in WORDS:
                found.setdefault(table, set()).update(strings_at(tree, table))
            for table in ENUMS:
                found.setdefault(table, set()).update(members(tree, table))
    return {table: words for table, words in found.items() if words}


def fields(tree: ast.Module, classes: tuple[str, ...]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in classes:
            yield from (line.target.id for line in node.body
                        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name))  # fmt: skip


def members(tree: ast.Module, name: str) -> Iterator[str]:
    """The values of an enumeration."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield from (str(line.value.value) for line in node.body
                        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant))  # fmt: skip


def strings_at(tree: ast.Module, name: str) -> Iterator[str]:
    """The string constants in what is assigned to a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            yield from (str(part.value) for part in ast.walk(node.value)
                        if isinstance(part, ast.Constant) and isinstance(part.value, str))  # fmt: skip


def flags(tree: ast.Module) -> Names:
    """The launch flags of each section (the names that its keys set), and the words that a flag is limited to."""
    found: Names = {}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument" and node.args):
            continue
        long = [a.value for a in node.args if isinstance(a, ast.Constant) and str(a.value).startswith("--")]
        if not long:
            continue
        flag = str(long[0]).removeprefix("--").replace("-", "_")
        section = next((s for s, starts in SECTIONS.items() if flag.startswith(starts)), "other flags")
        found.setdefault(section, set()).add(flag)
        for keyword in node.keywords:
            if keyword.arg == "choices" and isinstance(keyword.value, ast.List):
                words = {str(e.value) for e in keyword.value.elts if isinstance(e, ast.Constant)}
                found.setdefault(f"--{flag}", set()).update(words)
    return found


def table(history: dict[str, Names]) -> Iterator[str]:
    """One line a name: since when, and until when, over the releases that were read."""
    releases = list(history)
    for name in sorted({table for tables in history.values() for table in tables}):
        yield f"\n{name}"
        for word in sorted({word for tables in history.values() for word in tables.get(name, ())}):
            has = [word in history[release].get(name, ()) for release in releases]
            spans = []
            for at, there in enumerate(has):
                if there and (at == 0 or not has[at - 1]):
                    spans.append("always" if at == 0 else releases[at])
                if not there and at and has[at - 1]:
                    spans.append(f"until {releases[at]}")
            yield f"  {word:45} {' '.join(spans)}"


def differences(history: dict[str, Names]) -> Iterator[str]:
    """Where xflux_doctor's tables and the releases say different things."""
    for release, found in history.items():
        version = Version(release)
        tables = {
            "top level": (accepted_keys(version) - {"fp16", "dynamo_backend"}, found["top level"] - {"dynamo_backend"}),
            "DistributedType": (set(distributed_types(version)), found["DistributedType"]),
            "DynamoBackend": (
                {w for w, s in DYNAMO_BACKENDS.items() if s.has(version)},
                found.get("DynamoBackend", set()),
            ),
        }
        for section in FLAGS if version >= Version("0.14.0") else ():  # before, some flags have no prefix
            read = found.get(section, set()) | found.get("read only from files", set()) & set(FLAGS[section])
            tables[section] = (set(known_flags(section, version)), read)
        for name, (ours, theirs) in tables.items():
            if ours != theirs:
                yield f"{release} {name}: only ours {sorted(ours - theirs)}, only theirs {sorted(theirs - ours)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the wheels; missing ones are fetched")
    parser.add_argument("releases", nargs="*", default=RELEASES)
    given = parser.parse_args()
    given.wheels.mkdir(parents=True, exist_ok=True)
    download(given.wheels, given.releases)
    history = {r: names(given.wheels / f"accelerate-{r}-py3-none-any.whl") for r in given.releases}
    print(f"accelerate {given.releases[0]} to {given.releases[-1]}, {len(given.releases)} releases")
    print("\n".join(table(history)))
    print("\n" + ("\n".join(differences(history)) or "xflux_doctor's tables say the same."))


if __name__ == "__main__":
    main()
