"""Draw Fig. 8 from the runs committed here: python results/rl/figure.py nav [cheetah-dir cheetah-vel].

Left: return after one update while meta-training; right: return of the trained policies against the number of updates
on 40 fresh tasks. Lines are means over seeds, bands reach from the lowest to the highest seed. Of an environment and
method only the runs with the most tasks an iteration are drawn, and of these the longest.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
COLOURS = {"modgrad": "tab:red", "modgrad, nu as in Eq. 9": "tab:orange", "cavia": "tab:green", "maml": "tab:blue",
           "modgrad, x hidden": "tab:pink", "maml, x hidden": "tab:cyan"}
WINDOW = 10                     # iterations of the running mean on the left: 20 tasks of one iteration are few


def label(config):
    plain = config["method"] == "modgrad" and not config.get("normalise_context")
    return "modgrad, nu as in Eq. 9" if plain else config["method"] + ", x hidden" * config.get("hide_x", False)


def curves(runs):
    """(iterations, (seeds, iterations) smoothed returns after one update), cut at the shortest run."""
    logs = [[json.loads(line)["after"] for line in (run / "log.jsonl").read_text().splitlines()] for run in runs]
    length = min(map(len, logs))
    smooth = [np.convolve(log[:length], np.ones(WINDOW) / WINDOW, mode="valid") for log in logs]
    return np.arange(WINDOW, length + 1), np.array(smooth)


def draw(axes, x, ys, method, tasks):
    text = f"{method}, {tasks} tasks, {len(ys)} seed{'s' if len(ys) > 1 else ''}"
    axes.plot(x, ys.mean(0), color=COLOURS[method], label=text)
    axes.fill_between(x, ys.min(0), ys.max(0), color=COLOURS[method], alpha=0.2, linewidth=0)


def figure(env):
    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=110)
    results = {path.parent: json.loads(path.read_text()) for path in sorted(HERE.glob(f"{env}-*-seed*/result.json"))}
    for method in COLOURS:
        sizes = {run: (r["config"]["meta_batch"], r["iterations"]) for run, r in results.items()
                 if label(r["config"]) == method}
        if not sizes:
            continue
        runs = [run for run, size in sizes.items() if size == max(sizes.values())]
        draw(left, *curves(runs), method, max(sizes.values())[0])
        returns = np.array([results[run]["returns"] for run in runs])
        draw(right, np.arange(returns.shape[1]), returns, method, max(sizes.values())[0])
    left.set(title=f"{env}: after one update", xlabel=f"outer iterations (running mean of {WINDOW})", ylabel="return")
    right.set(title="40 fresh tasks", xlabel="updates", xticks=range(4))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    picture.tight_layout()
    picture.savefig(HERE / f"{env}.png")


if __name__ == "__main__":
    for env in sys.argv[1:] or ["nav"]:
        figure(env)
