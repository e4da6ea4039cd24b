"""A failed collective is tried again with one variable at a time, and the one that helps is the finding's proposal.

What the user has set stays as it is. Switches that turn NVLink's multicast off are never among these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import msgspec

from xflux_doctor.facts import AllReduce
from xflux_doctor.probes import signs

Attempt = Callable[[Mapping[str, str], float], AllReduce]
"""(environment, seconds) → the outcome."""

COSTS = {
    "NCCL_P2P_DISABLE": "it sends what the cards exchange through the host's memory, several times slower with NVLink",
    "NCCL_SHM_DISABLE": "ranks of one machine that are not linked directly then talk by the network, which is slower",
    "NCCL_IB_DISABLE": "machines then talk by TCP in place of InfiniBand or RoCE, often ten times slower",
    "NCCL_SOCKET_IFNAME": "it costs nothing where that interface is the fast one; all machines must have its name",
    "GLOO_SOCKET_IFNAME": "it costs nothing where that interface is the fast one; all machines must have its name",
}
"""What one pays for each variable, said with the proposal."""
LOOPBACK = "it works for ranks of one machine only"
LIVE = ("up", "unknown")


class Trial(msgspec.Struct, frozen=True):
    """One variable to try alone."""

    name: str
    value: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


def cost(assignment: str) -> str:
    """The price of `NAME=value`, in words."""
    name, _, value = assignment.partition("=")
    return LOOPBACK if value == "lo" else COSTS[name]


def trials(
    backend: str, environment: Mapping[str, str], interfaces: Mapping[str, str], *, infiniband: bool, machines: int
) -> tuple[Trial, ...]:
    """What may be tried, the likeliest first: without what the user set, and what this machine does not have."""
    live = [name for name, state in interfaces.items() if name != "lo" and state in LIVE]
    if machines == 1 and "lo" in interfaces:
        live.append("lo")
    found = []
    if backend == "nccl":
        found += [Trial("NCCL_P2P_DISABLE", "1"), Trial("NCCL_SHM_DISABLE", "1")]
        found += [Trial("NCCL_IB_DISABLE", "1")] if infiniband else []
    name = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    found += [Trial(name, interface) for interface in live]
    return tuple(trial for trial in found if trial.name not in environment)


def retry(
    first: AllReduce, todo: tuple[Trial, ...], attempt: Attempt, environment: Mapping[str, str], deadline: float,
    least: float,
) -> AllReduce:  # fmt: skip
    """The first outcome, with what was tried and the one that helped. No try gets less than `least` seconds."""
    if first.ok or not todo or ((sign := signs.named(f"{first.detail}\n{first.said}")) and not sign.variables):
        return first
    tried: list[str] = []
    for count, trial in enumerate(todo):
        left = deadline - time.monotonic()
        if left < least:
            words = ", ".join(map(str, todo[count:]))
            skipped = (*first.skipped, f"not tried, no time left: {words}")
            return msgspec.structs.replace(first, tried=tuple(tried), skipped=skipped)
        share = max(least, left / (len(todo) - count))
        if attempt({**environment, trial.name: trial.value}, share).ok:
            return msgspec.structs.replace(first, tried=tuple(tried), helped=(str(trial),))
        tried.append(str(trial))
    return msgspec.structs.replace(first, tried=tuple(tried))
