"""Two GPUs of one host: the check, LoRA and full fine-tunes by DDP, ZeRO-2 and FSDP2, real failures, and going on.

    python benchmarks/two_gpus.py --work DIR [--parts check,lora,exchange,finetune,fp32,faults,resume] [--resume]

Each card is held to 80 GiB (--cap) by the allocator, as `run --gpu-limit` does it, but for the fine-tune with fp32
states, which is foretold not to fit and then run without the cap where the cards have the memory. The full-size
transformer has made-up weights (23.8 GB in DIR, written once); failures and resuming take the demo's. The parts:

- check: `check --deep` over both cards, and an accelerate file of eight processes, which must be repaired to two
- lora: one card, DDP from that file of eight, and ZeRO-2 where DeepSpeed is installed: seconds, memory of each rank
  beside its forecast, and how far the ranks are apart
- exchange: `cost.py`'s two ranks, whose steps are taken together and apart in turn: the exchange's share of a step
- finetune: all weights in bf16 with stochastic rounding and Adam in 8 bits, cut up by FSDP2
- fp32: AdamW with fp32 states cut up by FSDP2, at the cap (refused, with the plans that fit) and without it
- faults: rank 1 killed, rank 1 stopped, two processes on one visible card: what `run` and `explain` say
- resume: three steps and three more on two ranks against six, number by number, by DDP and by FSDP2; then one rank on
  the same checkpoint

With --tiny --cpu all of it but `fp32`'s refusal is tried out on two CPU ranks with the demo's model. --resume goes on
with today's file, and takes the LoRA runs that are in it as they are. Appends to
benchmarks/results/two-gpus-GPU-DATE.json. Exit 1 where something is not as the table promises.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cards
import children
import start
from children import GIB, REPO, RESULTS, Outcome

PARTS = ("check", "lora", "exchange", "finetune", "fp32", "faults", "resume")
MEMORY, BALANCE, SCALING = 0.03, 0.01, 1.9
ENDLESS = 100_000
STARTED = 150.0
"""Seconds that a run may take to its third step, on a machine that imports torch for the first time."""
DDP, ZERO, FSDP = (children.SHARED[name] for name in ("ddp", "zero2", "fsdp"))


class Bench:
    """The folder, its two files, and the doctor in it."""

    def __init__(self, options: argparse.Namespace, known: dict[str, Any]) -> None:
        self.options, self.work, self.out = options, options.work, options.out
        self.known = known
        """The parts of today's file."""
        self.cap = [] if options.cpu else ["--gpu-limit", str(options.cap)]

    def write(self, ranks: int, accelerate: dict[str, Any], **train: Any) -> None:
        files = {
            "accelerate.yaml": {
                "compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": ranks,
                "mixed_precision": "no" if self.options.cpu else "bf16", "use_cpu": self.options.cpu,
                "main_process_port": self.options.port, **accelerate,
            },
            "train.yaml": {
                **start.settings(self.work), "output_dir": str(self.out), "checkpointing_steps": ENDLESS,
                "mixed_precision": "no" if self.options.cpu else "bf16", **train,
            },
        }  # fmt: skip
        for name, values in files.items():
            (self.work / name).write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML

    def argv(self, *words: str) -> list[str]:
        files = ["--config", str(self.work / "train.yaml"), "--accelerate-config", str(self.work / "accelerate.yaml")]
        argv = [sys.executable, "-m", "xflux_doctor.cli", *words, *files, "--offline"]
        return [*argv, "--cpu"] if self.options.cpu else argv

    def environment(self) -> dict[str, str]:
        return {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **os.environ}

    def doctor(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return self.command(self.argv(*words), **more)

    def command(self, argv: list[str], **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, cwd=self.work, env={**self.environment(), **more}, capture_output=True, text=True,
            timeout=self.options.deadline, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def document(self, *words: str, **more: str) -> dict[str, Any]:
        done = self.doctor(*words, "--format", "json", **more)
        try:
            return dict(json.loads(done.stdout))
        except ValueError:
            raise SystemExit(f"{' '.join(words)} said no JSON:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}") from None

    def explained(self) -> dict[str, Any]:
        argv = [sys.executable, "-m", "xflux_doctor.cli", "explain", str(self.out), "--format", "json"]
        told = json.loads(self.command(argv).stdout)
        return {key: told[key] for key in ("cause", "code", "confidence", "rank")}

    def trained(self, name: str, *, capped: bool = True) -> Outcome:
        """`run` with the files as they are; each rank's peak beside its forecast."""
        cap = self.cap if capped else []
        plan = self.document("plan", *cap)
        forecasts = [rank["gpu"] and rank["gpu"]["peak_bytes"] for rank in plan["ranks"]]
        begun = time.monotonic()
        with cards.Watched() as watched:
            done = self.doctor("run", "--yes", "--quick", *cap)
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        if done.returncode:
            wrong = [text for text in said if text.startswith(("✗", "error:"))]
            return {"name": name, "outcome": "failed", "code": done.returncode, "said": [*wrong, *said[-20:]]}
        told = json.loads((self.out / "metrics.json").read_text(encoding="utf-8"))
        shutil.rmtree(self.out)
        peaks = [rank["device"].get("overall", {}).get("allocated") for rank in told["per_rank"]]
        known = [peak for peak in peaks if peak]
        return {
            "name": name, "outcome": "trained", "strategy": told["strategy"], "world_size": told["world_size"],
            "samples": told["train_batch_size"] * told["gradient_accumulation_steps"] * told["world_size"],
            "seconds_per_step": told["seconds_per_step"], "loss": told["loss"], "peaks": peaks, "forecasts": forecasts,
            "errors": [want / peak - 1 for want, peak in zip(forecasts, peaks, strict=False) if want and peak],
            "balance": max(known) / min(known) - 1 if known else None, "nvml": watched.most, "notes": told["notes"],
            "launch": [line for line in said if "repaired in memory" in line], "seconds": time.monotonic() - begun,
            "host": children.host(plan["ranks"], told["per_rank"]),
        }  # fmt: skip


# The parts -----------------------------------------------------------------------------------------------


def check(bench: Bench) -> dict[str, Any]:
    bench.write(2, DDP, **full(bench))
    begun = time.monotonic()
    deep = bench.document("check", "--deep", *bench.cap)
    seconds = time.monotonic() - begun
    facts = deep["facts"]
    wrong = {item["check"]: [one["seen"] for one in item["findings"]] for item in deep["results"]
             if item["status"] in ("error", "crashed")}  # fmt: skip
    bench.write(8, DDP, **full(bench))
    eight = bench.document("check", "--quick", *bench.cap)
    foreseen = next((item["findings"] for item in eight["results"] if item["check"] == "LA105"), [])
    return {
        "seconds": seconds, "allreduce": facts["allreduce"], "topology": facts.get("topology"), "wrong": wrong,
        "speeds": facts.get("speeds"), "probes": facts.get("gpu_probes"), "eight": foreseen,
        "good": bool(facts["allreduce"] and facts["allreduce"]["ok"]) and (bench.options.cpu or bool(foreseen)),
    }  # fmt: skip


def full(bench: Bench) -> dict[str, Any]:
    """The seed's job: a LoRA of rank 16 at 1024 px, every block recomputed, so that all runs do the same work."""
    return {"rank": 16, "gradient_checkpointing": True, "max_train_steps": bench.options.steps}


def lora(bench: Bench) -> dict[str, Any]:
    many = 2 if bench.options.cpu else 8  # of a CPU's ranks there may be eight
    launches = {"one": (1, {"distributed_type": "NO", "gpu_ids": "0"}), "ddp": (many, DDP)}
    if _has("deepspeed") and not bench.options.cpu:
        launches["zero2"] = (2, ZERO)
    rows = {name: row for name, row in bench.known.get("lora", {}).get("rows", {}).items() if as_promised(row, bench)}
    for name, (ranks, accelerate) in launches.items():
        if name in rows:
            continue
        # The files' own plan: with what makes one of them faster than the other nothing could be compared.
        bench.write(ranks, accelerate, **full(bench), allow=[])
        rows[name] = bench.trained(name)
        print(line(rows[name]), flush=True)
    one, two = (rows[name].get("samples", 0) / rows[name].get("seconds_per_step", 1) for name in ("one", "ddp"))
    scaling = two / one if one else None  # of eight processes' file two take four passes a step
    good = all(as_promised(row, bench) for row in rows.values())
    good &= bench.options.cpu or bool(scaling and scaling >= SCALING)
    return {"rows": rows, "scaling": scaling, "good": good}


def exchange(bench: Bench) -> dict[str, Any]:
    size = ["--rank-layers", "1,2"] if bench.options.tiny else ["--rank-layers", "19,38", "--rank-heads", "24"]
    size += ["--rank-pixels", "256" if bench.options.tiny else "1024"]
    argv = [sys.executable, str(REPO / "benchmarks" / "cost.py"), "--no-grid", "--ranks", "2", *size]
    argv += ["--rounds", "2", "--results", str(bench.work / "cost"), "--deadline", str(bench.options.deadline)]
    done = bench.command(argv)
    found = sorted((bench.work / "cost").glob("cost-*.json"))
    rows = json.loads(found[-1].read_text(encoding="utf-8"))["ranks"] if found else []
    print(done.stdout[-600:], flush=True)
    return {"rows": rows, "good": bool(rows) and rows[0]["outcome"] == "measured"}


def finetune(bench: Bench) -> dict[str, Any]:
    bench.write(2, FSDP, **every(), optimizer="adamw8bit", weight_update="stochastic")
    row = bench.trained("FSDP2, bf16 with stochastic rounding, AdamW in 8 bits")
    print(line(row), flush=True)
    return {"rows": {"adamw8bit": row}, "good": as_promised(row, bench)}


def every() -> dict[str, Any]:
    """All weights are trained."""
    own = {"mode": "finetune", "gradient_checkpointing": True, "max_train_steps": 4}
    return {**own, "final_checkpoint": False}  # up to 143 GB, which nothing goes on from


def fp32(bench: Bench) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    bench.write(2, FSDP, **every())
    if not bench.options.cpu:
        plan, refused = bench.document("plan", *bench.cap), bench.doctor("run", "--yes", "--quick", *bench.cap)
        fitting = [row["label"] for row in plan["alternatives"] if row["gpu"]["verdict"] == "fits"]
        rows["refused"] = {"code": refused.returncode, "needs": plan["ranks"][0]["gpu"], "fitting": fitting,
                           "said": [text for text in refused.stdout.splitlines() if "ME101" in text]}  # fmt: skip
    rows["fp32"] = bench.trained("FSDP2, AdamW in fp32, no cap", capped=False)
    print(line(rows["fp32"]), flush=True)
    good = all(as_promised(row, bench) for row in rows.values() if "outcome" in row)
    if "refused" in rows and not bench.options.tiny:
        good &= rows["refused"]["code"] == 1 and bool(rows["refused"]["fitting"])
    return {"rows": rows, "good": good}


def faults(bench: Bench) -> dict[str, Any]:
    rows: dict[str, Any] = {
        "killed": _hurt(bench, lambda pid: os.kill(pid, signal.SIGKILL)),
        "stopped": _hurt(bench, lambda pid: os.kill(pid, signal.SIGSTOP), "--hang-after", "15"),
    }
    good = rows["killed"]["cause"] == "host-oom-kill" and rows["killed"]["exit"] == 137
    good &= rows["stopped"]["cause"] == "rank-stopped" and rows["stopped"]["exit"] == 124
    good &= all(row["rank"] == 1 for row in rows.values())
    if not bench.options.cpu:
        bench.write(2, DDP, **small())
        one = {"CUDA_VISIBLE_DEVICES": "0"}
        seen = bench.document("check", "--quick", **one)
        codes = [item["check"] for item in seen["results"] if item["status"] == "error"]
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                "xflux_trainer", "train", "--config", str(bench.work / "train.yaml")]  # fmt: skip
        done = bench.command(argv, **one)
        (bench.work / "alone.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        told = [sys.executable, "-m", "xflux_doctor.cli", "explain", str(bench.work / "alone.log"), "--format", "json"]
        cause = json.loads(bench.command(told).stdout)
        rows["one visible card"] = {"check": codes, "exit": done.returncode, "cause": cause["cause"],
                                    "code": cause["code"]}  # fmt: skip
        good &= "LA105" in codes and cause["code"] == "LA105"
        shutil.rmtree(bench.out, ignore_errors=True)
    return {"rows": rows, "good": good}


def small() -> dict[str, Any]:
    """The demo's model and sizes, beside the full-size one."""
    return {"pretrained_model": "tiny", "img_size": 64, "max_text_tokens": 16, "cache_dir": "tiny-cache", "rank": 4}


def _hurt(bench: Bench, hurt: Callable[[int], None], *extra: str) -> dict[str, Any]:
    """A run without an end; once both ranks train, something happens to the second."""
    bench.write(2, DDP, **small(), max_train_steps=ENDLESS)
    shown = bench.work / "shown.txt"
    with shown.open("wb") as file:
        process = subprocess.Popen(
            bench.argv("run", "--yes", "--quick", *extra), cwd=bench.work, env=bench.environment(), stdout=file,
            stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        pid = _second(bench, process)
        begun = time.monotonic()
        hurt(pid)
        code = process.wait(timeout=bench.options.deadline)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)
    told = bench.explained()
    left = [pid for pid, _ in _watching(bench)]
    shutil.rmtree(bench.out, ignore_errors=True)
    return {"exit": code, "seconds": time.monotonic() - begun, "left": left, **told}


def _second(bench: Bench, process: subprocess.Popen[bytes]) -> int:
    """The process of rank 1, once both have taken three steps."""
    from xflux_doctor.heartbeat import beats

    until = time.monotonic() + STARTED
    while time.monotonic() < until and process.poll() is None:
        for folder in {folder for _, folder in _watching(bench)}:
            found = beats(Path(folder))
            if len(found) == 2 and all(beat.step >= 3 for beat in found.values()):
                return found[1].pid
        time.sleep(0.1)
    raise SystemExit(f"the ranks did not come to train:\n{(bench.work / 'shown.txt').read_text()[-3000:]}")


def _watching(bench: Bench) -> list[tuple[int, str]]:
    """Processes of this folder's runs, and where their ranks tell what they do."""
    found, ours = [], (str(bench.work).encode(), str(bench.out).encode())
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            said = (place / "cmdline").read_bytes()
            if not any(folder in said for folder in ours):
                continue
            for word in (place / "environ").read_bytes().split(b"\0"):
                if word.startswith(b"XFLUX_WATCH="):
                    found.append((int(place.name), word.partition(b"=")[2].decode()))
    return found


def resume(bench: Bench) -> dict[str, Any]:
    """By DDP, where rank 0 has all that it writes, and by FSDP2, where it gathers the others' parts."""
    rows = {
        "LoRA, DDP": _resumed(bench, DDP),
        "all weights, FSDP2": _resumed(bench, FSDP, mode="finetune", weight_update="stochastic"),
    }
    return {"rows": rows, "good": all(row["good"] for row in rows.values())}


def _resumed(bench: Bench, accelerate: dict[str, Any], **own: Any) -> dict[str, Any]:
    keep = bench.work / "kept"
    shutil.rmtree(keep, ignore_errors=True)
    common = {**small(), "checkpointing_steps": 3, "deterministic": True, **own}
    bench.write(2, accelerate, **common, max_train_steps=6)
    whole = bench.doctor("run", "--yes", "--quick")
    six = _losses(bench)
    shutil.rmtree(bench.out, ignore_errors=True)
    bench.write(2, accelerate, **common, max_train_steps=3)
    half = bench.doctor("run", "--yes", "--quick")
    shutil.copytree(bench.out, keep)
    bench.write(2, accelerate, **common, max_train_steps=6, resume_from_checkpoint="latest")
    rest = bench.doctor("run", "--yes", "--quick")
    both = _losses(bench)
    shutil.rmtree(bench.out, ignore_errors=True)
    shutil.copytree(keep, bench.out)
    alone = {"distributed_type": "NO"} if bench.options.cpu else {"distributed_type": "NO", "gpu_ids": "0"}
    bench.write(1, alone, **common, max_train_steps=6, resume_from_checkpoint="latest")
    one = bench.doctor("run", "--yes", "--quick")
    words = [text for text in one.stdout.splitlines() if "images" in text and ("rank" in text or "makes steps" in text)]
    shutil.rmtree(bench.out, ignore_errors=True)
    codes = [done.returncode for done in (whole, half, rest)]
    good = codes == [0, 0, 0] and six == both and len(six) == 6 and one.returncode != 0 and bool(words)
    row = {"codes": codes, "six": six, "three and three": both, "one rank": {"exit": one.returncode, "said": words}}
    wrong = [] if good else [(done.stdout + done.stderr)[-2000:] for done in (whole, half, rest, one)]
    return {**row, "good": good, **({"said": wrong} if wrong else {})}


def _losses(bench: Bench) -> list[float]:
    with contextlib.suppress(OSError):
        lines = (bench.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(text)["loss"] for text in lines]
    return []


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


# What was promised ---------------------------------------------------------------------------------------


def as_promised(row: Outcome, bench: Bench) -> bool:
    """It trained; and on GPUs each rank within 3 % of its forecast and 1 % of the other."""
    if row["outcome"] != "trained" or bench.options.cpu or bench.options.tiny:
        return bool(row["outcome"] == "trained")
    return max(map(abs, row["errors"]), default=1.0) <= MEMORY and (row["balance"] or 0.0) <= BALANCE


def line(row: Outcome) -> str:
    if row["outcome"] != "trained":
        return "\n  ".join([f"{row['name']}: {row['outcome']} ({row['code']})", *row["said"]])
    peaks = ", ".join(f"{peak / GIB:.2f}" for peak in row["peaks"] if peak)
    errors = ", ".join(f"{error:+.2%}" for error in row["errors"])
    balance = "" if row["balance"] is None else f", {row['balance']:.2%} apart"
    return (f"{row['name']}: {row['strategy']} on {row['world_size']}, {row['seconds_per_step']:.3f} s/step, "
            f"peaks {peaks or '–'} GiB (forecast {errors or '–'}){balance}, {row['seconds']:.0f} s in all")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder on a local disk with 25 GB free")
    parser.add_argument("--out", type=Path, help="where the runs write; a fine-tune writes 24 GB")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of the parts")
    parser.add_argument("--cap", type=float, default=80, metavar="GIB", help="memory of each card that may be taken")
    parser.add_argument("--port", type=int, default=29500, help="where the ranks meet; another one beside another run")
    parser.add_argument("--steps", type=int, default=12, help="of each LoRA run")
    parser.add_argument("--deadline", type=float, default=300, metavar="S", help="seconds for each command")
    parser.add_argument("--resume", action="store_true", help="go on with today's file")
    start.model_options(parser)
    parser.add_argument("--cpu", action="store_true", help="two CPU ranks, with --tiny")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    options.work = options.work.absolute()
    options.out = (options.out or options.work / "out").absolute()
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = options.parts.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    start.make(options.work, options)
    file = children.place(options.results, "two-gpus")[0]
    body: dict[str, Any] = {}
    if options.resume and file.exists():
        body = {key: value for key, value in json.loads(file.read_text("utf-8")).items() if key in PARTS}
    bench = Bench(options, dict(body))
    for name in wanted:
        begun = time.monotonic()
        try:
            body[name] = {"check": check, "lora": lora, "exchange": exchange, "finetune": finetune, "fp32": fp32,
                          "faults": faults, "resume": resume}[name](bench)  # fmt: skip
        except (SystemExit, subprocess.TimeoutExpired) as wrong:  # the other parts are worth having
            body[name] = {"good": False, "said": str(wrong)}
        body[name]["took"] = time.monotonic() - begun
        print(f"== {name}: {'as promised' if body[name]['good'] else 'NOT as promised'}, {body[name]['took']:.0f} s")
        print(json.dumps(body[name])[:1500], flush=True)
        children.save(options.results, "two-gpus", "two_gpus.py", body)
    print(f"written to {file.name}")
    return 0 if all(part["good"] for part in body.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
