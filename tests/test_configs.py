"""Each file in configs/ says in its header on which machine it is judged and what must be found, no more, no less."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import case, job, machine

from xflux_doctor.check import examine
from xflux_doctor.checks import ALL
from xflux_doctor.matrix import Matrix

FOLDER = Path(__file__).parent / "configs"
# The model of these jobs is a hub id that no cache of a test machine holds.
ALWAYS = {"WE102"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_findings(matrix: Matrix, path: Path) -> None:
    text = path.read_text()
    header = re.search(r"# machine: (\d+) (\S+) (\S+)\n# expect:(.*)\n", text)
    assert header, f"{path.name} needs a header"
    count, card, stack = int(header[1]), header[2], header[3]
    facts = machine(matrix, card=card if count else None, count=count or 1, stack=stack)
    work = job(text, gradient_accumulation_steps=2, img_size=512)
    verdicts = examine(case(matrix, facts, work, stack), ALL)
    assert not [v for v in verdicts if v.status == "crashed"]
    found = {f.code for v in verdicts for f in v.findings} - ALWAYS
    assert found == set(header[4].split())
