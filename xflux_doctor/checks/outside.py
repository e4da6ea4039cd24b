"""HW and NE: what NVIDIA's own tools said of this machine, where they are installed (`check --deep`)."""

from __future__ import annotations

from collections.abc import Iterator

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.spare import used, without
from xflux_doctor.facts import DcgmFailure, Gpu
from xflux_doctor.finding import Finding, error, warning

_AGREES = 0.8
"""Share of nccl-tests' rate below which ours is another one: runs of one size vary by a tenth."""
_SETTINGS = ("persistence mode", "environment", "graphics processes")
"""Tests of DCGM 2 and 3, which tell no severity, that are about how a machine is set up and not about a card."""
_MONITOR, _CONFIG = 1, 5
"""dcgmErrorSeverity_t: watch it; the machine is set up otherwise than DCGM wants."""


@check("HW208", "DCGM's own quick diagnosis passes", needs=("dcgm",))
def diagnosis(case: Case) -> Iterator[Finding]:
    """`check --deep` runs `dcgmi diag -r 1` where dcgmi is installed. A failed test of a card that the job uses is an
    error; other cards, and what DCGM itself calls a matter of configuration, are warnings."""
    result = case.facts.dcgm
    assert result
    mine = {gpu.index for gpu in used(case)}
    bad = {gpu.index for one in result.failures if not _is_setting(one) for gpu in _cards(case, one)}
    for failure in result.failures:
        cards = _cards(case, failure)
        indices = sorted(gpu.index for gpu in cards)
        who = f"GPU {', '.join(str(index) for index in indices)}" if indices else "this machine"
        if failure.gpus and not indices:
            who = f"a card that this job does not see (DCGM's GPU {', '.join(str(one) for one in failure.gpus)})"
        seen = f"DCGM{f' {result.version}' if result.version else ''}: its test {failure.test} failed for {who}" + (
            f": {failure.detail}" if failure.detail else "."
        )
        if _is_setting(failure):
            yield warning(seen, "It is how the machine is set up, by DCGM's own severity: no card is called sick.",
                          "Set it as DCGM says, if the machine is yours; training works without.")  # fmt: skip
        elif failure.gpus and not mine.intersection(indices):
            yield warning(seen, "The job does not use it.", "Have it tested before a job does.",
                          commands=("dcgmi diag -r 3",))  # fmt: skip
        else:
            # One choice of cards for all findings: each alone would name another bad one.
            reason = "DCGM's diagnosis fails for the card"
            edits, commands, plan = without(case, bad, reason) if indices else ((), (), "")
            yield error(
                seen, "Training would run on what NVIDIA's own test rejects.",
                f"Take it out of use and have it tested for longer. {plan}".rstrip(),
                edits=edits, commands=("dcgmi diag -r 3", *commands),
                docs="https://docs.nvidia.com/datacenter/dcgm/latest/reference/diagnostics/errors.html",
            )  # fmt: skip


def _cards(case: Case, failure: DcgmFailure) -> list[Gpu]:
    """NVML's cards of DCGM's numbers: by UUID where DCGM told them, else its order is taken to be NVML's."""
    assert case.facts.dcgm
    known = case.facts.dcgm.cards
    uuids = {known.get(str(number)) for number in failure.gpus}
    return [
        gpu for gpu in case.facts.gpus or () if (gpu.uuid in uuids if known else gpu.index in failure.gpus)
    ]  # fmt: skip


def _is_setting(failure: DcgmFailure) -> bool:
    if failure.severity is not None:
        return failure.severity in (_MONITOR, _CONFIG)
    return failure.test.lower().startswith(_SETTINGS)


@check("NE106", "nccl-tests comes to the same all-reduce", needs=("nccl_tests",))
def nccl_tests(case: Case) -> Iterator[Finding]:
    """`check --deep` runs nccl-tests' all_reduce_perf where it is on PATH, with the job's variables: wrong values are
    an error; a failure, or a rate of ours under 80 % of its own, is a warning."""
    found, ours = case.facts.nccl_tests, case.facts.allreduce
    assert found
    if found.wrong:
        yield error(
            f"nccl-tests over {found.ranks} GPUs: an all-reduce gave {found.wrong} values that are wrong.",
            "Gradients would be wrong without a word: a link, a card or the way between them spoils bytes.",
            "Find the pair by running it over two cards at a time; then try NCCL_P2P_DISABLE=1, and look for an Xid.",
            commands=(f"all_reduce_perf -b {found.bytes} -e {found.bytes} -g 2", "dmesg | grep -i -e xid -e iommu"),
        )
    if found.failed:
        torch = "torch's own all-reduce works here" if ours and ours.ok else "see NE101 for torch's own all-reduce"
        yield warning(
            f"nccl-tests over {found.ranks} GPUs failed: {found.failed}", f"{torch[0].upper()}{torch[1:]}.",
            "Its NCCL need not be torch's: compare the versions that both print.",
            commands=(f"NCCL_DEBUG=INFO all_reduce_perf -b {found.bytes} -e {found.bytes} -g {found.ranks}",),
        )  # fmt: skip
    if found.wrong or found.failed:
        return
    if found.busbw is None or ours is None or ours.ranks != found.ranks:
        raise SkipCheck("there is no all-reduce of ours over the same cards")
    rate = next((one.busbw for one in ours.bandwidth if one.bytes == found.bytes), None)
    if rate is None:
        raise SkipCheck(f"our own all-reduce was not timed at {found.bytes >> 20} MiB")
    if rate < _AGREES * found.busbw:
        yield warning(
            f"An all-reduce of {found.bytes >> 20} MiB runs at {rate:.0f} GB/s bus bandwidth in torch and at "
            f"{found.busbw:.0f} GB/s in nccl-tests, over the same {found.ranks} cards.",
            "The links carry more than the job would get: torch brings another NCCL, or something else ran meanwhile.",
            "Compare the versions that both print, and run it again on an idle machine.",
            commands=(f"NCCL_DEBUG=VERSION all_reduce_perf -b {found.bytes} -e {found.bytes} -g {found.ranks}",),
        )
