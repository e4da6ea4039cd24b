"""EN2: NCCL's variables and gloo's: names, words, interfaces, and what switches a link off."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from packaging.version import Version

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.words import devices, installed
from xflux_doctor.finding import Finding, error, warning
from xflux_doctor.known_variables import (
    NCCL_ALGORITHMS,
    NCCL_FUNCTIONS,
    NCCL_LAST,
    NCCL_NOT_THERE,
    NCCL_OF_OTHERS,
    NCCL_PROTOCOLS,
    NCCL_SINCE,
    NCCL_TEXT,
    NCCL_UNTIL,
    NCCL_WORDS,
    SWITCHES_LEFT_ALONE,
)

NCCL_DOCS = "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html"
_NUMBER = re.compile(r"\s*[+-]?(0[xX][0-9a-fA-F]+|\d+)\s*")
# torch's old names, which it still reads with a warning; NCCL itself never did.
_TORCHS = frozenset(
    "NCCL_ASYNC_ERROR_HANDLING NCCL_BLOCKING_WAIT NCCL_DESYNC_DEBUG NCCL_ENABLE_TIMING NCCL_HIGH_PRIORITY "
    "NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK NCCL_USE_COMM_NONBLOCKING".split()
)
_STOPS = Version("2.24")
"""First release whose parseList refuses an unknown word (src/graph/tuning.cc, by tag)."""
_PARSED_ANEW = Version("2.29")
"""From here on NCCL is given new readers of values one by one; its numbers are not judged."""


def several_ranks(case: Case) -> None:
    """NCCL is used by several ranks on GPUs; one rank alone talks to nobody."""
    if case.job.use_cpu or case.job.num_processes <= 1:
        raise SkipCheck("NCCL is not used")


def nccl(case: Case) -> Version | None:
    """The release of the wheel that torch links against."""
    return installed(case, "nvidia-nccl-cu12") or installed(case, "nvidia-nccl-cu13")


def _set(case: Case) -> dict[str, str]:
    names = case.facts.environment.items()
    return {n: v for n, v in names if n.startswith("NCCL_") and n not in SWITCHES_LEFT_ALONE | _TORCHS and v}


@check("EN201", "NCCL reads every NCCL_ variable that is set")
def names_known(case: Case) -> Iterator[Finding]:
    """NCCL ignores a name that it does not know; the list is that of its sources 2.20.5 to 2.30.7 (NVIDIA/nccl)."""
    several_ranks(case)
    version = nccl(case)
    if version is not None and version > Version(NCCL_LAST):
        raise SkipCheck(f"NCCL {version} is newer than the list of names")
    for name, value in _set(case).items():
        if name in NCCL_NOT_THERE:
            why, hint = f"NCCL reads no such variable: {NCCL_NOT_THERE[name]}", "Unset it."
        elif name in NCCL_SINCE or name.startswith(NCCL_OF_OTHERS):
            continue
        else:
            near = difflib.get_close_matches(name, sorted(set(NCCL_SINCE) - SWITCHES_LEFT_ALONE), n=1, cutoff=0.85)
            if not near:
                continue  # a plugin's, or a newer NCCL's
            why, hint = "NCCL ignores a name that it does not know", f"Did you mean {near[0]}?"
        yield warning(f"{name} is set to {value!r}.", f"{why}.", hint, docs=NCCL_DOCS)


@check("EN202", "the installed NCCL knows the variables that are set")
def names_of_this_release(case: Case) -> Iterator[Finding]:
    """A variable of a newer, or a dropped one of an older NCCL is ignored without a word (NVIDIA/nccl, by tag)."""
    several_ranks(case)
    version = nccl(case)
    if version is None:
        raise SkipCheck("the release of NCCL is unknown")
    for name, value in _set(case).items():
        since, until = NCCL_SINCE.get(name), NCCL_UNTIL.get(name)
        if since and version < Version(since) and since != min(NCCL_SINCE.values(), key=Version):
            when = f"NCCL {since} is the first that reads it"
        elif until and Version(until) <= version <= Version(NCCL_LAST):
            when = f"NCCL {until} and newer do not read it"
        else:
            continue
        yield warning(
            f"{name} is {value!r} and NCCL is {version}.",
            f"{when}; here it does nothing.",
            "Unset it, so that nobody counts on it.",
            docs=NCCL_DOCS,
        )


@check("EN203", "NCCL takes the values of its variables for what they say")
def values_known(case: Case) -> Iterator[Finding]:
    """Switches are read by strtoll: 'true' is 0, '4M' is 4 (NVIDIA/nccl@v2.28.9-1:src/misc/param.cc, tuning.cc)."""
    several_ranks(case)
    version = nccl(case)
    for name, value in _set(case).items():
        if name in NCCL_WORDS:
            yield from _word(name, value)
        elif name in ("NCCL_ALGO", "NCCL_PROTO"):
            yield from _element_list(name, value, version)
        elif (
            name not in NCCL_TEXT
            and Version(NCCL_SINCE.get(name, "99")) < _PARSED_ANEW
            and not _NUMBER.fullmatch(value)
        ):
            digits = re.match(r"\s*[+-]?\d+", value)
            yield warning(
                f"{name} is {value!r}.",
                f"NCCL reads a number there and takes this for {digits[0].strip() if digits else 0}.",
                "Write a number: 1 for on, 0 for off, sizes in bytes.",
                docs=NCCL_DOCS,
            )


def _word(name: str, value: str) -> Iterator[Finding]:
    words = NCCL_WORDS[name]
    known = value.upper() in words if name == "NCCL_DEBUG" else value in words
    if known or (name.endswith("_LEVEL") and _NUMBER.fullmatch(value)):
        return
    near = value.upper() if value.upper() in words else ", ".join(words)
    yield warning(
        f"{name} is {value!r}.",
        "NCCL does not know the word and goes on as if the variable were not set.",
        f"Write {near}." if "," not in near else f"Its words are {near}.",
        docs=NCCL_DOCS,
    )


def _element_list(name: str, value: str, version: Version | None) -> Iterator[Finding]:
    """`ring,tree`, `^nvls`, and since 2.24 `allreduce:ring;broadcast:tree`; an unknown word stops NCCL."""
    known = NCCL_ALGORITHMS if name == "NCCL_ALGO" else NCCL_PROTOCOLS
    for part in value.lower().split(";"):
        function, colon, rest = part.rpartition(":")
        bad = [word for word in rest.lstrip("^").split(",") if word and word not in known]
        if colon and function not in NCCL_FUNCTIONS:
            bad.append(function)
        newer = [word for word in rest.lstrip("^").split(",") if version and version < Version(known.get(word, "0"))]
        if bad or newer:
            release = f" of NCCL {version}" if version else ""
            stops = version is not None and version >= _STOPS
            yield (error if stops else warning)(
                f"{name} is {value!r}: {', '.join(map(repr, bad or newer))} is no word of it{'' if bad else release}.",
                "NCCL stops when the ranks meet: 'ncclInvalidUsage'." if stops else "NCCL before 2.24 ignores it.",
                f"Its words are {', '.join(known)}. Best leave the choice to NCCL and unset it.",
                commands=(f"unset {name}",),
                docs=NCCL_DOCS,
            )
            return


@check("EN204", "the interfaces that are named exist", needs=("host",))
def interfaces_exist(case: Case) -> Iterator[Finding]:
    """NCCL: prefixes, ^ leaves out, = is exact; gloo: whole names (NCCL user guide; seen with torch 2.11)."""
    assert case.facts.host
    there = case.facts.host.interfaces
    if not there:
        raise SkipCheck("/sys/class/net cannot be read")
    if case.job.num_processes <= 1:
        raise SkipCheck("one rank meets nobody")
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = case.facts.environment.get(name, "")
        gloo = name.startswith("GLOO")
        if not value or (gloo and not case.job.use_cpu) or (not gloo and case.job.use_cpu):
            continue
        lacking = _lacking(value, gloo, tuple(there))
        if lacking:
            told = "Unable to find address for: " + lacking if gloo else "Bootstrap : no socket interface found"
            yield error(
                f"{name} is {value!r}; this machine's interfaces are {', '.join(sorted(there))}.",
                f"The ranks stop when they meet: '{told}'.",
                "Name one that is up, or unset it on one machine.",
                commands=(f"unset {name}",),
                docs=NCCL_DOCS,
            )


def _lacking(value: str, gloo: bool, there: tuple[str, ...]) -> str:
    """What no interface answers to; empty when one does. NCCL needs one of its list, gloo every one."""
    if gloo:
        return next((name for name in value.split(",") if name not in there), "")
    exclude = value.startswith("^")
    plain = value[1:] if exclude else value
    exact = plain.startswith("=")
    names = [entry.partition(":")[0] for entry in plain.removeprefix("=").split(",") if entry]
    match = [i for i in there if any(i == name if exact else i.startswith(name) for name in names)]
    left = [i for i in there if i not in match] if exclude else match
    return "" if left else value


@check("EN205", "the links between the cards are not switched off", needs=("gpus",))
def links_on(case: Case) -> Iterator[Finding]:
    """Without P2P the ranks exchange through host memory, without SHM through sockets (NCCL user guide)."""
    several_ranks(case)
    found = devices(case) or ()
    linked = [gpu for gpu in found if gpu.nvlinks]
    environment = case.facts.environment
    off = [name for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE") if environment.get(name, "").strip() == "1"]
    if environment.get("NCCL_P2P_LEVEL") in ("LOC", "0"):
        off.append("NCCL_P2P_LEVEL")
    p2p = [name for name in off if name != "NCCL_SHM_DISABLE"]
    if p2p and len(linked) > 1:
        yield warning(
            f"{p2p[0]} is {environment[p2p[0]]!r} and {len(linked)} cards have {linked[0].nvlinks} NVLinks up.",
            "Gradients go through the host's memory and not over NVLink: every step waits for them.",
            "Unset it; it is for finding faults and for cards without P2P.",
            commands=tuple(f"unset {name}" for name in p2p),
            docs=NCCL_DOCS,
        )
    elif len(off) > 1 and case.job.num_machines <= 1:
        yield warning(
            f"{' and '.join(off)} are set.",
            "With both off, the ranks of this machine exchange gradients over network sockets.",
            "Leave shared memory on.",
            commands=("unset NCCL_SHM_DISABLE",),
            docs=NCCL_DOCS,
        )


@check("EN206", "InfiniBand is used between machines", needs=("host",))
def infiniband_on(case: Case) -> Iterator[Finding]:
    """NCCL_IB_DISABLE=1 and NCCL_NET=Socket leave TCP between machines (NCCL user guide)."""
    several_ranks(case)
    assert case.facts.host
    if case.job.num_machines <= 1 or not case.facts.host.infiniband:
        raise SkipCheck("there is one machine, or no InfiniBand")
    environment = case.facts.environment
    off = "NCCL_IB_DISABLE" if environment.get("NCCL_IB_DISABLE", "").strip() == "1" else ""
    off = "NCCL_NET" if environment.get("NCCL_NET", "").lower() == "socket" else off
    if off:
        adapters = ", ".join(case.facts.host.infiniband)
        yield warning(
            f"{off} is {environment[off]!r}, {case.job.num_machines} machines take part and {adapters} is there.",
            "The machines exchange gradients over TCP, many times slower.",
            "Unset it, unless the fabric is broken.",
            commands=(f"unset {off}",),
            docs=NCCL_DOCS,
        )


@check("EN207", "NCCL's log does not flood the run")
def log_level(case: Case) -> Iterator[Finding]:
    """NCCL_DEBUG=TRACE prints every call; INFO prints some hundred lines a rank at the start (NCCL user guide)."""
    several_ranks(case)
    level = case.facts.environment.get("NCCL_DEBUG", "").upper()
    apart = case.facts.environment.get("NCCL_DEBUG_FILE")
    if not apart and (level == "TRACE" or (level == "INFO" and case.job.num_processes > 16)):
        yield warning(
            f"NCCL_DEBUG is {level!r} for {case.job.num_processes} ranks, and NCCL_DEBUG_FILE is not set.",
            "All ranks write into one log; at TRACE every collective does, and a step waits for it.",
            "Set WARN, or a file for each process.",
            commands=("export NCCL_DEBUG=WARN",),
            docs=NCCL_DOCS,
        )


@check("EN208", "NCCL's variables do not contradict each other")
def no_contradictions(case: Case) -> Iterator[Finding]:
    """One of the two is ignored: P2P_DISABLE beats P2P_LEVEL, MIN over MAX channels (NVIDIA/nccl: graph/paths.cc)."""
    several_ranks(case)
    values = _set(case)
    if values.get("NCCL_P2P_DISABLE", "").strip() == "1" and values.get("NCCL_P2P_LEVEL", "LOC") != "LOC":
        yield _pair("NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", values, "P2P is off; the level is not looked at")
    low, high = values.get("NCCL_MIN_NCHANNELS", ""), values.get("NCCL_MAX_NCHANNELS", "")
    if low.isdecimal() and high.isdecimal() and int(low) > int(high) > 0:
        yield _pair("NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", values, "the least is above the most")
    if values.get("NCCL_IB_DISABLE", "").strip() == "1" and values.get("NCCL_NET", "").upper() == "IB":
        yield _pair("NCCL_IB_DISABLE", "NCCL_NET", values, "NCCL is told to use a network that it may not use")


def _pair(one: str, other: str, values: dict[str, str], why: str) -> Finding:
    seen = f"{one} is {values[one]!r} and {other} is {values[other]!r}."
    return warning(seen, f"{why[0].upper()}{why[1:]}.", "Keep one of the two.", docs=NCCL_DOCS)
