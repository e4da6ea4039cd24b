"""The progress line, the files of lines, the trackers that must not end a run, the plot, and what metrics.json says."""

from __future__ import annotations

import io
import json
import math
import sys
import time
import types
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from xflux_trainer import meter, plots, report, track, trackers  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.errors import DataError, WriteError  # noqa: E402
from xflux_trainer.meter import WARM_UP, Meter  # noqa: E402
from xflux_trainer.ranks import Launch, Ranks  # noqa: E402
from xflux_trainer.speed import Rates  # noqa: E402
from xflux_trainer.track import Lines, Smooth, Terminal, read_lines  # noqa: E402
from xflux_trainer.trackers import Tracker  # noqa: E402

VALUES = {"loss": 0.5, "learning_rate": 1e-4, "grad_norm": 0.25, "seconds": 0.5}
RATES = Rates(seconds=0.5, samples=8.0, tflops=490.0, waiting=0.03)


class Screen(io.StringIO):
    def __init__(self, tty: bool) -> None:
        super().__init__()
        self.isatty = lambda: tty  # type: ignore[method-assign]


def test_the_line_says_all_that_is_asked_for() -> None:
    screen = Screen(tty=False)
    Terminal(3600 * 50, screen).step(1, VALUES, 0.4, RATES, peak_share=0.4953, memory=(26 << 30, 80 << 30))
    assert screen.getvalue().startswith(
        "step 1/180000  loss 0.4000  now 0.5000  lr 1.00e-04  grad 0.250  0.50 s/it  8 samples/s  "
        "490 TFLOP/s (50% of peak)  26.0 of 80.0 GiB  data 3%  eta 1d 00:59:59"
    )
    screen = Screen(tty=False)
    Terminal(1, screen).step(1, VALUES, 0.4, RATES)
    assert "490 TFLOP/s  data" in screen.getvalue()  # an unknown card has no peak, a CPU no memory of its own
    assert "eta 00:00:00" in screen.getvalue()


@pytest.mark.parametrize("width", [20, 60, 80, 120, 200])
def test_on_a_terminal_the_line_never_wraps(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track.shutil, "get_terminal_size", lambda: types.SimpleNamespace(columns=width))
    screen = Screen(tty=True)
    Terminal(9, screen).step(2, VALUES, 0.4, RATES, peak_share=0.5, memory=(1 << 30, 2 << 30))
    text = screen.getvalue()
    assert text.startswith("\r\x1b[Kstep 2/9") and "\n" not in text
    assert len(text) - len("\r\x1b[K") < width
    assert width < 60 or "loss 0.4000" in text
    assert width < 80 or "TFLOP/s" in text


def test_elsewhere_one_line_a_second_and_the_first_and_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(track.time, "monotonic", lambda: clock[0])
    screen = Screen(tty=False)
    terminal = Terminal(50, screen)
    for step in range(1, 51):
        clock[0] += 0.1
        terminal.step(step, VALUES | {"seconds": 0.1}, 0.4, RATES)
    shown = [int(line.split()[1].split("/")[0]) for line in screen.getvalue().splitlines()]
    assert shown[0] == 1 and shown[-1] == 50 and len(shown) <= 7


def test_the_time_left_counts_what_lies_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(track.time, "monotonic", lambda: clock[0])
    screen = Screen(tty=False)
    terminal = Terminal(12, screen)
    for step in (1, 2):
        clock[0] += 10.5  # half a second of step and ten of sampling
        terminal.step(step, VALUES, 0.4, RATES)
    # The first step's start is known, and that is all: ten seconds in two steps.
    assert screen.getvalue().splitlines()[-1].endswith("eta 00:00:55")


def test_the_smooth_loss_has_no_bias_and_takes_no_nan() -> None:
    smooth = Smooth()
    assert smooth.add(math.nan) != smooth.add(math.nan)  # nothing yet
    assert smooth.add(2.0) == pytest.approx(2.0)
    assert smooth.add(math.inf) == pytest.approx(2.0)
    for _ in range(2000):
        last = smooth.add(1.0)
    assert last == pytest.approx(1.0, abs=1e-6)


def test_lines_of_steps_that_are_taken_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path, 0)
    for step in (1, 2, 3):
        lines.write({"step": step, "loss": float(step), "more": {"nan": math.nan}})
    lines.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    resumed = Lines(path, 2)
    assert resumed.losses == [1.0, 2.0]
    resumed.write({"step": 3, "loss": 9.0})
    resumed.close()
    assert [line["loss"] for line in read_lines(path)] == [1.0, 2.0, 9.0]
    assert read_lines(path)[0]["more"] == {"nan": None}
    assert Lines(path, 0).losses == []


def test_the_meter_drops_the_warm_up_from_its_rates() -> None:
    gauge = Meter(torch.device("cpu"))
    assert gauge.peak_share() is None
    for _ in range(WARM_UP):
        gauge.book(10.0, 4, 1e12, 5.0)
    assert gauge.rates().samples == pytest.approx(0.4)
    line = gauge.book(0.5, 4, 1e14, 0.05)
    gauge.book(0.5, 4, 1e14, 0.05)
    assert line == {"seconds": 0.5, "samples_per_second": 8, "tflops": 200, "data_wait": 0.1}
    gauge.peak_tflops = 800.0
    rates = gauge.rates()
    assert (rates.seconds, rates.samples, rates.tflops, rates.waiting) == pytest.approx((0.5, 8, 200, 0.1))
    assert gauge.peak_share() == pytest.approx(0.25)
    assert gauge.memory() is None


class FakeRun:
    id = "abc"

    def __init__(self, fails: str = "") -> None:
        self.logged: list[dict[str, Any]] = []
        self._fails = fails
        self.finished = False

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        if self._fails == "log":
            raise RuntimeError("the server went away")
        self.logged.append(values)

    def finish(self) -> None:
        if self._fails == "finish":
            time.sleep(60)
        self.finished = True


class FakeWandb(types.ModuleType):
    """wandb as far as the tracker uses it: `fails` is the mode, or the call, that goes wrong."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.starts: list[dict[str, Any]] = []
        self.fails = fails
        self.Settings = lambda **options: options
        self.Image = lambda path: ("image", path)

    def init(self, **options: Any) -> FakeRun:
        self.starts.append(options)
        if options["mode"] == self.fails or self.fails == "all":
            raise ConnectionError("no route to host\nand much more")
        self.run = FakeRun(self.fails)
        return self.run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a key, and everything installed."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(trackers, "installed", lambda _: True)
    return tmp_path


def start(home: Path, fails: str, monkeypatch: pytest.MonkeyPatch, step: int = 0) -> tuple[Tracker, FakeWandb]:
    wandb = FakeWandb(fails)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return Tracker(TrainConfig("x", output_dir=str(home / "out"), report_to="wandb"), step), wandb


def test_wandb_without_a_key_does_not_ask_for_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, wandb = start(home, "", monkeypatch)
    assert [options["mode"] for options in wandb.starts] == ["offline"]
    assert "wandb has no key here" in tracker.notes[0] and "wandb sync" in tracker.notes[0]
    tracker.log({"loss": 1.0}, 7)
    tracker.images({"p": home / "a.png"}, 7)
    tracker.close()
    assert wandb.run.logged == [{"loss": 1.0, "step": 7}, {"p": ("image", str(home / "a.png")), "step": 7}]
    assert wandb.run.finished and len(tracker.notes) == 1


@pytest.mark.parametrize("place", ["WANDB_API_KEY", "netrc"])
def test_wandb_with_a_key_and_without_a_network_is_kept_offline(
    home: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "netrc":
        (home / ".netrc").write_text("machine api.wandb.ai login user password x\n")
        (home / ".netrc").chmod(0o600)
    else:
        monkeypatch.setenv(place, "x")
    tracker, wandb = start(home, "online", monkeypatch)
    assert [options["mode"] for options in wandb.starts] == ["online", "offline"]
    assert wandb.starts[0]["settings"]["init_timeout"] <= 30
    assert wandb.starts[0]["id"] != wandb.starts[1]["id"]
    assert "no route to host)" in tracker.notes[0]
    tracker.log({"loss": 1.0}, 1)
    assert wandb.run.logged


def test_a_resumed_run_goes_on_with_its_own_curves(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x")
    _, first = start(home, "", monkeypatch)
    assert first.starts[0]["resume"] is None
    _, second = start(home, "", monkeypatch, step=3)
    assert (second.starts[0]["id"], second.starts[0]["resume"]) == ("abc", "allow")
    _, third = start(home, "", monkeypatch)
    assert third.starts[0]["id"] != "abc"


def test_a_tracker_that_fails_later_is_left_alone_with_one_note(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, _ = start(home, "log", monkeypatch)
    before = len(tracker.notes)
    for step in range(3):
        tracker.log({"loss": 1.0}, step)
    tracker.images({}, 3)
    tracker.close()
    assert len(tracker.notes) == before + 1
    assert "the server went away" in tracker.notes[-1]


def test_wandb_that_does_not_end_is_not_waited_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "END_SECONDS", 0.05)
    tracker, _ = start(home, "finish", monkeypatch)
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 20
    assert "wandb sync" in tracker.notes[-1]


def test_where_wandb_cannot_start_at_all_tensorboard_draws(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    tracker, _ = start(home, "all", monkeypatch)
    assert "did not start" in tracker.notes[-1]
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert list((home / "out" / "logs").glob("events*"))


def test_tensorboard_takes_images_and_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(TrainConfig("x", output_dir=str(tmp_path)))
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png")
    tracker.log({"loss": 0.5}, 3)
    tracker.images({"samples/0": tmp_path / "a.png"}, 3)
    tracker.close()
    read = EventAccumulator(str(tmp_path / "logs"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(3, 0.5)]
    assert [(event.step, event.width, event.height) for event in read.Images("samples/0")] == [(3, 8, 4)]

    told: list[str] = []
    tracker = Tracker(TrainConfig("x", output_dir=str(tmp_path)), tell=told.append)
    backend: Any = tracker._backend
    monkeypatch.setattr(backend._writer, "add_scalar", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    tracker.log({"loss": 0.5}, 4)
    tracker.log({"loss": 0.5}, 5)
    assert len(told) == 1 and "No space left" in told[0]


def picture(folder: Path) -> list[ET.Element]:
    return list(ET.fromstring((folder / plots.NAME).read_text()).iter())


def test_the_plot_shows_the_losses_where_they_belong(tmp_path: Path) -> None:
    assert plots.write(tmp_path) is None
    lines = Lines(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 101):
        lines.write({"step": step, "loss": math.nan if step == 50 else 2.0 - step / 100})
    plots.write(tmp_path, "a <b> & c")
    shown = picture(tmp_path)
    curves = [element for element in shown if element.tag.endswith("polyline")]
    assert len(curves) == 2 and not [element for element in shown if element.tag.endswith("circle")]
    points = [tuple(map(float, point.split(","))) for point in curves[0].attrib["points"].split()]
    assert len(points) == 99
    assert points[-1][0] == plots.WIDTH - plots.RIGHT
    assert all(b[0] > a[0] and b[1] >= a[1] for a, b in pairwise(points))  # downwards: the loss falls
    assert any("a <b> & c" in (element.text or "") for element in shown)

    held = Lines(tmp_path / "heldout.jsonl", 0)
    for step in (0, 50, 100):
        held.write({"step": step, "mean": 1.5, "by_time": {"0.1": 2.0, "0.9": 1.0}})
    plots.write(tmp_path)
    shown = picture(tmp_path)
    assert len([element for element in shown if element.tag.endswith("polyline")]) == 5
    assert len([element for element in shown if element.tag.endswith("circle")]) == 9


def test_the_plot_of_a_long_run_stays_small(tmp_path: Path) -> None:
    text = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(1, 100_001))
    (tmp_path / "metrics.jsonl").write_text(text)
    place = plots.write(tmp_path)
    assert place and place.stat().st_size < 100_000


def test_metrics_of_an_earlier_run_do_not_stay_finished(tmp_path: Path) -> None:
    ranks, path = Ranks(Launch(use_cpu=True)), tmp_path / report.METRICS
    path.write_text('{"status": "finished", "steps": 9}')
    report.take_over(tmp_path, ranks)
    told = json.loads(path.read_text())
    assert (told["status"], told["steps"], told["earlier"]["steps"]) == ("starting", 0, 9)
    report.failed_early(tmp_path, ranks, DataError("No images.", "Put some there."))
    told = json.loads(path.read_text())
    assert (told["status"], told["error"]) == ("failed", "No images. Put some there.")
    report.take_over(tmp_path, ranks)  # a third start keeps what the first had done
    told = json.loads(path.read_text())
    assert (told["status"], told["earlier"]) == ("starting", {"status": "finished", "steps": 9})
    path.write_text('{"status": "running"}')
    report.failed_early(tmp_path, ranks, RuntimeError())  # the run's own writing knows more
    assert json.loads(path.read_text()) == {"status": "running"}
    path.write_text("{ broken")
    report.take_over(tmp_path, ranks)
    assert json.loads(path.read_text())["earlier"] is None


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteError):
        report.take_over(tmp_path / "file", Ranks(Launch(use_cpu=True)))
    assert meter.device_name(torch.device("cpu")) == "cpu"
