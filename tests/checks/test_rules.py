"""SW105: every row of the matrix can break and can be kept, and is silent on a healthy machine."""

from __future__ import annotations

import re

import msgspec
import pytest
from conftest import XFLUX_ACCELERATE, case, findings, gpus, job, machine, packages, verdict
from packaging.version import Version

from xflux_doctor import conditions
from xflux_doctor import matrix as matrices
from xflux_doctor.check import Case
from xflux_doctor.checks import rules
from xflux_doctor.checks.rules import Seen, judge
from xflux_doctor.conditions import ABSENT, Thing
from xflux_doctor.facts import Driver, Facts, Package, Toolchain
from xflux_doctor.gather.packages import OF_INTEREST
from xflux_doctor.matrix import Matrix, Rule

OURS = matrices.load()
DDP = XFLUX_ACCELERATE.replace("distributed_type: DEEPSPEED", "distributed_type: MULTI_GPU")
OFFLOAD = XFLUX_ACCELERATE.replace("offload_optimizer_device: none", "offload_optimizer_device: cpu")
LADDER = [f"{a}.{b}.{c}" for a in range(14) for b in range(60) for c in (0, 2, 99)]
LADDER += ["470.1", "525.60.13", "560.35.05", "570.26", "580.65.06", "600.0"]


def near(need: str) -> list[str]:
    """The versions that a specifier names, and those just around them, before the ladder of common ones."""
    named = [Version(v) for v in re.findall(r"\d+(?:\.\w+)*", need)]
    around = [f"{v.public}{tail}" for v in named for tail in ("", ".1")]
    return [*around, *LADDER]


def thing(need: str, *, met: bool) -> Thing:
    """Something that meets a condition, or that does not."""
    if need in ("present", "absent"):
        return Thing(True, "1.0") if (need == "present") == met else ABSENT
    if need.startswith("build "):
        builds = (need.split()[1].replace("*", "1"), "cpu", "cu118", "cu121", "rocm6.2")
        return next(t for b in builds if conditions.holds(need, t := Thing(True, "1.0", b)) is met)
    return next(t for v in near(need) if conditions.holds(need, t := Thing(True, v)) is met)


def around(rule: Rule, *, met: bool) -> Seen:
    """A machine on which the row's conditions hold, and its need is met or is not."""
    things: dict[str, Thing | None] = {name: thing(need, met=True) for name, need in rule.when.items()}
    things[rule.what] = thing(rule.need, met=met)
    return Seen(things, frozenset(rule.job))


@pytest.mark.parametrize("rule", OURS.rules, ids=lambda rule: rule.id)
def test_every_rule_breaks_and_is_kept(rule: Rule) -> None:
    seen = around(rule, met=False)
    assert judge(rule, seen) == "broken"
    assert rule.what in rules.in_words(rule, seen) or conditions.SUBJECTS[rule.what] in rules.in_words(rule, seen)
    assert judge(rule, around(rule, met=True)) == "kept"
    for name in (rule.what, *rule.when):
        unknown = msgspec.structs.replace(seen, things={**seen.things, name: None})
        assert judge(rule, unknown) in ("unknown", "beside"), name  # never a pass, never an alarm
    for name, need in rule.when.items():
        elsewhere = {**seen.things, name: thing(need, met=False)}
        assert judge(rule, msgspec.structs.replace(seen, things=elsewhere)) == "beside", name
    if rule.job:
        assert judge(rule, msgspec.structs.replace(seen, job=frozenset())) == "beside"


def test_rules_speak_only_of_what_is_looked_at(matrix: Matrix) -> None:
    """A row about a name that nobody gathers would never fire."""
    looked_at = set(matrix.names()) | OF_INTEREST | set(conditions.SUBJECTS)
    made = set(rules.look(case(matrix, machine(matrix, toolchain=Toolchain()), job())).things)
    assert set(conditions.SUBJECTS) <= made
    for rule in matrix.rules:
        assert {rule.what, *rule.when} <= looked_at and set(rule.job) <= set(conditions.JOBS), rule.id


@pytest.mark.parametrize("work", [XFLUX_ACCELERATE, OFFLOAD, DDP])
@pytest.mark.parametrize("stack", ["xflux-2024", "cuda12", "cuda13", "cpu"])
def test_stacks_keep_all_rules(matrix: Matrix, stack: str, work: str) -> None:
    """Also beside the toolkit of the stack's own CUDA and a usual compiler."""
    tools = Toolchain(cuda_home="/cuda", nvcc="/cuda/bin/nvcc", cuda_version=matrix.stack(stack).cuda or "12.4",
                      cxx="/usr/bin/c++", gcc_version="13")  # fmt: skip
    facts = machine(matrix, packages=packages(matrix, stack), toolchain=tools)
    assert findings(case(matrix, facts, job(work), stack), rules.rules) == ()


def broken(matrix: Matrix, facts: Facts, accelerate: str = XFLUX_ACCELERATE, **options: bool) -> dict[str, str]:
    """{row id: severity} of the findings, for some trainer that is started by accelerate's file alone."""
    work = msgspec.structs.replace(job(accelerate, **options), train=None)
    found = findings(case(matrix, facts, work, "xflux-2024"), rules.rules)
    return {match[1]: f.severity for f in found if (match := re.search(r"\((R-[A-Z0-9-]+):", f.seen))}


def test_resume_rule(matrix: Matrix) -> None:
    """deepspeed before 0.16 cannot resume under torch 2.6: the best known skew must be in the matrix."""
    found = packages(matrix, "xflux-2024", torch="2.6.0+cu124")
    subject = case(matrix, machine(matrix, packages=found), job(), "xflux-2024")
    assert any("deepspeed 0.14.4 beside torch 2.6.0" in f.seen for f in findings(subject, rules.rules))


def test_an_error_about_deepspeed_is_a_warning_in_a_job_without_it(matrix: Matrix) -> None:
    facts = machine(matrix, packages=packages(matrix, "xflux-2024", deepspeed="0.15.4", pydantic="1.10.0"))
    assert broken(matrix, facts)["R-DS-PYDANTIC"] == "error"
    assert broken(matrix, facts, DDP)["R-DS-PYDANTIC"] == "warning"


def nvcc(matrix: Matrix, version: str, **changes: object) -> Facts:
    tools = Toolchain(
        cuda_home="/cuda", nvcc="/cuda/bin/nvcc" if version else "", cuda_version=version, gcc_version="12"
    )
    return machine(matrix, packages=packages(matrix, "xflux-2024"), toolchain=tools, **changes)


@pytest.mark.parametrize(("version", "fires"), [
    ("12.0", False), ("12.1", False), ("12.5", False), ("12.6", True), ("12.8", True), ("13.0", True), ("11.8", True),
])  # fmt: skip
def test_nvcc_against_deepspeed_0144(matrix: Matrix, version: str, fires: bool) -> None:
    ids = [row for row in broken(matrix, nvcc(matrix, version), OFFLOAD) if "NVCC" in row]
    assert len(ids) == fires, ids
    assert not any("NVCC" in row for row in broken(matrix, nvcc(matrix, version)))  # nothing is compiled
    assert not any("NVCC" in row for row in broken(matrix, nvcc(matrix, version), OFFLOAD, cpu=True))
    skipped = nvcc(matrix, version, environment={"DS_SKIP_CUDA_CHECK": "1"})
    assert not any("NVCC" in row for row in broken(matrix, skipped, OFFLOAD))


def test_deepspeed_without_nvcc_beside_a_gpu(matrix: Matrix) -> None:
    assert broken(matrix, nvcc(matrix, ""))["R-DS-NO-NVCC"] == "error"
    assert "R-DS-NO-NVCC" not in broken(matrix, nvcc(matrix, ""), cpu=True)
    unknown = machine(matrix, packages=packages(matrix, "xflux-2024"))
    assert "R-DS-NO-NVCC" not in broken(matrix, unknown)  # the toolchain was not looked at
    newer = machine(matrix, packages=packages(matrix, "cuda13"), toolchain=Toolchain())
    assert findings(case(matrix, newer, job()), rules.rules) == ()


def test_cards_and_driver_against_the_installed_torch(matrix: Matrix) -> None:
    old = packages(matrix, "xflux-2024")
    assert "R-ARCH-BLACKWELL" in broken(matrix, machine(matrix, card="5090", packages=old))
    assert "R-ARCH-BLACKWELL" not in broken(matrix, machine(matrix, card="L40S", packages=old))
    hidden = (*gpus("H100", 1), *gpus("5090", 1, index=1, uuid="GPU-1"))
    chosen = machine(matrix, gpus=hidden, environment={"CUDA_VISIBLE_DEVICES": "0"}, packages=old)
    assert "R-ARCH-BLACKWELL" not in broken(matrix, chosen)
    driver = machine(matrix, driver=Driver("570.26", "12.8"))
    assert "R-DRV-13" in broken(matrix, driver) and "R-DRV-13" not in broken(matrix, driver, cpu=True)
    # a cuda-compat library beside an old driver speaks CUDA 13
    assert "R-DRV-13" not in broken(matrix, machine(matrix, driver=Driver("570.26", "13.0")))


def test_torchs_own_metadata_comes_first(matrix: Matrix) -> None:
    """Where torch names the exact library, SW108 judges by it; a torch that declares nothing is judged by the rows."""
    found = packages(matrix, "xflux-2024", triton="3.2.0")
    assert "R-TRITON-24" in broken(matrix, machine(matrix, packages=found))
    found["torch"] = msgspec.structs.replace(found["torch"], requires=("triton==3.0.0; python_version < '3.13'",))
    assert "R-TRITON-24" not in broken(matrix, machine(matrix, packages=found))


def test_nothing_known_is_no_pass(matrix: Matrix) -> None:
    bare = machine(matrix, packages={"pip": Package("pip", "25.0")})
    assert verdict(case(matrix, bare, job()), rules.rules).status == "skipped"


def test_the_hint_names_a_step_that_helps(matrix: Matrix) -> None:
    def hints(subject: Case) -> dict[str, str]:
        return {f.seen.split(" ", 1)[0]: f.hint for f in findings(subject, rules.rules)}

    found = packages(matrix, "cuda13", torchao="0.15.0")
    assert hints(case(matrix, machine(matrix, packages=found), job()))["torchao"].startswith("Install torchao >=0.16.0")
    old = case(matrix, machine(matrix, driver=Driver("570.26", "12.8")), job())
    assert any(hint.startswith("Upgrade the driver") for hint in hints(old).values())
