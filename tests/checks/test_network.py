"""NE: a failed reduction and what this host can say of the cause."""

from __future__ import annotations

import msgspec
from conftest import case, findings, job, machine

from xflux_doctor.checks import network
from xflux_doctor.facts import AllReduce
from xflux_doctor.matrix import Matrix


def test_gloo_looks_up_this_hosts_name(matrix: Matrix) -> None:
    failed = AllReduce("gloo", 2, False, "rendezvous", 1, "RuntimeError: gaierror", 3.0)
    facts = machine(matrix, allreduce=failed)
    assert facts.host
    for named, said in ((False, True), (True, False), (None, False)):
        subject = msgspec.structs.replace(facts, host=msgspec.structs.replace(facts.host, named=named))
        (finding,) = findings(case(matrix, subject, job(cpu=True)), network.all_reduce)
        assert ("/etc/hosts" in finding.hint) is said
