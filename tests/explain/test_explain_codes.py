"""A cause that a check can foresee has that check's code."""

from __future__ import annotations

from xflux_doctor.checks import ALL
from xflux_doctor.commands.explain import as_dict, confidence
from xflux_doctor.explain.codes import CODES
from xflux_doctor.explain.diagnosis import diagnose
from xflux_doctor.explain.rules import RULES


def test_codes_are_those_of_checks_and_causes_those_of_rules() -> None:
    assert set(CODES.values()) <= {check.code for check in ALL}
    assert set(CODES) <= {rule.id for rule in RULES} and len(CODES) >= 50


def test_how_sure_it_is() -> None:
    oom = diagnose(
        "Traceback (most recent call last):\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
    )
    assert oom is not None and confidence(oom) == "high" and as_dict(oom)["code"] == "ME101"
    killed = diagnose("subprocess.CalledProcessError: Command 'x' died with <Signals.SIGKILL: 9>.\n")
    assert killed is not None and confidence(killed) == "medium"
    strange = diagnose("Traceback (most recent call last):\nFooError: nobody knows\n")
    assert strange is not None and confidence(strange) == "low" and as_dict(strange)["code"] is None
    assert as_dict(None)["cause"] == "none"
