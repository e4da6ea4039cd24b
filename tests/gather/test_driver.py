"""The driver's versions, places and error reports, and the owners of its processes, by files below a root."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import msgspec
import pytest
from conftest import tree

from xflux_doctor.gather.cards import process_facts
from xflux_doctor.gather.driver import library_version, module_version, pci_addresses, same_place
from xflux_doctor.gather.kernel_log import xids

MODULES = [
    ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n", "535.129.03"),
    ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (builder@)  \nGCC version:\n",
     "580.159.04"),
    ("something else\n", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "version"), MODULES)
def test_module_version(tmp_path: Path, text: str, version: str) -> None:
    assert module_version(tree(tmp_path, {"proc/driver/nvidia/version": text})) == version
    assert module_version(tmp_path / "nothing") == ""


def test_library_version(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/x86_64-linux-gnu"
    tree(folder, {"libcuda.so.550.54.15": "", "libnvidia-ml.so.580.159.04": ""})
    (folder / "libcuda.so.1").symlink_to("libcuda.so.550.54.15")
    assert library_version(tmp_path) == "550.54.15"
    (folder / "libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.580.159.04")
    assert library_version(tmp_path) == "580.159.04"
    # ldconfig's word comes before the usual folders, LD_LIBRARY_PATH before both
    odd = tree(tmp_path / "opt/nvidia", {"libnvidia-ml.so.575.51.03": ""})
    (odd / "libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.575.51.03")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/ld.so.cache").write_bytes(b"glibc-ld.so.cache1.1\0\0/opt/nvidia/libnvidia-ml.so.1\0/lib/libz.so\0")
    assert library_version(tmp_path) == "575.51.03"
    mine = tree(tmp_path / "mine", {"libnvidia-ml.so.570.1": ""})
    (mine / "libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.570.1")
    assert library_version(tmp_path, {"LD_LIBRARY_PATH": f":{mine}"}) == "570.1"
    assert library_version(tmp_path / "nothing") == ""


def test_places(tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia/gpus/0000:3b:00.0").mkdir(parents=True)
    assert pci_addresses(tmp_path) == ["0000:3b:00.0"]
    assert pci_addresses(tmp_path / "nothing") == []
    assert same_place("00000000:3B:00.0") == same_place("0000:3b:00") == "0000:3b:00"
    assert same_place("odd") == "odd" and same_place("xx:yy:zz") == "xx:yy:zz"


def test_process_facts(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    stat = "77 (a) b) S " + " ".join("1" for _ in range(18)) + f" {100 * ticks} 0\n"
    tree(tmp_path, {"proc/77/comm": "python\n", "proc/77/stat": stat, "proc/uptime": "7300.5 1.0\n"})
    found = process_facts(77, 5, tmp_path)
    assert (found.pid, found.used, found.name, found.seconds) == (77, 5, "python", 7200.5)
    assert found.user
    assert process_facts(78, None, tmp_path) == msgspec.structs.replace(found, pid=78, used=None, name="", user="",
                                                                        seconds=None)  # fmt: skip


KMSG = (
    "6,100,5000000,-;nvidia: loading out-of-tree module taints kernel.\n SUBSYSTEM=pci\n"
    "4,200,3600000000,-;NVRM: Xid (PCI:0000:3b:00): 31, pid=4242, name=python, Ch 00000010\n"
    "4,201,7100000000,-;NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"
    "4,202,7150000000,-;nvidia-nvswitch2: SXid (PCI:0000:85:00.0): 12028, Non-fatal, Link 32 egress\n"
    "4,203,7160000000,-;nvidia-nvswitch2: SXid (PCI:0000:85:00.0): 20034, Fatal, Link 30 LTSSM Fault Up\n"
)


def test_xids_of_the_kernel_buffer(tmp_path: Path) -> None:
    found = xids(tree(tmp_path, {"dev/kmsg": KMSG}), uptime=7200.0)
    assert found is not None
    assert [(x.number, x.pci, x.seconds) for x in found] == [
        (31, "0000:3b:00", 3600.0), (79, "0000:3b:00", 100.0), (20034, "0000:85:00.0", 40.0),
    ]  # fmt: skip
    assert found[1].text.startswith("Xid (PCI:0000:3b:00): 79") and "fallen off the bus" in found[1].text
    assert found[2].text.startswith("SXid") and "Fatal" in found[2].text


def test_a_log_without_reports_is_known_and_an_empty_or_closed_one_is_not(tmp_path: Path) -> None:
    quiet = tree(tmp_path / "quiet", {"dev/kmsg": "6,100,5000000,-;all is well\n"})
    assert xids(quiet, uptime=10.0) == ()
    assert xids(tree(tmp_path / "dummy", {"dev/kmsg": ""}), uptime=10.0) is None
    assert xids(tmp_path / "nothing", uptime=10.0) is None


def test_a_pipe_that_nobody_fills_does_not_hold_us(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    os.mkfifo(tmp_path / "dev/kmsg")
    assert xids(tmp_path, uptime=10.0) is None


def test_xids_of_the_log_file(tmp_path: Path) -> None:
    zone = datetime.timezone.utc
    lines = (
        "2026-11-24T09:00:00.123456+00:00 box kernel: [ 99.1] NVRM: Xid (PCI:0000:3b:00): 48, pid=1, DBE\n"
        "Nov 24 10:30:00 box kernel: [ 99.1] NVRM: Xid (PCI:0000:5e:00): 63, pid=2, Row Remapper\n"
        "Nov 20 10:30:00 box kernel: [ 99.1] NVRM: Xid (PCI:0000:5e:00): 79, pid=2, of the boot before\n"
        "no date NVRM: Xid (PCI:0000:5e:00): 79, pid=2\n"
        "Nov 24 10:31:00 box kernel: something else\n"
    )
    root = tree(tmp_path, {"var/log/kern.log": lines})
    found = xids(root, uptime=86400.0, now=datetime.datetime(2026, 11, 24, 11, 0, tzinfo=zone))
    assert found is not None
    assert [(x.number, round(x.seconds)) for x in found] == [(48, 7200), (63, 1800)]
    # the year turns: a day that lies ahead was last year's
    turned = tree(tmp_path / "turn", {"var/log/kern.log": lines.replace("Nov 24 10:30", "Dec 31 23:00")})
    new_year = xids(turned, uptime=86400.0, now=datetime.datetime(2027, 1, 1, 0, 0, tzinfo=zone))
    assert new_year is not None and [(x.number, round(x.seconds)) for x in new_year] == [(63, 3600)]
