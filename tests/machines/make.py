"""Hand-made machines out of the recorded H100: `python tests/machines/make.py` writes them beside it.

They differ from it in what is named here and in nothing else, so that they follow the schema; a test holds that the
files are what this makes. Numbers are those of the products' data sheets.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from xflux_doctor.facts import Driver, Facts, Gpu, GpuHealth, GpuProcess, LostGpu, MigSlice, from_json, to_json

FOLDER = Path(__file__).parent
MIB, GIB = 1 << 20, 1 << 30
# As read from a healthy H100 under driver 580.
HEALTHY = GpuHealth(True, True, 0, False, False, None, "none", ("idle",), True, "completed", 16, 16, 33)
# A desktop card has no ECC, no fabric, and drivers before 570 tell no recovery action.
DESKTOP = GpuHealth(retirement_pending=None, throttle=("idle",), persistence=False, pcie_width=8, pcie_width_max=16)
NODES = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")


def base() -> Facts:
    """The recorded machine with the facts that are newer than its recording."""
    facts = from_json((FOLDER / "h100.json").read_bytes())
    assert facts.host and facts.gpus
    host = replace(facts.host, cgroup=2, limits={"memlock": None, "stack": 8 * MIB, "nofile": 1048576, "nproc": None})
    host = replace(host, interfaces={"eth0": "up", "lo": "unknown"}, named=True)
    driver = driver_of("580.159.04", "13.0")
    return replace(with_cards(facts, cards(1)), host=nodes(host, 1), driver=driver, xids=())


def driver_of(version: str, cuda: str) -> Driver:
    return Driver(version, cuda, version, version)


def nodes(host: Any, count: int) -> Any:
    names = (*NODES, *(f"nvidia{number}" for number in range(count)))
    return replace(host, device_nodes=dict.fromkeys(sorted(names), "ok"))


def cards(
    count: int,
    name: str = "NVIDIA H100 80GB HBM3",
    total: int = 85520809984,
    capability: tuple[int, int] = (9, 0),
    health: GpuHealth = HEALTHY,
    nvlinks: int | None = 18,
) -> tuple[Gpu, ...]:
    return tuple(
        Gpu(
            index=index,
            uuid=f"GPU-{index:08d}-0000-0000-0000-000000000000",
            name=name,
            memory_total=total,
            memory_free=total - 480 * MIB,
            capability=capability,
            pci=f"00000000:{0x10 + index:02X}:00.0",
            mig=False if capability in ((8, 0), (9, 0), (10, 0)) else None,
            compute_mode="default",
            health=health,
            nvlinks=nvlinks if count > 1 else None,
        )
        for index in range(count)
    )


def with_cards(facts: Facts, found: tuple[Gpu, ...], **changes: Any) -> Facts:
    """The cards and a host that is as large as such machines are."""
    assert facts.host
    many = len(found) + len(changes.get("lost_gpus", ()))
    host = replace(facts.host, cpus=16 * many, memory_total=many * 128 * GIB, memory_available=many * 120 * GIB)
    return replace(facts, gpus=found, host=nodes(host, many), **changes)


def eight_a100() -> Facts:
    """An HGX A100 under an older driver; Ampere has no fabric to tell of."""
    health = replace(HEALTHY, recovery_action="", fabric="not_supported")
    found = cards(8, "NVIDIA A100-SXM4-80GB", 85899345920, (8, 0), health, nvlinks=12)
    return replace(with_cards(base(), found), driver=driver_of("550.127.08", "12.4"))


def two_4090() -> Facts:
    """A desktop, no container, driver before 550.40.07."""
    facts = with_cards(base(), cards(2, "NVIDIA GeForce RTX 4090", 25757220864, (8, 9), DESKTOP, nvlinks=None))
    assert facts.host
    host = replace(facts.host, container="", cpus=24, memory_total=128 * GIB, memory_available=120 * GIB)
    return replace(facts, host=host, driver=driver_of("535.183.01", "12.2"))


def v100() -> Facts:
    """Volta: no bf16, page retirement in place of row remapping."""
    health = replace(
        HEALTHY, remap_pending=None, remap_failed=None, retirement_pending=False, recovery_action="", fabric=""
    )
    return with_cards(base(), cards(1, "Tesla V100-SXM2-32GB", 34359738368, (7, 0), health))


def eight_b200() -> Facts:
    return with_cards(base(), cards(8, "NVIDIA B200", 192265846784, (10, 0), nvlinks=18))


def mig_slices() -> Facts:
    """One A100 cut into three slices, all given to this container."""
    (card,) = cards(1, "NVIDIA A100-SXM4-80GB", 85899345920, (8, 0), replace(HEALTHY, fabric="not_supported"))
    sizes = (("3g.40gb", 42285268992), ("2g.20gb", 20937965568), ("1g.10gb", 10200547328))
    slices = tuple(
        MigSlice(f"MIG-{number:08d}-0000-0000-0000-000000000000", f"{card.name} MIG {name}", size, size - 13 * MIB)
        for number, (name, size) in enumerate(sizes)
    )
    return with_cards(base(), (replace(card, mig=True, slices=slices),))


def wsl2() -> Facts:
    """Two cards of a Windows machine: part of NVML, no device files, the screen on the first card."""
    found = cards(2, "NVIDIA GeForce RTX 3090", 25769803776, (8, 6), GpuHealth(throttle=("idle",)), nvlinks=None)
    first = replace(found[0], memory_free=found[0].memory_total - 2100 * MIB)
    facts = with_cards(
        base(), (first, found[1]), xids=None, unknown={"xids": "the kernel log cannot be read from here"}
    )
    assert facts.host
    host = replace(facts.host, wsl=True, container="", kernel="6.6.87.2-microsoft-standard-WSL2", cpus=24)
    host = replace(host, device_nodes={"dxg": "ok"}, memory_total=64 * GIB, memory_available=60 * GIB)
    return replace(facts, host=host, driver=Driver("581.42", "13.0"))


def mismatch() -> Facts:
    """The driver's packages were upgraded and the machine was not rebooted."""
    why = (
        "driver and library versions differ (the driver was upgraded without a reboot: "
        "library 580.159.04, kernel module 580.95.05)"
    )
    facts = base()
    assert facts.host
    host = replace(facts.host, container="")
    return replace(facts, gpus=None, driver=None, host=host, unknown={"gpus": why, "driver": why})


def one_lost() -> Facts:
    """Eight H100 of which the fourth fell off the bus."""
    found = tuple(card for card in cards(8) if card.index != 3)
    lost = LostGpu(3, "it has fallen off the bus (GPU is lost)", "0000:13:00.0")
    return with_cards(base(), found, lost_gpus=(lost,))


def foreign_memory() -> Facts:
    """A rented container with eight cards: one held from outside, one by the user's own run of this morning."""
    found = list(cards(8))
    left_over = GpuProcess(4711, 20 * GIB, "python", "root", 11000.0)
    total = found[2].memory_total
    found[2] = replace(found[2], memory_free=total - 20 * GIB - 480 * MIB, processes=(left_over,))
    found[5] = replace(found[5], memory_free=total - 70 * GIB)
    return with_cards(base(), tuple(found))


MACHINES: dict[str, Callable[[], Facts]] = {
    "a100-eight": eight_a100,
    "rtx4090-two": two_4090,
    "v100": v100,
    "b200-eight": eight_b200,
    "a100-mig": mig_slices,
    "wsl2-two": wsl2,
    "nvml-mismatch": mismatch,
    "h100-eight-one-lost": one_lost,
    "h100-eight-shared": foreign_memory,
}


def text(name: str) -> str:
    return to_json(MACHINES[name]()) + "\n"


if __name__ == "__main__":
    for machine in MACHINES:
        (FOLDER / f"{machine}.json").write_text(text(machine), encoding="utf-8")
