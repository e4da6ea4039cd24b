"""LA4: several machines, and processes that Slurm or torchrun started.

Each sentence about accelerate was seen by running 0.30.1 and 1.15.0. Of its static meeting: torch 2.4.0 and 2.13.0,
distributed/elastic/rendezvous/static_tcp_rendezvous.py, waits for 600 seconds.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path

from packaging.version import Version

from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.words import devices, installed
from xflux_doctor.cluster import task
from xflux_doctor.finding import Change, Edit, Finding, error, warning

_PORT_DEFAULT = Version("1.7.0")
"""First accelerate that takes port 29500 on several machines where none is named (1.6.0 and 1.7.0, utils/launch.py)."""
_WAITS = "It waits for 600 s and stops with a timeout that names nobody."
_DOCS = "https://huggingface.co/docs/accelerate/package_reference/cli"


def _several(case: Case) -> None:
    if case.job.num_machines < 2:
        raise SkipCheck("the job is for one machine")


def _launched(case: Case) -> None:
    _several(case)
    found = task(case.facts.environment) if case.job.command is None else None
    if found is not None and found.a_rank:
        raise SkipCheck("the ranks are started already: no launcher reads it")


def _ip(case: Case) -> str:
    value = case.job.get("main_process_ip")
    return value.strip() if isinstance(value, str) else ""


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address.lower() in ("localhost", "localhost.localdomain", "ip6-localhost")


@check("LA401", "machine_rank counts from 0 within num_machines", needs=("accelerate",))
def rank_within(case: Case) -> Iterator[Finding]:
    """torchrun takes any node_rank and waits for one that never comes (accelerate 0.30.1, 1.15.0: launched)."""
    _launched(case)
    job, count = case.job, case.job.num_machines
    if 0 <= job.machine_rank < count:
        return
    here = case.facts.cluster.here if case.facts.cluster else None
    meant = 0 if here else 1 if here is False and count == 2 else None
    edits: tuple[Change, ...] = ()
    if meant is not None:
        reason = f"main_process_ip is {'this' if meant == 0 else 'the other'} machine's"
        edits = (Edit("accelerate", ("machine_rank",), meant, reason),)
    yield error(
        f"machine_rank is {job.machine_rank} and num_machines is {count}.",
        f"Machine {count - 1} and its ranks never come. {_WAITS}",
        f"Number the machines from 0 to {count - 1}; 0 is the one at main_process_ip.",
        edits=edits,
        docs=_DOCS,
    )


@check("LA402", "several machines have one place to meet", needs=("accelerate",))
def place_given(case: Case) -> Iterator[Finding]:
    """main_process_ip and main_process_port reach torchrun as `--rdzv_endpoint` (accelerate: utils/launch.py)."""
    _launched(case)
    job, version = case.job, installed(case, "accelerate")
    if not _ip(case):
        yield error(
            f"num_machines is {job.num_machines} and main_process_ip is {job.get('main_process_ip')!r}.",
            f"accelerate hands torchrun the endpoint None:{job.main_process_port}: 'The IPv6 network addresses of "
            f"(None, {job.main_process_port}) cannot be retrieved'. {_WAITS}",
            "Set it to machine 0's address, the same in the files of all machines.",
            docs=_DOCS,
        )
    port = job.get("main_process_port")
    if port is None and version is not None and version < _PORT_DEFAULT:
        yield error(
            f"num_machines is {job.num_machines}, main_process_port is missing and accelerate is {version}.",
            f"\"ValueError: The port number of the rendezvous endpoint '{_ip(case)}:None' must be an integer between 0 "
            'and 65536".',
            "Name a port that is free on machine 0, the same on all machines.",
            edits=(Edit("accelerate", ("main_process_port",), 29500, "accelerate's default on one machine"),),
        )
    elif port == 0:
        yield error(
            f"num_machines is {job.num_machines} and main_process_port is 0.",
            f"Each machine takes a free port of its own, and they do not meet. {_WAITS}",
            "Name one port for all machines.",
            edits=(Edit("accelerate", ("main_process_port",), 29500, "one port for all machines"),),
        )


@check("LA403", "main_process_ip can be found", needs=("accelerate", "cluster"))
def place_known(case: Case) -> Iterator[Finding]:
    """A name is looked up in /etc/hosts, and by the resolver unless --quick or --offline."""
    _several(case)
    cluster = case.facts.cluster
    assert cluster
    if not _ip(case) or cluster.main != case.job.get("main_process_ip"):
        raise SkipCheck("no main_process_ip is given (see LA402)")
    if cluster.main_addresses is None:
        raise SkipCheck(f"{cluster.main}: {cluster.main_error}")
    if not cluster.main_addresses:
        yield error(
            f"main_process_ip is {cluster.main!r}, which this machine cannot find ({cluster.main_error}).",
            f"'The IPv6 network addresses of ({cluster.main}, {case.job.main_process_port}) cannot be retrieved'. "
            f"{_WAITS}",
            "Correct it, or write machine 0's address in place of the name.",
            commands=(f"getent hosts {cluster.main}",),
        )


@check("LA404", "machine 0 is the one at main_process_ip", needs=("accelerate", "cluster"))
def place_is_zero(case: Case) -> Iterator[Finding]:
    """The launcher of machine 0 listens, and the others connect to main_process_ip."""
    _several(case)
    cluster, job = case.facts.cluster, case.job
    assert cluster
    found = task(case.facts.environment)
    if found is not None and found.meets_by_itself:
        raise SkipCheck("torchrun's agents have met already")
    if cluster.here is None or not cluster.main_addresses:
        raise SkipCheck("it is not known whose address main_process_ip is")
    if all(map(_loopback, cluster.main_addresses)):
        raise SkipCheck("it is every machine's own (see LA405)")
    if job.machine_rank == 0 and not cluster.here:
        seen = (f"machine_rank is 0 and main_process_ip {cluster.main} is none of this machine's addresses "
                f"({_some(cluster.addresses)}).")  # fmt: skip
        because = f"The others look for machine 0 there, and it listens here. {_WAITS}"
        hint = "Give this machine its own machine_rank, or correct main_process_ip on all machines."
        if case.facts.host is not None and case.facts.host.container:
            hint += (
                f" In a {case.facts.host.container} container the host's address is right if its port leads in here."
            )
            yield warning(seen, because, hint)
        else:
            yield error(seen, because, hint)
    elif job.machine_rank > 0 and cluster.here:
        yield warning(
            f"machine_rank is {job.machine_rank} and main_process_ip {cluster.main} is this machine's own.",
            "Machine 0 would be this one too: unless two launchers are meant to run here, nobody listens.",
            "Set machine_rank to 0 here, or correct main_process_ip.",
        )


@check("LA405", "the place to meet is no loopback")
def no_loopback(case: Case) -> Iterator[Finding]:
    """127.0.0.1 is every machine's own: each waits for the others at home."""
    _several(case)
    if task(case.facts.environment) is not None:
        raise SkipCheck("Slurm or torchrun say where to meet")
    cluster = case.facts.cluster
    found = cluster.main_addresses if cluster and cluster.main == _ip(case) else None
    own = case.job.machine_rank > 0 and bool(found) and all(map(_loopback, found or ()))
    if _loopback(_ip(case)) or own:
        leads = "" if _loopback(_ip(case)) else f", which /etc/hosts leads to {', '.join(found or ())}"
        yield error(
            f"num_machines is {case.job.num_machines} and main_process_ip is {_ip(case)!r}{leads}.",
            f"It is every machine's own: each looks for machine 0 at home. {_WAITS}",
            "Set it to machine 0's address in the network that they share. For two launchers on this one machine: "
            "--accept LA405.",
        )


def _some(addresses: tuple[str, ...] | None) -> str:
    shown = [address for address in addresses or () if not _loopback(address) and not address.startswith("fe80")]
    return ", ".join(shown[:4]) or "none"


@check("LA406", "the ranks divide by the machines", needs=("accelerate",))
def ranks_divide(case: Case) -> Iterator[Finding]:
    """accelerate starts num_processes // num_machines on each machine (0.30.1, 1.15.0: utils/launch.py)."""
    _launched(case)
    job = case.job
    if job.distributed_type in ("NO", "MULTI_CPU"):
        raise SkipCheck("the distributed type starts one process for each machine (see LA407)")
    ranks, machines = job.num_processes, job.num_machines
    each = ranks // machines
    if each == 0:
        yield error(
            f"num_processes is {ranks} and num_machines is {machines}: it counts the ranks of all machines together.",
            f"{ranks} // {machines} is 0 on each machine, and torchrun stops with 'AssertionError'.",
            f"Set it to {machines} for one rank on each, or to the GPUs of all machines together.",
            edits=(Edit("accelerate", ("num_processes",), machines, "one rank on each machine"),),
        )
    elif ranks % machines:
        yield error(
            f"num_processes is {ranks} and num_machines is {machines}.",
            f"accelerate starts {ranks} // {machines} = {each} on each: {each * machines} ranks, without a word.",
            f"Write {each * machines}, which is what starts; or a multiple of {machines} that uses every GPU.",
            edits=(Edit("accelerate", ("num_processes",), each * machines, "what accelerate starts"),),
        )


@check("LA407", "several machines train together", needs=("accelerate",))
def kind_is_distributed(case: Case) -> Iterator[Finding]:
    """For NO and MULTI_CPU accelerate's simple launcher starts one process, without a rank, on each machine."""
    _launched(case)
    kind = case.job.distributed_type
    if kind not in ("NO", "MULTI_CPU") or case.job.get("mpirun_config"):
        return
    yield error(
        f"distributed_type is {kind} and num_machines is {case.job.num_machines}.",
        "Each machine gets MASTER_ADDR and no RANK and no WORLD_SIZE: each trains the whole job alone, and says so "
        "nowhere.",
        "Set it to MULTI_GPU; with use_cpu that is right for CPU ranks too.",
        edits=(Edit("accelerate", ("distributed_type",), "MULTI_GPU", "several machines make one group"),),
    )


_PER_NODE = "standard"


@check("LA408", "DeepSpeed's launcher reaches the other machines", needs=("accelerate",))
def deepspeed_launcher(case: Case) -> Iterator[Finding]:
    """All but `standard` hand over to `deepspeed --hostfile`, which without that file trains on this machine alone.

    Source: deepspeed 0.14.4 and 0.19.8, launcher/runner.py, `fetch_hostfile`; accelerate, utils/launch.py.
    """
    _launched(case)
    job, section = case.job, case.job.section("deepspeed_config")
    launcher = str(section.get("deepspeed_multinode_launcher") or "pdsh")
    if not job.deepspeed or job.launcher or launcher == _PER_NODE:
        raise SkipCheck("each machine's own launcher starts its ranks")
    file = section.get("deepspeed_hostfile")
    if isinstance(file, str) and Path(file).expanduser().is_file():
        return
    named = f"there is no file at deepspeed_hostfile {file!r}" if file else "deepspeed_hostfile is not set"
    asked = "" if section.get("deepspeed_multinode_launcher") else ", accelerate's default"
    yield error(
        f"num_machines is {job.num_machines}, deepspeed_multinode_launcher is {launcher}{asked}, and {named}.",
        f"accelerate runs `deepspeed --hostfile {file} --launcher {launcher}`: 'Unable to find hostfile, will proceed "
        "with training with local resources only'. Each machine trains the whole job alone.",
        "Use the standard launcher, and start the same command on each machine.",
        edits=(Edit("accelerate", ("deepspeed_config", "deepspeed_multinode_launcher"), _PER_NODE,
                    "each machine starts its own ranks"),),
    )  # fmt: skip


@check("LA409", "what the file says of the meeting is read", needs=("accelerate",))
def meeting_keys_read(case: Case) -> Iterator[Finding]:
    """rdzv_backend and same_network have defaults on the command line, which the file does not replace.

    Source: accelerate 0.30.1 to 1.15.0, commands/launch.py: only flags that are None are taken from the file.
    """
    _launched(case)
    value = case.job.get("rdzv_backend")
    if value in (None, "", "static") or case.job.source("rdzv_backend"):
        return
    yield warning(
        f"rdzv_backend is {value!r} in the file.",
        "accelerate does not read it from there: the machines meet by 'static', with machine_rank as it is.",
        f"Nothing needs to change; `accelerate launch --rdzv_backend {value}` would use it.",
    )


@check("LA410", "the tasks that were started are the job's ranks")
def tasks_fit(case: Case) -> Iterator[Finding]:
    """Slurm's or torchrun's tasks against accelerate's file and this machine's devices."""
    found = task(case.facts.environment)
    if found is None or case.job.command is not None:
        raise SkipCheck("this process is no task of Slurm's or torchrun's")
    job, own = case.job, case.job.accelerate or {}
    if found.source == "Slurm" and found.count < found.nodes:
        yield error(
            f"Slurm's step has {found.count} tasks on {found.nodes} nodes.",
            "Nodes without a task take no part, and the launch counts on them.",
            "Start one task for each node (--ntasks-per-node=1) or one for each GPU.",
        )
    if not found.a_rank:
        return
    if found.uneven and job.deepspeed:
        yield warning(
            f"The nodes have different numbers of tasks ({found.local_count} here, {found.count} on {found.nodes}).",
            "The ranks train; a launcher per node could not be used for the same job.",
            "Ask for --ntasks-per-node.",
        )
    written = own.get("num_processes")
    if isinstance(written, int) and not isinstance(written, bool) and written not in (found.count, 1):
        yield warning(
            f"{found.source} started {found.count} ranks and accelerate's file says num_processes {written}.",
            f"{found.count} train: a step sees {found.count / written:g} times the samples that the file means.",
            f"Start {written} tasks, or write {found.count} into the file.",
        )
    seen = devices(case)
    if job.use_cpu or seen is None or len(seen) == 1:
        return  # one device bound to each task is each task's own
    if found.local_rank >= len(seen):
        yield error(
            f"This is rank {found.local_rank} of {found.local_count} on this machine, and {len(seen)} devices are "
            "visible to it.",
            "It finds no device of its own.",
            "Start as many tasks on each node as it has GPUs, or bind one to each task (srun --gpus-per-task=1).",
        )


@check("LA411", "no launcher runs inside a rank")
def no_launcher_in_rank(case: Case) -> Iterator[Finding]:
    """N tasks that each start N ranks are N x N processes, of which N by N take the same rank and port."""
    found, job = task(case.facts.environment), case.job
    if found is None or not found.a_rank or not found.several or found.source == "the environment":
        raise SkipCheck("this process is no rank")
    inner = job.command.launcher if job.command is not None else "accelerate" if job.xflux is not None else ""
    if inner not in ("accelerate", "torchrun", "deepspeed"):
        raise SkipCheck("the ranks start the trainer themselves")
    who = "srun" if found.source == "Slurm" else "torchrun"
    yield error(
        f"{who} started {found.count} tasks, and each of them would start {inner}'s launcher.",
        f"{found.count} launchers start {found.count} times the ranks: they take each other's port and devices.",
        f"Start one task on each node (srun --ntasks-per-node=1) with {inner} in it, or the script in each task.",
    )


@check("LA412", "gloo finds an address that the other machines reach", needs=("cluster",))
def gloo_address(case: Case) -> Iterator[Finding]:
    """gloo takes the address of this host's own name; where /etc/hosts makes that 127.x, the others meet themselves.

    Source: torch 2.4.0 and 2.13.0, ProcessGroupGloo.cpp, `createDefaultDevice`; seen between two network namespaces.
    """
    _several(case)
    cluster, environment = case.facts.cluster, case.facts.environment
    assert cluster
    if not case.job.use_cpu:
        raise SkipCheck("NCCL chooses among the interfaces by itself")
    if cluster.own_addresses is None:
        raise SkipCheck("the address of this host's name is not known")
    if environment.get("GLOO_SOCKET_IFNAME") or not cluster.own_addresses:
        return
    if all(map(_loopback, cluster.own_addresses)):
        interfaces = [name for name in (case.facts.host.interfaces if case.facts.host else {}) if name != "lo"]
        name = interfaces[0] if len(interfaces) == 1 else "INTERFACE"
        yield error(
            f"This host's name {cluster.names[0]!r} is {', '.join(cluster.own_addresses)} in /etc/hosts.",
            "gloo gives that address to the other machines, which find themselves there: 'Gloo connectFullMesh failed "
            "with … Connection refused', or a wait of an hour.",
            f"Name the interface that the machines share{': ' + ', '.join(interfaces) if len(interfaces) > 1 else ''}.",
            commands=(f"export GLOO_SOCKET_IFNAME={name}",),
        )


MACHINES = (rank_within, place_given, place_known, place_is_zero, no_loopback, ranks_divide, kind_is_distributed,
            deepspeed_launcher, meeting_keys_read, tasks_fit, no_launcher_in_rank, gloo_address)  # fmt: skip
