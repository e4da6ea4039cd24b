"""NE: the collective that every step of a several-rank job stands on."""

from __future__ import annotations

from collections.abc import Iterator

from xflux_doctor.check import Case, check
from xflux_doctor.finding import Finding, error

_MEANING = {
    "start": "the rank did not come as far as to import torch",
    "import": "torch was imported, and the place to meet was not reached",
    "rendezvous": "the place to meet was reached, and the ranks did not form a group",
    "init": "the group was made, and the first reduction did not end",
    "tiny": "a reduction of one element worked, and the larger ones did not",
    "values": "this rank's sums were right, and another rank's never came",
}


@check("NE101", "an all-reduce over the job's ranks gives the right values", needs=("allreduce",))
def all_reduce(case: Case) -> Iterator[Finding]:
    """NCCL on GPUs, gloo on CPU ranks, with rank-dependent values, odd lengths, fp32 and bf16, and a deadline."""
    result = case.facts.allreduce
    assert result
    if result.ok:
        return
    silent = "was killed" in result.detail
    stage = _MEANING.get(result.stage, result.stage)
    hint = "Run again with NCCL_DEBUG=INFO for NCCL's own account."
    if result.backend == "gloo":
        hint = "Check that this host's name resolves, and that GLOO_SOCKET_IFNAME, if set, names a live interface."
        if case.facts.host is not None and case.facts.host.named is False:
            hint = f"This host's own name is not in /etc/hosts, which gloo looks up: add it there. {hint}"
    elif silent:
        hint += " If ranks hang, NCCL_P2P_DISABLE=1 tells whether the link between the cards is the cause."
    yield error(
        f"Rank {result.rank} of {result.ranks} failed a {result.backend} all-reduce after stage "
        f"'{result.stage}' in {result.seconds:.0f} s: {result.detail}",
        f"{stage[0].upper()}{stage[1:]}: training would hang or stop at the same place.",
        hint,
    )
