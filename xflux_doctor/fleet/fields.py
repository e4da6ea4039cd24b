"""What is compared between nodes: each field's name for a person, what a difference costs, and what to do about it.

An error stops a job or makes it wrong: ranks that wait for each other for ever, or train something else. A warning
costs time, or is what to look at first when one node behaves otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from xflux_doctor.finding import Severity


@dataclass(frozen=True)
class Field:
    """How a difference of one field is told."""

    title: str
    severity: Severity
    hint: str
    because: str = ""
    group: str = ""
    """Known together; told in one line where it is of the same nodes."""
    absent: str = ""
    """What it means that a node which tells the group does not tell the field; empty: the node is not asked."""
    follows: tuple[str, ...] = ()
    """Fields whose difference explains this one's."""


_CARDS = "Compare `nvidia-smi` on that node with another's; take the node out of the job or have it mended."
_SAME_IMAGE = "Start that node from the same image as the others."
FIELDS: dict[str, Field] = {
    "gpu count": Field("GPUs", "error", _CARDS, "The launch counts on the same number on every node."),
    "gpu model": Field("GPU model", "warning", _CARDS, "The slowest and the smallest card set the pace and the plan."),
    "gpu capability": Field("compute capability", "warning", _CARDS, follows=("gpu model",)),
    "gpu memory": Field("GPU memory", "warning", "Look at ECC and MIG on that node (`nvidia-smi -q`), or plan by "
                        "--gpu-limit.", "The smallest card decides what fits.", follows=("gpu model",)),
    "gpu mig": Field("MIG", "error", "Set MIG on all nodes alike (`nvidia-smi -mig 0`).", follows=("gpu model",)),
    "gpu ecc": Field("ECC", "warning", "Set it on all nodes alike (`nvidia-smi -e 1`, then a reset).",
                     "Memory and speed differ with it.", follows=("gpu model",)),
    "gpu compute mode": Field("compute mode", "warning", "Set it on all nodes alike (`nvidia-smi -c DEFAULT`)."),
    "gpu pcie": Field("PCIe lanes", "warning", "Have the card reseated, or take the node out of the job.",
                      "Its loading and its exchange set the pace of all.", follows=("gpu model",)),
    "gpu nvlink": Field("NVLinks up", "warning", "See `nvidia-smi nvlink -s` on that node; have it mended or left out.",
                        "The ring goes at the pace of its slowest link.", follows=("gpu model",)),
    "gpu topology": Field("ways between the cards", "warning", "Compare `nvidia-smi topo -m` on the nodes.",
                          "The slowest pair sets the pace.", follows=("gpu count", "gpu model", "gpu nvlink")),
    "gpu fabric": Field("NVSwitch fabric", "error", "See `systemctl status nvidia-fabricmanager` on that node.",
                        follows=("gpu model",)),
    "driver": Field("driver", "warning", "Install one driver on all nodes.",
                    "It works where both are new enough for this CUDA; speeds and faults differ."),
    "driver cuda": Field("CUDA of the driver", "warning", "Install one driver on all nodes.", follows=("driver",)),
    "driver module": Field("driver's kernel module", "warning", "Reboot the node after its driver's upgrade.",
                           follows=("driver",)),
    "python": Field("Python", "warning", _SAME_IMAGE),
    "kernel": Field("kernel", "warning", "Nothing stops; bring the node to the others' kernel when it behaves "
                    "otherwise.", group="host"),
    "glibc": Field("glibc", "warning", _SAME_IMAGE, group="host"),
    "machine": Field("architecture", "error", _SAME_IMAGE, group="host"),
    "container": Field("container", "warning", _SAME_IMAGE, group="host"),
    "cpus": Field("CPU cores", "warning", "Ask for the same number of cores on every node (Slurm: --cpus-per-task).",
                  "Its data workers set the pace.", group="host"),
    "infiniband": Field("InfiniBand devices", "error", "See `ibstat` on that node; have the adapters mended or leave "
                        "the node out.", "Ranks that choose another network wait for each other.", group="host"),
    "toolchain": Field("CUDA toolkit", "warning", _SAME_IMAGE),
    "host memory": Field("host memory", "warning", "Plan for the smallest node, or leave it out."),
    "host memory limit": Field("memory limit of the container", "warning", "Give every node's container the same."),
    "shared memory": Field("shared memory", "warning", "Start every node's container with the same --shm-size."),
    "job": Field("effective job", "error", "Give all nodes the same training and accelerate files.",
                 "The nodes would not run one job."),
}  # fmt: skip
_CORE = ("torch", "accelerate", "deepspeed", "xflux-doctor", "nvidia-nccl")
"""As `run`'s meeting has it: packages that talk to their likes on other nodes."""
_MUST = {
    "MASTER_ADDR": "The ranks would meet at different places.",
    "MASTER_PORT": "The ranks would meet at different places.",
    "WORLD_SIZE": "The ranks would wait for a different number.",
    **dict.fromkeys(("NCCL_ALGO", "NCCL_PROTO", "NCCL_NET", "NCCL_IB_DISABLE", "NCCL_SOCKET_FAMILY"),
                    "Ranks that choose another way wait for each other."),
}  # fmt: skip
_FOLDERS = "Check the mounts of that node (`findmnt`)."


def field(key: str) -> Field:
    """The field of a key; those of a package, a variable, a job's value and a folder follow from its first word."""
    if key in FIELDS:
        return FIELDS[key]
    kind, _, name = key.partition(" ")
    if kind == "package":
        core = name.startswith(_CORE) and (name in _CORE or name.startswith("nvidia-nccl"))
        return Field(name, "error" if core else "warning",
                     "Install the same versions on all nodes (`xflux-doctor fix --install`), or start one image.",
                     "Its ranks talk to those of the other nodes." if core else "", "packages",
                     "not installed")  # fmt: skip
    if kind == "variable":
        return Field(name, "error" if name in _MUST else "warning",
                     "Set it alike where the job is started (srun --export, torchrun's environment), or nowhere.",
                     _MUST.get(name, ""), "environment", "not set")  # fmt: skip
    if kind == "job":
        return Field(name, "error", "Give all nodes the same training and accelerate files.",
                     "The nodes would not run one job.", "job", "not set")  # fmt: skip
    if kind == "folder":
        return Field(f"folder of {name}", "warning", _FOLDERS, "", "folders")
    return Field(key, "warning", "Look at that node first.")
