"""What is known of failed collectives by the words that they leave, with where that is known from."""

from __future__ import annotations

import re

import msgspec


class Sign(msgspec.Struct, frozen=True):
    """One cause."""

    name: str
    words: str
    """What its error says (a regular expression)."""
    because: str
    hint: str
    source: str
    variables: bool = True
    """Whether a variable may be the way round it: else none is tried."""


_TORCH = "https://github.com/pytorch/pytorch/blob/v2.4.0/"
_NCCL = "https://github.com/NVIDIA/nccl/blob/v2.20.5-1/src/"
_GUIDE = "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html"

SIGNS: tuple[Sign, ...] = (
    Sign(
        "duplicate GPU", r"Duplicate GPU detected",
        "Two ranks took the same card.",
        "Give every rank a card of its own: num_processes must not exceed the cards that gpu_ids and "
        "CUDA_VISIBLE_DEVICES leave, and neither may name a card twice.",
        f"{_NCCL}init.cc (initTransportsRank)", variables=False,
    ),
    Sign(
        "no such device", r"invalid device ordinal",
        "A rank asked for a card that it does not see.",
        "Lower num_processes to the number of cards that CUDA_VISIBLE_DEVICES and gpu_ids leave.",
        "CUDA runtime API, cudaErrorInvalidDevice", variables=False,
    ),
    Sign(
        "mixed NCCL versions", r"version skew: .*\bnccl\b|Mismatched NCCL version|NCCL version mismatch",
        "Ranks with other NCCL versions do not understand each other.",
        "Give all machines the same packages (`xflux-doctor fix --install` on each).",
        f"{_NCCL}init.cc (initTransportsRank); the ranks' own words", variables=False,
    ),
    Sign(
        "version skew between ranks", r"version skew: ",
        "Ranks with other releases of torch form no group, or one that hangs.",
        "Give all machines the same packages (`xflux-doctor fix --install` on each).",
        "the ranks' own words", variables=False,
    ),
    Sign(
        "shared memory too small",
        r"(?:/dev/shm|[Ss]hared memory)[^\n]*(?:No space left|\(28\))|"
        r"(?:No space left|unable to allocate shared memory)[^\n]*(?:/dev/shm|nccl-)",
        "NCCL's segments do not fit into /dev/shm.",
        "Enlarge it: `docker run --shm-size=8g` or --ipc=host, in Kubernetes an emptyDir of medium Memory.",
        _GUIDE,
    ),
    Sign(
        "no room for files", r"No space left on device|Disk quota exceeded|EFBIG|File too large",
        "There is no room for the files by which the ranks meet.",
        "Make room in the temporary folder (TMPDIR), or name another in TMPDIR.",
        "errno(3) ENOSPC", variables=False,
    ),
    Sign(
        "address already in use", r"[Aa]ddress already in use|EADDRINUSE",
        "Another program listens on the port.",
        "End what holds it (`ss -ltnp`), or take another main_process_port.",
        f"{_TORCH}torch/csrc/distributed/c10d/socket.cpp", variables=False,
    ),
    Sign(
        "no host name resolves",
        r"getaddrinfo|gai error|[Nn]ame or service not known|[Tt]emporary failure in name resolution|"
        r"[Nn]o address associated with hostname|Unable to resolve hostname|gethostbyname",
        "A host name that the ranks meet by is not known here.",
        "Add the name to /etc/hosts or mend the resolver, or write addresses in place of names.",
        f"{_TORCH}torch/csrc/distributed/c10d/ProcessGroupGloo.cpp (createDefaultDevice)",
    ),
    Sign(
        "wrong interface",
        r"Unable to find address for|No socket interface found|Bootstrap : no socket interface|"
        r"ifa != nullptr|Unable to find interface|no interface found with name",
        "The named interface does not exist here, or has no address.",
        "Name a live one in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME (`ip -br addr`), or unset it.",
        f"{_NCCL}bootstrap.cc (bootstrapNetInit); gloo/transport/tcp/device.cc",
    ),
    Sign(
        "peer-to-peer",
        r"peer access is not supported|[Pp]eer (?:access|mapping)|cudaDeviceEnablePeerAccess|"
        r"transport/p2p\.cc|cudaIpcOpenMemHandle|P2P.*(?:not|fail)",
        "The cards cannot reach each other's memory, often because PCIe's ACS or an IOMMU is on.",
        "Switch ACS and the IOMMU off for the cards' bridges; until then NCCL_P2P_DISABLE=1 goes by the host's memory.",
        _GUIDE,
    ),
    Sign(
        "InfiniBand",
        r"ibv_\w+ failed|NET/IB\b[^\n]*(?:WARN|fail|error)|ibv_reg_mr|IBV_WC_\w*ERR|Got completion from peer",
        "The InfiniBand or RoCE adapter refused.",
        "See `ibstat` and `ulimit -l` (it must be unlimited); NCCL_IB_HCA names the adapter to take.",
        _GUIDE,
    ),
    Sign(
        "unhandled cuda error", r"unhandled cuda error|ncclUnhandledCudaError",
        "CUDA itself refused what NCCL asked for; NCCL's own line tells which call.",
        "Look for an Xid (HW) and a driver older than the CUDA of torch (SW); NCCL_DEBUG=INFO names the call.",
        _GUIDE,
    ),
    Sign(
        "out of GPU memory", r"CUDA out of memory|CUDA error: out of memory|cudaErrorMemoryAllocation",
        "The card has no room for NCCL's buffers.",
        "End what holds the card's memory (HW names it).",
        "CUDA runtime API, cudaErrorMemoryAllocation", variables=False,
    ),
    Sign(
        "no way to the other rank", r"Network is unreachable|No route to host",
        "This machine has no route to where the other rank is.",
        "See `ip -br addr` and `ip route`: the link is down, or the address is of another network.",
        "errno(3) ENETUNREACH, EHOSTUNREACH",
    ),
    Sign(
        "nothing arrives",
        r"Timed out waiting \d+ms for (?:recv|send)|collective operation timeout|Connection timed out",
        "A rank sent or waited, and the other's data never came.",
        "Between machines, see the cable and the firewalls (all ports must be open); between cards, `nvidia-smi topo "
        "-p2p r`.",
        "gloo/transport/tcp/unbound_buffer.cc; torch's ProcessGroupNCCL watchdog",
    ),
)  # fmt: skip


def named(text: str) -> Sign | None:
    """The first sign in what a failed rank said; the most telling stand first."""
    return next((sign for sign in SIGNS if re.search(sign.words, text)), None)
