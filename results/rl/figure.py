"""Draw Fig. 8 from the runs committed here: python results/rl/figure.py nav [cheetah-dir cheetah-vel].

Left: return after one update while meta-training, a line for each seed (the second dashed, the third dotted); right:
return of the trained policies against the number of updates on 40 fresh tasks, the mean over seeds and a band from the
lowest to the highest. Of an environment and method only the runs with the most tasks an iteration are drawn, and none
named after an alpha or a KL bound that is not the default, or as the first of two of one seed.
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
COLOURS = {"modgrad": "tab:red", "modgrad on the weights": "tab:orange", "modgrad on the weights, nu as in Eq. 9": "tab:pink",
           "cavia": "tab:green", "maml": "tab:blue"}
WINDOW = 10                     # iterations of the running mean on the left: 20 tasks of one iteration are few


def label(config):
    if config["method"] != "modgrad":
        return config["method"]
    weights = " on the weights" if config["adapt"] != ["context"] else ""
    return f"modgrad{weights}" + ", nu as in Eq. 9" * (not config.get("normalise_context"))


def smooth(run):
    """(iterations, running mean of the return after one update)."""
    after = [json.loads(line)["after"] for line in (run / "log.jsonl").read_text().splitlines()]
    return np.arange(WINDOW, len(after) + 1), np.convolve(after, np.ones(WINDOW) / WINDOW, mode="valid")


def figure(env):
    picture, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), dpi=110)
    found = [path for path in sorted(HERE.glob(f"{env}-*-seed*/result.json")) if not re.search("-(alpha|kl|first)", path.parent.name)]
    results = {path.parent: json.loads(path.read_text()) for path in found}
    for method in COLOURS:
        tasks = {run: r["config"]["meta_batch"] for run, r in results.items() if label(r["config"]) == method}
        if not tasks:
            continue
        runs = [run for run, count in tasks.items() if count == max(tasks.values())]
        text = f"{method}, {max(tasks.values())} tasks, {len(runs)} seed{'s' * (len(runs) > 1)}"
        for k, run in enumerate(runs):
            left.plot(*smooth(run), color=COLOURS[method], linestyle=("-", "--", ":")[k % 3], linewidth=1.2)
        returns = np.array([results[run]["returns"] for run in runs])
        updates = np.arange(returns.shape[1])
        right.plot(updates, returns.mean(0), color=COLOURS[method], label=text)
        right.fill_between(updates, returns.min(0), returns.max(0), color=COLOURS[method], alpha=0.15, linewidth=0)
    left.set(title=f"{env}: after one update", xlabel=f"outer iterations (running mean of {WINDOW})", ylabel="return")
    right.set(title="40 fresh tasks", xlabel="updates", xticks=range(4))
    for axes in (left, right):
        axes.grid(alpha=0.25)
    picture.tight_layout(rect=(0, 0.11, 1, 1))
    picture.legend(*right.get_legend_handles_labels(), loc="lower center", ncol=2, frameon=False, fontsize=9)
    picture.savefig(HERE / f"{env}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", nargs="+", choices=("nav", "cheetah-dir", "cheetah-vel"))
    for env in parser.parse_args().env:
        figure(env)
