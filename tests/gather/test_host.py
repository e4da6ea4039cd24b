"""The host, the toolchain and the listeners, read from trees as kernels, packages and containers write them."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from conftest import tree

from xflux_doctor.facts import PythonFacts
from xflux_doctor.gather.host import host_facts, oom_kills
from xflux_doctor.gather.ports import listeners
from xflux_doctor.gather.toolchain import toolchain_facts

MIB = 1 << 20


@pytest.mark.parametrize(("files", "expected"), [
    ({"sys/fs/cgroup/cgroup.controllers": "", "sys/fs/cgroup/memory.max": "1048576\n", "proc/self/cgroup": "0::/\n",
      "sys/fs/cgroup/cpu.max": "150000 100000\n", "sys/fs/cgroup/pids.max": "512\n"}, (2, MIB, 1.5, 512)),
    # Slurm and systemd put the limit on an inner folder, or on its parent
    ({"sys/fs/cgroup/cgroup.controllers": "", "sys/fs/cgroup/slurm/job_7/memory.max": "2097152\n",
      "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max\n", "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
      "sys/fs/cgroup/slurm/cpu.max": "400000 100000\n"}, (2, 2 * MIB, 4.0, None)),
    # a path of the host that this container does not have
    ({"sys/fs/cgroup/cgroup.controllers": "", "sys/fs/cgroup/memory.max": "max\n",
      "proc/self/cgroup": "0::/system.slice/docker-1.scope\n", "sys/fs/cgroup/cpu.max": "max 100000\n"},
     (2, None, None, None)),
    ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "3145728\n", "proc/self/cgroup": "5:memory:/\n4:cpu,cpuacct:/\n",
      "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
      "sys/fs/cgroup/pids/pids.max": "max\n"}, (1, 3 * MIB, 2.0, None)),
    ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
      "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
     (1, None, None, None)),
    ({}, (None, None, None, None)),
])  # fmt: skip
def test_cgroups(tmp_path: Path, files: dict[str, str], expected: tuple[Any, ...]) -> None:
    host = host_facts(tree(tmp_path, files))
    assert (host.cgroup, host.memory_limit, host.cpu_quota, host.pids_limit) == expected


@pytest.mark.parametrize(("files", "expected"), [
    ({"sys/fs/cgroup/job/memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 0\n",
      "sys/fs/cgroup/memory.events": "oom_kill 9\n", "proc/self/cgroup": "0::/job\n"}, 2),  # not the whole machine's
    ({"sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
      "proc/self/cgroup": "5:memory:/\n"}, 1),
    ({"sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n",
      "proc/self/cgroup": "5:memory:/\n"}, None),  # before Linux 4.13
    ({}, None),
])  # fmt: skip
def test_the_kernels_count_of_oom_kills(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert oom_kills(tree(tmp_path, files)) == expected


@pytest.mark.parametrize(("files", "container", "wsl"), [
    ({".dockerenv": ""}, "docker", False),
    ({"run/.containerenv": ""}, "podman", False),
    ({"proc/1/cgroup": "0::/kubepods/pod1\n"}, "kubernetes", False),
    ({".singularity.d/env": ""}, "apptainer", False),
    ({"proc/version": "Linux version 5.15.153.1-microsoft-standard-WSL2"}, "", True),
    ({"proc/version": "Linux version 6.8.0"}, "", False),
])  # fmt: skip
def test_containers(tmp_path: Path, files: dict[str, str], container: str, wsl: bool) -> None:
    host = host_facts(tree(tmp_path, files))
    assert (host.container, host.wsl) == (container, wsl)


def test_memory_interfaces_and_nodes(tmp_path: Path) -> None:
    root = tree(tmp_path, {
        "proc/meminfo": "MemTotal: 1024 kB\nMemAvailable: 512 kB\nSwapTotal: 64 kB\nSwapFree: 32 kB\nodd\n",
        "sys/class/net/lo/operstate": "unknown\n", "sys/class/net/eth0/operstate": "up\n",
        "sys/class/infiniband/mlx5_0/x": "", "dev/nvidia0": "", "dev/nvidiactl": "", "dev/null0": "",
        "etc/hosts": f"127.0.0.1 localhost\n10.0.0.1 {os.uname().nodename} # me\n"})  # fmt: skip
    (root / "dev/nvidia0").chmod(0)
    host = host_facts(root)
    assert (host.memory_total, host.memory_available) == (MIB, MIB // 2)
    assert (host.swap_total, host.swap_free) == (64 << 10, 32 << 10)
    assert host.interfaces == {"eth0": "up", "lo": "unknown"} and host.infiniband == ("mlx5_0",)
    denied = "ok" if os.geteuid() == 0 else "denied"
    assert host.device_nodes == {"nvidia0": denied, "nvidiactl": "ok"} and host.named is True


def test_this_host() -> None:
    host = host_facts()
    assert host.system == "Linux" and host.cpus >= 1 and host.memory_total > 0
    assert set(host.limits) == {"memlock", "stack", "nofile", "nproc"} and "lo" in host.interfaces


def toolkit(root: Path, name: str = "usr/local/cuda", **files: str) -> Path:
    tree(root / name, {"bin/nvcc": "x" * 5000, **{k.replace("__", "/"): v for k, v in files.items()}})
    return root / name


def python(root: Path) -> PythonFacts:
    return PythonFacts(str(root / "venv/bin/python"), "3.11.7", str(root / "venv"))


def test_toolkit_by_version_json_and_by_header(tmp_path: Path) -> None:
    toolkit(tmp_path)
    json = tree(tmp_path, {"usr/local/cuda/version.json": '{"cuda": {"version": "12.1.1"}}'})
    found = toolchain_facts({"PATH": ""}, python(tmp_path), json)
    assert (found.cuda_version, found.cuda_home_from) == ("12.1", str(tmp_path / "usr/local/cuda"))
    other = toolkit(tmp_path, "opt/cuda")
    tree(other, {"targets/x86_64-linux/include/cuda.h": "#define CUDA_VERSION 13020\n"})
    found = toolchain_facts({"PATH": "", "CUDA_HOME": str(other)}, python(tmp_path), tmp_path)
    assert (found.cuda_version, found.cuda_home_from, found.nvcc) == ("13.2", "CUDA_HOME", str(other / "bin/nvcc"))


def test_nvcc_on_path_is_torch_s_second_choice(tmp_path: Path) -> None:
    wrapper = tree(tmp_path, {"own/bin/nvcc": '#!/bin/sh\nexec /usr/local/cuda-12.4/bin/nvcc "$@"\n'}) / "own/bin"
    (wrapper / "nvcc").chmod(0o755)
    toolkit(tmp_path)
    found = toolchain_facts({"PATH": str(wrapper)}, python(tmp_path), tmp_path)
    assert (found.cuda_home, found.cuda_version) == (str(tmp_path / "own"), "12.4")


def test_a_runtime_image_has_a_home_and_no_nvcc(tmp_path: Path) -> None:
    (tmp_path / "usr/local/cuda/lib64").mkdir(parents=True)
    found = toolchain_facts({"PATH": ""}, python(tmp_path), tmp_path)
    assert found.cuda_home and not found.nvcc and not found.cuda_version


def test_compiler_headers_and_libraries(tmp_path: Path) -> None:
    tree(tmp_path, {"bin/x86_64-linux-gnu-g++-12": "", "bin/ninja": "", "usr/include/libaio.h": "",
                    "usr/lib/x86_64-linux-gnu/libaio.so": "", "base/include/python3.11/Python.h": "",
                    "venv/pyvenv.cfg": f"home = {tmp_path}/base/bin\n"})  # fmt: skip
    (tmp_path / "bin/c++").symlink_to("x86_64-linux-gnu-g++-12")
    for name in ("x86_64-linux-gnu-g++-12", "ninja"):
        (tmp_path / "bin" / name).chmod(0o755)
    found = toolchain_facts({"PATH": str(tmp_path / "bin")}, python(tmp_path), tmp_path)
    assert (found.cxx, found.gcc_version, found.ninja) == (str(tmp_path / "bin/c++"), "12", str(tmp_path / "bin/ninja"))
    assert found.python_headers and found.libaio
    bare = toolchain_facts({"PATH": ""}, PythonFacts("/none/bin/python", "3.11.7", "/none"), tmp_path / "none")
    assert (bare.cxx, bare.gcc_version, bare.ninja, bare.python_headers, bare.libaio) == ("", "", "", False, False)


def test_stale_locks(tmp_path: Path) -> None:
    for name in (".cache/torch_extensions/py311_cu121/cpu_adam/lock", "named/async_io/lock"):
        tree(tmp_path, {name: ""})
        os.utime(tmp_path / name, (0, 0))
    usual = toolchain_facts({"HOME": str(tmp_path)}, python(tmp_path)).stale_locks
    assert [Path(p).parent.name for p in usual] == ["cpu_adam"] and min(usual.values()) > 1e9
    named = toolchain_facts({"TORCH_EXTENSIONS_DIR": str(tmp_path / "named")}, python(tmp_path)).stale_locks
    assert [Path(p).parent.name for p in named] == ["async_io"]


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_real_listener_is_found(family: socket.AddressFamily) -> None:
    with socket.socket(family) as server:
        try:
            server.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        except OSError:
            pytest.skip("no such address here")
        port = server.getsockname()[1]
        assert [item for item in listeners({port}) or () if item.port == port] == []  # bound is not yet listening
        server.listen()
        (found,) = listeners({port}) or ()
        assert (found.pid, found.address) == (os.getpid(), server.getsockname()[0])
        assert found.name and found.seconds is not None
    assert listeners({port}) == ()


def test_no_proc(tmp_path: Path) -> None:
    assert listeners({29500}, tmp_path) is None
