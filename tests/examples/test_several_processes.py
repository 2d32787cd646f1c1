"""The example that users start with torchrun, as they start it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "several_processes.py"


@pytest.mark.parametrize("spread", [[], ["--particles"]], ids=["chains", "particles"])
def test_two_processes_find_the_evidence(spread: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run([*command, *spread], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 processes, 7680 network evaluations" in done.stdout
    found = re.search(r"log evidence (\S+), exact (\S+)", done.stdout)
    assert found is not None
    assert abs(float(found[1]) - float(found[2])) < 0.01  # the prior is Gaussian and the proposal knows it
