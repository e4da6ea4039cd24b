"""LA: accelerate's file, the environment and the devices, compared before anything starts."""

from __future__ import annotations

from collections.abc import Iterator

from xflux_trainer.config import RANGES

from xflux_doctor import batch
from xflux_doctor.check import Case, SkipCheck, check
from xflux_doctor.checks.words import devices, installed
from xflux_doctor.cluster import task
from xflux_doctor.facts import Gpu
from xflux_doctor.finding import Change, Edit, Finding, Remove, error, warning
from xflux_doctor.placement import STANDALONE, WRAPS, place, script_words, trainer_words
from xflux_doctor.visible import cards, choice, parse


@check("LA101", "accelerate's file can be read")
def accelerate_readable(case: Case) -> Iterator[Finding]:
    """The file exists, is text, is YAML, and holds keys and values."""
    yield from (_problem(case, p.seen, p.hint) for p in case.job.problems if p.file == "accelerate")
    if case.job.accelerate_path is None:
        raise SkipCheck("no accelerate file was given or found (--accelerate-config)")


@check("LA102", "the training file can be read", needs=("trainer",))
def train_readable(case: Case) -> Iterator[Finding]:
    """Every key is known and every value is of its type and in its range."""
    yield from (_problem(case, p.seen, p.hint) for p in case.job.problems if p.file == "train")
    if case.job.train_path is None:
        raise SkipCheck("no training file was given or found (--config)")


def _problem(case: Case, seen: str, hint: str) -> Finding:
    return error(f"{seen.rstrip('.')}.", "The job cannot start from this file.", hint)


@check("LA105", "every rank finds a device")
def ranks_have_devices(case: Case) -> Iterator[Finding]:
    """num_processes against the devices that torch would see under this environment and gpu_ids."""
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU (see LA107)")
    found = devices(case)
    if found is None:
        raise SkipCheck(case.facts.unknown.get("gpus", "the GPUs are unknown"))
    if any(gpu.mig for gpu in found) or (choice(case.facts.environment, case.job.gpu_ids) or "").startswith("MIG-"):
        raise SkipCheck("the devices are MIG slices: see HW118")
    started = task(case.facts.environment) if found and case.job.command is None else None
    if started is not None and started.a_rank:
        raise SkipCheck("this process is one of the ranks (see LA410)")
    ranks = case.job.local_processes
    if not found:
        yield _no_device(case)
    elif ranks > len(found):
        yield _too_many_ranks(case, ranks, found)


def _no_device(case: Case) -> Finding:
    """No repair: a GPU job is never turned into a CPU job unless the user asks for it."""
    if not case.facts.gpus:
        return error(
            "The job is for GPUs and the driver lists none.",
            "accelerate's ranks would compute on the CPU without a word; those of 0.30.1 each for itself.",
            "Run on a GPU machine, or give --cpu to train on the CPU.",
        )
    if case.job.gpu_ids not in (None, "all"):
        where = f"gpu_ids: {case.job.gpu_ids!r}"
    else:
        where = f"CUDA_VISIBLE_DEVICES={case.facts.environment.get('CUDA_VISIBLE_DEVICES', '')!r}"
    return error(
        f"{where} leaves none of the {len(case.facts.gpus)} GPUs visible.",
        "torch finds no CUDA device: accelerate's ranks would compute on the CPU without a word.",
        "Unset it, or name GPUs that exist.",
    )


def _too_many_ranks(case: Case, ranks: int, found: tuple[Gpu, ...]) -> Finding:
    job = case.job
    version, first = installed(case, "accelerate"), len(found)
    name = f"accelerate {version}" if version else "accelerate before 0.33"
    zero = job.machine_rank * ranks
    if version is not None and version >= WRAPS:
        because = f"{name} puts rank {zero + first} on the GPU of rank {zero} again and NCCL stops with"
    else:
        because = f"Under {name} rank {zero + first} dies with"
    because += f" '{script_words(first, version, zero)}'."
    if job.bundled:
        because += f" The bundled trainer stops before that: '{trainer_words(first, ranks)}'"
    total = len(found) * max(1, job.num_machines)
    kept = batch.keep(job, total)
    edits: list[Change] = [Edit("accelerate", ("num_processes",), total, "one rank per visible device")]
    if total == 1 and job.distributed_type == "MULTI_GPU":
        edits.append(Edit("accelerate", ("distributed_type",), "NO", "one process needs no process group"))
    names = ", ".join(f"{gpu.index}: {gpu.name}" for gpu in found)
    return error(
        f"num_processes is {job.num_processes} ({ranks} on this machine) and {len(found)} "
        f"{'device is' if len(found) == 1 else 'devices are'} visible{_where(case)} ({names}).",
        because,
        f"Set num_processes to {total}. {kept.words}".strip(),
        edits=(*edits, *kept.edits),
        offers=kept.offers,
        docs="https://github.com/XLabs-AI/x-flux/issues/44",
    )


def _where(case: Case) -> str:
    if case.job.gpu_ids not in (None, "all"):
        return f" under gpu_ids {case.job.gpu_ids}"
    value = case.facts.environment.get("CUDA_VISIBLE_DEVICES")
    return f" under CUDA_VISIBLE_DEVICES={value}" if value is not None else ""


@check("LA106", "the chosen devices exist", needs=("gpus",))
def chosen_devices_exist(case: Case) -> Iterator[Finding]:
    """CUDA_VISIBLE_DEVICES and gpu_ids are cut silently at the first entry that names no GPU."""
    assert case.facts.gpus is not None
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")
    count = len(case.facts.gpus)
    choices = [("CUDA_VISIBLE_DEVICES", case.facts.environment.get("CUDA_VISIBLE_DEVICES"))]
    if case.job.gpu_ids not in (None, "all"):
        choices.append(("gpu_ids", case.job.gpu_ids))
    for name, value in choices:
        if not value or count == 0 or value.startswith("MIG-"):
            continue  # HW118 judges the names of slices
        asked = [part for part in value.split(",") if part.strip()]
        honored = cards(case.facts.gpus, value)
        if len(honored) < len(asked) and honored:
            repeated = len(parse(value)) == 0
            first = asked[len(honored)].strip()
            why = (
                "a repeated entry empties the list"
                if repeated
                else f"{first!r} is none; GPUs are numbered 0 to {count - 1}"
            )
            yield warning(
                f"{name} is {value!r}: {len(asked)} entries, of which {len(honored)} name a GPU ({why}).",
                "torch drops the rest without a word.",
                f"Name GPUs of 0 to {count - 1}, each once.",
            )


@check("LA107", "CPU ranks fit the machine", needs=("accelerate", "host"))
def cpu_ranks(case: Case) -> Iterator[Finding]:
    """With --cpu, or `use_cpu: true`, ranks share the cores; gloo takes NCCL's place."""
    assert case.facts.host
    if not case.job.use_cpu:
        raise SkipCheck("the job runs on GPUs")
    edits: list[Change] = []
    if case.job.get("use_cpu") is not True:
        edits.append(Edit("accelerate", ("use_cpu",), True, "--cpu was given"))
    by_mpi = bool(case.job.section("mpirun_config").get("mpirun_hostfile")) and not case.job.bundled
    if case.job.distributed_type == "MULTI_CPU" and case.job.num_processes > 1 and not by_mpi:
        reason = "accelerate starts one process for MULTI_CPU without MPI"
        edits.append(Edit("accelerate", ("distributed_type",), "MULTI_GPU", reason))
    if case.job.gpu_ids is not None:
        edits.append(Remove("accelerate", ("gpu_ids",), "there are no GPUs in a CPU job"))
    machines = max(1, case.job.num_machines)
    cores, ranks = case.facts.host.cpus, case.job.num_processes
    offers: tuple[Change, ...] = ()
    words = ""
    if ranks > cores * machines:
        most = cores * machines
        edits.append(Edit("accelerate", ("num_processes",), most, f"{most} cores for {ranks} ranks"))
        kept = batch.keep(case.job, most)
        edits, offers, words = [*edits, *kept.edits], kept.offers, kept.words
    if edits:
        yield error(
            f"The accelerate file asks for {ranks} ranks"
            f"{'' if case.job.get('use_cpu') is True else ' on GPUs and --cpu for the CPU'}; there are {cores} cores"
            f"{' here' if machines > 1 else ''}.",
            "Launched as it is, the job would look for GPUs, or crowd the cores.",
            f"Write the CPU launch. {words}".strip(),
            edits=tuple(edits),
            offers=offers,
        )


@check("LA108", "no GPU stands idle", needs=("accelerate", "gpus"))
def idle_gpus(case: Case) -> Iterator[Finding]:
    """Fewer ranks than visible devices leave cards unused; memory per card does not fall with more ranks."""
    if case.job.use_cpu:
        raise SkipCheck("the job runs on the CPU")
    found = devices(case) or ()
    ranks = case.job.local_processes
    if 0 < ranks < len(found):
        yield warning(
            f"{len(found)} GPUs are visible and the job starts {ranks} rank{'s' if ranks > 1 else ''}.",
            f"{len(found) - ranks} of them will stand idle.",
            "Raise num_processes, or hide the others by CUDA_VISIBLE_DEVICES. For a LoRA more ranks mean more "
            "samples a second, not less memory per GPU.",
        )


@check("LA109", "gradient accumulation is the same in both files", needs=("accelerate", "train"))
def accumulation_agrees(case: Case) -> Iterator[Finding]:
    """Under `accelerate launch` with DeepSpeed the value of accelerate's file reaches the ranks and wins."""
    assert case.job.train is not None
    if not case.job.deepspeed:
        raise SkipCheck("only DeepSpeed's section of the accelerate file reaches the ranks")
    value = case.job.section(batch.SECTION[0]).get(batch.SECTION[1])
    mine = case.job.train.gradient_accumulation_steps
    low, high = RANGES["gradient_accumulation_steps"]
    if not isinstance(value, int) or isinstance(value, bool) or value == mine:
        return
    if not low <= value <= high:
        yield error(
            f"gradient_accumulation_steps is {value} in accelerate's file.",
            "Accelerate hands it to DeepSpeed, which cannot step with it.",
            f"Write the training file's {mine} there.",
            edits=(Edit("accelerate", batch.SECTION, mine, "the training file's value"),),
        )
    else:
        yield warning(
            f"gradient_accumulation_steps is {value} in accelerate's file and {mine} in the training file.",
            f"Under accelerate launch {value} is what happens, whatever the training file says.",
            "Write one number into both.",
            edits=(Edit("train", ("gradient_accumulation_steps",), value, "accelerate's value wins"),),
        )


@check("LA110", "one Python launches and trains", needs=("trainer", "packages"))
def trainer_installed(case: Case) -> Iterator[Finding]:
    """`accelerate launch` runs in the chosen interpreter, which must have the trainer beside the stack."""
    assert case.facts.packages is not None
    if "xflux-doctor" not in case.facts.packages:
        python = case.facts.python.executable if case.facts.python else "python"
        yield error(
            f"The bundled trainer is not installed in {python}.",
            "`-m xflux_trainer` would not be found.",
            "Install xflux-doctor there too.",
            commands=(f"{python} -m pip install xflux-doctor",),
        )


@check("LA115", "accelerate starts with these gpu_ids", needs=("accelerate",))
def gpu_ids_enough(case: Case) -> Iterator[Finding]:
    """One id and MULTI_GPU is refused before anything starts (accelerate 0.30.1 and 1.15.0, commands/launch.py)."""
    refusal = place(case.job, case.facts).refusal
    if not refusal or case.job.use_cpu:  # LA107 removes the ids of a CPU job
        return
    edits: tuple[Change, ...] = ()
    hint = "Name as many ids as num_processes, or remove gpu_ids."
    if case.job.num_processes == 1:
        hint = "Set distributed_type to NO: one process needs no process group."
        edits = (Edit("accelerate", ("distributed_type",), "NO", "one id is one process"),)
    yield error(
        f"distributed_type is {case.job.distributed_type} and gpu_ids is {case.job.gpu_ids!r}.",
        f"accelerate starts nothing: '{refusal}'",
        hint,
        edits=edits,
    )


@check("LA112", "the port where the ranks meet is free", needs=("listeners",))
def port_free(case: Case) -> Iterator[Finding]:
    """accelerate before 1.8 stops when its port is taken; often by a left-over rank of the run before.

    Source: huggingface/accelerate@33967d47:src/accelerate/utils/launch.py (#3576).
    """
    assert case.facts.listeners is not None
    if case.job.num_processes <= 1:
        raise SkipCheck("one process needs no meeting place")
    port = case.job.main_process_port
    holder = next((item for item in case.facts.listeners if item.port == port), None)
    version = installed(case, "accelerate")
    torchrun = case.job.command is not None and case.job.command.launcher == "torchrun"
    finds_another = not torchrun and version is not None and version >= STANDALONE and case.job.num_machines <= 1
    if holder is None or port == 0 or finds_another:
        return
    taken = {item.port for item in case.facts.listeners}
    free = next((number for number in range(port + 1, port + 16) if number not in taken), None)
    who, commands = "another user's process or one outside this container", tuple[str, ...]()
    if holder.pid is not None:
        age = f", {holder.seconds / 3600:.1f} h old" if holder.seconds is not None else ""
        who, commands = f"process {holder.pid} ({holder.name}{age})", (f"ps -fp {holder.pid}", f"kill {holder.pid}")
    yield error(
        f"Port {port} is in use by {who}.",
        "torchrun stops with EADDRINUSE."
        if torchrun
        else f"'ConnectionError: Tried to launch distributed communication on port `{port}`, but another process is "
        "utilizing it'.",
        "If it is left over from a run of yours, end it (the doctor never does); or take another port.",
        # On several machines all files name the port: one machine's edit would part it from the others.
        edits=(Edit("accelerate", ("main_process_port",), free, f"port {port} is taken"),)
        if free and case.job.num_machines <= 1
        else (),
        commands=commands,
    )
