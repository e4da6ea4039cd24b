"""SW105: the matrix's rules, held against what is installed and what the job asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import msgspec
from packaging.utils import canonicalize_name

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.conditions import ABSENT, SUBJECTS, Thing, holds
from xflux_doctor.facts import Facts
from xflux_doctor.finding import Finding, error, warning
from xflux_doctor.matrix import Rule
from xflux_doctor.visible import selected

Outcome = Literal["kept", "broken", "beside", "unknown"]
"""`beside`: the row speaks of something else; `unknown`: a fact that it needs is not known. Neither is a pass."""
_HINTS = {
    "driver": "Upgrade the driver, or install a torch for an older CUDA: `xflux-doctor matrix list`.",
    "capability": "Install a torch that was built for this card: `xflux-doctor matrix list`.",
    "glibc": "Use a newer system or container image, or an older torch: `xflux-doctor matrix list`.",
    "python": "Make a venv with another Python: `xflux-doctor matrix list`.",
    "nvcc": "Install the CUDA toolkit of torch's own CUDA and point CUDA_HOME at it, or do not offload the optimizer.",
    "gcc": "Install that compiler and point CXX at it, or do not offload the optimizer.",
}
LINKED = ("nvidia-", "triton")
"""Names of the wheels that torch's own libraries are linked to."""
_ROLES = {"deepspeed": "deepspeed", "optimum-quanto": "quantized"}
"""Packages that only some jobs use, and the word for those jobs."""


class Seen(msgspec.Struct, frozen=True):
    """What the rows are held against. A thing that is None is not known; a name that is not there is not installed."""

    things: dict[str, Thing | None]
    job: frozenset[str]


def look(case: Case) -> Seen:
    """Packages, the subjects of conditions.SUBJECTS, and what this job does."""
    facts, cpu = case.facts, case.job.use_cpu
    things: dict[str, Thing | None] = {
        name: Thing(True, package.version, package.build) for name, package in (facts.packages or {}).items()
    }
    things["python"] = Thing(True, facts.python.version) if facts.python else None
    things["glibc"] = Thing(True, facts.host.glibc) if facts.host and facts.host.glibc else None
    things["kernel"] = Thing(True, _leading(facts.host.kernel)) if facts.host and facts.host.kernel else None
    things["cuda"] = _cuda(things.get("torch", ABSENT))
    driver = facts.driver if not cpu else None
    things["driver"] = Thing(True, driver.version) if driver else None
    things["driver-cuda"] = Thing(True, driver.cuda) if driver and driver.cuda else None
    things |= _tools(facts, cpu) | _cards(case, cpu)
    return Seen(things, frozenset(_job(case)))


def _leading(text: str) -> str:
    match = re.match(r"\d+(\.\d+)*", text)
    return match[0] if match else ""


def _cuda(torch: Thing | None) -> Thing | None:
    """The CUDA of torch's build: cu121 is 12.1, cpu has none."""
    if torch is None or not torch.there or torch.build == "cpu":
        return ABSENT
    number = re.fullmatch(r"cu(\d+)(\d)", torch.build)
    return Thing(True, f"{number[1]}.{number[2]}") if number else None


def _tools(facts: Facts, cpu: bool) -> dict[str, Thing | None]:
    tools = facts.toolchain
    if tools is None:
        return {"nvcc": None, "gcc": None}
    nvcc = Thing(True, tools.cuda_version) if tools.nvcc else ABSENT
    return {"nvcc": None if cpu else nvcc, "gcc": Thing(True, tools.gcc_version) if tools.gcc_version else None}


def _cards(case: Case, cpu: bool) -> dict[str, Thing | None]:
    if cpu:
        return {"gpus": ABSENT, "capability": None}
    if case.facts.gpus is None:
        return {"gpus": None, "capability": None}
    cards = selected(case.facts.gpus, case.facts.environment, case.job.gpu_ids)
    if not cards:
        return {"gpus": ABSENT, "capability": None}
    major, minor = min(card.capability for card in cards)
    return {"gpus": Thing(True, str(len(cards))), "capability": Thing(True, f"{major}.{minor}")}


def _job(case: Case) -> Iterator[str]:
    job = case.job
    if job.deepspeed:
        yield "deepspeed"
    if job.compiled_ops:
        yield "compiles"
    if case.facts.environment.get("DS_SKIP_CUDA_CHECK") != "1":
        yield "cuda-check"
    if str(job.section("dynamo_config").get("dynamo_backend") or "no").lower() != "no":
        yield "dynamo"
    if job.quanto:
        yield "quantized"


@check("SW105", "the packages go together", needs=("packages",))
def rules(case: Case) -> Iterator[Finding]:
    """Every rule of the matrix whose conditions hold here."""
    found = look(case)
    judged = [(rule, judge(rule, found)) for rule in case.matrix.rules if not _told_by_torch(rule, case)]
    if not any(outcome in ("kept", "broken") for _, outcome in judged):
        raise SkipCheck("no rule of the matrix speaks of what is known here")
    for rule, outcome in judged:
        if outcome == "broken":
            make = error if rule.severity == "error" and _used(rule, found.job) else warning
            words = f"{in_words(rule, found)} ({rule.id}: {rule.title})."
            yield make(words, rule.because, hint(rule, case), docs=next(filter(_is_url, rule.source), rule.source[0]))


def _is_url(source: str) -> bool:
    return source.startswith("https://")


def _used(rule: Rule, job: frozenset[str]) -> bool:
    """A row about DeepSpeed stops only a job that uses it."""
    return all(word in job for name, word in _ROLES.items() if name in (rule.what, *rule.when))


def _told_by_torch(rule: Rule, case: Case) -> bool:
    """Whether the installed torch names this library itself: then SW108 judges by that exact version."""
    torch = (case.facts.packages or {}).get("torch")
    if torch is None or not rule.what.startswith(LINKED) or "torch" not in rule.when:
        return False
    names = (re.match(r"[\w.-]+", line) for line in torch.requires)
    return rule.what in {canonicalize_name(name[0]) for name in names if name}


def judge(rule: Rule, found: Seen) -> Outcome:
    """Hold one row against what was found."""
    if not set(rule.job) <= found.job:
        return "beside"
    thing = found.things.get(rule.what, None if rule.what in SUBJECTS else ABSENT)
    met = [_holds(need, name, found) for name, need in rule.when.items()]
    if False in met or (thing is not None and not thing.there and rule.need not in ("present", "absent")):
        return "beside"
    kept = _holds(rule.need, rule.what, found)
    if None in met or kept is None:
        return "unknown"
    return "kept" if kept else "broken"


def _holds(need: str, name: str, found: Seen) -> bool | None:
    thing = found.things.get(name, None if name in SUBJECTS else ABSENT)
    return None if thing is None else holds(need, thing)


def broken(rule: Rule, found: Seen) -> bool:
    return judge(rule, found) == "broken"


def in_words(rule: Rule, found: Seen) -> str:
    """What breaks the row: `deepspeed 0.14.4 beside torch 2.6.0 must be >=0.16.0`."""
    beside = ", ".join(_label(name, found, need) for name, need in rule.when.items())
    beside = f" beside {beside}" if beside else ""
    if rule.need == "present":
        return f"{rule.what} is not installed{beside}"
    must = {"absent": "must not be there"}.get(rule.need, f"must be {rule.need}")
    if rule.need.startswith("build "):
        must = f"must be a build for {' or '.join(rule.need.split()[1:])}"
    return f"{_label(rule.what, found, rule.need)}{beside} {must}"


def _label(name: str, found: Seen, need: str) -> str:
    thing = found.things.get(name) or ABSENT
    called = SUBJECTS.get(name, name)
    if not thing.there:
        return f"no {called}" if name != "gpus" else "no visible GPU"
    if need.startswith("build "):
        return f"{called} {thing.version.partition('+')[0]}+{thing.build}"
    return f"{called} {thing.version}".strip()


def hint(rule: Rule, case: Case) -> str:
    """The row's own next step; else the subject's; else the stack's packages, where the package is one of them."""
    if rule.hint:
        return rule.hint
    if rule.what in _HINTS:
        return _HINTS[rule.what]
    if case.stack is None or rule.what in case.stack.packages:
        return "Run `xflux-doctor fix --install`."
    if rule.need in ("present", "absent"):
        return f"{'Install' if rule.need == 'present' else 'Uninstall'} {rule.what}."
    return f"Install {rule.what} {rule.need}, or uninstall it if nothing needs it."
