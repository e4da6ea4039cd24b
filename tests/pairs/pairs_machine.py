"""Pairs: the machine: variables, limits, memory, disks, the toolchain."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.version import Version
from pair_kit import ACCELERATE, TORCHRUN, TRAINER, Pair, Place, skip

TORCHRUN_TRAINS = "torchrun --nproc-per-node 2 -m xflux_trainer train --config train.yaml"


def variable(**environment: str) -> Callable[[Place], None]:
    def break_it(place: Place) -> None:
        place.environment.update(environment)

    return break_it


def launched(**environment: str) -> Callable[[Place], None]:
    def break_it(place: Place) -> None:
        place.environment.update(environment)
        place.start = ACCELERATE

    return break_it


def mounted(place: Place, mount: str) -> None:
    """Start the check and the job with a mount of their own, which ends with them."""
    inside = ("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")
    if (
        not shutil.which("unshare")
        or subprocess.run([*inside, "true"], capture_output=True, cwd=place.folder).returncode
    ):
        skip("nothing can be mounted here")
    place.inside = inside


def _small_shm(place: Place) -> None:
    mounted(place, "mount -t tmpfs -o size=1m none /dev/shm")
    place.script(
        "import torch\n"
        "data = torch.utils.data.DataLoader([torch.zeros(1 << 20)] * 8, batch_size=2, num_workers=2)\n"
        "for batch in data:\n    print(batch.shape)\n"
    )


def _few_files(place: Place) -> None:
    place.inside = ("sh", "-c", 'ulimit -n 96 && exec "$@"', "sh")
    place.script(
        "import torch\n"
        "data = torch.utils.data.DataLoader([torch.zeros(4)] * 256, batch_size=None, num_workers=24)\n"
        "kept = list(data)\n"
    )


def _disk_full(place: Place) -> None:
    (place.folder / "out").mkdir()
    mounted(place, "mount -t tmpfs -o size=160k none out")


def _read_only(place: Place) -> None:
    (place.folder / "out").mkdir()
    mounted(place, "mount -t tmpfs -o ro none out")


def _hub_cache(place: Place) -> None:
    (place.folder / "ro").mkdir()
    mounted(place, "mount -t tmpfs -o ro none ro")
    place.environment.update(HF_HOME=str(place.folder / "ro"), HF_HUB_OFFLINE="-", HF_ENDPOINT="http://127.0.0.1:9")
    place.train["pretrained_model"] = "black-forest-labs/FLUX.1-dev"


def _pythonhome(place: Place) -> None:
    place.check = ("--quick", "--launch", f"PYTHONHOME=/nowhere {TORCHRUN_TRAINS}")
    place.start = ("env", "PYTHONHOME=/nowhere", *TORCHRUN, *TRAINER[1:])


def _endpoint(place: Place) -> None:
    place.environment.update(HF_ENDPOINT="hub.example.org", HF_HUB_OFFLINE="-")
    place.train["pretrained_model"] = "black-forest-labs/FLUX.1-dev"


def _unreachable(place: Place) -> None:
    place.environment.update(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="-")
    place.train["pretrained_model"] = "black-forest-labs/FLUX.1-dev"
    place.check = ()


class _Gate(http.server.BaseHTTPRequestHandler):
    """A hub that lets nobody in, as it answers for a gated model."""

    def do_HEAD(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to model is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments: object) -> None:
        return


def _gated(place: Place) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Gate)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place.closing += [server.shutdown, server.server_close]
    place.environment.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_address[1]}", HF_HUB_OFFLINE="-")
    place.environment["HF_TOKEN"] = "hf_" + "a" * 34
    place.train["pretrained_model"] = "black-forest-labs/FLUX.1-dev"
    place.check = ()


def _format_missing(place: Place) -> None:
    if find_spec("bitsandbytes") is not None:
        skip("bitsandbytes is installed here")
    place.train["quantization"] = "nf4"


def _shadowed(place: Place) -> None:
    (place.folder / "torch.py").write_text("# my notes on torch\n")


def _optional_shadowed(place: Place) -> None:
    """transformers imports the hub's package `kernels` wherever it finds a module of that name."""
    if int(version("transformers").split(".")[0]) < 5:
        skip("this transformers does not look for it")
    (place.folder / "kernels.py").write_text("from my_helpers import fast_attention\n")


def bare_path(place: Place, *without: str) -> None:
    """A PATH with links to what the system's folders hold, but for some."""
    folder = place.folder / "bin"
    folder.mkdir()
    for place_of in os.environ["PATH"].split(os.pathsep)[::-1]:
        for file in Path(place_of).glob("*") if Path(place_of).is_dir() else ():
            link = folder / file.name
            if not any(file.name == w or file.name.startswith(f"{w}-") for w in without):
                link.unlink(missing_ok=True)
                link.symlink_to(file)
    place.environment["PATH"] = str(folder)


BUILD = (
    "from torch.utils.cpp_extension import load_inline\n"
    "load_inline('toy', 'int one() { return 1; }', functions=['one'], build_directory='.')\n"
)
ADAM = "from deepspeed.ops.op_builder import CPUAdamBuilder\nCPUAdamBuilder().load()\n"


def _offloads(place: Place, code: str, **zero: Any) -> None:
    """A script of the user's own, which builds the operator that the engine would build at its first step."""
    file = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, **zero},
            "train_micro_batch_size_per_gpu": 1}  # fmt: skip
    place.deepspeed(file)
    place.accelerate.update(use_cpu=False, num_processes=1)
    place.script(code)
    place.files = ("--accelerate-config", "accelerate.yaml")
    place.check = ("--quick", "--launch", "accelerate launch --config_file accelerate.yaml script.py")


def _no_compiler(place: Place) -> None:
    _offloads(place, ADAM)
    bare_path(place, "c++", "g++", "gcc", "cc", "clang++", "clang", "x86_64-linux-gnu-g++", "x86_64-linux-gnu-gcc")


def _no_ninja(place: Place) -> None:
    _offloads(place, ADAM)
    bare_path(place, "ninja")


def _cuda_home(place: Place) -> None:
    if place.run(place.python, "-c", "import torch; raise SystemExit(torch.version.cuda is None)").returncode:
        skip("this torch is built without CUDA, and looks for no toolkit")
    _offloads(place, ADAM)
    place.environment.update(CUDA_HOME="/nowhere/cuda", DS_ACCELERATOR="cuda")


def _no_aio(place: Place) -> None:
    if Path("/usr/include/libaio.h").exists() or Version(version("deepspeed")) < Version("0.16"):
        skip("libaio is installed here, or this DeepSpeed builds the operator on GPU hosts only")
    nvme = {"device": "nvme", "nvme_path": "/tmp"}
    code = "from deepspeed.ops.op_builder import AsyncIOBuilder\nAsyncIOBuilder().load()\n"
    _offloads(place, code, stage=3, offload_optimizer=nvme)


def _killed(place: Place) -> None:
    from group_kit import inside, limited

    group = limited(240 << 20)
    folder = group.__enter__()
    place.closing.append(lambda: group.__exit__(None, None, None))
    place.inside = tuple(inside(folder))
    place.start = ("bash", "-c", '"$@"; exit $?', "bash", *TRAINER)  # a job script, which says who was killed


PAIRS: tuple[Pair, ...] = (
    Pair("debug-level", "variable-refused", "EN305", variable(TORCH_DISTRIBUTED_DEBUG="VERBOSE")),
    Pair("threads-word", "variable-refused", "EN401", launched(OMP_NUM_THREADS="all")),
    Pair("python-home", "variable-refused", "EN407", _pythonhome),
    Pair("hub-endpoint", "variable-refused", "EN406", _endpoint),
    Pair("hub-unreachable", "hub-offline", "WE104", _unreachable),
    Pair("hub-gated", "hub-gated", "WE104", _gated),
    Pair("format-missing", "module-missing", "SW116", _format_missing),
    Pair("small-shm", "dataloader-shm-bus-error", "HO103", _small_shm),
    Pair("few-files", "too-many-open-files", "HO105", _few_files),
    Pair("disk-full", "disk-full", "DA102", _disk_full),
    Pair("output-read-only", "output-not-writable", "DA102", _read_only),
    Pair("torch-shadowed", "module-shadowed", "SW118", _shadowed, quick=True),
    Pair(
        "kernels-shadowed",
        "module-shadowed",
        "SW118",
        _optional_shadowed,
        needs=("torch", "accelerate", "transformers"),
    ),
    Pair("no-compiler", "compiler-missing", "TC103", _no_compiler),
    Pair("no-ninja", "ninja-missing", "TC104", _no_ninja),
    Pair("cuda-home", "cuda-home-not-set", "TC101", _cuda_home),
    Pair("host-memory", "host-oom-kill", "ME102", _killed),
    Pair("no-libaio", "libaio-missing", "TC106", _no_aio),
)
