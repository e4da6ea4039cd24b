"""The deep level without children: what is tried and proposed, what is recognised, what is too slow."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from cli_kit import doctor
from conftest import XFLUX_ACCELERATE, case, findings, job, machine, verdict

from xflux_doctor.checks import bandwidth, network
from xflux_doctor.facts import AllReduce, Bandwidth, TorchFacts
from xflux_doctor.matrix import Matrix
from xflux_doctor.probes import retry, signs

INTERFACES = {"lo": "unknown", "eth0": "up", "eth1": "down", "ib0": "up"}
FAILED = AllReduce("nccl", 2, False, "init", 0, "did not end within 9 s and was killed", 9.0)
# Switches that turn NVLink's multicast off are the user's alone.
NEVER = ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS")


def named(*trials: retry.Trial) -> list[str]:
    return [str(trial) for trial in trials]


class TestTrials:
    def test_what_this_machine_has(self) -> None:
        found = named(*retry.trials("nccl", {}, INTERFACES, infiniband=True, machines=1))
        assert found == ["NCCL_P2P_DISABLE=1", "NCCL_SHM_DISABLE=1", "NCCL_IB_DISABLE=1", "NCCL_SOCKET_IFNAME=eth0",
                         "NCCL_SOCKET_IFNAME=ib0", "NCCL_SOCKET_IFNAME=lo"]  # fmt: skip
        assert named(*retry.trials("gloo", {}, {"lo": "unknown", "eth1": "down"}, infiniband=True, machines=1)) == [
            "GLOO_SOCKET_IFNAME=lo"
        ]

    def test_what_it_does_not_have(self) -> None:
        found = named(*retry.trials("nccl", {}, INTERFACES, infiniband=False, machines=2))
        assert not [name for name in found if "IB_DISABLE" in name or name.endswith("=lo")]

    @pytest.mark.parametrize("name", ["NCCL_P2P_DISABLE", "NCCL_SOCKET_IFNAME"])
    def test_the_users_are_left_alone(self, name: str) -> None:
        found = retry.trials("nccl", {name: ""}, INTERFACES, infiniband=True, machines=1)
        assert found and name not in {trial.name for trial in found}

    def test_each_has_its_price_and_none_is_multicasts(self) -> None:
        for backend in ("nccl", "gloo"):
            for trial in retry.trials(backend, {}, INTERFACES, infiniband=True, machines=1):
                assert retry.cost(str(trial)) and trial.name not in NEVER
        assert not set(NEVER) & set(retry.COSTS)


class TestRetry:
    def run(self, helps: str, seconds: float = 60.0, first: AllReduce = FAILED) -> tuple[AllReduce, list[str]]:
        seen: list[str] = []
        given = {"NCCL_DEBUG": "WARN", "NCCL_NVLS_ENABLE": "0"}

        def attempt(environment: Mapping[str, str], share: float) -> AllReduce:
            assert {name: environment[name] for name in given} == given and 0 < share <= seconds
            (new,) = {*environment} - {*given}
            seen.append(new)
            return msgspec.structs.replace(FAILED, ok=new == helps)

        todo = retry.trials("nccl", given, {"eth0": "up"}, infiniband=True, machines=1)
        return retry.retry(first, todo, attempt, given, time.monotonic() + seconds, 5.0), seen

    def test_it_stops_at_what_helps(self) -> None:
        result, seen = self.run("NCCL_SHM_DISABLE")
        assert (result.ok, result.tried, result.helped) == (False, ("NCCL_P2P_DISABLE=1",), ("NCCL_SHM_DISABLE=1",))
        assert seen == ["NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"]

    def test_nothing_helps(self) -> None:
        result, seen = self.run("")
        assert len(result.tried) == len(seen) == 4 and result.helped == () and result.detail == FAILED.detail

    def test_no_time_is_said(self) -> None:
        result, seen = self.run("NCCL_P2P_DISABLE", seconds=1.0)
        assert seen == [] and "no time left: NCCL_P2P_DISABLE=1" in result.skipped[-1]

    @pytest.mark.parametrize("change", [{"ok": True}, {"detail": "ncclInvalidUsage: Duplicate GPU detected : rank 1"}])
    def test_what_no_variable_mends(self, change: dict[str, object]) -> None:
        result, seen = self.run("NCCL_P2P_DISABLE", first=msgspec.structs.replace(FAILED, **change))
        assert seen == [] and result.helped == ()


# Lines as the libraries write them.
WORDS = [
    ("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000", "duplicate GPU"),
    ("RuntimeError: CUDA error: invalid device ordinal", "no such device"),
    ("Error while creating shared memory segment /dev/shm/nccl-ab (size 9637888), error: No space left on device (28)",
     "shared memory too small"),
    ("version skew: rank 1 has torch 2.4.0 nccl 2.20.5, the others torch 2.4.0 nccl 2.21.5", "mixed NCCL versions"),
    ("version skew: rank 1 has torch 2.4.0, the others torch 2.6.0", "version skew between ranks"),
    ("RuntimeError: write: No space left on device", "no room for files"),
    ("The server socket has failed to bind to [::]:29500 (errno: 98 - Address already in use).",
     "address already in use"),
    ("gaierror: [Errno -2] Name or service not known", "no host name resolves"),
    ("[enforce fail at device.cc:84] ifa != nullptr. Unable to find address for: dead0", "wrong interface"),
    ("Bootstrap : no socket interface found", "wrong interface"),
    ("transport/p2p.cc:275 NCCL WARN Cuda failure 'peer access is not supported between these two devices'",
     "peer-to-peer"),
    ("misc/ibvwrap.cc:252 NCCL WARN Call to ibv_reg_mr failed", "InfiniBand"),
    ("ncclUnhandledCudaError: Call to CUDA function failed.", "unhandled cuda error"),
    ("connect: (errno: 101 - Network is unreachable).", "no way to the other rank"),
    ("[unbound_buffer.cc:81] Timed out waiting 9302ms for recv operation to complete", "nothing arrives"),
    ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1, OpType=ALLREDUCE)", "nothing arrives"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "out of GPU memory"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "name"), WORDS)
def test_a_known_cause_is_named(matrix: Matrix, words: str, name: str) -> None:
    for where in ({"detail": words}, {"said": f"something\n{words}\nmore"}):
        failed = msgspec.structs.replace(FAILED, **where)
        (finding,) = findings(case(matrix, machine(matrix, allreduce=failed), job()), network.all_reduce)
        assert finding.because.lower().startswith(name.lower()), finding


def test_every_sign_says_where_it_is_known_from() -> None:
    assert {name for _, name in WORDS} == {sign.name for sign in signs.SIGNS}
    for sign in signs.SIGNS:
        assert re.compile(sign.words) and sign.source and sign.because.endswith(".") and sign.hint.endswith(".")
    assert signs.named("did not end within 60 s and was killed") is None


class TestBandwidth:
    def judged(self, matrix: Matrix, card: str, busbw: float, **changes: object) -> object:
        facts = machine(matrix, card=card, count=8)
        assert facts.gpus
        name = facts.gpus[0].name
        result = AllReduce("nccl", 8, True, "done", bandwidth=(Bandwidth(1 << 28, 1e-3, busbw),))
        facts = msgspec.structs.replace(
            facts,
            gpus=tuple(msgspec.structs.replace(gpu, nvlinks=18) for gpu in facts.gpus),
            torch=TorchFacts("2.6.0", devices=(name,) * 8),
            allreduce=msgspec.structs.replace(result, **changes),
        )
        return verdict(case(matrix, facts, job()), bandwidth.fast_enough)

    @pytest.mark.parametrize(("card", "busbw", "status"), [
        ("H100", 340, "ok"), ("H100", 40, "warning"), ("H200", 40, "warning"), ("A100", 190, "ok"),
        ("A100", 20, "warning"), ("L40S", 1, "skipped"),
    ])  # fmt: skip
    def test_against_public_numbers(self, matrix: Matrix, card: str, busbw: float, status: str) -> None:
        found = self.judged(matrix, card, busbw)
        assert found.status == status, found
        if status == "warning":
            assert found.findings[0].docs.startswith("https://") and f"{busbw} GB/s" in found.findings[0].seen

    def test_what_is_not_judged(self, matrix: Matrix) -> None:
        for changes in ({"bandwidth": ()}, {"backend": "gloo"}, {"ok": False, "bandwidth": ()},
                        {"bandwidth": (Bandwidth(1 << 20, 1e-3, 1.0),)}):  # fmt: skip
            found = self.judged(matrix, "H100", 1, **changes)
            assert found.status == "skipped" and found.reason

    def test_every_floor_has_its_source(self) -> None:
        assert all(re.match(r"https://\S+ \(.+\)$", floor.source) for floor in bandwidth.FLOORS)


class TestCommandLine:
    @pytest.mark.parametrize("other", [("--quick",), ("--facts", "cuda13-2.json")])
    def test_one_level_at_a_time(self, place: Path, other: tuple[str, ...]) -> None:
        done = doctor("check", "--deep", *other, cwd=place, code=2)
        assert "--deep" in done.stderr and other[0] in done.stderr

    @pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
    def test_its_numbers_are_reported(self, tmp_path: Path) -> None:
        (tmp_path / "accelerate.yaml").write_text(XFLUX_ACCELERATE.replace("num_processes: 8", "num_processes: 2"))
        words = ("check", "--cpu", "--accelerate-config", "accelerate.yaml", "--timeout", "60")
        shown = doctor(*words, "--deep", cwd=tmp_path).stdout
        assert "all-reduce over 2 gloo ranks" in shown and "16,384 KiB" in shown
        assert "all-reduce over" not in doctor(*words, cwd=tmp_path).stdout
