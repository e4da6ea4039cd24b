"""One report to what a fleet keeps of it. What is only this node's own is left out here: serials, addresses on the bus,
process ids, free memory, temperatures, times, ports, and its own name inside a path."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from xflux_doctor import topology
from xflux_doctor.facts import SCHEMA, Facts, Gpu
from xflux_doctor.finding import Severity
from xflux_doctor.fleet.reading import broken
from xflux_doctor.fleet.values import Broken, Node, Report, Told
from xflux_doctor.gather.gpus import DENIED

_COMPARED = ("NCCL_", "TORCH_", "PYTORCH_", "GLOO_", "NVSHMEM_", "CUDA_", "ACCELERATE_", "DS_")
_COMPARED_NAMES = frozenset(
    "OMP_NUM_THREADS MASTER_ADDR MASTER_PORT WORLD_SIZE LD_LIBRARY_PATH LD_PRELOAD NVIDIA_TF32_OVERRIDE "
    "HF_HUB_OFFLINE TRANSFORMERS_OFFLINE TP_SOCKET_IFNAME".split()
)
_OWN = frozenset(
    "NCCL_HOSTID NCCL_COMM_ID NCCL_DEBUG_FILE NCCL_TOPO_DUMP_FILE NCCL_GRAPH_DUMP_FILE TORCH_NCCL_DEBUG_INFO_TEMP_FILE "
    "TORCH_NCCL_DEBUG_INFO_PIPE_FILE".split()
)
"""Variables that are meant to differ from node to node."""
_SLOWED = ("hw_slowdown", "hw_thermal", "hw_power_brake", "sw_thermal")
"""As HW116 judges them: idle and the power limit are normal."""
_MOST_TOLD = 300
"""Letters of a finding that are kept."""


class _Finding(msgspec.Struct):
    severity: Severity
    seen: str
    hint: str = ""


class _Result(msgspec.Struct):
    check: str
    status: str
    findings: list[_Finding] = []


class _Job(msgspec.Struct):
    hash: str = ""
    values: dict[str, str] = {}


class _Check(msgspec.Struct):
    """The parts of `check --format json` that a fleet reads; more may stand there."""

    schema: int
    results: list[_Result]
    facts: Facts
    node: str = ""
    created: str = ""
    job: _Job | None = None


_FACTS = msgspec.json.Decoder(Facts)
_CHECK = msgspec.json.Decoder(_Check)
_KEYS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def node_of(report: Report) -> Node | Broken:
    """The node that the report is of, or why it is none."""
    try:
        keys = _KEYS.decode(report.data)
        if "failed" in keys:
            return broken(report, f"the doctor could not judge there: {msgspec.json.decode(keys['failed'])}")
        if "results" in keys and "facts" in keys:
            check = _CHECK.decode(report.data)
            facts = check.facts
        elif "schema" in keys and ("host" in keys or "packages" in keys):
            check, facts = None, _FACTS.decode(report.data)
        else:
            return broken(report, "it is JSON and no report of xflux-doctor")
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        return broken(report, f"it cannot be read: {error}")
    if facts.schema != SCHEMA or (check is not None and check.schema != 1):
        return broken(report, f"it is of another release of the doctor (schema {facts.schema})")
    words, sizes = _words(facts, check), {key: float(value) for key, value in _sizes(facts) if value}
    uuids = frozenset(card.uuid for card in facts.gpus or () if not _made_up(card.uuid))
    return Node(
        name=(check.node if check else "") or (facts.host.name if facts.host else "") or _named_by(report.source),
        created=(check.created if check else "") or facts.created,
        digest=hashlib.sha256(report.data).hexdigest()[:16],
        source=report.source,
        cards=uuids,
        groups=frozenset(_groups(facts, check)),
        words={sys.intern(key): sys.intern(value) for key, value in words.items()},
        sizes={sys.intern(key): value for key, value in sizes.items()},
        free={sys.intern(f"free {purpose}"): float(folder.free) for purpose, folder in (facts.folders or {}).items()
              if not folder.error and folder.total},
        told=_told(facts, check),
        checks=len(check.results) if check else 0,
        card=sys.intern(next(iter({card.name for card in facts.gpus or ()}), "")),
        speeds={sys.intern(name): value for name, value in facts.speeds.items()},
        links=facts.links,
        clock=facts.clock,
        job=check.job.hash if check and check.job else "",
    )  # fmt: skip


def _named_by(source: str) -> str:
    """A report of an older doctor tells no host: its file's name, or its label in a stream, stands for it."""
    place, _, label = source.rpartition(", ")
    if place:
        return f"task {label}" if label.isdigit() else label
    return Path(source).name.partition(".")[0] or source


def _made_up(uuid: str) -> bool:
    """Recorded machines carry zeros in the place of serial numbers, alike on all."""
    return not uuid or re.fullmatch(r"GPU-\d{8}(-0+)+", uuid) is not None


def _groups(facts: Facts, check: _Check | None) -> Iterator[str]:
    yield "environment"
    if facts.packages is not None:
        yield "packages"
    if check is not None and check.job is not None:
        yield "job"


def _words(facts: Facts, check: _Check | None) -> dict[str, str]:
    return {key: value for key, value in _all_words(facts, check) if value}


def _all_words(facts: Facts, check: _Check | None) -> Iterator[tuple[str, str]]:
    """Every field that is compared letter by letter; an empty value is not known."""
    host, driver = facts.host, facts.driver
    if facts.gpus is not None:
        yield from _card_words(facts.gpus, len(facts.gpus))
    elif "gpus" in facts.unknown:
        yield "gpu count", f"unknown ({facts.unknown['gpus']})"
    if facts.topology is not None:
        yield "gpu topology", topology.canonical(facts.topology)
    if driver is not None:
        yield from (("driver", driver.version), ("driver cuda", driver.cuda), ("driver module", driver.module))
    if facts.python is not None:
        yield "python", facts.python.version
    if host is not None:
        yield from (("kernel", host.kernel), ("glibc", host.glibc), ("machine", host.machine))
        yield from (("container", host.container or "none"), ("cpus", str(host.cpus)))
        yield "infiniband", f"{len(host.infiniband)}: {', '.join(host.infiniband)}" if host.infiniband else "none"
    if facts.toolchain is not None:
        yield "toolchain", facts.toolchain.cuda_version or "none"
    for name, package in (facts.packages or {}).items():
        yield f"package {name}", f"{package.version}{'+' + package.build if package.build else ''}"
    for name, value in facts.environment.items():
        yield from _variable(name, value, facts)
    for purpose, folder in (facts.folders or {}).items():
        kind = folder.error or f"{folder.kind or 'unknown kind'}{', read-only' if folder.read_only else ''}"
        yield f"folder {purpose}", kind
    if check is not None and check.job is not None:
        yield from ((f"job {key}", value) for key, value in check.job.values.items())
        if not check.job.values:
            yield "job", check.job.hash


def _card_words(cards: tuple[Gpu, ...], count: int) -> Iterator[tuple[str, str]]:
    """Of all cards together, however they are numbered, and whether one of them is missing or not."""
    yield "gpu count", str(count)
    if not cards:
        return
    yield "gpu model", _listed(card.name for card in cards)
    yield "gpu capability", _listed(f"{card.capability[0]}.{card.capability[1]}" for card in cards)
    yield "gpu mig", _listed({True: "on", False: "off", None: ""}[card.mig] for card in cards)
    yield "gpu compute mode", _listed(card.compute_mode for card in cards)
    yield "gpu nvlink", _listed("" if card.nvlinks is None else str(card.nvlinks) for card in cards)
    health = [card.health for card in cards]
    yield "gpu ecc", _listed({True: "on", False: "off", None: ""}[item.ecc] for item in health)
    yield "gpu pcie", _listed("" if item.pcie_width is None else str(item.pcie_width) for item in health)
    yield "gpu fabric", _listed(item.fabric for item in health)


def _listed(values: Iterator[str]) -> str:
    return " and ".join(sorted({value for value in values if value}))


def _variable(name: str, value: str, facts: Facts) -> Iterator[tuple[str, str]]:
    if name in _OWN or not (name in _COMPARED_NAMES or name.startswith(_COMPARED)):
        return
    if name == "CUDA_VISIBLE_DEVICES":  # which of a node's cards are its own matter, by number or UUID
        value = f"{len([word for word in value.split(',') if word.strip()])} devices"
    if "/" in value:  # a path may hold what is this node's own, and that of a library the driver's release
        if facts.host is not None and len(facts.host.name) > 2:
            value = re.sub(rf"(?<![\w-]){re.escape(facts.host.name)}(?![\w-])", "NODE", value)
        if facts.driver is not None:
            value = re.sub(r"(\.so)\.\d[\d.]*\b", r"\1", value).replace(facts.driver.version, "DRIVER")
    yield f"variable {name}", value or "empty"


def _sizes(facts: Facts) -> Iterator[tuple[str, int | None]]:
    if facts.gpus:
        yield "gpu memory", min(card.memory_total for card in facts.gpus)
    if facts.host is not None:
        yield "host memory", facts.host.memory_total
        yield "host memory limit", facts.host.memory_limit
        yield "shared memory", facts.host.shm_total


def _told(facts: Facts, check: _Check | None) -> dict[str, Told]:
    """{code: what is wrong} of the checks, and of the cards where the report is facts alone."""
    found: dict[str, Told] = {}
    judged = {result.check for result in check.results if result.status != "skipped"} if check else set()
    for result in check.results if check else ():
        if result.findings:
            worst = next((item for item in result.findings if item.severity == "error"), result.findings[0])
            more = f" (and {len(result.findings) - 1} more)" if len(result.findings) > 1 else ""
            found[sys.intern(result.check)] = Told(
                worst.severity, sys.intern(worst.seen[:_MOST_TOLD] + more), sys.intern(worst.hint[:_MOST_TOLD])
            )
    for code, told in _faults(facts):
        if code not in judged:
            found.setdefault(code, told)
    return found


def _faults(facts: Facts) -> Iterator[tuple[str, Told]]:
    """What is a fault whatever other nodes have, by the codes of the checks that judge it (checks/health.py)."""
    reset = "Have the card reset; if it comes back, have it replaced, or leave the node out of the job."
    for lost in (card for card in facts.lost_gpus if card.reason != DENIED):
        yield "HW106", Told("error", f"GPU {lost.index} does not answer: {lost.reason}.", reset)
    for gpu in facts.gpus or ():
        state, name = gpu.health, f"GPU {gpu.index} ({gpu.name})"
        goes_on = state.recovery_action == "none"
        if state.ecc_uncorrected:
            seen = f"{name} had {state.ecc_uncorrected} uncorrected memory errors since the driver loaded."
            yield "HW110", Told("warning" if goes_on else "error", seen, reset)
        if state.remap_failed:
            yield "HW111", Told("error", f"{name}: remapping of a memory row has failed.", "Have the card replaced.")
        elif state.remap_pending:
            yield "HW111", Told("warning", f"{name}: a memory row is to be remapped at the next reset.", reset)
        if state.retirement_pending:
            yield "HW112", Told("warning", f"{name}: faulty memory pages wait to be retired.", reset)
        if state.recovery_action not in ("", "none"):
            yield "HW114", Told("error", f"{name}: the driver asks for {state.recovery_action}.", reset)
        slowed = [reason for reason in state.throttle if reason in _SLOWED]
        if slowed:
            hint = "Look at cooling and power of that node, or leave it out: all others wait for it."
            yield "HW116", Told("warning", f"{name}: its clocks are held down ({', '.join(slowed)}).", hint)
