"""Draw validation accuracy against training episodes: python results/miniimagenet/figure.py.

Of runs with 84 pixels, on 400 validation tasks (5-shot) and 200 (1-shot), in a panel the same for all; the band is a 95 % interval
over tasks. Dotted: the paper's test accuracies after 50,000 episodes.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from table import PAPER  # noqa: E402

RUNS = {"84px-modgrad-fp32-h200": ("ModGrad, conv3 and conv4, alpha 0.1, float32", "tab:red"),
        "84px-modgrad-seed2-h200": ("the same, bf16, seed 2", "tab:orange"),
        "84px-maml-conv4-alpha3-h200": ("MAML, conv4 alone, alpha 3, bf16", "tab:blue"),
        "84px-maml-alpha0.05-h200": ("MAML, all layers, 5 steps, alpha 0.05, bf16", "tab:purple"),
        "84px-maml-h200": ("MAML, all layers, 5 steps, alpha 0.01, bf16", "tab:cyan"),
        "84px-cavia-h200": ("CAVIA, 2 steps, bf16", "tab:gray"),
        "84px-modgrad-1shot-bf16": ("ModGrad, conv3 and conv4, alpha 0.1, bf16", "tab:orange"),
        "84px-maml-1shot": ("MAML, conv4 alone, alpha 3, bf16", "tab:blue")}


def validations(run: Path) -> list[tuple[float, float, float]]:
    """(episodes, accuracy and half of its interval in %) of each validation."""
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [(row["episode"], 100 * row["val_accuracy"], 100 * row["val_ci95"]) for row in rows if "val_accuracy" in row]


def shots(run: Path) -> int:
    return json.loads((run / "config.json").read_text())["shots"]


def panel(axes, k: int) -> None:
    """The runs with k shots, and the paper's numbers."""
    for name, (label, colour) in RUNS.items():
        if shots(HERE / name) == k:
            episodes, accuracy, half = zip(*validations(HERE / name))
            axes.plot(episodes, accuracy, ".-", color=colour, label=label)
            axes.fill_between(episodes, [a - h for a, h in zip(accuracy, half)], [a + h for a, h in zip(accuracy, half)],
                              color=colour, alpha=0.15, linewidth=0)
    for method, name, colour in (("modgrad", "ModGrad", "tab:red"), ("maml", "MAML", "tab:blue")):
        accuracy = float(PAPER[method, "conv4", k].split()[0])
        axes.axhline(accuracy, color=colour, linestyle=":", label=f"paper, {name}: test after 50,000 episodes")
    axes.set(xlabel="training episodes", title=f"mini-ImageNet, 5-way {k}-shot, Conv-4, 84 pixels")
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.25)


def main() -> None:
    picture, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), dpi=110)
    panel(left, 5)
    panel(right, 1)
    left.set_ylabel("accuracy on validation tasks, %")
    picture.tight_layout()
    picture.savefig(HERE / "84px.png")


if __name__ == "__main__":
    main()
