"""Write the tables of the documents from the result files: python results/table.py [--check]

Every `result.json` below results/ is one run. A block between `<!-- table NAME -->` and `<!-- end -->` is replaced by the table of
that name. `--check` changes nothing and fails if a document is out of date.
"""

import argparse
import functools
import json
import os
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import MAY_CHANGE, mean_ci95  # noqa: E402
from train_miniimagenet import parse_flags  # noqa: E402

DOCUMENTS = HERE.parent / "README.md", HERE / "README.md", HERE / "miniimagenet/README.md"
PAPER = {  # Table 2: (method, backbone, shots) -> accuracy, % and its 95 % interval
    ("modgrad", "conv4", 1): "53.20 ± 0.86", ("modgrad", "conv4", 5): "69.17 ± 0.69",
    ("maml", "conv4", 1): "47.89 ± 1.20", ("maml", "conv4", 5): "64.59 ± 0.88",
    ("metasgd", "conv4", 1): "50.50 ± 1.90", ("metasgd", "conv4", 5): "64.00 ± 0.90", ("tnet", "conv4", 1): "51.70 ± 1.84",
    ("cavia", "conv4", 1): "51.82 ± 0.65 (512 filters)", ("cavia", "conv4", 5): "65.85 ± 0.55 (512 filters)",
    ("modgrad", "wrn28-10", 1): "65.72 ± 0.21", ("modgrad", "wrn28-10", 5): "81.17 ± 0.20",
}


def runs(folder):
    """(folder, result) of each run, with the interval that a run has now: older ones have too narrow a one for few tasks."""
    found = [(path.parent, json.loads(path.read_text())) for path in sorted((HERE / folder).rglob("result.json"))]
    return [(path, r | ({"ci95": mean_ci95(r["accuracies"])[1]} if r.get("accuracies") else {})) for path, r in found]


def glance():
    """One row an experiment: the paper's number for ModGrad beside that of one run of ours, or of all its seeds.

    Of several runs the choice is made without test results: mini-ImageNet's longest of each network (all of that length), CelebA's
    best on validation images, of Omniglot's in the form that was chosen on validation alphabets that with the most mini-batches.
    """
    rows = ["| experiment | paper | ours | our training, time a run |", "| --- | --- | --- | --- |"]
    where = lambda r: f" of one {r['device_name']}" if r["device_name"].startswith("NVIDIA") else ""
    link = lambda folder, text: f"[{text}](results/{folder.relative_to(HERE)})"
    ours = lambda folder: [(f, r, r["config"]) for f, r in runs(folder) if r["config"]["method"] == "modgrad"]

    size = [run for run in ours("miniimagenet") if run[2]["backbone"] == "conv4" and usual(run[2])]
    tested = [run for run in size if run[1]["split"] == "test"]
    for shots in sorted({c["shots"] for _, _, c in tested}, reverse=True):
        length = max(r["episodes"] for _, r, c in tested if c["shots"] == shots)
        longest = [run for run in tested if (run[2]["shots"], run[1]["episodes"]) == (shots, length)]
        best, worst = (pick(longest, key=lambda run: run[1]["value"]) for pick in (max, min))
        numbers = link(best[0], percent(best[1]))
        if len(longest) > 1:
            numbers = f"{link(worst[0], percent(worst[1]))} to {numbers}, [{len(longest)} runs](#mini-imagenet)"
        folder, r, c = min(longest, key=lambda run: run[1]["train_seconds"])
        rows.append(f"| mini-ImageNet, 5-way {shots}-shot, Conv-4: accuracy, % | {PAPER['modgrad', 'conv4', shots]} | {numbers} | "
                    f"{length:,} of 50,000 episodes, {duration(r['train_seconds'])}{where(r)}" + " (bf16)" * (c["precision"] == "bf16") + " |")
    folder, r, c = max((run for run in ours("miniimagenet") if run[2]["backbone"] == "wrn28-10"), key=lambda run: run[1]["episodes"])
    rows.append(f"| mini-ImageNet, 5-way {c['shots']}-shot, WRN-28-10: accuracy, % | {PAPER['modgrad', 'wrn28-10', c['shots']]} | "
                f"{link(folder, percent(r))} | {160 // c['channels']} times narrower, {c['image_size']} pixels; pretrained, then "
                f"{r['episodes']:,} episodes, {duration(r['train_seconds'])} |")
    for k, (order, pixels) in enumerate(CELLS):
        folder, r, c = min((run for run in ours("celeba") if (run[2]["order"], run[2]["pixels"]) == (order, pixels)),
                           key=lambda run: run[1]["best_val_mse"])
        rows.append(f"| CelebA, {order} {pixels} pixels: mean squared error | {CELEBA['modgrad'][k]:.3f} | "
                    f"{link(folder, interval(r, 4))} | {r['iterations']:,} of 50,000 iterations, "
                    f"{c['inner_steps']} inner steps, {duration(r['train_seconds'])} |")
    form = [run for run in ours("omniglot") if run[2]["protocol"] == "multi-shot" and run[2]["psi_lr"] <= 0.001
            and not run[0].name.startswith("candidate")]
    folder, r, c = max(form, key=lambda run: run[1]["meta_steps"] * run[2]["meta_batch"] * run[2]["inner_steps"])
    rows.append(f"| Omniglot, multi-shot (Fig. 5): accuracy, % | {OMNIGLOT['modgrad']} | {link(folder, percent(r))} | "
                f"{r['meta_steps']:,} of 1,000 meta-steps, {c['meta_batch']} tasks x {c['inner_steps']} steps, "
                f"{duration(r['train_seconds'])}{where(r)} |")
    for env, what in (("nav", "navigation"), ("cheetah-dir", "half-cheetah, direction"), ("cheetah-vel", "half-cheetah, velocity")):
        seeds = [run for run in ours("rl") if run[2]["env"] == env and run[2]["adapt"] == ["context"]
                 and not re.search("-(kl|first)", run[0].name)]
        numbers = ", ".join(link(f, interval(r, 1)) for f, r, _ in seeds)
        rows.append(f"| {what}: return after one update | {RL[env, 'modgrad']} | {numbers} | "
                    f"{', '.join(str(r['iterations']) for _, r, _ in seeds)} of 500 iterations, "
                    f"{duration(sum(r['train_seconds'] for _, r, _ in seeds) / len(seeds))} |")
    return "\n".join(rows)


def interval(r, digits, unit=1):
    if None in (r["value"], r["ci95"]):
        return "not finite"
    return f"{r['value'] / unit:.{digits}f} ± {r['ci95'] / unit:.{digits}f}"


def percent(r):
    return interval(r, 2, 0.01)


def miniimagenet():
    """One row a run: what was run, our accuracy, the paper's (always on test classes after 50,000 episodes)."""
    rows = ["| run | backbone | shots | pixels | training episodes | evaluated on | ours, % | paper, % (test, 50,000 episodes) | "
            "device | training |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for folder, r in runs("miniimagenet"):
        c = r["config"]
        if c["method"] == "pretrain":
            what = "pretraining alone, nearest class means"
        else:
            what = f"{c['method']}, {c['inner_steps']} step{'s' * (c['inner_steps'] > 1)}, alpha {c['inner_lr']:g}"
            count = len(c["adapt"])
            what += f", {c['init']} init, {c['factors']} factors" if c["method"] == "modgrad" else f", {count} tensor{'s' * (count > 1)}"
        what += f", u {c['rank']}" * (c["method"] == "modgrad" and c["rank"] != 5) + ", nu refined" * c.get("refine", False)
        what += f", noise {c.get('gradient_noise', 0):g}" * bool(c.get("gradient_noise"))
        what += ", pretrained" * bool(c.get("start_from")) + ", frozen prefix" * c.get("freeze_prefix", False)
        what += ", nu normalised" * c.get("normalise_context", False)
        what += f", rate halved every {c['meta_lr_halve_every']:,}" if c.get("meta_lr_halve_every", 10000) != 10000 else ""
        what += ", nearest pixels" * c.get("resize_nearest", False) + f", seed {r['seed']}" * (r["seed"] != 1)
        what += f", {c['precision']}" * (c["precision"] != "fp32")
        what += ", SYNTHETIC" if r["synthetic"] else ""
        full = {"conv4": 64, "resnet34": 64, "wrn28-10": 160}[c["backbone"]]
        backbone = c["backbone"] + f", {full // c['channels']} times narrower" * (c["channels"] < full)
        trained = f"{r['episodes']:,}" if "episodes" in r else f"{r['updates']:,} batches of {c['batch_size']}"
        rows.append(f"| [{what}](results/{folder.relative_to(HERE)}) | {backbone} | {c['shots']} | {c['image_size']} | {trained} | "
                    f"{r['tasks']} {r['split']} tasks | {percent(r)} | "
                    f"{paper_accuracy(c)} | {device(r)} |")
    return "\n".join(rows)


LENGTH = {"shots", "seed", "precision", "episodes", "log_every", "val_every", "val_episodes"}      # of a run and its validation


@functools.cache
def defaults(method, backbone):
    return json.loads(json.dumps(vars(parse_flags(["--method", method, "--backbone", backbone]))))


def usual(config, but=()):
    """Whether a mini-ImageNet run's method has all its defaults, but for its shots, seed, precision and length and the flags `but`."""
    given = defaults(config["method"], config["backbone"])
    return all(config.get(flag, value) == value for flag, value in given.items() if flag not in MAY_CHANGE | LENGTH | set(but))


def varied(config):
    """The flags of Tables 4 and 5 that differ from ModGrad's defaults in one of its runs."""
    return [flag for flag, (_, default, _) in ABLATIONS.items() if config["method"] == "modgrad" and config[flag] != default]


def paper_accuracy(config):
    """The paper's accuracy of a mini-ImageNet run's method, network, shots and, for Conv-4, values of Tables 4 and 5; or "-"."""
    flags = varied(config)
    if len(flags) == 1 and config["backbone"] == "conv4":
        value = ABLATIONS[flags[0]][2].get(config["shots"], {}).get(config[flags[0]])
        return f"{value:.2f}" if value else "-"
    return "-" if flags else PAPER.get((config["method"], config["backbone"], config["shots"]), "-")


ABLATIONS = {  # flag -> (what it is, its default, paper's 5-shot and 1-shot accuracy of ModGrad by value, %)
    "rank": ("u, columns (Table 5)", 5, {5: {1: 68.43, 5: 69.17, 10: 67.62}, 1: {1: 53.13, 5: 53.20, 10: 52.53}}),
    "inner_steps": ("K, inner steps (Table 4)", 1, {5: dict(enumerate((69.17, 68.80, 68.42, 68.34, 68.24), 1)),
                                                    1: dict(enumerate((53.20, 52.66, 53.54, 52.87, 52.76), 1))}),
}


def of_seed_1():
    return [(folder, r) for folder, r in runs("ablations") if r["seed"] == 1]


def ablations():
    """One row a value of one flag, all others at their defaults: at the paper's size beside its numbers, then in the short runs."""
    rows = ["| what varies | value | 5-shot: ours, % | paper, % | 1-shot: ours, % | paper, % | short runs, 5-shot, % | short runs, 1-shot, % |",
            "| --- |" + " --- |" * 7]
    full = [(folder, r) for folder, r in runs("miniimagenet") if r["config"]["backbone"] == "conv4"
            and (r.get("episodes"), r["seed"], r["config"]["precision"]) == (50_000, 1, "bf16")]
    for flag, (title, _, paper) in ABLATIONS.items():
        cells = {}
        for length, found, others in (("full", full, {flag}), ("short", of_seed_1(), {flag, "image_size"})):
            for folder, r in found:
                c = r["config"]
                if c["method"] == "modgrad" and usual(c, others):
                    cells[length, c["shots"], c[flag]] = f"[{percent(r)}](results/{folder.relative_to(HERE)})"
        for value in sorted({value for _, _, value in cells}):
            row = [entry for shots in (5, 1) for entry in (cells.get(("full", shots, value), "-"),
                                                           f"{paper[shots][value]:.2f}" if value in paper[shots] else "-")]
            row += [cells.get(("short", shots, value), "-") for shots in (5, 1)]
            rows.append(f"| {title} | {value} | {' | '.join(row)} |")
    return "\n".join(rows)


def shots():
    """One row a number of shots: ModGrad with all other flags at their defaults, MAML on its tensors or on conv4 alone."""
    both, cells = ("conv3", "conv4"), {}
    columns = {("modgrad", 0.1, both): "modgrad, alpha 0.1: ours, %", ("maml", 1, both): "maml, alpha 1: ours, %",
               ("maml", 3, ("conv4",)): "maml, conv4 alone, alpha 3: ours, %"}
    for folder, r in of_seed_1():
        c = r["config"]
        if (c["inner_steps"], c["rank"], c["gradient_noise"]) == (1, 5, 0):
            cells[c["shots"], (c["method"], c["inner_lr"], adapted_layers(c))] = f"[{percent(r)}](results/{folder.relative_to(HERE)})"
    rows = [f"| shots | {' | '.join(columns.values())} |", "| --- |" + " --- |" * len(columns)]
    for n in sorted({n for n, column in cells if column in columns}):
        rows.append(f"| {n} | {' | '.join(cells.get((n, column), '-') for column in columns)} |")
    return "\n".join(rows)


def steps():
    """One row a method and number of inner steps: MAML over all layers, and ModGrad with all other flags at their defaults."""
    cells = {}
    for folder, r in of_seed_1():
        c = r["config"]
        every_layer = len(c["adapt"]) == 10 and c["method"] in ("maml", "fomaml")
        if every_layer or (c["method"], c["inner_lr"], c["rank"], c["gradient_noise"], c["inner_steps"]) == ("modgrad", 0.1, 5, 0, 1):
            row = c["method"], c["inner_steps"], c["inner_lr"]
            cells.setdefault(row, {})[c["shots"]] = f"[{percent(r)}](results/{folder.relative_to(HERE)})"
    names = {"modgrad": "modgrad", "maml": "maml, all layers", "fomaml": "first-order maml, all layers"}
    several = sorted({shots for (name, *_), row in cells.items() for shots in row if name != "modgrad"})
    rows = [f"| method | inner steps | alpha | {' | '.join(f'{shots}-shot: ours, %' for shots in several)} |",
            "| --- | --- | --- |" + " --- |" * len(several)]
    for (name, count, rate), row in sorted(cells.items(), key=lambda cell: (list(names).index(cell[0][0]), cell[0])):
        rows.append(f"| {names[name]} | {count} | {rate:g} | {' | '.join(row.get(shots, '-') for shots in several)} |")
    return "\n".join(rows)


def adapted_layers(config):
    return tuple(sorted({name.split(".")[0] for name in config["adapt"]}))


def variant(method, layers):
    """What tells a method's row from the comparison's one step on ModGrad's layers."""
    return "" if layers == ("conv3", "conv4") else ", 2 steps" if method == "cavia" else f", {' and '.join(layers)} alone"


def methods():
    """One row a method, set of layers and alpha, one column a number of shots and standard deviation of the gradient's noise."""
    cells = {}
    for folder, r in of_seed_1():
        c = r["config"]
        if c["inner_steps"] == (2 if c["method"] == "cavia" else 1) and c["rank"] == 5 and c["shots"] <= 5:
            row = cells.setdefault((c["method"], adapted_layers(c), c["inner_lr"]), {})
            row[-c["shots"], c["gradient_noise"]] = f"[{percent(r)}](results/{folder.relative_to(HERE)})"
    columns = sorted({column for row in cells.values() for column in row})
    titles = [f"{-shots}-shot{f', noise {noise:g}' * (noise > 0)}: ours, %" for shots, noise in columns]
    rows = [f"| method | alpha | {' | '.join(titles)} |", "| --- | --- |" + " --- |" * len(columns)]
    for (name, layers, rate), row in sorted(cells.items(), key=lambda cell: (cell[0][0] != "modgrad", cell[0])):
        what = variant(name, layers)
        rows.append(f"| {name}{what} | {rate:g}{' at the start' * (name == 'metasgd')} | {' | '.join(row.get(x, '-') for x in columns)} |")
    return "\n".join(rows)


def seeds():
    """One row a method, set of layers, alpha and noise in the inner gradient of which there are several seeds."""
    cells = {}
    for folder, r in runs("ablations"):
        c = r["config"]
        if (c["inner_steps"], c["rank"], c["shots"]) == (2 if c["method"] == "cavia" else 1, 5, 5):
            cells.setdefault((c["method"], adapted_layers(c), c["inner_lr"], c["gradient_noise"]), {})[r["seed"]] = folder, r
    cells = {row: found for row, found in cells.items() if len(found) > 1}
    columns = sorted({seed for found in cells.values() for seed in found})
    rows = [f"| method | alpha | noise | {' | '.join(f'seed {seed}: ours, %' for seed in columns)} | mean, standard deviation over seeds |",
            "| --- | --- | --- |" + " --- |" * (len(columns) + 1)]
    for (name, layers, rate, noise), found in sorted(cells.items(), key=lambda cell: (cell[0][0] != "modgrad", cell[0])):
        what = variant(name, layers)
        numbers = [f"[{percent(found[seed][1])}](results/{found[seed][0].relative_to(HERE)})" if seed in found else "-"
                   for seed in columns]
        values = [100 * r["value"] for _, r in found.values()]
        rows.append(f"| {name}{what} | {rate:g} | {noise:g} | {' | '.join(numbers)} | {statistics.mean(values):.2f}, {statistics.stdev(values):.2f} |")
    return "\n".join(rows)


def noise(folder="ablations"):
    """One row a run, one column a standard deviation of the noise in the test alone."""
    file = json.loads((HERE / folder / "noise.json").read_text())
    levels = sorted({level for run in file["runs"].values() for level in run["accuracy"]}, key=float)
    rows = [f"| run | alpha | {' | '.join(f'noise {level}: ours, %' for level in levels)} |", "| --- | --- |" + " --- |" * len(levels)]
    for name, run in file["runs"].items():
        cells = [percent(run["accuracy"][level]) if level in run["accuracy"] else "-" for level in levels]
        rows.append(f"| [{run['method']}](results/{folder}/{name}) | {run['inner_lr']:g} | {' | '.join(cells)} |")
    return "\n".join(rows)


def noise_at_full_size():
    return noise("miniimagenet")


def modulation():
    """One row a run: the M of its two weight tensors, and what it is worth to a task that it is its own."""
    file = json.loads((HERE / "ablations/modulation.json").read_text())
    kinds = {"rms": "root mean square", "zeros": "zeros", "spread": "spread over tasks"}
    names = ("conv3.weight", "conv4.weight")
    rows = [f"| run | alpha | {' | '.join(f'M of {name}: {kind}' for name in names for kind in kinds.values())} "
            "| nu: length, before Psi's training | spread over tasks | cosine of two tasks', before Psi's training | accuracy, % "
            "| with its own M rather than another task's, points |",
            "| --- | --- |" + " --- |" * (len(names) * len(kinds) + 5)]
    for run, r in file["runs"].items():
        cells = [f"{r['tensors'][name][kind]:{'.3g' if kind == 'rms' else '.1%'}}" for name in names for kind in kinds]
        nu, before = r["context"], r["context_of_untrained_psi"]
        cells += [f"{nu['length']:.2g}, {before['length']:.2g}", f"{nu['spread']:.1%}", f"{nu['cosine']:.4f}, {before['cosine']:.2f}"]
        rows.append(f"| [{run}](results/{folder_of(run)}/{run}) | {r['inner_lr']:g} | {' | '.join(cells)} | {percent(r['own'])} "
                    f"| {percent(r['own_less_other'])} |")
    return "\n".join(rows)


def context():
    """One row a run and adapted matrix: what of a task reaches its nu."""
    rows = ["| run | matrix | g and g': cosine | g ⊙ g': positive part of its absolute sum | two tasks' g: cosine | two tasks' g ⊙ g' | two tasks' dL/drow | two tasks' dL/dcol |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for run, r in json.loads((HERE / "ablations/context.json").read_text())["runs"].items():
        for name, t in r["tensors"].items():
            cosines = " | ".join(f"{round(t[f'cosine_of_{what}'], 2) + 0:.2f}" for what in ("g", "dM", "drow", "dcol"))      # + 0: no -0.00
            rows.append(f"| [{run}](results/{folder_of(run)}/{run}) | {name} | {t['alike']:.2f} | {t['positive']:.1%} | {cosines} |")
    return "\n".join(rows)


def folder_of(run):
    """Where a run that figures were made of is kept. Raises SystemExit if it is not."""
    for part in ("ablations", "miniimagenet"):
        if (HERE / part / run / "result.json").exists():
            return part
    raise SystemExit(f"error: figures of {run} are in results/ablations, its result.json is not in results: keep both or neither")


CELEBA = {  # Table 3: method -> mean squared error of random 10, random 100, ordered 10, ordered 100
    "modgrad": (0.034, 0.012, 0.048, 0.043), "maml": (0.040, 0.017, 0.055, 0.047),
    "cavia": (0.037, 0.014, 0.053, 0.047), "cnp": (0.039, 0.016, 0.057, 0.047),
}
CELLS = [(order, pixels) for order in ("random", "ordered") for pixels in (10, 100)]


def celeba():
    """One row a run beside the paper's cell, in the order of Table 3; before them, what a linear completion reaches."""
    linear = json.loads((HERE / "celeba/linear.json").read_text())
    rows = ["| given pixels | method | inner loop | training iterations | ours, MSE | paper, MSE (50,000 iterations) | device | training |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    order = lambda run: (CELLS.index((run[1]["config"]["order"], run[1]["config"]["pixels"])),
                         list(CELEBA).index(run[1]["config"]["method"]), run[0])
    cells = [run for run in runs("celeba") if (run[1]["config"]["order"], run[1]["config"]["pixels"]) in CELLS]
    shown = set()
    for folder, r in sorted(cells, key=order):
        c = r["config"]
        if (cell := f"{c['order']} {c['pixels']}") not in shown:
            shown.add(cell)
            for rule, bounds in (("linear predictor", linear["mse"]), ("additive rule", linear["additive"])):
                if bound := bounds.get(cell):
                    rows.append(f"| {cell} | [best {rule}](results/celeba/linear.py) | - | - | "
                                f"{bound['value']:.4f} ± {bound['ci95']:.4f} | - | {linear['device_name']} | - |")
        loop = "none" if c["method"] == "cnp" else f"{c['inner_steps']} step{'s' * (c['inner_steps'] > 1)}, alpha {c['inner_lr']:g}"
        rows.append(f"| {c['order']} {c['pixels']} | [{c['method']}{', SYNTHETIC' * r['synthetic']}](results/{folder.relative_to(HERE)}) | "
                    f"{loop} | {r['iterations']:,}, {c['meta_lr_schedule']} rate | {interval(r, 4)} | "
                    f"{CELEBA[c['method']][CELLS.index((c['order'], c['pixels']))]:.3f} | {device(r)} |")
    return "\n".join(rows)


OMNIGLOT = {"modgrad": "85.1", "leap": "83.3", "reptile": "76.4"}          # Fig. 5, multi-shot


def omniglot():
    """One row a run; the paper has numbers for multi-shot only."""
    rows = ["| protocol | method | training | inner steps: training / test | seed | ours, % | paper, % | device | time |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for folder, r in ((f, r) for f, r in runs("omniglot") if not f.name.startswith("candidate")):      # of ModGrad's form
        c = r["config"]
        few = c["protocol"] == "few-shot"
        what = f"{c['ways']}-way {c['shots']}-shot" if few else f"multi-shot, {c['channels']} filters"
        method = c["method"] + (f", psi at {c['psi_lr']:g}" if c["method"] == "modgrad" and not few else "")
        rows.append(f"| {what} | [{method}{', SYNTHETIC' * r['synthetic']}](results/{folder.relative_to(HERE)}) | "
                    f"{r['meta_steps']:,} x {c['meta_batch']} tasks | {c['inner_steps']} / {c['inner_steps'] if few else c['test_steps']} | "
                    f"{r['seed']} | {percent(r)} | "
                    f"{'-' if few else OMNIGLOT.get(c['method'], '-')} | {device(r)} |")
    return "\n".join(rows)


RL = {  # Fig. 8, return after one step; "far below" and "below" where the text gives no number
    ("nav", "modgrad"): "about -8", ("nav", "cavia"): "-15 or below", ("nav", "maml"): "-15 or below",
    ("cheetah-dir", "modgrad"): "about 590", ("cheetah-dir", "cavia"): "below 550", ("cheetah-dir", "maml"): "below 550",
    ("cheetah-vel", "modgrad"): "about -80", ("cheetah-vel", "cavia"): "about -90", ("cheetah-vel", "maml"): "about -100",
}


def rl():
    """One row a run: returns of fresh tasks after 0, 1, ... updates."""
    rows = ["| task | method, alpha, adapted | seed | iterations x tasks | KL bound | environment steps | return before / after 1, 2, 3 updates | paper, after 1 | distance learned (correlation) | device | training |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for folder, r in runs("rl"):
        c = r["config"]
        first, *after = (f"{m:.1f} ± {h:.1f}" for m, h in zip(r["returns"], r["returns_ci95"]))
        what = "all tensors" if len(c["adapt"]) > 2 else ", ".join(c["adapt"])
        what += ", nu normalised" * c.get("normalise_context", False) + ", x hidden" * c.get("hide_x", False)
        learned = f"{r['end_points'][1]['radius_correlation']:.2f}" if "end_points" in r else "-"
        rows.append(f"| {c['env']} | [{c['method']}](results/{folder.relative_to(HERE)}), {c['inner_lr']:g}, {what} | {r['seed']} | {r['iterations']:,} x {c['meta_batch']} | {c['max_kl']:g} | "
                    f"{r['env_steps'] / 1e6:.1f} M | {first} / {', '.join(after)} | {RL[c['env'], c['method']]} | {learned} | {device(r)} |")
    return "\n".join(rows)


def device(r):
    """Hardware and training time, two cells."""
    return f"{machine(r)} | {duration(r['train_seconds'])}"


def duration(seconds):
    return f"{seconds / 3600:.1f} h" if seconds > 180 else f"{seconds:.0f} s"


def speeds():
    """Of each machine the whole run, then what was timed apart; a table shows a figure of the first file that has it."""
    return [json.loads(path.read_text()) for path in sorted(HERE.glob("speed-*.json"), key=lambda path: path.stem)]


def machine(s):
    """Of a benchmark's file: device, its vector instructions where they were noted, threads."""
    name = s.get("device_name") or s["device"]
    if name.startswith("NVIDIA"):
        return name
    kind = f" ({s['cpu_capability']})" if s.get("cpu_capability") else ""
    return f"{name}{kind}, {s['threads']} thread{'s' * (s['threads'] > 1)}"


CONTENDERS = {"ours": "ours", "ours_tf32": "ours, `--precision tf32`", "ours_bf16": "ours, `--precision bf16`",
              "ours_launched": "ours, `--no-cuda-graph`", "ours_compiled": "ours, `--compile`",
              "naive": "naive, tuned allocator", "naive_tf32": "naive, TF32",
              "naive_bf16": "naive, bf16 autocast", "naive_stock": "naive, stock allocator", "higher": "higher 0.2.1",
              "torchopt": "TorchOpt 0.7.3"}


def ratios():
    """One row a machine and method: how many times as fast as each other implementation we are, medians over turns."""
    others = [name for name in CONTENDERS if "ours" not in name and "bf16" not in name and "tf32" not in name]
    rows = [f"| ours is so many times as fast as | {' | '.join(CONTENDERS[name] for name in others)} |",
            f"| --- | {' | '.join('---' for _ in others)} |"]
    shown = set()
    for s in speeds():
        for case in s["cases"]:
            what = f"{case['method']}, {case['inner_steps']} step{'s' * (case['inner_steps'] > 1)}: {machine(s)}"
            cells = [f"{1 / c['ours_over_this_seconds']['median']:.1f}" if (c := case["contenders"].get(name)) else "-" for name in others]
            if what not in shown and set(cells) != {"-"}:
                shown.add(what)
                rows.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(rows)


def speed():
    """One row a machine, method and implementation: seconds per episode and what ours takes of it."""
    rows = ["| machine | method | implementation | s/episode, median [20 %, 80 %] | CPU s/episode | ours / this | ours bf16 / this |",
            "| --- | --- | --- | --- | --- | --- | --- |"]
    shown = set()
    for s in speeds():
        for case in s["cases"]:
            what = f"{case['method']}, {case['inner_steps']} step{'s' * (case['inner_steps'] > 1)}"
            for name in (n for n in CONTENDERS if n in case["contenders"] and (machine(s), what, n) not in shown):
                shown.add((machine(s), what, name))
                c = case["contenders"][name]
                t = c["seconds_per_episode"]
                ratio = lambda mine: f"{c[key]['median']:.2f}" if (key := f"{mine}_over_this_seconds") in c else "-"
                show = lambda seconds: f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.4f}"
                cpu = "-" if s["device"] == "cuda" else show(c["cpu_seconds_per_episode"]["median"])       # it waits for the GPU
                rows.append(f"| {machine(s)} | {what} | {CONTENDERS[name]} | {show(t['median'])} [{show(t['p20'])}, {show(t['p80'])}] "
                            f"| {cpu} | {ratio('ours')} | {ratio('ours_bf16')} |")
    return "\n".join(rows)


def work():
    """One row a machine and method: what an episode computes, and how near to the machine's matrix-multiply rate (CPU time)."""
    rows = ["| machine | method | GFLOP an episode, ours / naive | float32 matrix product, GFLOP/s | ours, share of that rate |",
            "| --- | --- | --- | --- | --- |"]
    shown = set()
    for s in speeds():
        for case in s["cases"]:
            key = machine(s), case["method"], case["inner_steps"]
            if key in shown:
                continue
            shown.add(key)
            flops, rate = case["gflop_per_episode"], s["matmul_gflops"]["float32"]
            clock = "seconds" if s["device"] == "cuda" else "cpu_seconds"
            share = flops["ours"] / case["contenders"]["ours"][f"{clock}_per_episode"]["median"] / rate
            rows.append(f"| {machine(s)} | {case['method']}, {case['inner_steps']} step{'s' * (case['inner_steps'] > 1)} | "
                        f"{flops['ours']:.1f} / {flops['naive']:.1f} | {rate:.0f} | {share:.0%} |")
    return "\n".join(rows)


def scaling():
    """One row a machine and a thing that grows: what an episode costs at each of its values."""
    rows = ["| machine | what grows | seconds per episode | peak memory, GiB |", "| --- | --- | --- | --- |"]
    cell = lambda points: ", ".join(f"{value}: {number:.2f}" for value, number in points.items())
    for s in speeds():
        for what, points in s["scaling"].items():
            seconds = {value: p["seconds_per_episode"]["median"] for value, p in points.items()}
            memory = {value: p["peak_memory_bytes"] / 2**30 for value, p in points.items()}
            rows.append(f"| {machine(s)} | {what.replace('rank', 'columns')} | {cell(seconds)} | {cell(memory)} |")
        if s["peak_memory_bytes"]:
            for key, what in (("whole", "meta-batch, whole"), ("task_chunk_1", "meta-batch, with `--task-chunk 1`")):
                peaks = {tasks: peak[key] / 2**30 for tasks, peak in s["peak_memory_bytes"].items()}
                rows.append(f"| {machine(s)} | {what} | - | {cell(peaks)} |")
    return "\n".join(rows)


def throughput():
    """One row a machine and form of ModGrad's step: episodes a second and peak memory by meta-batch."""
    found = [s for s in speeds() if s.get("throughput")]
    batches = list(dict.fromkeys(tasks for s in found for tasks in s["throughput"]))
    rows = [f"| machine | ModGrad's meta-step | {' | '.join(f'{tasks} tasks: episodes/s, GiB' for tasks in batches)} |",
            f"| --- | --- | {' | '.join('---' for _ in batches)} |"]
    for s in found:
        for name in next(iter(s["throughput"].values())):
            cells = [f"{1 / p['seconds_per_episode']['median']:,.0f}, {p['peak_memory_bytes'] / 2**30:.1f}"
                     for p in (s["throughput"][tasks][name] for tasks in batches)]
            rows.append(f"| {machine(s)} | {CONTENDERS[name]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def kernel_files():
    return [json.loads(path.read_text()) for path in sorted(HERE.glob("kernels-*.json")) if path.stem != "kernels-resources"]


UPDATE = ("forward", "backward", "double backward", "inner step")          # what is timed of the modulated update


def passes():
    """One row a machine and network, at the machine's largest number of tasks: our form's speed over eager's and over the compiler's."""
    rows = [f"| times as fast as eager, as torch.compile | T | {' | '.join(UPDATE)} |", f"| --- | --- | {' | '.join('---' for _ in UPDATE)} |"]
    for file in kernel_files():
        found = {(r["size"], r["tasks"], r["contender"], r["pass"]): r["median_ms"] for r in file["rows"]}
        ours, tasks = "triton" if file["device"].startswith("NVIDIA") else "closed", max(r["tasks"] for r in file["rows"])
        for size in dict.fromkeys(r["size"] for r in file["rows"]):
            ratio = lambda form, name: f"{found[size, tasks, form, name] / found[size, tasks, ours, name]:.2f}"
            cells = " | ".join(f"{ratio('eager', name)}, {ratio('compile', name)}" for name in UPDATE)
            rows.append(f"| {size}: {machine(file)}, {ours} | {tasks} | {cells} |")
    return "\n".join(rows)


def kernels():
    """One row a machine, network and number of tasks: eager's time over ours, over the four passes; on a GPU, of what does not fit its
    cache, also the bytes' rate as a share of the best copy's."""
    rows = [f"| machine | adapted tensors of | T | form | {' | '.join(f'{p}: ms, times faster than eager' for p in UPDATE)} |",
            f"| --- | --- | --- | --- | {' | '.join('---' for _ in UPDATE)} |"]
    for file in kernel_files():
        found = {(r["size"], r["tasks"], r["contender"], r["pass"]): r for r in file["rows"]}
        gpu = file["device"].startswith("NVIDIA")
        left_out, copied = ("eager", "addcmul", *["closed"] * gpu), max(r["copy_gb_per_s"] for r in file["rows"])
        for size, tasks, form in dict.fromkeys(key[:3] for key in found if key[2] not in left_out):
            cells = [found[size, tasks, form, p] for p in UPDATE]
            share = lambda r: f", {r['gb_per_s'] / copied:.0%}" if gpu and r["model_bytes"] > 2 ** 28 else ""
            text = " | ".join(f"{r['median_ms']:.{4 if gpu else 2}f}, {r['times_faster_than_eager']:.2f}{share(r)}" for r in cells)
            rows.append(f"| {machine(file)} | {size} | {tasks} | {form} | {text} |")
    return "\n".join(rows)


PASSES = ("forward", "first derivatives", "second derivatives")


def convolutions():
    """One row a machine, layer and form: GFLOP/s of the three passes."""
    return by_layer("convolutions", "tasks x images", lambda file: f"{file['tasks']} x {file['images']}", "GFLOP/s",
                    lambda row: f"{row['gflops']:.0f}")


def blocks():
    """The same for what follows a convolution; each pass is timed with those before it."""
    return by_layer("blocks", "images", lambda file: file["images"], "ms (times faster than PyTorch)",
                    lambda row: f"{row['median_ms']:.1f} ({row['times_faster_than_pytorch']:.2f})")


def linears():
    """The same for linear layers."""
    return by_layer("linears", "numbers", lambda file: "float32", "GFLOP/s (times faster than PyTorch)",
                    lambda row: f"{row['gflops']:.0f} ({row['times_faster_than_pytorch']:.2f})")


def by_layer(name, size_title, size, unit, cell):
    """One row a machine, layer and form of the files NAME-*.json; size: file -> its text, cell: row of a pass -> its text."""
    rows = [f"| machine | {size_title} | layer | form | {' | '.join(f'{p}, {unit}' for p in PASSES)} |",
            f"| --- | --- | --- | --- | {' | '.join('---' for _ in PASSES)} |"]
    for path in sorted(HERE.glob(f"{name}-*.json")):
        file = json.loads(path.read_text())
        found = {(r["layer"], r["form"], r["pass"]): r for r in file["rows"]}
        for layer, form in dict.fromkeys(key[:2] for key in found):
            cells = " | ".join(cell(found[layer, form, p]) for p in PASSES)
            precision = "" if file.get("precision", "fp32") == "fp32" else f", {file['precision']}"
            rows.append(f"| {machine(file)}{precision} | {size(file)} | {layer} | {form} | {cells} |")
    return "\n".join(rows)


def resources():
    """One row a GPU, dtype and size: registers a thread of each kernel; the largest stack and number of spills of them."""
    file = json.loads((HERE / "kernels-resources.json").read_text())
    names = ("forward", "backward", "shared_backward", "double_backward", "sum")
    rows = [f"| compiled for | dtype | size | {' | '.join(f'{n.replace(chr(95), chr(32))}, registers' for n in names)} | stack bytes, spills |",
            f"| --- | --- | --- | {' | '.join('---' for _ in names)} | --- |"]
    found = {(r["gpu"], r["dtype"], r["size"], r["kernel"]): r for r in file["kernels"] if r["size"] != "network"}
    for gpu, dtype, size in dict.fromkeys(key[:3] for key in found):
        of = [found[gpu, dtype, size, n] for n in names if (gpu, dtype, size, n) in found]
        registers = {r["kernel"]: str(r["registers"]) for r in of}
        rows.append(f"| {gpu} | {dtype} | {size} | {' | '.join(registers.get(n, '-') for n in names)} | "
                    f"{max(r['stack'] for r in of)}, {max(r['spills'] for r in of)} |")
    return "\n".join(rows)


def linked(folder, text):
    return f"[{text}](results/{folder.relative_to(HERE)})"


def grid(titles, rows):
    """A table: titles of the columns, then rows of as many cells."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows))


def table2():
    """Table 2 at full size: one row a method and inner loop, ours beside the paper's at one shot and at five."""
    label = {"modgrad": "ModGrad", "maml": "MAML", "cavia": "CAVIA, 64 filters", "metasgd": "Meta-SGD", "tnet": "T-Net"}
    cells = {(method, ""): {} for method in label}
    for folder, r in runs("miniimagenet"):
        c = r["config"]
        full = (c["backbone"], c["image_size"], c["channels"], r["split"]) == ("conv4", 84, 64, "test") and r["episodes"] > 45_000
        if full and (c["method"] == "maml" or usual(c)):
            layers = "all layers" if len(c["adapt"]) == 10 else f"{' and '.join(adapted_layers(c))} alone"
            loop = f", {layers}, {c['inner_steps']} step{'s' * (c['inner_steps'] > 1)}, alpha {c['inner_lr']:g}" * (c["method"] == "maml")
            text = percent(r) + f", {c['precision']}" + f", seed {r['seed']}" * (r["seed"] != 1)
            cells.setdefault((c["method"], loop), {}).setdefault(c["shots"], []).append(linked(folder, text))
    paper = lambda method, loop, shots: "-" if "alone" in loop else PAPER.get((method, "conv4", shots), "-")
    rows = [[label[method] + loop, *(entry for shots in (1, 5) for entry in ("<br>".join(found.get(shots, "-")), paper(method, loop, shots)))]
            for (method, loop), found in sorted(cells.items(), key=lambda cell: (list(label).index(cell[0][0]), cell[0][1]))
            if found or method != "maml"]
    return grid(["Conv-4", "1-shot: ours, %", "paper, %", "5-shot: ours, %", "paper, %"], rows)


def table3():
    """Table 3: methods after 5,000 and after the paper's 50,000 iterations (40,000 or more), the best linear rule, the paper's numbers."""
    names, cells = {"modgrad": "ModGrad", "maml": "MAML", "cavia": "CAVIA", "cnp": "CNP"}, {}
    for folder, r in runs("celeba"):
        c = r["config"]
        length = 50_000 if r["iterations"] > 40_000 else r["iterations"]
        if length in (5_000, 50_000) and (c["order"], c["pixels"]) in CELLS:
            note = f" ({r['iterations']:,})" * (r["iterations"] != length)
            cells.setdefault((length, list(names).index(c["method"]), c["inner_steps"] or 0), {})[c["order"], c["pixels"]] = (
                linked(folder, interval(r, 4) + note))
    rows = [[f"{list(names.values())[method]}{f', {steps} step' if steps else ''}{'s' * (steps > 1)}", f"{length:,}",
             *(found.get(cell, "-") for cell in CELLS)] for (length, method, steps), found in sorted(cells.items())]
    linear = json.loads((HERE / "celeba/linear.json").read_text())["mse"]
    rows.append(["[best linear rule](results/celeba/linear.py)", "-", *(interval(linear[f"{order} {pixels}"], 4) for order, pixels in CELLS)])
    rows += [[f"paper: {names[method]}", "50,000", *(f"{value:.3f}" for value in values)] for method, values in CELEBA.items()]
    return grid(["mean squared error", "iterations", *(f"{order} {pixels}" for order, pixels in CELLS)], rows)


def figure5():
    """Fig. 5's end points: at the paper's size after a part of its meta-steps, and in shorter runs of a smaller network, seed by seed."""
    names = {"modgrad": "ModGrad", "leap": "LEAP", "reptile": "Reptile", "fomaml": "FOMAML", "maml": "MAML, second order, 5 steps"}
    columns = {(64, None): "at the paper's size, %", (32, 1000): "small, 1,000 meta-steps, %", (32, 200): "small, 200 meta-steps, seeds 1, 2, %"}
    cells = {}
    for folder, r in runs("omniglot"):
        c = r["config"]
        column = c["channels"], r["meta_steps"] if c["channels"] == 32 else None
        chosen = c["method"] != "modgrad" or c["psi_lr"] == (0.0003 if column[1] == 1000 else 0.001)
        if c["protocol"] == "multi-shot" and not folder.name.startswith("candidate") and column in columns and chosen:
            note = f" ({r['best_meta_step'] or r['meta_steps']} meta-steps)" * (column[1] is None)
            cells.setdefault((c["method"], column), []).append(linked(folder, interval(r, 1, 0.01) + note))
    rows = [[names[method], *(", ".join(cells.get((method, column), "-")) for column in columns), OMNIGLOT.get(method, "-")] for method in names]
    return grid(["accuracy", *columns.values(), "paper, 1,000 meta-steps, %"], rows)


def figure8():
    """Fig. 8's end points: return after one and after three updates, seed by seed, ModGrad in its default form."""
    tasks = {"nav": "navigation", "cheetah-dir": "half-cheetah, direction", "cheetah-vel": "half-cheetah, velocity"}
    names = {"modgrad": "ModGrad", "cavia": "CAVIA", "maml": "MAML"}
    cells = {}
    for folder, r in runs("rl"):
        c = r["config"]
        if not re.search("-(kl|first|weights|plain|4tasks)", folder.name):
            note = "" if r["iterations"] == 500 else f" ({r['iterations']} iterations)"
            cells.setdefault((c["env"], c["method"]), {})[r["seed"]] = linked(folder, interval(r, 1)) + f", {r['returns'][3]:.1f}{note}"
    seeds = sorted({seed for found in cells.values() for seed in found})
    rows = [[what, names[method], *(cells[env, method].get(seed, "-") for seed in seeds), RL[env, method]]
            for env, what in tasks.items() for method in names]
    return grid(["return after one update, three", "method", *(f"seed {seed}" for seed in seeds), "paper, after one"], rows)


def fill(text, folder):
    """Replace every table block of a document in `folder`; an unknown name is an error."""
    tables = {table.__name__: table for table in (glance, table2, table3, figure5, figure8, miniimagenet, ablations, shots, steps, methods, seeds, noise, noise_at_full_size,
                                                  modulation, context, celeba, omniglot, rl, ratios, speed, work, throughput,
                                                  scaling, passes, kernels, convolutions, blocks, linears, resources)}
    def table(match):
        rows = tables[match[2]]()
        if rows.count("\n") < 2:
            raise ValueError(f"table {match[2]} has no rows: are its result files there?")
        rows = re.sub(r"\]\((results/[^)]*)", lambda link: "](" + os.path.relpath(HERE.parent / link[1], folder), rows)
        return f"{match[1]}{rows}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", table, text, flags=re.S)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is out of date")
    check, stale = parser.parse_args().check, []
    for path in DOCUMENTS:
        before = path.read_text(encoding="utf-8")
        after = fill(before, path.parent)
        stale += [str(path.relative_to(HERE.parent))] * (after != before)
        if not check:
            path.write_text(after, encoding="utf-8")
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python results/table.py")


if __name__ == "__main__":
    main()
