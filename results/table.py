"""Write the tables of README.md from the result files: python results/table.py [--check]

Every `result.json` below results/ is one run. A block between `<!-- table NAME -->` and `<!-- end -->` in README.md is
replaced by the table of that name. `--check` changes nothing and fails if README.md is out of date.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
PAPER = {  # Table 2: (method, backbone, shots) -> accuracy, % and its 95 % interval
    ("modgrad", "conv4", 1): "53.20 ± 0.86", ("modgrad", "conv4", 5): "69.17 ± 0.69",
    ("maml", "conv4", 1): "47.89 ± 1.20", ("maml", "conv4", 5): "64.59 ± 0.88",
}


def runs(folder):
    return [(path.parent, json.loads(path.read_text())) for path in sorted((HERE / folder).rglob("result.json"))]


def miniimagenet():
    """One row a run: what was run, our accuracy, the paper's (always on test classes after 50,000 episodes)."""
    rows = ["| run | shots | pixels | training episodes | evaluated on | ours, % | paper, % (test, 50,000 episodes) | device | training |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for folder, r in runs("miniimagenet"):
        c = r["config"]
        what = f"{c['method']}, {c['inner_steps']} step{'s' * (c['inner_steps'] > 1)}, alpha {c['inner_lr']:g}"
        what += f", {c['init']} init, {c['factors']} factors" if c["method"] == "modgrad" else ""
        what += ", SYNTHETIC" if r["synthetic"] else ""
        rows.append(f"| [{what}](results/{folder.relative_to(HERE)}) | {c['shots']} | {c['image_size']} | {r['episodes']:,} | "
                    f"{r['tasks']} {r['split']} tasks | {100 * r['value']:.2f} ± {100 * r['ci95']:.2f} | "
                    f"{PAPER.get((c['method'], c['backbone'], c['shots']), '-')} | {r['device_name']}, "
                    f"{r['threads']} thread{'s' * (r['threads'] > 1)} | {r['train_seconds'] / 3600:.1f} h |")
    return "\n".join(rows)


def speed():
    """One row a machine: seconds per episode beside the naive loop."""
    rows = ["| machine | ours, s/episode | naive, s/episode | ratio | of the matrix-multiply rate | peak memory, meta-batch 8: whole / task-chunk 1 |",
            "| --- | --- | --- | --- | --- | --- |"]
    for path in sorted(HERE.glob("speed-*.json")):
        s = json.loads(path.read_text())
        peak = s["peak_memory_bytes"]["8"]
        rows.append(f"| {s['device_name']}, {s['threads']} thread{'s' * (s['threads'] > 1)} | {s['ours_seconds_per_episode']['median']:.2f} | "
                    f"{s['naive_seconds_per_episode']['median']:.2f} | {s['ratio']['median']:.2f} | "
                    f"{s['share_of_matmul_rate']:.0%} | {peak['whole'] / 2**30:.1f} / {peak['task_chunk_1'] / 2**30:.1f} GiB |")
    return "\n".join(rows)


def fill(text):
    """Replace every table block; an unknown name is an error."""
    tables = {"miniimagenet": miniimagenet, "speed": speed}
    block = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)
    return block.sub(lambda m: f"{m[1]}{tables[m[2]]()}\n{m[3]}", text)


def main():
    before = README.read_text(encoding="utf-8")
    after = fill(before)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is out of date: run python results/table.py" if after != before else 0)
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
