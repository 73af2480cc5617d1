"""The code of the guides to other tools runs, in one process; ranks are in test_ways_in.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.test_ways_in import needs, run

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(guide: str) -> str:
    found = re.findall(r"```python\n(.*?)```", (DOCS / guide).read_text(), re.DOTALL)
    assert found
    return "\n".join(found)


@pytest.mark.more
@needs("tensorboard", "lightning", "transformers", "accelerate")
def test_integrations(tmp_path):
    program = tmp_path / "guide.py"
    program.write_text(blocks("howto/integrations.md") + "\nprint('all of it')\n")
    assert "all of it" in run([sys.executable, program])


@pytest.mark.more
def test_launching(tmp_path):
    program = tmp_path / "guide.py"
    program.write_text(blocks("howto/launching.md"))
    assert run([sys.executable, program]).rstrip().endswith("[3, 3]")


@pytest.mark.more
@needs("tensorboard")
def test_tensorboard_loads_no_framework(tmp_path):
    """TensorFlow takes seconds and a gigabyte, and would be loaded if it is installed."""
    program = (
        "import sys\n"
        "from hvdloss.losses.ledger import Ledger\n"
        "from hvdloss.report import StepReport\n"
        "from hvdloss.report.trackers import TensorBoard\n"
        f"with TensorBoard({str(tmp_path / 'log')!r}) as tracker:\n"
        "    tracker.step(StepReport.of(1, [Ledger(numerator=1.0, denominator=1.0)], 'mean'))\n"
        "assert tracker.failures == 0\n"
        "print(sorted({'torch', 'tensorflow', 'keras'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
    assert len(list((tmp_path / "log").iterdir())) == 1
