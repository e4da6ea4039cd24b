"""What the deep level's trials of the GPUs mean: checks over recorded values, and the edits that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import xflux_kit
from cli_kit import doctor
from conftest import GIB, TRAIN, case, findings, job, machine, record, values, verdict

from xflux_doctor import deep, planner
from xflux_doctor.check import Case
from xflux_doctor.checks import computed, tried
from xflux_doctor.facts import AttentionTrial, BlockTrial, GpuProbe, GpuProcess, Product, Reading, TorchFacts
from xflux_doctor.finding import Edit
from xflux_doctor.matrix import Matrix
from xflux_doctor.probes.level import _speeds

SQUARE = "8192x8192x8192"
HEALTHY = GpuProbe(
    device=0, name="NVIDIA H100 80GB HBM3", uuid="00000000-0000-0000-0000-000000000000", pci="0000:00:00.0",
    done={"context": 4.0, "memory": 0.5}, wanted=25 * GIB, free=78 * GIB, total=79 * GIB, whole=True, pieces=True,
    taken=25 * GIB, products=(Product("bfloat16", 0.5, True, {SQUARE: 780.0}), Product("float8_e4m3fn", 0.1)),
    copy_gbs=2700.0, h2d_gbs=55.0, d2h_gbs=54.0, shapes="batch 1, 4608 tokens, 24 heads of 128",
    attention=tuple(AttentionTrial(name, True, {"out": 0.004}, forward, 2.5 * forward) for name, forward in (
        ("trainer flash", 2e-3), ("trainer flash-attn-4", 1e-3), ("trainer sdpa", 3e-3), ("trainer cudnn", 1.1e-3),
        ("torch flash", 2e-3), ("torch choice", 1.2e-3), ("torch cudnn", 1.2e-3))),
    blocks=(BlockTrial("trainer", True, 0.004, 0.01), BlockTrial("choice", True, 0.005, 0.01)),
)  # fmt: skip
ALL = (tried.context, tried.memory, tried.products, tried.rate, tried.link, computed.attention, computed.blocks)


def subject(matrix: Matrix, *probes: GpuProbe, work: dict[str, Any] | None = None, **changes: Any) -> Case:
    facts = machine(matrix, count=max(1, len(probes)), gpu_probes=probes or (HEALTHY,), **changes)
    return case(matrix, facts, job(None, img_size=1024, **(work or {})))


def but(**changes: Any) -> GpuProbe:
    return msgspec.structs.replace(HEALTHY, **changes)


def trials(**changed: str) -> tuple[AttentionTrial, ...]:
    """HEALTHY's, with those of these names wrong: `trainer_flash="why"`."""
    wrong = {name.replace("_", " ", 1).replace("_", "-"): why for name, why in changed.items()}
    return tuple(AttentionTrial(one.name, False, detail=wrong[one.name]) if one.name in wrong else one
                 for one in HEALTHY.attention)  # fmt: skip


def test_a_healthy_card_passes(matrix: Matrix) -> None:
    for check in ALL:
        assert verdict(subject(matrix), check).status == "ok", verdict(subject(matrix), check)


def test_nothing_tried_is_no_pass(matrix: Matrix) -> None:
    quick = case(matrix, machine(matrix), job(None))
    for check in ALL:
        found = verdict(quick, check)
        assert found.status == "skipped" and "check --deep" in found.reason


class TestContext:
    def test_none_can_be_made(self, matrix: Matrix) -> None:
        failed = but(name="", uuid="", failed={"context": "died by SIGSEGV"}, done={}, attention=(), products=())
        (found,) = findings(subject(matrix, failed), tried.context)
        assert found.severity == "error" and "GPU" not in found.seen.partition(":")[2][:4] and "SIGSEGV" in found.seen

    @pytest.mark.parametrize(("seconds", "own", "persistence", "words"), [
        (40.0, 37.0, False, None),
        (52.4, 47.2, False, ("52 s; 40 s is the bound. CUDA's own start was 47 s", "Persistence mode is off: each")),
        (52.4, 47.2, True, ("CUDA's own start was 47 s of it", "the host is busy. The card works")),
        (52.4, None, None, ("came after 52 s; 40 s is the bound.", "The driver was still starting")),
        (66.0, 3.0, False, ("All but 3 s of it was the import of torch", "disk that torch lies on is slow")),
    ])  # fmt: skip
    def test_a_late_one_is_a_warning(
        self, matrix: Matrix, seconds: float, own: float | None, persistence: bool | None,
        words: tuple[str, str] | None,
    ) -> None:  # fmt: skip
        probe = but(done={"context": seconds}, context_seconds=own)
        facts = machine(matrix, gpu_probes=(probe,))
        assert facts.gpus
        health = msgspec.structs.replace(facts.gpus[0].health, persistence=persistence)
        gpus = (msgspec.structs.replace(facts.gpus[0], health=health),)
        found = findings(case(matrix, msgspec.structs.replace(facts, gpus=gpus), job(None)), tried.context)
        if words is None:
            assert found == ()
            return
        assert [one.severity for one in found] == ["warning"]
        assert words[0] in found[0].seen and words[1] in found[0].because
        assert ("sudo nvidia-smi -pm 1" in found[0].commands) == (own != 3.0) and "try again" in found[0].hint.lower()

    def test_a_second_start_that_fails_is_an_error(self, matrix: Matrix) -> None:
        failed = but(done={"context": 52.0}, failed={"context": "did not end within 40 s and was killed"})
        (found,) = findings(subject(matrix, failed), tried.context)
        assert found.severity == "error" and "was started once, and then no more: did not end" in found.seen

    def test_not_tried_is_no_pass(self, matrix: Matrix) -> None:
        left = but(done={}, skipped={"context": "no time was left: it had taken 12 s"})
        other = but(device=1, uuid="00000001-0000-0000-0000-000000000000")
        assert verdict(subject(matrix, left, other), tried.context).status == "skipped"
        dead = but(device=1, failed={"context": "died by SIGSEGV"})
        assert [one.severity for one in findings(subject(matrix, left, dead), tried.context)] == ["error"]

    def test_the_job_goes_on_on_the_other(self, matrix: Matrix) -> None:
        failed = but(failed={"context": "RuntimeError: CUDA error: unknown error"})
        other = but(device=1, uuid="00000001-0000-0000-0000-000000000000")
        (found,) = findings(subject(matrix, failed, other), tried.context)
        assert "CUDA_VISIBLE_DEVICES=1" in " ".join(found.commands)

    def test_another_card_than_meant(self, matrix: Matrix) -> None:
        crossed = but(uuid="00000001-0000-0000-0000-000000000000")
        (found,) = findings(subject(matrix, crossed, but(device=1)), tried.context)
        assert found.severity == "warning" and "PCI_BUS_ID" in found.hint and "GPU 1" in found.seen


class TestMemory:
    def test_who_holds_it_is_named(self, matrix: Matrix) -> None:
        short = but(pieces=False, whole=False, taken=18 * GIB, free=19 * GIB)
        facts = machine(matrix, gpu_probes=(short,))
        assert facts.gpus
        holds = GpuProcess(4711, 60 * GIB, "python3", "ann", 7200.0)
        gpu = msgspec.structs.replace(facts.gpus[0], memory_free=19 * GIB, processes=(holds,))
        held = msgspec.structs.replace(facts, gpus=(gpu,))
        (found,) = findings(case(matrix, held, job(None, img_size=1024)), tried.memory)
        assert found.severity == "error" and "4711 python3 of ann holds 60.0 GiB" in found.seen
        assert "of 25.0 GiB" in found.seen and "18.0 came" in found.seen and "19.0 GiB were free" in found.seen

    def test_larger_than_the_card_is_me101s(self, matrix: Matrix) -> None:
        small = but(pieces=False, whole=False, total=16 * GIB, free=15 * GIB)
        assert findings(subject(matrix, small), tried.memory) == ()

    def test_holes_are_no_fault(self, matrix: Matrix) -> None:
        assert findings(subject(matrix, but(whole=False)), tried.memory) == ()

    def test_a_death_is_an_error(self, matrix: Matrix) -> None:
        dead = but(pieces=None, failed={"memory": "died by SIGBUS"})
        (found,) = findings(subject(matrix, dead), tried.memory)
        assert found.severity == "error" and "SIGBUS" in found.seen


class TestProducts:
    @pytest.mark.parametrize(("one", "words"), [
        (Product("bfloat16", 37.0), "off by 37 times what rounding can do"),
        (Product("float8_e4m3fn", 1.5), "off by 1.5 times"),
        (Product("bfloat16", 0.5, False), "does not give the same bits"),
    ])  # fmt: skip
    def test_a_sick_card(self, matrix: Matrix, one: Product, words: str) -> None:
        (found,) = findings(subject(matrix, but(products=(one,))), tried.products)
        assert found.severity == "error" and words in found.seen and "NaN" in found.because

    def test_only_the_sick_one_is_named(self, matrix: Matrix) -> None:
        other = but(device=1, uuid="00000001-0000-0000-0000-000000000000", products=(Product("bfloat16", 9.0),))
        (found,) = findings(subject(matrix, HEALTHY, other), tried.products)
        assert found.seen.startswith("GPU 1") and "CUDA_VISIBLE_DEVICES=0" in " ".join(found.commands)


class TestRates:
    def slow(self, tflops: float, **changes: Any) -> GpuProbe:
        return but(products=(Product("bfloat16", 0.5, True, {SQUARE: tflops}),), **changes)

    @pytest.mark.parametrize(("tflops", "status"), [(780, "ok"), (600, "ok"), (590, "warning"), (200, "warning")])
    def test_against_the_table(self, matrix: Matrix, tflops: float, status: str) -> None:
        assert verdict(subject(matrix, self.slow(tflops)), tried.rate).status == status

    def test_what_holds_it_down_is_said(self, matrix: Matrix) -> None:
        hot = Reading(1200, 1980, 88, 350.0, 350.0, ("sw_thermal", "sw_power_cap"))
        (found,) = findings(subject(matrix, self.slow(400, loaded=hot)), tried.rate)
        for words in ("400 TFLOP/s", "792 were measured", "1200 of 1980 MHz", "88 °C", "350 of 350 W", "sw_power_cap"):
            assert words in found.seen

    def test_by_the_data_sheet(self, matrix: Matrix) -> None:
        (found,) = findings(subject(matrix, self.slow(60, name="NVIDIA L40S")), tried.rate)
        assert "data sheet says 362" in found.seen
        assert verdict(subject(matrix, self.slow(60, name="Strange 1")), tried.rate).status == "skipped"

    @pytest.mark.parametrize(("speed", "status"), [(55.0, "ok"), (24.0, "warning")])
    def test_the_link(self, matrix: Matrix, speed: float, status: str) -> None:
        found = verdict(subject(matrix, but(h2d_gbs=speed)), tried.link)
        assert found.status == status
        assert status == "ok" or "PCIe 5 carry" in found.findings[0].seen

    def test_a_copy_that_dies(self, matrix: Matrix) -> None:
        dead = but(h2d_gbs=None, failed={"link": "RuntimeError: CUDA error: unknown error"})
        (found,) = findings(subject(matrix, dead), tried.link)
        assert found.severity == "error"

    def test_the_slowest_card_counts(self) -> None:
        found = _speeds((HEALTHY, self.slow(500, h2d_gbs=25.0)))
        assert found == {"matmul_bf16_tflops": 500, "h2d_gbs": 25, "d2h_gbs": 54, "copy_gbs": 2700}


DIED = "died by SIGABRT: terminate called"
TRAP = {"attention torch choice": "AcceleratorError: CUDA error: an illegal memory access was encountered"}


class TestAttention:
    def test_the_trap_is_named_and_this_job_is_safe(self, matrix: Matrix) -> None:
        (found,) = findings(subject(matrix, but(failed=TRAP)), computed.attention)
        assert found.severity == "warning" and "illegal memory access" in found.seen and not found.edits
        assert "enable_cudnn_sdp(False)" in found.hint and "leaves it out" in found.because

    @pytest.mark.parametrize("trap", [
        {"failed": TRAP}, {"failed": {"blocks choice": DIED}}, {"failed": {"attention torch cudnn": DIED}},
        {"attention": trials(torch_cudnn="its dv behind a double block is wrong by 140%")},
        {"blocks": (BlockTrial("trainer", True), BlockTrial("choice", False, detail="a gradient is off by 90%"))},
    ])  # fmt: skip
    def test_cudnn_by_name_is_repaired(self, matrix: Matrix, trap: dict[str, Any]) -> None:
        (found,) = findings(subject(matrix, but(**trap), work={"attention": "cudnn"}), computed.attention)
        assert found.severity == "error" and values(found) == ["flash-attn-4"]

    def test_cudnn_where_it_is_right(self, matrix: Matrix) -> None:
        assert findings(subject(matrix, work={"attention": "cudnn"}), computed.attention) == ()

    def test_the_jobs_own_fails(self, matrix: Matrix) -> None:
        wrong = but(attention=trials(trainer_flash_attn_4="its dq behind a single block is wrong by 30%"))
        (found,) = findings(subject(matrix, wrong), computed.attention)  # auto takes it
        assert found.severity == "error" and values(found) == ["flash"] and "wrong by 30%" in found.seen
        dead = but(failed={"attention trainer flash-attn-4": DIED}, attention=HEALTHY.attention[:1])
        (found,) = findings(subject(matrix, dead), computed.attention)
        assert values(found) == ["flash"] and "SIGABRT" in found.seen

    def test_one_that_is_not_taken_may_fail(self, matrix: Matrix) -> None:
        wrong = but(attention=trials(trainer_flash_attn_4="its dq is wrong"))
        assert findings(subject(matrix, wrong, work={"attention": "flash"}), computed.attention) == ()

    def test_a_slow_one_is_worth_a_word(self, matrix: Matrix) -> None:
        (found,) = findings(subject(matrix, work={"attention": "flash"}), computed.attention)
        assert found.severity == "warning" and not found.edits
        assert [edit.value for edit in found.offers if isinstance(edit, Edit)] == ["flash-attn-4"]

    def test_xfluxs_own_script_is_hit(self, matrix: Matrix, tmp_path: Path) -> None:
        work = xflux_kit.job(tmp_path)
        mine = case(matrix, machine(matrix, gpu_probes=(but(failed=TRAP),)), work)
        (found,) = findings(mine, computed.attention)
        assert found.severity == "error" and "would die" in found.because and not found.edits
        assert any("TORCH_CUDNN_SDPA_DEPRIORITIZED=1" in command for command in found.commands)
        assert (
            findings(msgspec.structs.replace(mine, facts=machine(matrix, gpu_probes=(HEALTHY,))), computed.attention)
            == ()
        )
        asked = deep.ask_of(mine)
        assert "attention torch choice" in asked.stages and not [name for name in asked.stages if "trainer" in name]

    def test_a_dead_card_is_no_trap(self, matrix: Matrix) -> None:
        dead = but(attention=(), blocks=(), failed={**TRAP, "attention trainer flash": DIED})
        (found,) = findings(subject(matrix, dead), computed.attention)
        assert "flash, fails" in found.seen and values(found) == ["sdpa"]

    def test_it_must_be_right_on_every_card(self, matrix: Matrix) -> None:
        wrong = but(device=1, attention=trials(trainer_flash_attn_4="its dq is wrong"))
        assert computed.fastest(subject(matrix, HEALTHY, wrong)) == "flash"


class TestBlocks:
    def test_a_mismatch(self, matrix: Matrix) -> None:
        bad = but(blocks=(BlockTrial("trainer", False, 0.5, 0.9, detail="the output is off by 50%"),))
        (found,) = findings(subject(matrix, bad), computed.blocks)
        assert found.severity == "error" and values(found) == ["diffusers"] and "off by 50%" in found.seen

    def test_a_death(self, matrix: Matrix) -> None:
        (found,) = findings(subject(matrix, but(blocks=(), failed={"blocks trainer": DIED})), computed.blocks)
        assert "SIGABRT" in found.seen

    def test_left_out(self, matrix: Matrix) -> None:
        found = verdict(
            subject(matrix, but(blocks=(), skipped={"blocks trainer": "no time was left"})), computed.blocks
        )
        assert found.status == "skipped" and found.reason == "no time was left"


def test_a_plans_seconds_go_by_what_was_measured(matrix: Matrix) -> None:
    """Products at 0.8 of the table's take a step longer, on these cards only."""

    def seconds(**changes: Any) -> float:
        found = planner.known(subject(matrix, **changes))
        assert found and found.own.seconds
        return found.own.seconds

    table, same = seconds(), seconds(speeds={"matmul_bf16_tflops": 792.0, "h2d_gbs": 55.0})
    slower = seconds(speeds={"matmul_bf16_tflops": 0.8 * 792.0})
    assert same == pytest.approx(table) and 1.1 < slower / table < 1.25
    facts = machine(matrix, card="H200", gpu_probes=(HEALTHY,), speeds={"matmul_bf16_tflops": 100.0})
    other = planner.known(case(matrix, facts, job(None, img_size=1024)))
    assert other and other.own.seconds and other.own.seconds < 1.5 * table


def test_the_report_shows_the_rates(matrix: Matrix) -> None:
    from xflux_doctor.commands.check import summarize
    from xflux_doctor.report import text

    facts = msgspec.structs.replace(subject(matrix).facts, torch=TorchFacts("2.6.0"))
    shown = text.render(summarize(msgspec.structs.replace(subject(matrix), facts=facts)))
    assert "bfloat16 780 TFLOP/s" in shown and "from the host 55 GB/s" in shown
    assert shown.index("trainer flash-attn-4 3.50 ms") < shown.index("trainer flash 7.00 ms")


def test_the_config_is_repaired(matrix: Matrix, tmp_path: Path) -> None:
    """By `fix` over facts in which the deep level found the trap; the other keys keep their bytes."""
    present = tuple(one for one in HEALTHY.attention if "flash-attn-4" not in one.name)
    record(tmp_path / "facts.json", subject(matrix, but(failed=TRAP, attention=present)).facts)
    (tmp_path / "train.yaml").write_text(f"# mine\nattention: cudnn  # quick\n{TRAIN}")
    words = ("fix", "--facts", "facts.json", "--config", "train.yaml", "--offline", "--write-config", "--yes")
    doctor(*words, cwd=tmp_path)
    text = (tmp_path / "train.yaml").read_text()
    assert text.startswith("# mine\nattention: flash  # quick") and text.endswith(TRAIN)
