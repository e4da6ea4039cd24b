"""How the cards are joined, and which cores are near them, by NVML. Raises nothing: what is not told is left empty.

Levels of nvmlDeviceGetTopologyCommonAncestor (nvml.h, nvmlGpuTopologyLevel_t) are those that `nvidia-smi topo -m`
shows: PIX one PCIe switch, PXB several, PHB one host bridge, NODE one NUMA node, SYS between sockets.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from xflux_doctor.facts import CardPair, CardPlace, Topology
from xflux_doctor.gather.cards import maybe, text
from xflux_doctor.gather.driver import same_place

_LEVELS = {0: "board", 10: "pix", 20: "pxb", 30: "phb", 40: "node", 50: "sys"}
_SWITCH = 2
"""NVML_NVLINK_DEVICE_TYPE_SWITCH."""
_MOST_LINKS = 36
_BITS = 64
Links = tuple[int, dict[str, int]]
"""A card's NVLinks into a switch, and those to other cards by their addresses."""


def topology(nvml: Any, indices: tuple[int, ...], root: Path = Path("/")) -> Topology | None:
    """Of the cards that answer; None where there are not two, or the driver tells nothing of them."""
    handles = {index: maybe(functools.partial(nvml.nvmlDeviceGetHandleByIndex, index)) for index in indices}
    handles = {index: handle for index, handle in handles.items() if handle is not None}
    if len(handles) < 2:
        return None
    address = {index: maybe(functools.partial(_address, nvml, handle)) or "" for index, handle in handles.items()}
    links = {index: _links(nvml, handle) for index, handle in handles.items()}
    found = sorted(handles)
    pairs = []
    for at, first in enumerate(found):
        for second in found[at + 1 :]:
            level = maybe(functools.partial(nvml.nvmlDeviceGetTopologyCommonAncestor, handles[first], handles[second]))
            direct = links[first][1].get(same_place(address[second]), 0)
            through = min(links[first][0], links[second][0])
            path = _LEVELS.get(level, "") if level is not None else ""
            pairs.append(CardPair(first, second, path, direct or through, not direct and through > 0))
    if not any(pair.path or pair.nvlinks for pair in pairs):
        return None
    places = [_place(nvml, index, handles[index], address[index], root) for index in found]
    return Topology(tuple(places), tuple(pairs))


def _address(nvml: Any, handle: Any) -> str:
    return text(nvml.nvmlDeviceGetPciInfo(handle).busId)


def _links(nvml: Any, handle: Any) -> Links:
    """The first link that is up tells whether the card is on switches: there all links are, and need not be asked."""
    switched, direct = 0, dict[str, int]()
    for link in range(_MOST_LINKS):
        state = maybe(functools.partial(nvml.nvmlDeviceGetNvLinkState, handle, link))
        if state is None:
            break
        if not state:
            continue
        if not switched and not direct:
            kind = maybe(functools.partial(nvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link))
            switched = int(kind == _SWITCH)
        elif switched:
            switched += 1
        if not switched:
            remote = maybe(functools.partial(_remote, nvml, handle, link))
            if remote:
                direct[remote] = direct.get(remote, 0) + 1
    return switched, direct


def _remote(nvml: Any, handle: Any, link: int) -> str:
    return same_place(text(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId))


def _place(nvml: Any, index: int, handle: Any, address: str, root: Path) -> CardPlace:
    words = (os.cpu_count() or 1) // _BITS + 1
    cpus = _mask(lambda: nvml.nvmlDeviceGetCpuAffinity(handle, max(words, 16)))
    nodes = _mask(lambda: nvml.nvmlDeviceGetMemoryAffinity(handle, 16, 0))
    return CardPlace(index, nodes[0] if len(nodes) == 1 else _numa(address, root), ranges(cpus))


def _mask(ask: Callable[[], Iterable[int]]) -> list[int]:
    """The numbers of the bits that are set."""
    found = maybe(lambda: [int(word) for word in ask()]) or []
    return [at * _BITS + bit for at, word in enumerate(found) for bit in range(_BITS) if word >> bit & 1]


def _numa(address: str, root: Path) -> int | None:
    """By the kernel; it says -1 where the firmware told it nothing."""
    folder = root / "sys/bus/pci/devices"
    names = maybe(lambda: [entry.name for entry in folder.iterdir() if same_place(entry.name) == same_place(address)])
    number = maybe(lambda: int((folder / (names or [""])[0] / "numa_node").read_text()))
    return number if number is not None and number >= 0 else None


def ranges(numbers: Iterable[int]) -> str:
    """0 1 2 3 8 → 0-3,8: as taskset, numactl and Slurm take it."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
