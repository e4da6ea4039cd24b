"""deterministic: true: what is set, that it is taken back, and the sentence for what cannot be had."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")

from xflux_trainer import deterministic  # noqa: E402
from xflux_trainer.config import TrainConfig  # noqa: E402
from xflux_trainer.errors import Unsupported  # noqa: E402

ON = TrainConfig("x", deterministic=True)


def test_it_holds_inside_and_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(deterministic.WORKSPACE, ":0:0")
    tf32 = torch.backends.cuda.matmul.allow_tf32
    with deterministic.kernels(ON):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
        assert os.environ[deterministic.WORKSPACE] == ":4096:8"  # the user's own would not have been steady
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_a_steady_workspace_of_the_users_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(deterministic.WORKSPACE, ":16:8")
    with deterministic.kernels(ON):
        assert os.environ[deterministic.WORKSPACE] == ":16:8"


def test_without_it_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(deterministic.WORKSPACE, raising=False)
    with deterministic.kernels(TrainConfig("x")):
        assert not torch.are_deterministic_algorithms_enabled()
        assert deterministic.WORKSPACE not in os.environ


def test_an_operation_without_such_a_kernel_is_a_sentence() -> None:
    with pytest.raises(Unsupported, match=r"^put_ has no kernel that gives the same bits"), deterministic.kernels(ON):
        # torch's own refusal: put_ without accumulate depends on which of two writers comes last.
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_pass_and_the_mode_is_taken_back() -> None:
    with pytest.raises(RuntimeError, match="shapes"), deterministic.kernels(ON):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not torch.are_deterministic_algorithms_enabled()


def test_cuda_that_was_started_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(deterministic.WORKSPACE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(Unsupported, match="CUDA was started"), deterministic.kernels(ON):
        raise AssertionError
