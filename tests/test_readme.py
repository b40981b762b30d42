"""What the README shows works and what it states is what the result files hold."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_miniimagenet
from results import table

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


@pytest.mark.parametrize("flags, number", [("", "69.17 ± 0.69"), ("--shots 1 --rank 1", "53.13"), ("--inner-steps 3", "68.42"),
                                           ("--inner-steps 3 --rank 1", "-"), ("--inner-steps 7", "-"), ("--shots 10 --rank 1", "-"),
                                           ("--method maml --inner-steps 3", "64.59 ± 0.88"),
                                           ("--backbone wrn28-10 --inner-steps 2", "-")])
def test_the_papers_number_is_that_of_the_runs_flags(flags, number):
    assert table.paper_accuracy(vars(train_miniimagenet.parse_flags(flags.split()))) == number


def test_a_run_with_another_flag_is_not_beside_tables_4_and_5():
    config = vars(train_miniimagenet.parse_flags(["--inner-steps", "2", "--shots", "1", "--precision", "bf16"]))
    assert table.usual(config, {"inner_steps"}) and not table.usual(config)
    for flag, value in (("refine", True), ("gradient_noise", 0.1), ("init", "released"), ("image_size", 42)):
        assert not table.usual(config | {flag: value}, {"inner_steps"}), flag


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "results").rglob("README.md"))]


def headings(document):
    """The anchors that GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if "://" not in link and not (target.exists() and (not anchor or anchor in headings(target))):
            broken.append(link)
    assert links and not broken
