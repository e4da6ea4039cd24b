"""The import rules of docs/design.md, read from the source by its syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# Floors from the ground up; inside a floor, a module may import those listed before it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "files", "redact", "facts", "versions", "finding", "conditions", "matrix_types", "matrix_lint", "matrix",
     "choose",
     "pins", "accelerate_sections", "accelerate_keys", "known_variables", "visible", "xflux_scripts",
     "xflux_config", "xflux_images", "xflux", "shellwords", "command", "deepspeed_keys", "deepspeed_file", "job",
     "cluster", "placement", "batch", "launched", "topology", "floors", "install_room"),
    (
        "gather.deadline", "gather.cluster", "gather.environment", "gather.hub_cache", "gather.mounts",
        "gather.folders",
        "gather.host", "gather.metadata", "gather.interpreter", "gather.packages",
        "gather.driver", "gather.cards", "gather.clocks", "gather.topology", "gather.gpus",
        "gather.kernel_log", "gather.toolchain",
        "gather.ports", "gather.shadows", "gather.machine",
        "probes.torch_import", "probes.allreduce", "probes.hub_access", "probes.wire", "probes.meeting",
        "probes.reunion",
        "probes.gpu_loads", "probes.gpu_attention", "probes.gpu_blocks", "probes.gpu",
        "probes.runner", "probes.reduction", "probes.signs", "probes.retry", "probes.each_gpu", "probes.outside",
        "probes.level",
        "verdict", "check", "refused", "bill", "deep", "xflux_bill", "strategy", "plans", "hostroom", "steptime",
        "plansearch", "planner",
    ),
    ("checks.hardware", "checks.software", "checks.rules", "checks.packages", "checks.releases",
     "checks.words", "checks.sections", "checks.section_words", "checks.section_types", "checks.strategies",
     "checks.variables", "checks.nccl_variables", "checks.torch_variables", "checks.job_variables", "checks.host",
     "checks.toolchain", "checks.spare", "checks.cards", "checks.health", "checks.xids", "checks.launch",
     "checks.sharing", "checks.tried", "checks.computed",
     "checks.machines",
     "checks.deepspeed", "checks.deepspeed_section", "checks.deepspeed_stages", "checks.deepspeed_file",
     "checks.deepspeed_wins", "checks.deepspeed_memory",
     "checks.memory", "checks.room", "checks.storage", "checks.data", "checks.lint",
     "checks.weights", "checks.network", "checks.bandwidth", "checks.outside", "checks.xflux", "checks.xflux_run",
     "checks.xflux_data", "checks.xflux_resume", "checks"),
    ("yamlnodes", "yamlscalar", "meaning", "plan", "yamlcomment", "yamltext", "jsontext", "repair", "joint", "nodes",
     "effective", "template", "launch",
     "explain.*", "explain", "inputs"),
    ("guard", "heartbeat", "hang", "syscalls", "waits", "cstack", "stacks", "vitals", "outlets", "progress",
     "runstate", "lifesigns", "attach", "watcher", "supervise", "preempt", "remember", "between", "roll",
     "fleet.values", "fleet.reading", "fleet.fields", "fleet.node",
     "fleet.compare", "fleet.numbers", "fleet.links", "fleet.merge", "fleet.collect", "fleet.network",
     "fleet.__main__", "fleet"),
    ("report.placement", "report.summary", "report.text", "report.jsonreport", "report.planjson", "report.difference",
     "report.groups", "report.bars", "report.htmlparts", "report.htmlbars", "report.planhtml",
     "report.fleettext", "report.fleetjson", "report.runfiles", "report.story", "report.storytext", "report.storyhtml",
     "report"),
    ("commands.check", "commands.planned", "commands.fix", "commands.undo", "commands.install", "commands.lighter",
     "commands.again", "commands.rejoin", "commands.bundle", "commands.explain", "commands.plan",
     "commands.matrix", "commands.nodes", "commands.together", "commands.gate", "commands.shown", "commands.runfolder",
     "commands.lead", "commands.report", "commands.run",
     "commands.fleet",
     "commands", "cli", "program"),
)  # fmt: skip
TORCH_STACK = {"torch", "torchvision", "transformers", "diffusers", "accelerate", "deepspeed", "peft", "optimum"}
TORCH_FREE_TRAINER = {
    "config", "spec", "memory", "memory_diffusers", "memory_fused", "memory_terms",
    "rules", "timing", "timing_cards", "samples", "lint",
    "layout", "bfl_spec",
    "find", "speed",
}  # fmt: skip
PACKAGE = ROOT / "xflux_doctor"


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            found[name] = path
    return found


def place(name: str) -> tuple[int, int]:
    for floor, names in enumerate(FLOORS):
        for position, entry in enumerate(names):
            if name == entry or (entry.endswith(".*") and name.startswith(entry[:-1])):
                return floor, position
    raise AssertionError(f"{name} stands on no floor: add it to FLOORS and to docs/design.md")


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import of a file, at whatever depth."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def own(module: str, name: str, known: dict[str, Path]) -> str | None:
    """The module of ours that an import names, or None."""
    if module.split(".")[0] != "xflux_doctor":
        return None
    whole = f"{module}.{name}".removeprefix("xflux_doctor.")
    if whole in known:
        return whole
    bare = module.removeprefix("xflux_doctor").lstrip(".")
    return bare or None


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_from_below(name: str) -> None:
    known = modules()
    for module, symbol in imports(known[name]):
        target = own(module, symbol, known)
        if target is None or target == name:
            continue
        assert not (name.startswith(f"{target}.")), f"{name} imports its own package's __init__"
        mine, other = place(name), place(target)
        same_family = name.split(".")[0] == target.split(".")[0] == "explain"
        assert other[0] < mine[0] or (other[0] == mine[0] and other[1] < mine[1]) or same_family, (
            f"{name} (floor {mine}) imports {target} (floor {other})"
        )


def test_no_cycles() -> None:
    known = modules()
    graph = {n: {t for m, s in imports(p) if (t := own(m, s, known)) and t != n} for n, p in known.items()}
    done: set[str] = set()

    def visit(node: str, path: tuple[str, ...]) -> None:
        assert node not in path, " → ".join((*path, node))
        if node in done:
            return
        for target in graph.get(node, ()):
            visit(target, (*path, node))
        done.add(node)

    for node in graph:
        visit(node, ())


@pytest.mark.parametrize("name", [n for n in modules() if not n.startswith("probes.")])
def test_the_doctor_imports_no_torch(name: str) -> None:
    for module, _ in imports(modules()[name]):
        assert module.split(".")[0] not in TORCH_STACK


@pytest.mark.parametrize("name", modules())
def test_the_doctor_takes_only_torch_free_modules_of_the_trainer(name: str) -> None:
    for module, symbol in imports(modules()[name]):
        if module.split(".")[0] == "xflux_trainer":
            part = module.partition(".")[2] or symbol
            assert part.split(".")[0] in TORCH_FREE_TRAINER, f"{name} imports xflux_trainer.{part}"


@pytest.mark.parametrize("path", sorted((ROOT / "trainer").rglob("*.py")), ids=lambda p: p.name)
def test_the_trainer_takes_nothing_from_the_doctor(path: Path) -> None:
    assert all(module.split(".")[0] != "xflux_doctor" for module, _ in imports(path))


def test_sys_modules_never_holds_torch() -> None:
    """A whole quick check and the trainer's torch-free modules, in a process of their own."""
    code = (
        "import sys\n"
        "from xflux_doctor.cli import main\n"
        "main(['check', '--quick', '--cpu'])\n"
        "main(['matrix', 'list', '--cpu'])\n"
        "import xflux_trainer.config, xflux_trainer.spec, xflux_trainer.memory, xflux_trainer.samples\n"
        "heavy = {'torch', 'numpy', 'PIL', 'transformers', 'diffusers', 'accelerate', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_importing_does_nothing(tmp_path: Path) -> None:
    """No logging set-up and no files or folders made at import."""
    names = [f"xflux_doctor.{n}" for n in modules() if not n.startswith("probes.")]
    code = (
        "import os, logging\n"
        "import importlib\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "assert not logging.getLogger().handlers\n"
        "assert os.listdir('.') == [], os.listdir('.')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
