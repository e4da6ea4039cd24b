from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from excerpts import CHILD_FAILED, EXCERPTS
from excerpts_kit import crash
from hypothesis import given, settings
from hypothesis import strategies as st

from xflux_doctor.explain.diagnosis import Diagnosis, diagnose, diagnose_file
from xflux_doctor.explain.rules import RULES

CASES = [pytest.param(name, text, id=f"{name}-{n}") for name, texts in EXCERPTS.items() for n, text in enumerate(texts)]

HEALTHY = """\
The following values were not passed to `accelerate launch` and had defaults used instead:
	`--num_machines` was set to a value of `1`
To avoid this warning pass in values for each of the problematic parameters or run `accelerate config`.
/x/torch/utils/data/dataloader.py:557: UserWarning: This DataLoader will create 4 worker processes in total.
  warnings.warn(_create_warning_msg(
The installed version of bitsandbytes was compiled without GPU support. 8-bit optimizers are unavailable.
/x/libbitsandbytes_cpu.so: undefined symbol: cadam32bit_grad_fp32
WARNING[XFORMERS]: xFormers can't load C++/CUDA extensions. xFormers was built for:
 [WARNING]  async_io requires the dev libaio .so object and headers but these were not found.
No CUDA runtime is found, using CUDA_HOME='/usr/local'
Port `29500` is already in use. Accelerate will attempt to launch in a standalone-like mode by finding an open port
[W socket.cpp:436] [c10d] The server socket has failed to bind to [::]:29500 (errno: 98 - Address already in use).
node:42:42 [0] NCCL INFO NET/Plugin: Plugin load returned 2 : libnccl-net.so: cannot open shared object file: No such
W tensorflow/stream_executor/dso_loader.cc:64] Could not load dynamic library 'libcudart.so.11.0'; dlerror: cannot open
A module that was compiled using NumPy 1.x cannot be run in NumPy 2.1.3 as it may crash.
[2026-11-23 22:40:27,074] [INFO] [config.py:1003:print]   loss_scale ................... 1.0
[2026-11-23 22:40:27,074] [INFO] [config.py:1003:print]   checkpoint_tag_validation_fail  False
11/23/2026 23:10:55 - INFO - __main__ - ***** Running training *****
"""
STEPS = "".join(f"11/23/2026 23:10:{n:02} - INFO - __main__ - step {n}/60 loss=1.{n} lr=0.001\n" for n in range(10, 60))
PRINTED = "".join(f"step {n} loss {1 / (n + 1):.4f}\n" for n in range(60))
OOM = crash("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 216.00 MiB.")
FULL = crash("OSError: [Errno 28] No space left on device")


def cause(text: str) -> str:
    found = diagnose(text)
    return found.cause if found else "none"


@pytest.mark.parametrize(("name", "text"), CASES)
def test_each_cause(name: str, text: str) -> None:
    assert cause(text) == name


@pytest.mark.parametrize(("name", "text"), CASES)
def test_noise_around_changes_nothing(name: str, text: str) -> None:
    """Warnings and progress before it, the launcher's report after it."""
    if "exitcode" in text:  # the launcher's report is the mark itself
        assert cause(HEALTHY + text) == name
        return
    assert cause(HEALTHY + text) == name
    assert cause(HEALTHY + STEPS + text + CHILD_FAILED) == name
    assert cause((HEALTHY + STEPS + text + CHILD_FAILED).replace("\n", "\r\n")) == name


@pytest.mark.parametrize(("name", "text"), CASES)
def test_an_error_that_the_training_outlived_is_no_cause(name: str, text: str) -> None:
    if name != "nan-loss" or "loss" not in text[:200].lower():
        assert cause(text + STEPS) == "none"
    assert cause(text + STEPS + FULL + CHILD_FAILED) == "disk-full"


def test_healthy() -> None:
    assert diagnose(HEALTHY) is None
    no_name = (
        "[W socket.cpp:697] [c10d] The IPv6 network addresses of (node-0, 29500) cannot be retrieved (gai error: -2)\n"
    )
    assert diagnose(no_name + HEALTHY) is None
    assert diagnose(HEALTHY + STEPS) is None
    assert diagnose(HEALTHY + PRINTED + "training finished\n") is None
    assert diagnose("") is None
    assert diagnose([]) is None


def test_a_warning_counts_when_the_job_failed_and_nothing_better_is_known() -> None:
    warning = "RuntimeError: module compiled against ABI version 0x1000009 but this version of numpy is 0x2000000\n"
    assert cause(warning) == "none"
    assert cause(warning + crash("mylib.NoArrays: x") + CHILD_FAILED) == "numpy2-abi"
    assert cause(warning + OOM) == "cuda-oom"
    assert cause(warning + STEPS) == "none"


def test_what_the_launcher_says_is_never_the_cause() -> None:
    found = diagnose(HEALTHY + STEPS + CHILD_FAILED)
    assert found is not None
    assert found.cause == "unknown"
    found = diagnose(STEPS + crash("zlib.error: Error -3 while decompressing", rank=1) + CHILD_FAILED)
    assert found is not None
    assert found.cause == "unknown"


def test_an_unknown_error_is_shown_with_its_place() -> None:
    found = diagnose(STEPS + crash("mylib.StrangeError: 42", "/workspace/train.py:7:main: go()", rank=3) + CHILD_FAILED)
    assert found is not None
    assert found.cause == "unknown"
    assert found.rank == 3
    assert [e.text for e in found.evidence] == ['File "/workspace/train.py", line 7, in main', "mylib.StrangeError: 42"]
    assert [e.line for e in found.evidence] == [52, 54]


@pytest.mark.parametrize("first", [0, 1])
def test_the_rank_that_failed_and_not_the_one_that_noticed(first: int) -> None:
    both = [
        crash("RuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:28809", rank=0),
        crash("KeyError: 'caption'", "/workspace/src/dataset.py:12:__getitem__: return meta['caption']", rank=1),
    ]
    found = diagnose(both[first] + both[1 - first] + CHILD_FAILED)
    assert found is not None
    assert (found.cause, found.rank) == ("dataset-key-missing", 1)
    assert found.others == ("peer-rank-died",)


def test_of_two_failing_ranks_the_earlier() -> None:
    oom, full = OOM.replace("\n", "\n[rank2]: "), crash("OSError: [Errno 28] No space left on device", rank=5)
    assert cause("[rank2]: " + oom + "\n" + full) == "cuda-oom"
    assert cause(full + "[rank2]: " + oom) == "disk-full"


def test_the_exception_is_shown_and_not_the_source_line_that_raised_it() -> None:
    error = "AssertionError: Torch not compiled with CUDA enabled"
    text = crash(error, "/x/torch/cuda.py:9:f: raise AssertionError('Torch not compiled with CUDA enabled')")
    found = diagnose(text)
    assert found is not None
    assert found.evidence[-1].text == "AssertionError: Torch not compiled with CUDA enabled"


def test_interleaved_tracebacks_are_kept_apart() -> None:
    """Rank 0 is in its optimizer's step and only notices; rank 1 has run out of memory in the forward pass."""
    optimizer = crash("RuntimeError: Connection closed by peer", "/x/train.py:5:main: optimizer.step()", rank=0)
    forward = crash("torch.OutOfMemoryError: CUDA out of memory.", "/x/model.py:9:forward: x = self.q(x)", rank=1)
    mixed = [line for pair in zip(optimizer.splitlines(), forward.splitlines(), strict=True) for line in pair]
    found = diagnose(mixed)
    assert found is not None
    assert (found.cause, found.rank) == ("cuda-oom", 1)
    assert found.evidence[0].text == 'File "/x/model.py", line 9, in forward'


def test_the_rank_from_the_summary_when_lines_do_not_say() -> None:
    found = diagnose(OOM + CHILD_FAILED)
    assert found is not None
    assert found.rank == 1


def test_what_the_machine_says_beats_what_programs_say() -> None:
    text = crash("RuntimeError: CUDA error: unspecified launch failure") + CHILD_FAILED
    assert cause(text) == "cuda-kernel-fault"
    assert (
        cause(text + "[ 99.1] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\n")
        == "gpu-fell-off-bus"
    )


def test_a_stop_from_outside_beats_its_consequences_and_not_an_error() -> None:
    stop = "slurmstepd: error: *** JOB 4 ON n CANCELLED AT 2026-11-23T23:10:16 DUE TO TIME LIMIT ***\n"
    gone = crash("RuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:28809", rank=0)
    assert cause(gone + stop) == "slurm-time-limit"
    assert cause(OOM + gone + stop) == "cuda-oom"


def test_prints_that_left_a_buffer_late_do_not_hide_an_error() -> None:
    """Plain prints are written when the process ends: below the traceback."""
    assert cause(OOM + PRINTED) == "cuda-oom"
    assert cause(OOM + PRINTED * 8) == "none"  # more than a buffer holds: the training did go on
    assert cause(OOM + PRINTED + "Training finished\n") == "none"


def test_one_more_drawing_of_the_progress_bar_is_no_progress() -> None:
    bar = "Steps:   3%|▎         | 30/1000 [00:12<06:40,  2.42it/s, loss=0.312, lr=0.0001]"
    assert cause(bar + "\r" + bar + "\n" + OOM + "\r" + bar + "\n") == "cuda-oom"


def test_a_restart_that_works() -> None:
    assert diagnose(OOM + CHILD_FAILED + STEPS) is None


def test_errors_while_python_cleans_up() -> None:
    text = "Exception ignored in: <function Adam.__del__ at 0x7f>\n" + crash(
        "AttributeError: module 'torch' has no attribute 'x'"
    )
    assert diagnose(STEPS + text) is None
    assert cause(text + OOM) == "cuda-oom"


def test_nan_loss_only_when_it_stays() -> None:
    assert cause("step 1 loss nan\nstep 2 loss 0.5\nstep 3 loss 0.4\n") == "none"
    assert cause("loss: 0.5 val_loss: nan\n") == "none"
    assert cause("epoch 1 val loss: nan\nbest loss: inf\neval/loss: nan\n") == "none"
    found = diagnose("loss: 0.5\nloss: nan\nloss: 0.4\nstep 9 loss: inf\nstep 10 loss: nan\n")
    assert found is not None
    assert (found.cause, found.evidence[0].line) == ("nan-loss", 4)
    assert cause("step 1 loss nan\nstep 2 loss nan\n" + OOM) == "nan-loss"
    assert cause(OOM + "step 1 loss nan\n") == "cuda-oom"


def test_line_numbers_are_those_of_an_editor() -> None:
    text = "a\n\nb 1%|\rb 2%|\rb 3%|\n" + OOM
    lines = text.split("\n")
    for source in (text, lines, [line + "\n" for line in lines]):
        found = diagnose(source)
        assert found is not None
        assert lines[found.evidence[-1].line - 1].startswith("torch.OutOfMemoryError")


def test_secrets_do_not_leave() -> None:
    found = diagnose("OSError: We couldn't connect to 'https://me:hunter2@hf.co/?token=abcdefgh' hf_AbCdEfGhIjKlMnOp\n")
    assert found is not None
    assert "hunter2" not in found.evidence[0].text
    assert "abcdefgh" not in found.evidence[0].text
    assert "hf_" not in found.evidence[0].text


def test_hosts_and_stamps_before_the_lines() -> None:
    error = (
        crash("RuntimeError: x", "/x/train.py:5:main: a()")
        + "\nDuring handling of the above exception, another\n\n"
        + OOM
    )
    for mark in ("worker-1: ", "trainer-1  | ", "2026-11-23T23:10:16.123456789Z ", "2026-11-23T23:10:16.1Z stderr F "):
        text = "".join(mark + line + "\n" for line in error.splitlines())
        found = diagnose(text)
        assert found is not None
        assert found.cause == "cuda-oom"
        assert found.evidence[0].text.startswith("File ")


def test_files(tmp_path: Path) -> None:
    colored = OOM.replace("torch.OutOf", "\x1b[31mtorch.\x1b[1mOutOf\x1b[0m")
    for name, data in {
        "utf8": (STEPS + colored).encode(),
        "utf16": (STEPS + OOM).encode("utf-16"),
        "binary": b"\x00\xff\xfe\x80" * 5000 + b"\n" + OOM.encode() + b"\x89PNG\r\n",
        "latin": "Größe 1 GB\n".encode("latin-1") + OOM.encode(),
        "long": b"x" * 3_000_000 + b"\n" + OOM.encode() + b"y" * 3_000_000,
        "cut": (STEPS + OOM).encode()[:-3],
        "bar": ("\r".join(f"{n}%|#| {n}/100 [loss=0.{n}]" for n in range(100)) + "\n" + OOM).encode(),
    }.items():
        path = tmp_path / name
        path.write_bytes(data)
        found = diagnose_file(path)
        assert found is not None, name
        assert found.cause == "cuda-oom", name
    (tmp_path / "empty").write_bytes(b"")
    assert diagnose_file(tmp_path / "empty") is None


@settings(max_examples=60, deadline=None, database=None)
@given(st.binary(max_size=4000), st.lists(st.sampled_from(sorted(EXCERPTS)), max_size=3))
def test_never_crashes(tmp_path_factory: pytest.TempPathFactory, data: bytes, names: list[str]) -> None:
    path = tmp_path_factory.mktemp("log") / "x.log"
    path.write_bytes(data[:2000] + "".join(EXCERPTS[name][0] for name in names).encode() + data[2000:])
    found = diagnose_file(path)
    assert found is None or isinstance(found, Diagnosis)


def many_lines(count: int) -> Iterator[str]:
    for n in range(count):
        yield f"11/23/2026 23:10:55 - INFO - __main__ - step {n}/{count} loss=0.{n} lr=0.001\n"
        yield f"[2026-11-23 22:40:27,074] [INFO] [logging.py:96:log_dist] [Rank 0] step={n}, mom=[(0.9, 0.999)]\n"
    yield from OOM.splitlines(keepends=True)


def test_a_limit_of_the_jobs_own_is_nobody_elses_fault() -> None:
    """As an H200 said it, with the allocator held to 33.06 GiB and 1 GiB of another process: 105 GiB were free."""
    said = (
        "error: CUDA out of memory. Tried to allocate 28.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which "
        "105.01 GiB is free. Process 1292 has 1.02 GiB memory in use. Including non-PyTorch memory, this process has "
        "33.76 GiB memory in use. 33.06 GiB allowed; Of the allocated memory 31.62 GiB is allocated by PyTorch, and "
        "1.41 GiB is reserved by PyTorch but unallocated.\n"
    )
    found, full = diagnose(said), diagnose(said.replace("105.01 GiB is free", "12.01 MiB is free"))
    assert found is not None and full is not None
    assert (found.cause, full.cause) == ("cuda-oom", "cuda-oom-other-process")


def test_long_logs_take_little_time_and_memory() -> None:
    import tracemalloc

    start = time.process_time()
    found = diagnose(many_lines(50_000))
    seconds = time.process_time() - start
    assert found is not None
    assert (found.cause, found.evidence[-1].line) == ("cuda-oom", 100_004)
    assert seconds < 15, "10 MB should take about a second"
    tracemalloc.start()
    diagnose(many_lines(5_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6


def test_a_table_of_ones_own() -> None:
    text = "step 1 loss nan\n" + OOM
    assert diagnose(text, rules=()) is not None
    own = tuple(rule for rule in RULES if rule.id == "cuda-oom")
    found = diagnose(text, rules=own)
    assert found is not None
    assert found.cause == "cuda-oom"


KILLED = """\
E1129 10:58:13.973000 10903 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9) local_rank: 1 (pid: 10909) of binary: /usr/bin/python
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
=======================================================
train.py FAILED
-------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-29_10:58:13
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 10908)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 10908
-------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-29_10:58:13
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 10909)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 10909
=======================================================
"""  # noqa: E501


def test_of_several_ended_ranks_the_launcher_says_which_was_first() -> None:
    """The other one was ended by the launcher itself. Two launchers that name two ranks name none."""
    found = diagnose(KILLED)
    assert found is not None and (found.cause, found.rank) == ("host-oom-kill", 1)
    both = diagnose(KILLED + KILLED.replace("rank      : 1 (local_rank: 1)", "rank      : 3 (local_rank: 1)"))
    assert both is not None and both.rank is None
