"""What the README shows works and what it states is what the result files hold."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_example_for_an_own_network_runs():
    code, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in names["module"].parameters())
    reached = [p.grad is not None and p.grad.abs().sum() > 0 for p in names["generator"].parameters()]
    assert all(reached)


def test_the_tables_are_those_of_the_result_files():
    done = subprocess.run([sys.executable, str(ROOT / "results" / "table.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
