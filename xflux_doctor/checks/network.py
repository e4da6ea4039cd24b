"""NE: the collective that every step of a several-rank job stands on, and the meeting of its machines before it."""

from __future__ import annotations

from collections.abc import Iterator

from xflux_doctor.check import Case, Check, check
from xflux_doctor.cluster import task
from xflux_doctor.facts import AllReduce, Meeting
from xflux_doctor.finding import Finding, error, warning
from xflux_doctor.probes import signs
from xflux_doctor.probes.retry import cost
from xflux_doctor.probes.signs import Sign

_MEANING = {
    "start": "the rank did not come as far as to import torch",
    "import": "torch was imported, and the place to meet was not reached",
    "rendezvous": "the place to meet was reached, and not all ranks came there with the same libraries",
    "versions": "all ranks came, and did not form a group",
    "init": "the group was made, and the first reduction did not end",
    "tiny": "a reduction of one element worked, and the larger ones did not",
    "values": "the sums were right, and another collective was not",
    "collectives": "this rank's values were right, and what follows them did not end",
    "sweep": "everything was right and timed, and another rank did not end",
}


@check("NE101", "an all-reduce over the job's ranks gives the right values", needs=("allreduce",))
def all_reduce(case: Case) -> Iterator[Finding]:
    """NCCL on GPUs, gloo on CPU ranks: all-reduce, all-gather, reduce-scatter and broadcast in stages, with
    rank-dependent values, odd lengths, fp32 and bf16, and a deadline. `check --deep` also tries, after a failure, one
    variable at a time, and proposes what helped."""
    result = case.facts.allreduce
    assert result
    if result.ok:
        return
    sign = signs.named(f"{result.detail}\n{result.said}")
    who = f"Rank {result.rank} of {result.ranks}" if result.rank is not None else f"The {result.ranks} ranks"
    doing = f", at '{result.doing}'" if result.doing else ""
    frame = f"; its Python stood in {result.frame}" if result.frame else ""
    stage = _MEANING.get(result.stage, result.stage)
    if result.helped and all(case.facts.environment.get(n) == v for n, v in proven(result).items()):
        names = " and ".join(result.helped)
        yield warning(
            f"A {result.backend} all-reduce of {result.ranks} ranks passed all stages with {names} only.",
            f"This launch is given it: {'; '.join(map(cost, result.helped))}. Without it: {result.detail}{frame}.",
            f"Mend this machine; set {names} yourself to skip the search at each start.",
        )
        return
    because = f"{stage[0].upper()}{stage[1:]}: training would hang or stop at the same place."
    yield error(
        f"{who} failed a {result.backend} all-reduce after stage '{result.stage}'{doing} in {result.seconds:.0f} s: "
        f"{result.detail}{frame}",
        f"{sign.name[0].upper()}{sign.name[1:]}: {sign.because} {because}" if sign else because,
        " ".join(_hints(case, result, sign)),
    )


def proven(result: AllReduce) -> dict[str, str]:
    """The variables under which a reduction that failed without them passed."""
    return {name: value for name, _, value in (assignment.partition("=") for assignment in result.helped)}


def _hints(case: Case, result: AllReduce, sign: Sign | None) -> Iterator[str]:
    """What helped when it was tried; else what the signs say; else where to look."""
    for assignment in result.helped:
        name = assignment.partition("=")[0]
        yield f"With {assignment}, and nothing else changed, all stages passed: {cost(assignment)}. Set it to go on;"
        yield f"without {name} this machine has a fault to mend."
    if result.tried:
        yield f"Tried without success: {', '.join(result.tried)}."
    if sign is not None:
        yield sign.hint
    if case.facts.host is not None and case.facts.host.named is False and result.backend == "gloo":
        yield "This host's own name is not in /etc/hosts, which gloo looks up: add it there."
    if sign is not None or result.helped:
        return
    if "SIGSTOP" in result.detail:
        yield "Something stops the process, such as a job control or a debugger: nothing of the network is wrong."
    elif "SIGKILL" in result.detail:
        yield "Something killed it, most often the kernel for want of memory: `dmesg` names it."
    elif result.backend == "gloo":
        yield "Check that this host's name resolves, and that GLOO_SOCKET_IFNAME, if set, names a live interface."
    else:
        yield "Run again with NCCL_DEBUG=INFO for NCCL's own account."
        if "was killed" in result.detail and not result.tried:
            yield "`check --deep` tells whether the link between the cards is the cause."


_ENDLESS = "The others would wait until their own deadline, which is ten minutes and more."


@check("NE102", "everybody came to the launch", needs=("meeting",))
def all_came(case: Case) -> Iterator[Finding]:
    """Before a launch over several machines `run` has them meet, for --wait-for-nodes seconds."""
    meeting = case.facts.meeting
    assert meeting
    if meeting.missing:
        hint = "Start the same command there, with its own machine_rank; --wait-for-nodes S waits longer."
        if meeting.kind == "rank":
            hint = "See whether it was started, and what it says."
        yield error(
            f"{_named(meeting, meeting.missing)} of {meeting.count} did not come to {meeting.address} within "
            f"{meeting.seconds:.0f} s.",
            _ENDLESS,
            f"{hint}{_leftover(case)}",
        )
    if meeting.left:
        yield error(
            f"{_named(meeting, meeting.left)} of {meeting.count} came and left before all were ready.",
            _ENDLESS,
            "Look at what it says.",
        )
    elsewhere = tuple(number for number in meeting.stopped if number != meeting.rank)
    if elsewhere:
        yield error(
            f"The checks of {_named(meeting, elsewhere).lower()} stop the launch.",
            "Nothing was started anywhere.",
            "Look at what it says.",
        )


_TROUBLES = {
    "refused": ("nothing listens on that port (connection refused)",
                "Start number 0 first; if it runs, main_process_ip or main_process_port is another machine's."),
    "timeout": ("no answer came",
                "The address is wrong, or a firewall drops what is sent to that port."),
    "no route": ("there is no route to it",
                 "The address is wrong, or this machine is in another network."),
    "unknown name": ("its name is not known here",
                     "Correct main_process_ip, or write the address in place of the name."),
    "no resolver": ("its name could not be looked up",
                    "Write the address in place of the name, or mend this machine's name service."),
    "other service": ("something listens there that is no xflux-doctor",
                      "Another program has the port, or number 0 has launched already: take another port, or end both "
                      "and start them again."),
    "busy": ("this machine's port is in use already",
             "End what holds it, or take another main_process_port in the files of all machines."),
    "no port": ("the port cannot be opened here", "Take a port of 1024 to 32767 that is free."),
    "gone": ("it ended the meeting", "Look at what number 0 says."),
}  # fmt: skip


@check("NE103", "number 0 answers at main_process_ip", needs=("meeting",))
def main_answers(case: Case) -> Iterator[Finding]:
    """The others connect to number 0 at main_process_ip and main_process_port, where the ranks will meet."""
    meeting = case.facts.meeting
    assert meeting
    if not meeting.trouble:
        return
    what, hint = _TROUBLES.get(meeting.trouble, (meeting.trouble, ""))
    detail = f": {meeting.detail}" if meeting.detail and meeting.detail not in what else ""
    where = "This is number 0, to listen" if meeting.rank == 0 else f"{meeting.kind.capitalize()} 0 was looked for"
    yield error(
        f"{where} at {meeting.address}, and {what}{detail} ({meeting.seconds:.0f} s).",
        "The launcher would try the same address until its deadline.",
        f"{hint}{_leftover(case)}",
    )


@check("NE104", "everybody would run the same", needs=("meeting",))
def all_alike(case: Case) -> Iterator[Finding]:
    """The machines compare their launch, their training file and their packages; paths may differ."""
    meeting = case.facts.meeting
    assert meeting
    for number, keys in meeting.unlike.items():
        shown = [f"{key}: {theirs} ({own} on number 0)" for key, (own, theirs) in list(keys.items())[:8]]
        more = f", and {len(keys) - 8} more" if len(keys) > 8 else ""
        yield error(
            f"{meeting.kind.capitalize()} {number} has another {', '.join(shown)}{more}.",
            "Ranks that disagree wait for each other for ever, or train something else together.",
            "Give all machines the same files and packages.",
        )
    if meeting.twice:
        yield error(
            f"{_named(meeting, meeting.twice)} came twice.",
            "Two of them take the same ranks, and others are missing.",
            "Give each machine its own machine_rank, counted from 0.",
        )


MEETING: tuple[Check, ...] = (all_came, main_answers, all_alike)


def _named(meeting: Meeting, numbers: tuple[int, ...]) -> str:
    kind = meeting.kind + ("s" if len(numbers) > 1 else "")
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"{kind.capitalize()} {', '.join(map(str, numbers[:8]))}{more}"


def _leftover(case: Case) -> str:
    """RANK and its like, set by no launcher that is known: perhaps nobody else was started."""
    found = task(case.facts.environment)
    if found is None or found.source != "the environment":
        return ""
    return " RANK and WORLD_SIZE are set here: if they are left over from another run, unset them."
