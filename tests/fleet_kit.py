"""A simulated fleet: one recorded machine, many times over, with the noise of healthy nodes, and planted faults."""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Callable
from typing import Any

from conftest import ROOT

from xflux_doctor.facts import from_json, to_json
from xflux_doctor.fleet.values import Report

MACHINES = ROOT / "tests" / "machines"
START = datetime.datetime(2026, 11, 24, 15, 50, tzinfo=datetime.timezone.utc)
Plant = Callable[[dict[str, Any]], None]
NEIGHBOURS = 4


def name_of(number: int) -> str:
    return f"node{number + 1:04d}"


def reports(machine: str, count: int, plants: dict[int, Plant] | None = None, seed: int = 0) -> list[Report]:
    """`count` reports of nodes that are alike, but for what is planted: {number: what is done to its report}."""
    base = json.loads(to_json(from_json((MACHINES / f"{machine}.json").read_bytes())))
    dice, found = random.Random(seed), []
    for number in range(count):
        document = noisy(base, number, count, dice)
        if plants and number in plants:
            plants[number](document)
        found.append(Report(f"{name_of(number)}.json", json.dumps(document, indent=2).encode()))
    return found


def noisy(base: dict[str, Any], number: int, count: int, dice: random.Random) -> dict[str, Any]:
    """A check's report of one healthy node. Nothing of what is changed here may ever be reported."""
    facts, name = json.loads(json.dumps(base)), name_of(number)
    created = (START + datetime.timedelta(seconds=dice.uniform(0, 90))).isoformat(timespec="seconds")
    facts["created"] = created
    host = facts["host"]
    host["name"] = name
    host["memory_total"] = int(host["memory_total"] * dice.uniform(0.999, 1.0))
    host["memory_available"] = int(host["memory_total"] * dice.uniform(0.5, 0.98))
    host["shm_free"] = dice.randrange(1 << 30, 2 << 30)
    host["interfaces"] = {"lo": "unknown", f"enp{dice.randrange(99)}s0": "up", f"veth{dice.randrange(9999)}": "up"}
    for gpu in facts["gpus"] or ():
        gpu["uuid"] = f"GPU-{dice.getrandbits(32):08x}-{dice.getrandbits(16):04x}-4000-8000-{dice.getrandbits(48):012x}"
        gpu["pci"] = f"00000000:{dice.randrange(256):02X}:00.0"
        gpu["memory_free"] = gpu["memory_total"] - dice.randrange(1 << 20, 1 << 30)
        gpu["health"]["temperature"] = dice.randrange(25, 60)
        gpu["health"]["throttle"] = dice.choice((["idle"], ["none"], ["sw_power_cap"]))
        if dice.random() < 0.3:
            gpu["processes"] = [{"pid": dice.randrange(1 << 22), "used": dice.randrange(1 << 28)}]
    for lost in facts["lost_gpus"]:
        lost["pci"] = f"00000000:{dice.randrange(256):02X}:00.0"
    facts["environment"] |= {
        "SLURM_PROCID": str(number), "SLURM_NODEID": str(number), "SLURM_JOB_ID": "4711", "MASTER_ADDR": name_of(0),
        "NCCL_DEBUG_FILE": f"/tmp/nccl.{name}.{dice.randrange(1 << 16)}", "CUDA_CACHE_PATH": f"/local/{name}/cuda",
        "RANK": str(number), "CUDA_VISIBLE_DEVICES": dice.choice(("0,1", "4,5", "GPU-1,GPU-2")),
    }  # fmt: skip
    facts["folders"] = {
        "output": folder("/shared/out", "nfs4", int(9e13 * dice.uniform(0.9, 1.0)), "0:52"),
        "temporary": folder("/tmp", "ext4", int(4e11 * dice.uniform(0.5, 1.0)), f"8:{dice.randrange(9)}"),
    }
    facts["clock"] = {"offset": 40 + dice.gauss(0, 0.05), "error": 0.02, "reference": "node0001"}
    facts["speeds"] = {"matmul_bf16_tflops": dice.gauss(760, 8), "h2d_gbs": dice.gauss(54, 0.5),
                       "allreduce_busbw_gbs": dice.gauss(340, 6)}  # fmt: skip
    peers = {(number + step) % count for step in range(1, NEIGHBOURS + 1)} - {number}
    facts["links"] = [{"peer": name_of(peer), "gbps": dice.gauss(370, 8)} for peer in sorted(peers)]
    cards = range(len(facts["gpus"] or ()))
    facts["topology"] = {
        "cards": [{"index": card, "numa": card % 2, "cpus": "0-31"} for card in cards],
        "pairs": [{"first": one, "second": two, "path": "node"} for one in cards for two in cards if one < two],
    }
    facts["timings"] = {"packages": dice.random(), "nvml": dice.random()}
    return {
        "schema": 1, "version": "0.1.0", "node": name, "created": created,
        "job": {"hash": "0" * 12, "accelerate": "0" * 12, "train": "0" * 12, "values": {
            "num_processes": "16", "mixed_precision": "bf16", "learning_rate": "0.0001"}},
        "exit_code": 0, "stack": "cuda13", "packages": [], "launch": None,
        "summary": {"error": 0, "warning": 1, "ok": 2, "skipped": 0},
        "results": [
            result("HW101"), result("HW110"), result("HW116"), result("HW106"),
            result("TC102", "warning", f"libaio is missing on {name} (pid {dice.randrange(999)})."),
        ],
        "facts": facts,
    }  # fmt: skip


def folder(path: str, kind: str, free: int, device: str) -> dict[str, Any]:
    return {"path": path, "existing": path, "mount": path, "kind": kind, "writable": True, "total": 10**14,
            "free": free, "device": device}  # fmt: skip


def result(check: str, severity: str = "ok", seen: str = "") -> dict[str, Any]:
    finding = {"code": check, "severity": severity, "seen": seen, "because": "", "hint": "Do this.", "edits": [],
               "offers": [], "commands": [], "docs": ""}  # fmt: skip
    return {"check": check, "title": "t", "status": severity, "seconds": 0.1, "reason": "",
            "findings": [] if severity == "ok" else [finding]}  # fmt: skip


# --- what can be wrong with one node -------------------------------------------------------------------------


def version(document: dict[str, Any]) -> None:
    document["facts"]["packages"]["torch"]["version"] = "2.10.0"


def driver(document: dict[str, Any]) -> None:
    document["facts"]["driver"] = {
        "version": "570.86.15",
        "cuda": "12.8",
        "module": "570.86.15",
        "library": "570.86.15",
    }


def slow_link(document: dict[str, Any]) -> None:
    """Its own numbers; those that its neighbours measured are set by `slow_in_all`."""
    for link in document["facts"]["links"]:
        link["gbps"] = 92.0


def ecc(document: dict[str, Any]) -> None:
    document["facts"]["gpus"][-1]["health"]["ecc_uncorrected"] = 12
    document["results"][1] = result("HW110", "error", "GPU 1 had 12 uncorrected memory errors.")


def missing_gpu(document: dict[str, Any]) -> None:
    gone = len(document["facts"]["gpus"]) - 1
    document["facts"]["gpus"].pop()
    topology = document["facts"]["topology"]
    topology["cards"].pop()
    topology["pairs"] = [pair for pair in topology["pairs"] if pair["second"] != gone]


def other_config(document: dict[str, Any]) -> None:
    document["job"] = {"hash": "f" * 12, "accelerate": "f" * 12, "train": "0" * 12,
                       "values": {**document["job"]["values"], "mixed_precision": "fp16"}}  # fmt: skip


def clock(document: dict[str, Any]) -> None:
    document["facts"]["clock"]["offset"] += 7.5


def throttled(document: dict[str, Any]) -> None:
    document["facts"]["gpus"][0]["health"]["throttle"] = ["hw_thermal"]
    document["results"][2] = result("HW116", "warning", "GPU 0: its clocks are held down.")


def python(document: dict[str, Any]) -> None:
    document["facts"]["python"]["version"] = "3.11.9"


def kernel(document: dict[str, Any]) -> None:
    document["facts"]["host"]["kernel"] = "5.15.0-1"


def memory(document: dict[str, Any]) -> None:
    document["facts"]["host"]["memory_total"] //= 2


def model(document: dict[str, Any]) -> None:
    for gpu in document["facts"]["gpus"]:
        gpu["name"], gpu["memory_total"] = "NVIDIA H200", 150754820096


def nvlink(document: dict[str, Any]) -> None:
    document["facts"]["gpus"][0]["nvlinks"] = 17


def pcie(document: dict[str, Any]) -> None:
    document["facts"]["gpus"][0]["health"]["pcie_width"] = 8


def variable(document: dict[str, Any]) -> None:
    document["facts"]["environment"]["NCCL_IB_DISABLE"] = "1"


def full_disk(document: dict[str, Any]) -> None:
    document["facts"]["folders"]["temporary"]["free"] = 1 << 30


def finding(document: dict[str, Any]) -> None:
    document["results"].append(result("ST101", "error", "The disk of the output is full."))


def slow_card(document: dict[str, Any]) -> None:
    document["facts"]["speeds"]["matmul_bf16_tflops"] = 480.0


def slow_reduce(document: dict[str, Any]) -> None:
    document["facts"]["speeds"]["allreduce_busbw_gbs"] = 150.0


def old(document: dict[str, Any]) -> None:
    document["created"] = (START - datetime.timedelta(days=2)).isoformat(timespec="seconds")


def topology(document: dict[str, Any]) -> None:
    document["facts"]["topology"]["pairs"][0]["path"] = "sys"


PLANTS: dict[str, tuple[Plant, str, str]] = {
    "version": (version, "package torch", "error"),
    "driver": (driver, "driver", "warning"),
    "ecc": (ecc, "HW110", "error"),
    "missing GPU": (missing_gpu, "gpu count", "error"),
    "other config": (other_config, "job mixed_precision", "error"),
    "clock": (clock, "clock", "warning"),
    "slow link": (slow_link, "links", "warning"),
    "throttled": (throttled, "HW116", "warning"),
    "python": (python, "python", "warning"),
    "kernel": (kernel, "kernel", "warning"),
    "memory": (memory, "host memory", "warning"),
    "model": (model, "gpu model", "warning"),
    "nvlink": (nvlink, "gpu nvlink", "warning"),
    "topology": (topology, "gpu topology", "warning"),
    "pcie": (pcie, "gpu pcie", "warning"),
    "variable": (variable, "variable NCCL_IB_DISABLE", "error"),
    "full disk": (full_disk, "free temporary", "warning"),
    "finding": (finding, "ST101", "error"),
    "slow card": (slow_card, "matmul_bf16_tflops", "warning"),
    "slow all-reduce": (slow_reduce, "allreduce_busbw_gbs", "warning"),
    "old report": (old, "report's time", "warning"),
}
"""{what: (how it is planted, the field that tells it, how grave it is)}."""
SEVEN = ("version", "driver", "slow link", "ecc", "missing GPU", "other config", "clock")
