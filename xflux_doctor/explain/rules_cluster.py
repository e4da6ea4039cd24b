"""Causes: ranks that do not find, hear or wait for each other; the scheduler; signals."""

from __future__ import annotations

from xflux_doctor.explain.rule import Rule, Sign

_NCCL = "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html"
_NCCL_ENV = "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html"
_BUSY = (
    r"(?i)sav(?:e|ing) (?:the )?(?:model|state|checkpoint|weights)|save_state|running validation|log_validation"
    r"|validating"
)

RULES: tuple[Rule, ...] = (
    Rule(
        "port-in-use",
        "another process listens on the master port",
        (
            Sign("EADDRINUSE"),
            Sign("Tried to launch distributed communication on port"),
            Sign("failed to listen on any local network address"),
            Sign("Address already in use", r"Error\b.*Address already in use"),
        ),
        "An earlier run that still lives, or another job on this machine, has the port (29500 unless told otherwise).",
        "End the stale run, or choose another port with --main_process_port (main_process_port in the config).",
        ("ss -ltnp | grep 29500", "accelerate launch --main_process_port 29511 …"),
    ),
    Rule(
        "rendezvous-timeout",
        "not all nodes came to the rendezvous",
        (
            Sign("RendezvousTimeoutError"),
            Sign("waiting for clients", r"Timed out after \d+ seconds waiting for clients"),
            Sign("client socket has timed out", r"TimeoutError: The client socket has timed out"),
            Sign("Stop_waiting response is expected"),
        ),
        "One node waits for others that were not started, run with another endpoint, or cannot reach the master.",
        "Start every node with the same main_process_ip and port, num_machines and its own machine_rank; check the "
        "firewall from a worker.",
        ("nc -vz $MASTER_ADDR $MASTER_PORT",),
        level="consequence",
        weight=60,
    ),
    Rule(
        "rendezvous-unreachable",
        "the master's address cannot be reached",
        (
            Sign("client socket has timed out", r"DistNetworkError: The client socket has timed out"),
            Sign(
                "client socket has timed out",
                r"Error: The client socket has timed out",
                after="gai error: ",
                weight=66,
                code="LA403",
            ),
            Sign(
                "client socket has timed out",
                r"Error: The client socket has timed out",
                after="failed to connect/validate",
            ),
            Sign("client socket has failed to connect", r"(?:Error|\[E).*client socket has failed to connect"),
            Sign("RendezvousConnectionError"),
            Sign("connection to the C", r"connection to the C10d store has failed"),
            Sign("Gloo connectFullMesh failed"),
            Sign(
                "gaierror",
                r"socket\.gaierror|gaierror: \[Errno",
                within=r"torch/distributed|deepspeed|socket\.py",
                code="LA403",
            ),
            Sign("ConnectionRefusedError", within=r"torch/distributed|deepspeed/comm|launcher"),
            Sign("No route to host", r"Error\b"),
        ),
        "The name does not resolve, or nobody listens there: the head node is not up, the address is wrong, or a "
        "firewall is in between.",
        "Start the head node first; set main_process_ip to an address that the workers can reach; open the port.",
        ("getent hosts $MASTER_ADDR", "nc -vz $MASTER_ADDR $MASTER_PORT"),
        level="consequence",
        weight=65,
    ),
    Rule(
        "socket-ifname",
        "the network interface that GLOO_SOCKET_IFNAME names does not exist",
        (
            Sign("Unable to find address for"),
            Sign("Unable to find interface for"),
        ),
        "The variable was set for another machine; here the interface has another name.",
        "Unset GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or set them to a name that `ip link` shows.",
        ("ip -br link", "unset GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME"),
        weight=60,
    ),
    Rule(
        "nccl-socket-ifname",
        "NCCL finds no network interface of the given name",
        (
            Sign("no socket interface found"),
            Sign("No interface found in the same subnet"),
        ),
        "NCCL_SOCKET_IFNAME names an interface that this machine does not have.",
        "Unset NCCL_SOCKET_IFNAME, or set it to a name that `ip link` shows (a leading ^ excludes names).",
        ("ip -br link", "unset NCCL_SOCKET_IFNAME"),
        _NCCL_ENV,
        weight=70,
    ),
    Rule(
        "nccl-connection-refused",
        "NCCL cannot connect to a peer",
        (
            Sign("NCCL WARN", r"[Cc]onnect\w*.*(?:Connection refused|No route to host|timed out)"),
            Sign("socketStartConnect", r"failed|refused"),
            Sign("Last error", r"(?:Connection refused|No route to host)", level="consequence"),
            Sign("Connection refused", r"(?:ncclSystemError|ncclSocket|NCCL)", level="consequence"),
        ),
        "The rendezvous worked, but the ranks' own connections do not: a firewall between the nodes, the wrong "
        "interface, or a node whose network is broken.",
        "Open all ports between the nodes, set NCCL_SOCKET_IFNAME to the interface that joins them, or leave the "
        "node out.",
        ("NCCL_DEBUG=INFO", "ip -br addr"),
        _NCCL,
        level="consequence",
        weight=70,
    ),
    Rule(
        "nccl-ib-link",
        "the InfiniBand path between the nodes does not work",
        (
            Sign("ibv_modify_qp"),
            Sign("ibv_", r"Call to ibv_\w+ failed|ibv_\w+ failed with error"),
            Sign("NET/IB", r"NET/IB\w* ?:.*(?:Got completion .*(?:error|status)|failed|async event)"),
        ),
        "The cards are there, but their link, subnet or partition does not join the nodes.",
        "Check the links; NCCL_IB_DISABLE=1 goes over Ethernet meanwhile, NCCL_IB_HCA picks the right cards.",
        ("ibstat", "NCCL_IB_DISABLE=1", "NCCL_DEBUG=INFO"),
        _NCCL_ENV,
        weight=68,
    ),
    Rule(
        "nccl-peer-mapping",
        "direct access between GPUs fails",
        (
            Sign("peer mapping resources exhausted"),
            Sign("peer access", r"peer access (?:is not supported|from|has not|not)|[Cc]uda failure.*peer access"),
            Sign("transport/p", r"transport/p2p\S*.*(?:WARN|failure|failed)"),
            Sign("cudaIpcOpenMemHandle"),
            Sign("cudaDeviceEnablePeerAccess"),
            Sign("doesn't support faster communication broadband", r"Error"),
        ),
        "The cards, their driver or virtualization (ACS, IOMMU) do not allow peer-to-peer copies.",
        "Set NCCL_P2P_DISABLE=1; if that helps, switch off ACS or IOMMU on the host, or leave it set.",
        ("nvidia-smi topo -p2p r", "NCCL_P2P_DISABLE=1"),
        _NCCL,
        weight=68,
    ),
    Rule(
        "nccl-segfault",
        "NCCL crashed",
        (
            Sign("libnccl", r"segfault at .*libnccl", level="machine"),
            Sign(
                "libnccl.so",
                near=r"(?i)segmentation fault|SIGSEGV|Signal(?: code)?: ?(?:Segmentation|11|\(11\))|[Ss]ignal 11\b",
            ),
            Sign("SIGSEGV", r"Signal 11 \(SIGSEGV\)|Signals\.SIGSEGV|SIGSEGV", near=r"libnccl\.so", level="killed"),
            Sign("Segmentation fault", near=r"libnccl\.so", level="killed"),
        ),
        "The process died inside NCCL's library: often a network plugin or an NCCL release that does not fit.",
        "Unset NCCL_NET_PLUGIN, or install the NCCL wheel that this torch requires; try NCCL_IB_DISABLE=1.",
        ("python -c 'import torch; print(torch.cuda.nccl.version())'", "NCCL_DEBUG=INFO"),
        _NCCL,
        weight=60,
    ),
    Rule(
        "segfault",
        "a process crashed with a segmentation fault",
        (
            Sign("SIGSEGV", r"Signal 11 \(SIGSEGV\)|Signals\.SIGSEGV|terminated with signal SIGSEGV"),
            Sign("exitcode", r"exitcode\s*:\s*-11\b"),
            Sign(
                "Segmentation fault", r"^(?:\S+: line \d+: +\d+ )?Segmentation fault|Fatal Python error: Segmentation"
            ),
        ),
        "Compiled code read memory that is not its own: extensions that do not fit each other, most often.",
        "Run once with PYTHONFAULTHANDLER=1 to see which call it was in, and reinstall the package it belongs to.",
        ("PYTHONFAULTHANDLER=1", "pip check"),
        level="killed",
        weight=20,
    ),
    Rule(
        "nccl-unhandled-cuda-error",
        "NCCL met a CUDA error that it does not explain",
        (
            Sign("unhandled cuda error"),
            Sign("ncclUnhandledCudaError"),
            Sign("NCCL WARN", r"NCCL WARN Cuda failure"),
        ),
        "A CUDA call inside NCCL failed: an NCCL release older than the card, memory that is full, or access between "
        "cards that is not allowed.",
        "Run once with NCCL_DEBUG=INFO to see the call; update NCCL for new cards; try NCCL_P2P_DISABLE=1.",
        ("NCCL_DEBUG=INFO", "NCCL_P2P_DISABLE=1"),
        _NCCL,
        weight=45,
    ),
    Rule(
        "collective-timeout",
        "one rank was busy for longer than the others wait",
        (
            Sign("Timed out waiting", r"Timed out waiting \d+ ?ms for (?:recv|send) operation"),
            Sign("collective operation timeout", near=_BUSY, weight=60),
            Sign("before timing out", near=_BUSY, weight=60),
            Sign("failed to pass monitoredBarrier"),
            Sign("wait timeout after"),
        ),
        "The others waited in a collective call while one rank saved, validated or loaded data alone.",
        "Raise the timeout (InitProcessGroupKwargs(timeout=…)), and let no single rank do slow work between steps.",
        (),
        "https://pytorch.org/docs/stable/distributed.html#torch.distributed.init_process_group",
        level="consequence",
        weight=50,
    ),
    Rule(
        "nccl-timeout",
        "a rank did not join a collective call in time",
        (
            Sign("collective operation timeout", r"Watchdog caught collective operation timeout"),
            Sign("before timing out", r"ran for \d+ milliseconds before timing out"),
            Sign("Some NCCL operations have failed or timed out"),
            Sign("Heartbeat monitor timed out"),
            Sign("Timeout at NCCL work"),
        ),
        "The ranks do not make the same calls in the same order (a branch that only some take, uneven data), or one "
        "of them hangs.",
        "Compare the operation and SeqNum that each rank names; TORCH_DISTRIBUTED_DEBUG=DETAIL finds the mismatch.",
        ("TORCH_DISTRIBUTED_DEBUG=DETAIL", "TORCH_NCCL_TRACE_BUFFER_SIZE=2000", "py-spy dump --pid PID"),
        "https://pytorch.org/docs/stable/distributed.html#debugging-torch-distributed-applications",
        level="consequence",
        weight=45,
    ),
    Rule(
        "peer-rank-died",
        "another rank died; its log holds the cause",
        (
            Sign("xflux-doctor: peer-rank-died: ", level="error"),  # above what the ranks say as they are ended
            Sign("Connection closed by peer", r"Error"),
            Sign("Connection reset by peer", r"(?:gloo|NCCL|c10d|Error)"),
            Sign("ncclRemoteError"),
            Sign("NCCL communicator was aborted"),
            Sign("remote process exited or there was a network error"),
            Sign("failed to recv, got"),
            Sign("Broken pipe", r"(?:TCPStore|c10d|gloo|NCCL)"),
        ),
        "This rank only noticed that the other end of a connection is gone.",
        "Look into the logs of the other ranks and nodes for the first one that failed.",
        (),
        "https://pytorch.org/docs/stable/elastic/errors.html",
        level="consequence",
        weight=10,
    ),
    Rule(
        "slurm-time-limit",
        "the scheduler ended the job at its time limit",
        (
            Sign("DUE TO TIME LIMIT"),
            Sign("Exceeded job time limit"),
            Sign("walltime", r"(?i)(?:exceeded|over).*walltime|walltime.*exceeded"),
        ),
        "The job ran for as long as was asked for and was not finished.",
        "Resume from the last checkpoint with a longer --time; save more often than once a limit.",
        ("sacct -j $SLURM_JOB_ID --format=State,Elapsed,Timelimit",),
        level="stop",
        weight=60,
    ),
    Rule(
        "sigterm",
        "the job was stopped from outside",
        (
            Sign("death signal", r"Received (?:\d+|Signals\.SIG\w+|SIG\w+) death signal"),
            Sign("got signal: "),
            Sign("CANCELLED AT"),
            Sign("DUE TO PREEMPTION"),
            Sign("DUE TO NODE FAILURE"),
            Sign("received SIG", r"received (?:SIGTERM|SIGHUP|SIGINT)", weight=45),
            Sign("Received SIG", r"Received (?:SIGTERM|SIGHUP|SIGINT)", weight=45),
            Sign("Terminated", r"^(?:\S+: line \d+: +\d+ )?Terminated\b", weight=45),
            Sign("Hangup", r"^(?:\S+: line \d+: +\d+ )?Hangup\b", weight=45),
            Sign("KeyboardInterrupt", r"^(?:\[rank\d+\]: ?)?KeyboardInterrupt\b", weight=40),
        ),
        "A signal ended it: the scheduler, somebody with kill or scancel, or a terminal that was closed.",
        "Resume from the last checkpoint; start long jobs with sbatch, nohup or tmux so that a lost terminal does "
        "not end them.",
        (),
        level="stop",
        weight=50,
    ),
)
