"""Pairs: how the ranks are started: accelerate's launcher, DeepSpeed's file, ports, names and interfaces."""

from __future__ import annotations

import socket
from collections.abc import Callable
from importlib.metadata import version

from packaging.version import Version
from pair_kit import ACCELERATE, TORCHRUN, TRAINER, Pair, Place, skip

USER = """\
import torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(4, 4)
data = torch.utils.data.DataLoader(torch.zeros(8, 4), batch_size=1)
model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), data)
for x in data:
    accelerator.backward(model(x.to(next(model.parameters()).dtype)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
accelerator.print("training finished")
"""
"""A script of the user's own, as accelerate's guides write it."""
ENGINE = """\
import deepspeed
import torch
deepspeed.init_distributed("gloo")
model = torch.nn.Linear(4, 4)
deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config="ds.json")
print("training finished")
"""
"""DeepSpeed's engine made by hand: accelerate makes none on the CPU."""
ZERO = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True}}  # fmt: skip
"""A sound DeepSpeed file."""


def own_script(place: Place, code: str = USER) -> None:
    """The user's own script by accelerate's launcher, which `check` is told by --launch."""
    place.script(code)
    place.start = (*ACCELERATE[:5], "script.py")
    place.files = ("--accelerate-config", "accelerate.yaml")
    place.check = ("--quick", "--launch", "accelerate launch --config_file accelerate.yaml script.py")


def zero(code: str = USER, /, **changes: object) -> Callable[[Place], None]:
    """A DeepSpeed file with these changes; None takes a key out."""

    def break_it(place: Place) -> None:
        file = {**ZERO, **changes}
        place.deepspeed({key: value for key, value in file.items() if value is not None})
        own_script(place, code)

    return break_it


def inline(**section: object) -> Callable[[Place], None]:
    def break_it(place: Place) -> None:
        place.deepspeed(**{"zero_stage": 2, "gradient_accumulation_steps": 2, **section})
        own_script(place)

    return break_it


def accelerates(**values: object) -> Callable[[Place], None]:
    def break_it(place: Place) -> None:
        place.accelerate.update(values)
        own_script(place)

    return break_it


def _beside_a_file(place: Place) -> None:
    zero()(place)
    place.accelerate["mixed_precision"] = "bf16"
    place.accelerate["deepspeed_config"]["zero_stage"] = 2


def _json_broken(place: Place) -> None:
    place.deepspeed("{'zero_optimization': 1,}")
    own_script(place)


def _file_absent(place: Place) -> None:
    zero()(place)
    (place.folder / "ds.json").unlink()


def two_ranks(place: Place, **values: object) -> None:
    place.accelerate.update({"distributed_type": "MULTI_CPU", "num_processes": 2, **values})
    place.start = ACCELERATE


def _port_taken(place: Place) -> None:
    listener = socket.socket()
    listener.bind(("", 0))
    listener.listen()
    place.closing.append(listener.close)
    port = listener.getsockname()[1]
    two_ranks(place, main_process_port=port)
    words = f"torchrun --nproc-per-node 2 --master-port {port} -m xflux_trainer train --config train.yaml"
    place.check = ("--quick", "--cpu", "--launch", words)
    place.start = (*TORCHRUN, "--master-port", str(port), *TRAINER[1:])


def _name_unknown(place: Place) -> None:
    place.deepspeed(zero_stage=2, gradient_accumulation_steps=2, deepspeed_multinode_launcher="standard")
    place.accelerate.update(
        num_machines=2, machine_rank=1, num_processes=2, main_process_ip="head.invalid", main_process_port=29511
    )
    place.check = ()
    place.start = (*ACCELERATE[:5], "--rdzv_conf", "timeout=8", *ACCELERATE[5:])


def _parallelism(place: Place) -> None:
    if Version(version("accelerate")) < Version("1.10"):
        skip("this accelerate has no parallelism_config")
    sizes = {"parallelism_config_dp_shard_size": 4}
    fsdp = {"fsdp_version": 2}
    accelerates(distributed_type="FSDP", num_processes=2, fsdp_config=fsdp, parallelism_config=sizes)(place)


def _fsdp_one(place: Place) -> None:
    place.accelerate.update(distributed_type="FSDP", num_processes=2, fsdp_config={"fsdp_version": 1})
    place.start = ACCELERATE


def _quantised_and_cut(place: Place) -> None:
    place.deepspeed(zero_stage=3, gradient_accumulation_steps=2)
    place.train["quantization"] = "int8"


def _interface(place: Place) -> None:
    two_ranks(place)
    place.environment["GLOO_SOCKET_IFNAME"] = "eth9"
    words = "torchrun --nproc-per-node 2 -m xflux_trainer train --config train.yaml"
    place.check = ("--quick", "--cpu", "--launch", words)
    place.start = (*TORCHRUN, *TRAINER[1:])


PAIRS: tuple[Pair, ...] = (
    Pair("deepspeed-batch", "deepspeed-config-mismatch", "LA312", zero(ENGINE, train_batch_size=7)),
    Pair("deepspeed-json-broken", "deepspeed-config-mismatch", "LA301", _json_broken),
    Pair("deepspeed-file-absent", "deepspeed-config-mismatch", "LA301", _file_absent),
    Pair("deepspeed-beside-a-file", "deepspeed-config-mismatch", "LA302", _beside_a_file),
    Pair("deepspeed-precision", "deepspeed-config-mismatch", "LA311", zero(ENGINE, fp16={"enabled": True})),
    Pair(
        "deepspeed-zero-key",
        "deepspeed-config-mismatch",
        "LA308",
        zero(ENGINE, zero_optimization={"stage": 2, "overlap_com": True}),
    ),
    Pair("deepspeed-no-zero", "deepspeed-config-mismatch", "LA307", zero(zero_optimization=None)),
    Pair("deepspeed-zero-number", "deepspeed-config-mismatch", "LA307", zero(zero_optimization=2)),
    Pair("deepspeed-stage", "deepspeed-config-mismatch", "LA310", zero(ENGINE, zero_optimization={"stage": 7})),
    Pair(
        "deepspeed-old-name",
        "deepspeed-config-mismatch",
        "LA309",
        zero(
            ENGINE,
            zero_optimization={
                "stage": 3,
                "stage3_gather_fp16_weights_on_model_save": True,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
        ),
    ),
    Pair("deepspeed-inline-stage", "deepspeed-config-mismatch", "LA304", inline(zero_stage="two")),
    Pair("deepspeed-inline-clipping", "deepspeed-config-mismatch", "LA304", inline(gradient_clipping="much")),
    Pair("deepspeed-inline-flag", "deepspeed-config-mismatch", "LA304", inline(zero3_init_flag="maybe", zero_stage=3)),
    Pair(
        "one-gpu-id",
        "config-missing-key",
        "LA115",
        accelerates(distributed_type="MULTI_GPU", gpu_ids="0", use_cpu=False),
    ),
    Pair("xla-without-torch-xla", "module-missing", "LA208", accelerates(distributed_type="XLA", use_cpu=False)),
    Pair(
        "fsdp-sharding-word",
        "config-missing-key",
        "LA203",
        accelerates(
            distributed_type="FSDP", num_processes=2, fsdp_config={"fsdp_version": 1, "fsdp_sharding_strategy": "FULL"}
        ),
    ),
    Pair("parallelism-product", "config-missing-key", "LA206", _parallelism),
    Pair("fp8-without-library", "module-missing", "LA207", accelerates(mixed_precision="fp8")),
    Pair("dynamo-backend", "config-missing-key", "LA203", accelerates(dynamo_config={"dynamo_backend": "INDUCTR"})),
    Pair("fsdp-of-the-first-version", "setting-refused", "LA111", _fsdp_one),
    Pair("quantised-and-cut", "setting-refused", "LA116", _quantised_and_cut),
    Pair("port-taken", "port-in-use", "LA112", _port_taken),
    Pair("name-unknown", "rendezvous-unreachable", "LA403", _name_unknown),
    Pair("interface-absent", "socket-ifname", "EN204", _interface),
)
