"""The command line, and the one place where errors become words and exit codes.

0 nothing wrong · 1 blocking findings · 2 usage · 3 the doctor itself failed · 130/143 interrupted.
"""

from __future__ import annotations

import importlib
import sys

if __name__ == "__main__":  # the script `xflux-doctor`, which begins before the imports below and does not come back
    importlib.import_module("xflux_doctor.program").entry()

import functools
import gc
import io
import math
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import click

from xflux_doctor import __version__
from xflux_doctor.errors import DoctorError
from xflux_doctor.gather import gpus
from xflux_doctor.inputs import DEEP_SECONDS, Inputs
from xflux_doctor.preempt import Requeue

_MOST = 1e6
"""Seconds or GiB: more is a slip of the finger."""
F = TypeVar("F", bound=Callable[..., Any])


def shared(command: F) -> F:
    """The options that say which job, machine and stack are meant."""
    for option in reversed(
        (
            click.option("--config", metavar="TRAIN.yaml", help="The training file (X-Flux's or ours)."),
            click.option("--accelerate-config", metavar="FILE", help="accelerate's file."),
            click.option("--matrix", metavar="FILE", help="A site's own stacks and rules, laid over ours."),
            click.option("--stack", metavar="NAME", help="Hold the packages against this stack."),
            click.option("--python", metavar="EXE", help="Look into this interpreter instead of this one."),
            click.option("--quick", is_flag=True, help="No child process, no CUDA context, no socket."),
            click.option("--facts", metavar="FILE", help="Judge recorded facts instead of this machine."),
            click.option(
                "--gpu-limit", type=click.FloatRange(min=0.1), metavar="GIB", help="Memory per GPU to stay in."
            ),
            click.option("--cpu", is_flag=True, help="Train on CPU ranks."),
            click.option("--offline", is_flag=True, help="Nothing may be fetched."),
            click.option("--accept", multiple=True, metavar="CODE", help="Take this finding as a warning."),
            click.option(
                "--take",
                multiple=True,
                metavar="CODE",
                help="Make the changes that this finding offers; PLAN: the plan's.",
            ),
            click.option(
                "--timeout", type=click.FloatRange(min=1), default=60.0, metavar="S", help="Deadline of the probes."
            ),
        )
    ):
        command = option(command)
    return command


_launch = click.option(
    "--launch", metavar="COMMAND", help="Judge the job as this command line would launch it: 'accelerate launch …'."
)
_xflux = click.option(
    "--xflux", metavar="CHECKOUT", help="Judge the job as X-Flux's own scripts, launched in CHECKOUT, would run it."
)


def _deep(words: str) -> Callable[[F], F]:
    text = f"{words} {DEEP_SECONDS:.0f} s unless --timeout says."
    return click.option("--deep", is_flag=True, help=text)


def _deepened(context: click.Context, options: dict[str, Any], *, deep: bool) -> dict[str, Any]:
    """The options with the level, and with its deadline where the user gave none."""
    if deep and (options["quick"] or options["facts"]):
        other = "--quick starts no child" if options["quick"] else "--facts judges a recorded machine"
        raise click.UsageError(f"--deep looks at this machine with children of its own, and {other}: give one of them.")
    return {**options, "deep": deep, "deep_timeout": _deep_seconds(context, options)}


_SHORT = frozenset({"check", "matrix", "nodes", "plan"})
"""Commands that read, judge and end: they leave Python's search for cycles off (program.py)."""


def _command(name: str, *, cards: bool = False) -> Any:
    """A command's module, loaded when it is called: `plan` does without the checks, all others without its rows.

    `cards`: it will ask for this machine's GPUs, whose driver starts meanwhile.
    """
    if cards:
        gpus.ahead()
    module = importlib.import_module(f"xflux_doctor.commands.{name}")
    if name not in _SHORT:
        gc.enable()
    return module


@functools.cache
def _codes() -> frozenset[str]:
    return frozenset(check.code for check in importlib.import_module("xflux_doctor.checks").ALL)


def inputs_of(options: dict[str, Any]) -> Inputs:
    for name in ("gpu_limit", "timeout"):
        if options.get(name) is not None and not (math.isfinite(options[name]) and options[name] < _MOST):
            raise click.BadParameter(
                f"{options[name]} is no sensible number.", param_hint=f"--{name.replace('_', '-')}"
            )
    for name in ("accept", "take"):
        for code in options.get(name, ()):
            if code not in _codes() and (name, code) != ("take", "PLAN"):
                raise click.BadParameter(f"There is no check {code!r}; see -v for the codes.", param_hint=f"--{name}")
    names = Inputs.__struct_fields__
    return Inputs(**{name: value for name, value in options.items() if name in names})


def _deep_seconds(context: click.Context, options: dict[str, Any]) -> float:
    """--timeout, where it was given: the deep level has more time than the default one."""
    given = context.get_parameter_source("timeout") is not click.core.ParameterSource.DEFAULT
    return float(options["timeout"]) if given else DEEP_SECONDS


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="xflux-doctor")
def cli() -> None:
    """Make FLUX.1 fine-tuning start, fit and finish."""


@cli.command()
@shared
@_launch
@_xflux
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text")
@click.option("--output", metavar="FILE", help="Write the report there instead of to the terminal.")
@click.option("--strict", is_flag=True, help="Warnings count as errors.")
@click.option("-v", "--verbose", is_flag=True, help="Also what passed, what was skipped and why.")
@_deep("Also try each GPU and time the all-reduce; if that fails, try what might help.")
@click.pass_context
def check(
    context: click.Context, /, form: str, output: str | None, strict: bool, verbose: bool, deep: bool, **options: Any
) -> int:
    """Say what would stop the job on this machine."""
    options = _deepened(context, options, deep=deep)
    module = _command("check", cards=not options["facts"])
    return int(module.run(inputs_of(options), form=form, output=output, strict=strict, verbose=verbose))


@cli.command()
@shared
@_launch
@_xflux
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text")
@click.option("--write-config", is_flag=True, help="Write the repaired files, with a backup beside each.")
@click.option("--install", is_flag=True, help="Install the stack's packages with pip.")
@click.option("--undo", is_flag=True, help="Put the latest backup of the accelerate and training files back.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_deep("Repair by what `check --deep` finds too.")
@click.pass_context
def fix(
    context: click.Context, /, form: str, write_config: bool, install: bool, undo: bool, yes: bool, deep: bool,
    **options: Any,
) -> int:  # fmt: skip
    """Show the repairs; write or install them when asked."""
    given = inputs_of(_deepened(context, options, deep=deep))
    if undo + install + write_config > 1:
        raise click.UsageError("Give one of --write-config, --install and --undo.")
    if undo:
        return int(_command("undo").run(given, form=form))
    if install:
        if form == "json":
            raise click.UsageError("--install shows pip's own words; it has no --format json.")
        return int(_command("install").run(given, yes=yes))
    return int(_command("fix", cards=not options["facts"]).run(given, form=form, write=write_config, yes=yes))


@cli.command(context_settings={"ignore_unknown_options": False})
@shared
@click.option("--dry-run", is_flag=True, help="Show the launch and start nothing.")
@click.option("--yes", is_flag=True, help="Do not ask before a repaired file is used.")
@click.option(
    "--wait-for-nodes",
    type=click.FloatRange(min=0, max=3600),
    default=20.0,
    metavar="S",
    help="How long the machines of a job wait for each other before the launch, 60 s longer after a death "
    "(--retries); 0: not at all.",
)
@click.option(
    "--retries", type=click.IntRange(0, 100), default=0, metavar="N",
    help="Go on from the last checkpoint after a death, each time by another way, at most N times; of several machines "
    "all together.",
)  # fmt: skip
@click.option(
    "--requeue-code", type=click.IntRange(1, 255), metavar="N",
    help="What to end with after SIGUSR2, the notice of a preemption, once all is saved; given, after SIGTERM too. "
    "[default: 75]",
)  # fmt: skip
@click.option(
    "--hang-after", type=click.FloatRange(min=0, max=86400), metavar="S",
    help="End a run in which a rank stands still so long in a step, ten times that elsewhere; 0: never. "
    "[default: 20 median steps, 60 s at the least; 600 s elsewhere, no limit for downloads and uploads]",
)  # fmt: skip
@click.option(
    "--attach", metavar="[RUN]", is_flag=False, flag_value="",
    help="Show the run in this folder, or in the config's output_dir, again. Ctrl-C detaches, and the run goes on.",
)  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, help="Show all output of all ranks as it comes.")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(
    context: click.Context, /, dry_run: bool, yes: bool, wait_for_nodes: float, retries: int, hang_after: float | None,
    attach: str | None, verbose: bool, extra: tuple[str, ...], requeue_code: int | None, **options: Any,
) -> int:  # fmt: skip
    """Validate, repair in memory, launch the trainer. EXTRA after -- goes to the trainer."""
    if attach is not None:
        gc.enable()  # it shows a run for as long as that lives
        module: Any = importlib.import_module("xflux_doctor.attach")
        return int(module.attach(module.folder_of(attach, options["config"]), raw=verbose))
    options["deep_timeout"] = _deep_seconds(context, options)
    how = _command("lead").How(retries, hang_after, verbose)
    given = {"dry_run": dry_run, "yes": yes, "extra": extra, "wait": wait_for_nodes, "how": how}
    with Requeue(requeue_code) as requeue:
        try:
            code = int(_command("run", cards=not options["facts"]).run(inputs_of(options), **given))
        except SystemExit as end:
            if not isinstance(end.code, int):
                raise
            code = end.code
            click.echo(
                "Ended by a signal outside of the training: none is running. Give the same command again.", err=True
            )
        return requeue.exit_code(code)


@cli.command()
@shared
@_launch
@_xflux
@click.option("--gpu", metavar="NAME:GIB", help="Plan for a GPU that is not here, such as 'A100:80'.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text")
@click.option("--html", metavar="FILE", help="Write the plan as a page as well, with its picture and the whole bill.")
def plan(gpu: str | None, form: str, html: str | None, **options: Any) -> int:
    """The memory bill, the fastest plan that fits, and its alternatives."""
    here = (gpu is None or options["launch"] is not None) and not options["facts"]
    return int(_command("plan", cards=here).run(inputs_of(options), gpu=gpu, form=form, html=html))


@cli.command()
@click.option("--config", metavar="TRAIN.yaml", help="The training file (X-Flux's or ours).")
@click.option("--accelerate-config", metavar="FILE", help="accelerate's file, for one machine or all.")
@click.option("--hosts", metavar="A,B", help="The machines, the first is number 0; Slurm's n[01-04] too.")
@click.option("--launcher", type=click.Choice(["accelerate", "torchrun", "srun"]), default="accelerate")
@click.option("--port", type=click.IntRange(1, 65535), default=29500, help="Where the ranks meet, if no file says.")
@click.option("--write", is_flag=True, help="Write each machine's file: accelerate_config.node0.yaml …")
@click.argument("files", nargs=-1)
def nodes(files: tuple[str, ...], hosts: str | None, **options: Any) -> int:
    """One job on several machines: each machine's file and command. With FILES: whether these go together."""
    if files:
        return int(_command("nodes").compare(files))
    if hosts is None:
        raise click.UsageError("Give --hosts, or the files of all machines to compare.")
    return int(_command("nodes").run(hosts=hosts, **options))


@cli.command()
@click.argument("reports", nargs=-1, metavar="[FILE|FOLDER|-]...")
@shared
@click.option("--expect", metavar="HOSTS", help="Nodes that should have sent one: a,b or node[001-064]; else Slurm's.")
@click.option("--shared", metavar="DIR", help="Where the nodes of a launch put their reports; all must see it.")
@click.option("--port", type=click.IntRange(1, 65535), help="Where node 0 takes them, without --shared.")
@click.option(
    "--wait", type=click.FloatRange(min=0, max=3600), default=120.0, metavar="S", help="How long node 0 waits for them."
)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text")
@click.option("--output", metavar="FILE", help="Write the report there instead of to the terminal.")
def fleet(
    reports: tuple[str, ...],
    expect: str | None,
    shared: str | None,
    port: int | None,
    wait: float,
    form: str,
    output: str | None,
    **options: Any,
) -> int:
    """Many nodes' reports (check --format json, facts) into one: who differs from the others, and in what.

    Without reports, started by srun or torchrun on every node: each makes its own, and node 0 merges them.
    """
    if reports:
        return int(_command("fleet").run(reports, expect=expect, form=form, output=output))
    given = inputs_of(options)
    return int(_command("fleet").launch(given, shared=shared, port=port, wait=wait, form=form, output=output))


@cli.command()
@click.argument("log")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text")
@click.option("--bundle", metavar="FILE.tar.gz", help="Write what a bug report needs, without secrets and names.")
@click.option("--keep-hosts", is_flag=True, help="Leave host names and addresses in the bundle.")
def explain(log: str, form: str, bundle: str | None, keep_hosts: bool) -> int:
    """The cause of a failed run, from its LOG, its run FOLDER, or - for standard input."""
    return int(_command("explain").run(log, form=form, bundle=bundle, hosts=keep_hosts))


@cli.command()
@click.argument("folder", metavar="RUN")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text")
@click.option("--html", metavar="FILE", help="Write it as a page as well, with the loss curve and the samples.")
def report(folder: str, form: str, html: str | None) -> int:
    """One page of a run folder: what ran, what was changed, forecast and measured, how it ended, what is next."""
    return int(_command("report").run(folder, form=form, html=html))


@cli.command()
@click.option("--python", metavar="EXE", help="Look into this interpreter instead of this one.")
def facts(python: str | None) -> int:
    """The machine as JSON: attach it to a bug report, or judge it elsewhere with --facts."""
    return int(_command("check").show_facts(python))


@cli.group()
def matrix() -> None:
    """Stacks and rules."""


def _site(command: F) -> F:
    return click.option("--matrix", "site", metavar="FILE", help="A site's own file, laid over ours.")(command)


@matrix.command("list")
@click.option("--cpu", is_flag=True, help="Choose for CPU ranks.")
@click.option("--rules", is_flag=True, help="The rules instead of the stacks.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text")
@_site
def matrix_list(cpu: bool, rules: bool, form: str, site: str | None) -> int:
    """The stacks, the one that fits this machine, and why the others do not."""
    if rules:
        return int(_command("matrix").list_rules(form=form, site=site))
    return int(_command("matrix").list_stacks(cpu=cpu, form=form, site=site))


@matrix.command("show")
@click.argument("name")
@_site
def matrix_show(name: str, site: str | None) -> int:
    """One stack or rule, whole."""
    return int(_command("matrix").show(name, site))


@matrix.command("check")
@click.argument("file", required=False)
def matrix_check(file: str | None) -> int:
    """Validate a matrix file, whole or a site's own: every fault with its line. Without FILE ours."""
    return int(_command("matrix").validate(file))


@matrix.command("export")
@click.argument("name")
@_site
def matrix_export(name: str, site: str | None) -> int:
    """A pip requirements file that installs the stack, naming its index."""
    return int(_command("matrix").export(name, site))


class _Terminated(BaseException):
    """SIGTERM, raised where it strikes so that `finally` blocks run."""


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without ✗, a file name that is no text: shown escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        return int(cli.main(args=arguments, prog_name="xflux-doctor", standalone_mode=False) or 0)
    except DoctorError as error:
        click.echo(f"error: {error.seen}", err=True)
        if error.hint:
            click.echo(f"→ {error.hint}", err=True)
        return error.code
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return 130
    except _Terminated:
        return 143
    except BrokenPipeError:
        sys.stderr.close()  # the reader left; Python would complain about the same pipe at exit
        return 141
    except OSError as error:
        # The file system's own refusal, wherever it came up: a folder that may not be entered, a full disk, no TMPDIR.
        place = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {place}{error.strerror or error}.", err=True)
        click.echo("→ Correct the path, its permissions or the room on its disk, and try again.", err=True)
        return 1
    except Exception as error:  # noqa: BLE001 - the one error edge
        click.echo(_bug_report(error), err=True)
        return 3
    finally:
        gpus.forget()


def _bug_report(error: Exception) -> str:
    """A block ready to be pasted into an issue. Paths under the home folder are shortened."""
    traceback, platform = importlib.import_module("traceback"), importlib.import_module("platform")
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    trace = trace.replace(os.path.expanduser("~"), "~")  # noqa: PTH111 - Path.home() raises for a user without one
    return (
        "xflux-doctor itself failed; this is a defect of ours, not of your job. Please report:\n"
        f"```\nxflux-doctor {__version__}, Python {platform.python_version()}, {platform.platform()}\n{trace}```"
    )
