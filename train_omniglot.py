"""Omniglot: alphabets learned from many images (Fig. 5 of the paper), and few-shot characters.

    python train_omniglot.py --method modgrad

is the paper's multi-shot experiment in LEAP's protocol: a task is an alphabet, 20 of its characters are told apart
after 100 steps on mini-batches of 20 images (paper: ModGrad 85.1 %, `--method leap` 83.3, `reptile` 76.4). LEAP costs
about half a minute per meta-step on one CPU core, 1,000 meta-steps in all. `--protocol few-shot --ways 5 --shots 1` is
the benchmark of MAML. Without the real images it runs on SYNTHETIC alphabets.

DEVIATION: ModGrad's form for the multi-shot experiment is not public. Here each of the 100 steps is its inner step on
that mini-batch, with nu from a trial step (Eq. 9: two gradients where the other methods take one). theta learns by LEAP's
rule along the trajectory, psi by the held-out loss after short unrolls from points of it (--windows, --unroll): so psi
sees the held-out drawings of the training alphabets, Algorithm 1's validation data, as LEAP, Reptile and FOMAML do not.

Shapes: T tasks, B images of a mini-batch, N images of a task, S = 28 pixels a side, A alphabets, P images of one,
K characters or mini-batches, C channels, D context size.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common import (DataError, HelpFormatter, Training, UsageError, add_cuda_graph_flag, add_run_flags, append_log,
                    cached_array, copy_weights, extract_archive, fetch_file, fill_in, fingerprint_files, load_weights,
                    mean_ci95, non_negative_float, open_run, parse_run, plot_log, positive_float, positive_int, progress,
                    random_order, replays, run_main, save_atomically, setup, several_int, subfolders, takes_cuda_graph,
                    to_device, whole_float32, write_result)
from kernels import batch_norm, conv2d, modulated_step, resolve_backend
from modgrad import Chain, Generator, adapt, check_names, conv4

# --- flags -----------------------------------------------------------------------------------------------------------

EVALUATION_SEED = 20200823      # of validation and test tasks: the same for every run (multi-shot: whose seed draws the same alphabets)
DRAWN = 10                      # few-shot evaluation tasks drawn at once, whatever --eval-batch is: else it would choose them
SIDE = 28                       # pixels per side, in every protocol on Omniglot
BLOCKS = range(1, 5)            # of the network
METHODS = ("modgrad", "leap", "reptile", "fomaml", "maml")
PROTOCOLS = {                   # what differs between the protocols; LEAP's multi-shot, MAML's few-shot
    "multi-shot": {"ways": 20, "meta_steps": 1000, "meta_batch": 20, "val_every": 20, "log_every": 10,
                   "checkpoint_every": 10, "inner_steps": 100, "inner_lr": 0.1, "psi_lr": 3e-4},
    "few-shot": {"ways": 5, "meta_steps": 60_000, "meta_batch": 32, "val_every": 1000, "log_every": 20,
                 "checkpoint_every": 100, "inner_lr": 0.1, "meta_lr": 1e-3, "psi_lr": 1e-3},
}
LAYERS = ("conv1", "conv2", "conv3", "conv4", "head")
WEIGHTS = [f"{layer}.weight" for layer in LAYERS]
LAST_CONVOLUTIONS = ["conv3.weight", "conv3.bias", "conv4.weight", "conv4.bias"]
DEFAULTS = {                    # what differs between the methods
    ("multi-shot", "modgrad"): {"meta_lr": 0.1, "adapt": WEIGHTS},
    ("multi-shot", "leap"): {"meta_lr": 0.1},
    ("multi-shot", "reptile"): {"meta_lr": 0.1},
    ("multi-shot", "fomaml"): {"meta_lr": 0.5},
    ("multi-shot", "maml"): {"meta_lr": 0.5, "inner_steps": 5},
    ("few-shot", "modgrad"): {"inner_steps": 1, "adapt": LAST_CONVOLUTIONS},
    ("few-shot", "maml"): {"inner_steps": 5, "adapt": [f"{layer}.{kind}" for layer in LAYERS
                                                       for kind in ("weight", "bias")]},
}
SMOKE = {"meta_steps": 6, "val_every": 3, "val_episodes": 8, "test_episodes": 16, "meta_batch": 3, "channels": 16,
         "context_dim": 32, "log_every": 2, "checkpoint_every": 3}


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    task = parser.add_argument_group("task")
    task.add_argument("--data", help="folder with Omniglot (default: data/omniglot if there, else SYNTHETIC data)")
    task.add_argument("--download", action="store_true", help="fetch Omniglot into --data first (16 MB)")
    task.add_argument("--protocol", choices=tuple(PROTOCOLS), default="multi-shot",
                      help="multi-shot: an alphabet is a task (Fig. 5); few-shot: the usual 5-way or 20-way one")
    task.add_argument("--train-alphabets", type=positive_int, default=25, help="multi-shot: N, to train (paper: 25)")
    task.add_argument("--batch", type=positive_int, default=20, help="multi-shot: images of a mini-batch (LEAP: 20)")
    task.add_argument("--imbalanced", action="store_true",
                      help="multi-shot: 1 to 25 images per class, drawn for each task (the paper's text; above the 15 "
                           "there are, drawings repeat), instead of 15 (LEAP's code)")
    task.add_argument("--ways", type=positive_int, help="classes per task (multi-shot 20; few-shot default 5)")
    task.add_argument("--shots", type=positive_int, default=1, help="few-shot: support images per class")
    task.add_argument("--queries", type=positive_int, default=15, help="few-shot: query images per class")

    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=METHODS, default="modgrad",
                        help="the meta-learner; leap and reptile are for multi-shot")
    method.add_argument("--channels", type=positive_int, default=64, help="filters per convolution (LEAP: 64)")
    method.add_argument("--inner-steps", type=positive_int, help="K while meta-training (default: multi-shot 100, its "
                        "maml 5; few-shot modgrad 1, maml 5)")
    method.add_argument("--inner-lr", type=positive_float, help="alpha (default: 0.1)")
    method.add_argument("--adapt", nargs="+", metavar="NAME",
                        help="multi-shot: tensors whose gradient is modulated (default: all weights), while all "
                             "move; few-shot: tensors that move (default: modgrad the last two convolutions, maml all "
                             "convolutions and the head)")
    method.add_argument("--rank", type=positive_int, default=5, help="u, columns per sister network (paper: 5)")
    method.add_argument("--context-dim", type=positive_int, default=300, help="D, length of nu")
    method.add_argument("--hidden-cap", type=positive_int, default=256, help="largest hidden layer of a sister network")
    method.add_argument("--factors", choices=("flat", "natural"), default="flat",
                        help="matrix view of a convolution: flat (o k) x (i k), natural o x (i k k)")
    method.add_argument("--init", choices=("identity", "released"), default="identity",
                        help="M at the start of training: 1, or PyTorch's default layers (M near 0)")
    method.add_argument("--first-order", action="store_true", help="modgrad, maml: no second derivatives")
    method.add_argument("--theta-update", choices=("leap", "held-out"), default="leap",
                        help="multi-shot modgrad: theta by LEAP's rule over the whole trajectory, or, like psi, by the "
                             "loss on held-out images after each window, as if the steps before it were the identity")
    method.add_argument("--windows", type=positive_int, default=2,
                        help="multi-shot modgrad: places of the trajectory, drawn for each meta-step, where psi learns")
    method.add_argument("--unroll", type=positive_int, default=1, help="multi-shot modgrad: steps of a window that are "
                        "differentiated")
    method.add_argument("--gradient-noise", type=non_negative_float, default=0.0,
                        help="few-shot: eta, standard deviation of noise on the inner gradient")
    method.add_argument("--kernel", choices=("auto", "triton", "closed", "eager"), default="auto",
                        help="the modulated update: auto is Triton on CUDA, closed forms on the CPU")

    train = parser.add_argument_group("meta-training")
    train.add_argument("--meta-steps", type=positive_int, help="updates (default: multi-shot 1000, few-shot 60000)")
    train.add_argument("--meta-batch", type=positive_int, help="tasks of one (default: multi-shot 20, few-shot 32)")
    train.add_argument("--meta-lr", type=positive_float, help="of theta: multi-shot SGD (default: modgrad, leap, "
                       "reptile 0.1, fomaml, maml 0.5), few-shot Adam (default 1e-3)")
    train.add_argument("--psi-lr", type=positive_float, help="Adam's rate for psi (default: multi-shot 3e-4, few-shot 1e-3, the "
                       "paper's on mini-ImageNet)")
    add_cuda_graph_flag(train)
    train.add_argument("--val-every", type=positive_int, help="meta-steps between validations (default: multi-shot 20, "
                       "few-shot 1000); the best weights are tested, those of the end where none was made")
    train.add_argument("--val-episodes", type=several_int, default=200, help="few-shot: validation tasks")
    train.add_argument("--log-every", type=positive_int, help="meta-steps per line of log.jsonl (default: multi-shot 10, "
                       "few-shot 20)")
    train.add_argument("--checkpoint-every", type=positive_int, help="meta-steps between checkpoints (default: multi-shot 10, "
                       "few-shot 100)")

    test = parser.add_argument_group("test")
    test.add_argument("--test-steps", type=positive_int,
                      help="steps at validation and test (default: multi-shot 100, few-shot as in training)")
    test.add_argument("--test-episodes", type=several_int, default=600,
                      help="few-shot: test tasks (multi-shot: all 10 test alphabets)")
    test.add_argument("--test-split", choices=("test", "val"), default="test", help="classes of the final evaluation")
    test.add_argument("--eval-batch", type=positive_int, default=10, help="tasks evaluated at once")
    test.add_argument("--smoke", action="store_true", help="a complete tiny run on SYNTHETIC data in under a minute")

    use = parser.add_argument_group("without training")
    use.add_argument("--figure", nargs="+", metavar="RUN", help="draw Fig. 5 from these finished multi-shot runs")
    use.add_argument("--picture", default="figure5.png", help="file that --figure writes (.png, .pdf, .svg)")
    use.add_argument("--benchmark", action="store_true", help="time meta-steps against a loop over tasks and images")
    add_run_flags(parser, bf16=True)
    return complete(parse_run(parser, argv, lambda given: SMOKE, unread))


def unread(args: argparse.Namespace) -> dict:
    """Flags that protocol and method do not read: {whose they are: names}."""
    flags = {}
    if args.method not in ("modgrad", "maml"):
        flags["for --method modgrad or maml"] = ["first_order"]
    if args.protocol == "few-shot":
        flags["for --protocol multi-shot"] = ["train_alphabets", "batch", "imbalanced", "benchmark", "theta_update", "windows",
                                              "unroll"]
    else:
        flags["for --protocol few-shot"] = ["shots", "queries", "val_episodes", "test_episodes", "gradient_noise"]
    return flags


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on protocol, method or --smoke, and refuse combinations that mean nothing."""
    if args.protocol == "few-shot" and args.method not in ("modgrad", "maml"):
        raise UsageError(f"--protocol few-shot has the methods modgrad and maml, not {args.method}")
    if not args.picture.endswith((".png", ".pdf", ".svg")):
        raise UsageError(f"--picture {args.picture}: give it a name that ends in .png, .pdf or .svg")
    if args.smoke:
        if args.data or args.download:
            raise UsageError("--smoke runs on the synthetic alphabets: leave out --data and --download")
    multi_shot = args.protocol == "multi-shot"
    if multi_shot and args.adapt and args.method != "modgrad":
        raise UsageError(f"--adapt tells in the multi-shot protocol whose gradient modgrad modulates; with {args.method} all weights move")
    defaults = {**PROTOCOLS[args.protocol], **DEFAULTS[args.protocol, args.method]}
    if args.smoke and multi_shot:
        defaults |= {"inner_steps": min(defaults["inner_steps"], 10), "test_steps": 20}
    fill_in(args, defaults)
    args.test_steps = args.test_steps or (100 if multi_shot else args.inner_steps)
    if multi_shot and args.ways != CHARACTERS:
        raise UsageError(f"--ways is {args.ways}, but a multi-shot task has {CHARACTERS} characters")
    if args.batch < 2:
        raise UsageError(f"--batch is {args.batch}, but batch norm needs 2 images")
    if multi_shot and args.method in ("modgrad", "leap", "reptile") and args.inner_steps < 2:
        raise UsageError(f"--inner-steps is {args.inner_steps}, but {args.method} compares successive steps: use 2")
    if multi_shot and args.method == "modgrad" and args.inner_steps < args.unroll + args.windows - 1:
        raise UsageError(f"{args.windows} windows of {args.unroll} step(s) do not fit into {args.inner_steps} steps")
    kind = f"{args.ways}way-{args.shots}shot-" if not multi_shot else ""
    args.out = args.out or f"runs/omniglot/{args.protocol}-{kind}{args.method}-seed{args.seed}{'-smoke' * args.smoke}"
    return args


# --- data ------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "val", "test")
DRAWINGS = 20                                   # of each character, one per person
CHARACTERS = 20                                 # of an alphabet in a multi-shot task
HELD_OUT = 5                                    # drawings of a character that are not adapted to
TEST_ALPHABETS = 10
HALVES = {"images_background": (30, 964), "images_evaluation": (20, 659)}      # alphabets, characters
ARCHIVES = {
    "images_background": {"size": 9_464_212, "md5": "68d2efa1b9178cc56df9314c21c6e718",
                          "sha256": "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"},
    "images_evaluation": {"size": 6_462_886, "md5": "6b91aef0f799c5bb55b94e3f2daec811",
                          "sha256": "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee"},
}
SOURCE = "https://github.com/brendenlake/omniglot/raw/master/python"
LAYOUTS = """\
  images_background/ALPHABET/CHARACTER/*.png and images_evaluation/ALPHABET/CHARACTER/*.png (both zips, unpacked)
  ALPHABET/CHARACTER/*.png (alphabets of your own)
with 20 drawings per character"""


class Drawings(NamedTuple):
    """All characters, sorted by alphabet and name."""
    images: np.ndarray      # uint8 (K, 20, S, S), 1 paper, 0 ink
    alphabets: list         # K names: the alphabet of each character
    dataset: str
    synthetic: bool


class Alphabets(NamedTuple):
    """The tasks of a multi-shot split: uint8, 1 paper, 0 ink; rows sorted by character, which is the label."""
    train: Tensor           # (A, 20 * 15, S, S), adapted to
    held_out: Tensor        # (A, 20 * 5, S, S)
    names: list             # A


def load_drawings(root: str | Path) -> Drawings:
    """Read all drawings below `root`, once; then they come from a cache beside the data. Raises DataError."""
    root = Path(root)
    index = read_index(root)
    files = [path for character in index.values() for path in character]
    # Names relative to the root: all characters hold files of the same kind of name.
    mark = fingerprint_files(files) + "".join(f"{alphabet}/{name}" for alphabet, name in index)
    images = cached_array(root / "cache", f"drawings-{SIDE}", mark, lambda: _decode(files))
    alphabets = [alphabet for alphabet, _ in index]
    return Drawings(images.reshape(-1, DRAWINGS, SIDE, SIDE), alphabets, "omniglot", synthetic=False)


def find_data(root: Path) -> Path | None:
    """`root` if it holds a folder that may be data, else None."""
    return root if any(path.name != "cache" for path in subfolders(root)) else None


def read_index(root: Path) -> dict[tuple[str, str], list[Path]]:
    """{(alphabet, character): 20 files}, sorted. Raises DataError where something is missing."""
    if not find_data(root):
        raise DataError(f"no Omniglot in {root.absolute()}; looked for\n{LAYOUTS}\n"
                        f"To download it: python train_omniglot.py --download --data {root}")
    halves = [root / half for half in HALVES if (root / half).is_dir()]
    if len(halves) == 1:
        missing = next(half for half in HALVES if not (root / half).is_dir())
        raise DataError(f"{root} lacks the folder {missing}: unpack both zips there")
    index = {}
    for folder in halves or [root]:
        part = {(alphabet.name, character.name): sorted(character.glob("*.png"))
                for alphabet in subfolders(folder) if alphabet.name != "cache" for character in subfolders(alphabet)}
        _check_index(folder, part)
        index |= part
    return dict(sorted(index.items()))


def _check_index(folder: Path, part: dict) -> None:
    found = len({alphabet for alphabet, _ in part}), len(part)
    expected = HALVES.get(folder.name, found)
    if found != expected or not part:
        raise DataError(f"{folder} holds {found[0]} alphabets with {found[1]} characters, not {expected[0]} with "
                        f"{expected[1]}: unpack it again")
    for (alphabet, character), files in part.items():
        if len(files) != DRAWINGS:
            raise DataError(f"{folder / alphabet / character} holds {len(files)} drawings (*.png), not {DRAWINGS}")


def _decode(files: list[Path]) -> np.ndarray:
    """uint8 (len(files), S, S); on threads, since PIL releases the GIL."""
    with ThreadPoolExecutor() as pool, progress(len(files), 0, "decoding") as bar:
        rows = []
        for row in pool.map(_read_drawing, files, chunksize=64):
            rows.append(row)
            bar.update(1)
    return np.stack(rows)


def _read_drawing(path: Path) -> np.ndarray:
    """1 paper, 0 ink; nearest-neighbour resizing, which PIL uses for 1-bit images whatever filter is asked for."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.NEAREST)) // 128
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not a readable image: {error}") from None


def download(root: Path) -> None:
    """Fetch and unpack both halves of Omniglot into `root`; zips and folders that are there already are used."""
    for half, known in ARCHIVES.items():
        if (root / half).is_dir():
            continue
        archive = fetch_file([f"{SOURCE}/{half}.zip"], root / f"{half}.zip", **known,
                             manual=f"By hand: unpack {SOURCE}/{half}.zip into {root.absolute()}")
        extract_archive(archive, root)


def synthetic_drawings(alphabets: int = 46, seed: int = 0) -> Drawings:
    """SYNTHETIC alphabets of 20 characters: 2 or 3 bent strokes each, drawn 20 times with jitter in every point.

    The strokes of an alphabet end on a few points of its own, so that its characters resemble each other.
    """
    rng = np.random.default_rng(seed)
    images = np.ones((alphabets * CHARACTERS, DRAWINGS, SIDE, SIDE), np.uint8)
    for number in range(alphabets):
        anchors = rng.uniform(0.15, 0.85, (6, 2))
        for character in range(CHARACTERS):
            ends = rng.integers(0, 6, (rng.integers(2, 4), 3))
            strokes = anchors[ends] + rng.normal(0, 0.06, (1, 3, 2))                         # (n, 3, 2)
            images[number * CHARACTERS + character] -= _draw_strokes(strokes, rng)
    names = [f"synthetic-{number:02d}" for number in range(alphabets) for _ in range(CHARACTERS)]
    return Drawings(images, names, "synthetic", synthetic=True)


def _draw_strokes(strokes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Quadratic Bezier curves (n, 3, 2) in the unit square -> ink uint8 (20, S, S)."""
    points = strokes + rng.normal(0, 0.03, (DRAWINGS, *strokes.shape)) + rng.normal(0, 0.03, (DRAWINGS, 1, 1, 2))
    t = np.linspace(0, 1, 40)[:, None]
    bezier = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t ** 2], 1)[..., 0]                    # (40, 3)
    curves = np.einsum("pk,dnkc->dnpc", bezier, points).reshape(DRAWINGS, -1, 2)
    y, x = np.moveaxis((curves * SIDE).astype(int).clip(0, SIDE - 2), 2, 0)                 # (20, n * 40) each
    ink = np.zeros((DRAWINGS, SIDE, SIDE), np.uint8)
    for dy, dx in itertools.product((0, 1), (0, 1)):                                        # a pen two pixels wide
        ink[np.arange(DRAWINGS)[:, None], y + dy, x + dx] = 1
    return ink


def split_alphabets(drawings: Drawings, train_alphabets: int, seed: int, device: torch.device) -> dict[str, Alphabets]:
    """LEAP's split: alphabets of at least 20 characters in an order drawn by the seed; train, 10 to test, the rest val.

    20 characters of each are drawn once. Raises DataError where there are too few alphabets.
    """
    rows = {name: [] for name in sorted(set(drawings.alphabets))}
    for k, name in enumerate(drawings.alphabets):
        rows[name].append(k)
    usable = [name for name in rows if len(rows[name]) >= CHARACTERS]
    needed = train_alphabets + TEST_ALPHABETS + 1
    if len(usable) < needed:
        raise DataError(f"{len(usable)} of {len(rows)} alphabets have at least {CHARACTERS} characters, but {needed} "
                        f"are needed: {train_alphabets} to train (--train-alphabets), {TEST_ALPHABETS} to test, 1 to "
                        "validate")
    rng = random.Random(seed)
    rng.shuffle(usable)
    chosen = [rng.sample(rows[name], CHARACTERS) for name in usable]
    images = torch.from_numpy(drawings.images[np.array(chosen)]).to(device)                 # (A, 20, 20, S, S)
    train, held_out = images[:, :, HELD_OUT:].flatten(1, 2), images[:, :, :HELD_OUT].flatten(1, 2)
    part = lambda a, b: Alphabets(train[a:b], held_out[a:b], usable[a:b])
    cut = train_alphabets + TEST_ALPHABETS
    return {"train": part(0, train_alphabets), "test": part(train_alphabets, cut), "val": part(cut, None)}


def split_characters(drawings: Drawings, device: torch.device) -> dict[str, Tensor]:
    """Few-shot classes uint8 (classes, 20, S, S), 1 ink: each character upright and turned by 90, 180 and 270 degrees.

    Of 1,623 characters 1,100 train, 100 validate and 423 test, the same for every run; other numbers in proportion.
    """
    count = len(drawings.images)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(EVALUATION_SEED))
    sizes = [round(count * share / 1623) for share in (1100, 100)]
    images = 1 - torch.from_numpy(np.array(drawings.images))
    turned = lambda rows: torch.cat([images[rows].rot90(turn, (2, 3)) for turn in range(4)]).to(device)
    return dict(zip(SPLITS, map(turned, order.split([*sizes, count - sum(sizes)]))))


def sample_episodes(classes: Tensor, tasks: int, args: argparse.Namespace, rng: torch.Generator) -> tuple[Tensor, ...]:
    """T few-shot tasks: distinct classes, support and query disjoint, rows interleave the classes.

    uint8 (classes, 20, S, S) -> support_x (T, ways * shots, 1, S, S), support_y (T, ways * shots), query_x, query_y.
    Raises UsageError for impossible sizes.
    """
    each = args.shots + args.queries
    if args.ways > len(classes) or each > DRAWINGS:
        raise UsageError(f"{args.ways} ways and {args.shots} shots + {args.queries} queries are asked for, but there "
                         f"are {len(classes)} classes of {DRAWINGS} drawings")
    chosen = random_order((tasks, len(classes)), rng)[:, :args.ways]                         # (T, ways)
    members = random_order((tasks, args.ways, DRAWINGS), rng)[:, :, :each]                   # (T, ways, each)
    rows = (chosen[:, :, None] * DRAWINGS + members).transpose(1, 2).reshape(tasks, -1)      # (T, N)
    x = classes.flatten(0, 1)[to_device(rows, classes.device)].unsqueeze(2).to(activation_type(args))   # (T, N, 1, S, S)
    y = torch.arange(args.ways, device=classes.device).repeat(tasks, each)                   # (T, N)
    cut = args.ways * args.shots
    return x[:, :cut], y[:, :cut], x[:, cut:], y[:, cut:]


class Batches(NamedTuple):
    """The mini-batches of T tasks: which drawings, and how each is moved."""
    images: Tensor          # uint8 (A * P, S, S), all drawings
    rows: Tensor            # (K, T, B) into images, K mini-batches
    labels: Tensor          # (K, T, B)
    moves: Tensor           # (K, T, B, 2, 3), see `draw_moves`
    dtype: torch.dtype      # of the images that are given out

    def of(self, tasks: Tensor) -> Batches:
        """Those of some of the tasks only."""
        return self._replace(rows=self.rows[:, tasks], labels=self.labels[:, tasks], moves=self.moves[:, tasks])

    def take(self, k: int) -> tuple[Tensor, Tensor]:
        """Mini-batch k: images (T, B, 1, S, S), labels (T, B)."""
        return move(self.images[self.rows[k]].unsqueeze(2).float(), self.moves[k]).to(self.dtype), self.labels[k]


def draw_batches(images: Tensor, alphabets: Tensor, steps: int, batch: int, rng: torch.Generator,
                 imbalanced: bool = False, dtype: torch.dtype = torch.float32) -> Batches:
    """`steps` mini-batches of each of T alphabets (T): all drawings in random order, again and again (as LEAP's code).

    images uint8 (A, P, S, S), P = 20 * drawings of a character; rng on the CPU, so that every device sees the same.
    """
    tasks, per_alphabet = len(alphabets), images.shape[1]
    each = per_alphabet // CHARACTERS
    if imbalanced:
        pool, sizes = imbalanced_pool(tasks, each, rng)
    else:
        pool, sizes = torch.arange(per_alphabet).expand(tasks, -1), torch.tensor(per_alphabet)
    order = random_order((tasks, steps * batch), rng) % sizes                                # (T, K B)
    within = pool.gather(1, order).unflatten(1, (steps, batch)).transpose(0, 1)              # (K, T, B)
    rows, moves = alphabets[:, None] * per_alphabet + within, draw_moves(within.shape, rng)
    return Batches(images.flatten(0, 1), *(to_device(t, images.device) for t in (rows, within // each, moves)), dtype)


def imbalanced_pool(tasks: int, each: int, rng: torch.Generator, most: int = 25) -> tuple[Tensor, Tensor]:
    """n ~ U{1..25} drawings for each class of each task, distinct up to `each`, then repeated.

    Returns (T, 20 * 25) and sizes (T, 1): the first `size` entries of a row count.
    """
    wanted = torch.randint(1, most + 1, (tasks, CHARACTERS, 1), generator=rng)
    order = random_order((tasks, CHARACTERS, each), rng).repeat(1, 1, math.ceil(most / each))[..., :most]
    rows = order + each * torch.arange(CHARACTERS)[:, None]                                  # (T, 20, 25)
    unused = torch.arange(most) >= wanted
    first = unused.flatten(1).to(torch.uint8).argsort(dim=1, stable=True)
    return rows.flatten(1).gather(1, first), wanted.sum(1)


def choose_alphabets(available: int, tasks: int, rng: torch.Generator) -> Tensor:
    """T alphabets in random order, repeated only where there are fewer than T."""
    return torch.cat([torch.randperm(available, generator=rng) for _ in range(math.ceil(tasks / available))])[:tasks]


def draw_moves(shape: Iterable[int], rng: torch.Generator) -> Tensor:
    """LEAP's random affine maps: turn by any angle, shift by up to 20 % along each axis, scale by 0.8 to 1.2.

    Returns (*shape, 2, 3): from places of the new image to places of the old one, both in [-1, 1].
    """
    angle, scale, shift_x, shift_y = torch.rand(4, *shape, generator=rng)
    angle, scale = 2 * math.pi * angle, 0.8 + 0.4 * scale
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    back = turn / scale[..., None, None]
    shift = 2 * (0.4 * torch.stack([shift_x, shift_y], -1) - 0.2).unsqueeze(-1)              # [-1, 1] is two units wide
    return torch.cat([back, -back @ shift], -1)


def move(images: Tensor, moves: Tensor) -> Tensor:
    """Apply affine maps (T, B, 2, 3) to images (T, B, 1, S, S); nearest pixel, 0 (ink) where the old image ends."""
    flat = images.flatten(0, 1)
    with whole_float32():
        grid = F.affine_grid(moves.flatten(0, 1), flat.shape, align_corners=False)
    return F.grid_sample(flat, grid, mode="nearest", align_corners=False).unflatten(0, images.shape[:2])


def activation_type(args: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if args.precision == "bf16" else torch.float32


# --- network ---------------------------------------------------------------------------------------------------------

class Learner(NamedTuple):
    """What is meta-learned; the few-shot network is cut where adaptation begins."""
    theta: dict[str, Tensor]        # every tensor of the base network
    generator: Generator | None     # psi; None for M = 1
    adapted: tuple[str, ...]        # few-shot: names of the tensors that the inner loop changes
    prefix: Chain                   # few-shot: images -> features, the same before and after adaptation
    suffix: Chain                   # few-shot: features -> logits, reads the adapted tensors

    state, load = copy_weights, load_weights        # state() -> a copy on the CPU, load(state)

    def parameters(self) -> list[Tensor]:
        return [*self.theta.values(), *(self.generator.parameters() if self.generator else ())]


def build_learner(args: argparse.Namespace, device: torch.device) -> Learner:
    theta, network = conv4(args.ways, args.channels, SIDE, in_channels=1)
    theta = {name: nn.Parameter(t.detach().to(device)) for name, t in theta.items()}
    generator = None
    if args.method == "modgrad":
        check_names(args.adapt, theta)
        generator = Generator({name: theta[name].shape for name in args.adapt}, args.context_dim, args.rank,
                              args.factors, args.init, args.hidden_cap).to(device)
    adapted = tuple(args.adapt or theta)
    return Learner(theta, generator, adapted, *network.split(adapted))


Running = dict[int, tuple[Tensor, Tensor]]


def fresh_statistics(tasks: int, args: argparse.Namespace, device: torch.device) -> Running:
    """Running mean and variance of each block's batch norm at a task's start: {block: (T * C), (T * C)}."""
    size = tasks * args.channels
    return {k: (torch.zeros(size, device=device), torch.ones(size, device=device)) for k in BLOCKS}


def classify(theta: dict[str, Tensor], x: Tensor, running: Running | None = None, training: bool = True) -> Tensor:
    """The multi-shot network, 4 x [conv 3x3, max-pool 2, batch norm, ReLU], linear: x (T, B, 1, S, S) -> (T, B, 20).

    theta is per task, (T, *shape). With `training` batch norm uses the batch's statistics of each task and updates
    `running`, if given, in place; otherwise it uses `running`. LEAP's order of layers; modgrad.conv4 normalises first.
    """
    tasks, count = x.shape[:2]
    # Tasks side by side as groups of channels, channels last: 1.5 times as fast as a loop over tasks on a CPU.
    h = x.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)       # (B, T, S, S)
    for k in BLOCKS:
        weight, bias, gamma, beta = (theta[f"{layer}{k}.{kind}"].flatten(0, 1)
                                     for layer in ("conv", "norm") for kind in ("weight", "bias"))
        weight, bias = weight.to(h.dtype), bias.to(h.dtype)
        if k == 1 and x.is_cuda:                        # cuDNN's grouped kernels for one channel are far from its others
            h = product_and_pool(x, weight, bias)
        else:
            h = F.max_pool2d(conv2d(h, weight, bias, groups=tasks), 2)                      # (B, T C, S / 2, S / 2)
        if running is None:
            h = batch_norm(h, gamma, beta)
        else:
            h = F.batch_norm(h, *running[k], gamma, beta, training, momentum=0.1)
        h = F.relu(h)
    weight, bias = theta["head.weight"], theta["head.bias"]
    h = h.reshape(count, tasks, -1).transpose(0, 1).to(weight.dtype)                         # (T, B, C)
    return torch.baddbmm(bias.unsqueeze(1), h, weight.transpose(1, 2))


def product_and_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution 3x3 of images and max-pool 2, as a matrix product for each image: x (T, B, 1, S, S), weight (T C, 1, 3, 3),
    bias (T C) -> (B, T C, S / 2, S / 2), channels last."""
    tasks, count, _, side, _ = x.shape
    patches = F.pad(x[:, :, 0], (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).reshape(tasks, count, side * side, 9)
    y = patches @ weight.view(tasks, 1, -1, 9).transpose(2, 3)                              # (T, B, S S, C)
    y = F.max_pool2d(y.reshape(tasks * count, side, side, -1).movedim(-1, 1), 2)            # (T B, C, S / 2, S / 2)
    y = y.unflatten(0, (tasks, count)).transpose(0, 1).flatten(1, 2) + bias[:, None, None]
    return y.contiguous(memory_format=torch.channels_last)


# --- task loss -------------------------------------------------------------------------------------------------------

def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each task: logits (T, N, ways), labels (T, N) -> (T,)."""
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers of each task (T,); where a logit is not finite, argmax would answer the first class: that is wrong."""
    return ((logits.argmax(-1) == labels) & logits.isfinite().all(-1)).float().mean(1)


def adapt_and_predict(learner: Learner, args: argparse.Namespace, support_x: Tensor, support_y: Tensor, query_x: Tensor,
                      rng: torch.Generator | None, train: bool) -> Tensor:
    """Few-shot: adapt to each support set, then classify its queries: (T, Nq, 1, S, S) -> (T, Nq, ways)."""
    theta = learner.theta
    with torch.set_grad_enabled(train):
        features = learner.prefix(theta, support_x)
        loss = lambda adapted: cross_entropy(learner.suffix({**theta, **adapted}, features), support_y)
        adapted = adapt(loss, {name: theta[name] for name in learner.adapted}, len(support_x), args.inner_lr,
                        learner.generator, steps=args.inner_steps if train else args.test_steps,
                        first_order=args.first_order, noise_std=args.gradient_noise, rng=rng, differentiable=train,
                        kernel=args.kernel)
        return learner.suffix({**theta, **adapted}, learner.prefix(theta, query_x))


# --- inner loop of the multi-shot protocol ---------------------------------------------------------------------------

Tensors = dict[str, Tensor]


class Step(NamedTuple):
    """One step of T tasks along their trajectories."""
    theta: Tensors          # before the step, {name: (T, *shape)}
    losses: Tensor          # (T,), of the step's mini-batch at theta
    gradient: Tensors       # of those losses
    after: Tensors          # theta after the step


def inner_step(learner: Learner, args: argparse.Namespace, theta: Tensors, x: Tensor, y: Tensor,
               running: Running | None = None, graph: bool = False) -> Step:
    """One SGD step of every task on its mini-batch; with psi, modulated by M(nu), nu from the same mini-batch (Eq. 9).

    `graph` keeps what a derivative through the gradient and through nu needs.
    """
    losses = cross_entropy(classify(theta, x, running), y)
    grads = torch.autograd.grad(losses.sum(), list(theta.values()), create_graph=graph)
    gradient, factors = dict(zip(theta, grads)), {}
    if learner.generator:
        nu = losses.new_zeros(len(x), args.context_dim).requires_grad_()
        trial = update(theta, gradient, learner.generator(nu), args)
        trial_loss = cross_entropy(classify(trial, x), y).sum()
        factors = learner.generator(-torch.autograd.grad(trial_loss, nu, create_graph=graph)[0])
    return Step(theta, losses, gradient, update(theta, gradient, factors, args))


def update(theta: Tensors, gradient: Tensors, factors: dict, args: argparse.Namespace) -> Tensors:
    """theta - alpha M ⊙ gradient for the tensors that have factors, M = 1 for the others."""
    after = {name: theta[name] - args.inner_lr * gradient[name] for name in theta if name not in factors}
    if factors:
        rows, cols = zip(*factors.values())
        views = [(len(row), row.shape[1], -1) for row in rows]                               # (T, n1, n2)
        stepped = modulated_step([theta[name].reshape(view) for name, view in zip(factors, views)],
                                 [gradient[name].reshape(view) for name, view in zip(factors, views)],
                                 [args.inner_lr * row for row in rows], list(cols), kernel=args.kernel)
        after |= {name: t.reshape(theta[name].shape) for name, t in zip(factors, stepped)}
    return {name: after[name] for name in theta}


def leaves(theta: Tensors) -> Tensors:
    return {name: t.detach().requires_grad_() for name, t in theta.items()}


def expand(theta: Tensors, tasks: int) -> Tensors:
    """The same start for every task, {name: (T, *shape)}."""
    return {name: t.detach().expand(tasks, *t.shape) for name, t in theta.items()}


def first_order_step(learner: Learner, args: argparse.Namespace, theta: Tensors, x: Tensor, y: Tensor, running: Running) -> Step:
    """`inner_step` from theta as a constant; nothing is kept for a derivative."""
    step = inner_step(learner, args, leaves(theta), x, y, running)
    return Step(theta, step.losses.detach(), step.gradient, {name: t.detach() for name, t in step.after.items()})


class Parts(NamedTuple):
    """What a meta-step repeats, on a GPU recorded once and replayed."""
    take_step: Callable[..., Step]          # first_order_step(theta, x, y, running)
    leap_segment: Callable[..., Tensors]    # leap_segment(total, one, two)
    window_gradients: Callable[..., tuple]  # window_gradients(start, batches)


def launched_parts(learner: Learner, args: argparse.Namespace) -> Parts:
    bound = lambda function: functools.partial(function, learner, args)
    return Parts(bound(first_order_step), leap_segment, bound(window_gradients))


def make_parts(learner: Learner, args: argparse.Namespace, device: torch.device) -> Parts:
    """On a GPU recorded as CUDA graphs, unless the flags forbid it."""
    parts = launched_parts(learner, args)
    if not takes_cuda_graph(args, device):
        return parts
    names, pairs = list(learner.theta), lambda tensors: dict(zip(BLOCKS, zip(tensors[::2], tensors[1::2])))
    named, count = lambda tensors: dict(zip(names, tensors)), len(names)

    def flat_step(x: Tensor, y: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        statistics = tensors[count:]                                                         # batch norm's, changed in place
        step = parts.take_step(named(tensors), x, y, pairs(statistics))
        return step.losses, *step.gradient.values(), *step.after.values(), *statistics

    def flat_segment(losses: Tensor, next_losses: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        total, theta, next_theta, gradient = (named(tensors[first:]) for first in range(0, 4 * count, count))
        return tuple(leap_segment(total, Step(theta, losses, gradient, {}), Step(next_theta, next_losses, {}, {})).values())

    def flat_window(*tensors: Tensor) -> tuple[Tensor, ...]:
        batches = tensors[count:]
        to_start, to_psi = parts.window_gradients(named(tensors), list(zip(batches[::2], batches[1::2])))
        return *to_start.values(), *to_psi

    step_graph, segment_graph, window_graph = replays(flat_step), replays(flat_segment), replays(flat_window)

    def take_step(theta: Tensors, x: Tensor, y: Tensor, running: Running) -> Step:
        losses, *rest = step_graph(x, y, *(theta[name] for name in names), *itertools.chain(*running.values()))
        running.update(pairs(rest[2 * count:]))
        return Step(theta, losses, named(rest), named(rest[count:]))

    def recorded_segment(total: Tensors, one: Step, two: Step) -> Tensors:
        groups = total, one.theta, two.theta, one.gradient
        return named(segment_graph(one.losses, two.losses, *(group[name] for group in groups for name in names)))

    def recorded_window(start: Tensors, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensors, Sequence[Tensor]]:
        found = window_graph(*(start[name] for name in names), *itertools.chain(*batches))
        return named(found), found[count:]

    return Parts(take_step, recorded_segment, recorded_window)


def trajectory(learner: Learner, args: argparse.Namespace, batches: Batches, running: Running,
               take_step: Callable[..., Step] | None = None) -> Iterator[Step]:
    """The first-order inner loop from theta over all mini-batches; one step at a time, so that none has to be kept."""
    take_step = take_step or functools.partial(first_order_step, learner, args)
    theta = expand(learner.theta, batches.rows.shape[1])
    for k in range(len(batches.rows)):
        step = take_step(theta, *batches.take(k), running)
        theta = step.after
        yield step


# --- meta-train ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def leap_segment(total: Tensors, one: Step, two: Step) -> Tensors:
    """LEAP's sum, {name: (T, *shape)}, after one more segment, from step `one` to step `two`."""
    moved = {name: one.theta[name] - two.theta[name] for name in one.theta}
    rise = (two.losses - one.losses).abs()                                                   # (T,)
    length = (rise ** 2 + sum((t ** 2).flatten(1).sum(1) for t in moved.values())).sqrt()
    per_task = lambda values, like: values.view(-1, *[1] * (like.dim() - 1))
    return {name: total[name] + (t + per_task(rise, t) * one.gradient[name]) / per_task(length, t) for name, t in moved.items()}


def leap_direction(steps: Iterable[Step], segment: Callable[..., Tensors] = leap_segment) -> Tensors:
    """LEAP (Flennerhag et al. 2019), length metric with stabiliser, {name: (T, *shape)}: over successive steps i, i + 1

        sum of  [(theta_i - theta_{i+1}) + |dL| g_i] / sqrt(dL^2 + ||theta_{i+1} - theta_i||^2),  dL = L_{i+1} - L_i,

    with one norm over all tensors. The end of the last step has no loss, so that 100 steps make 99 segments. `segment` is
    `leap_segment`, or the same recorded.
    """
    total = {}
    for one, two in itertools.pairwise(steps):
        total = segment(total or {name: torch.zeros_like(g) for name, g in one.gradient.items()}, one, two)
    return total


def reptile_direction(steps: Iterable[Step]) -> Tensors:
    """Reptile (Nichol et al. 2018) as in LEAP's comparison: theta^0 minus theta BEFORE the last step."""
    first, last = _ends(steps)
    return {name: first.theta[name] - t for name, t in last.theta.items()}


def fomaml_direction(steps: Iterable[Step]) -> Tensors:
    """FOMAML as in LEAP's comparison: the gradient of the last step's mini-batch; no held-out images."""
    return _ends(steps)[1].gradient


def _ends(steps: Iterable[Step]) -> tuple[Step, Step]:
    """The first and the last step; those between are not kept."""
    steps = iter(steps)
    first = last = next(steps)
    for last in steps:
        pass
    return first, last


DIRECTIONS = {"leap": leap_direction, "reptile": reptile_direction, "fomaml": fomaml_direction}


def window_losses(learner: Learner, args: argparse.Namespace, start: Tensors, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Losses on the last mini-batch (x, y), of held-out images, (T,), after a differentiable step on each of the others."""
    *support, (x, y) = batches
    for batch in support:
        start = inner_step(learner, args, start, *batch, graph=not args.first_order).after
    return cross_entropy(classify(start, x), y)


def window_gradients(learner: Learner, args: argparse.Namespace, start: Tensors,
                     batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensors, Sequence[Tensor]]:
    """The gradient of each task's `window_losses` with respect to its start, {name: (T, *shape)}, and that of their mean to psi.

    batches: as in `window_losses`, x (T, B, 1, S, S) and y (T, B) of each step and, last, of held-out images.
    """
    start, psi = leaves(start), list(learner.generator.parameters())
    found = torch.autograd.grad(window_losses(learner, args, start, batches).mean(), [*start.values(), *psi])
    return {name: g * len(batches[-1][1]) for name, g in zip(start, found)}, found[len(start):]      # of each task, not the mean


def modgrad_direction(learner: Learner, args: argparse.Namespace, steps: Iterable[Step], batches: Batches,
                      held_out: Batches, places: list[int], parts: Parts) -> Tensors:
    """Walk the modulated trajectory; at each place psi receives the gradient of a window's held-out loss.

    DEVIATION: see the head of this file. theta_k of a place is a constant for psi, as in WarpGrad; theta learns by LEAP's
    rule along the trajectory, which led to lower losses on validation alphabets (results/omniglot/candidate-*), or with
    --theta-update held-out from the windows.
    """
    from_windows = {name: 0.0 for name in learner.theta}

    def visited() -> Iterator[Step]:
        for k, step in enumerate(steps):
            if k in places:
                taken = [*(batches.take(i) for i in range(k, k + args.unroll)), held_out.take(places.index(k))]
                to_start, to_psi = parts.window_gradients(step.theta, taken)
                for p, g in zip(learner.generator.parameters(), to_psi):
                    g = g / len(places)
                    p.grad = g if p.grad is None else p.grad + g
                for name, g in to_start.items():
                    from_windows[name] = from_windows[name] + g / len(places)
            yield step

    by_leap = leap_direction(visited(), parts.leap_segment)
    return by_leap if args.theta_update == "leap" else from_windows


def alphabets_step(learner: Learner, args: argparse.Namespace, split: Alphabets, rng: torch.Generator,
                   parts: Parts | None = None) -> Tensor:
    """Multi-shot: leave the meta-gradient of one meta-batch in .grad; (loss over the trajectory, at its end), (2,).

    `parts` are make_parts', which are costly to make anew when they are recorded.
    """
    parts = parts or launched_parts(learner, args)
    alphabets = choose_alphabets(len(split.names), args.meta_batch, rng)
    dtype = activation_type(args)
    batches = draw_batches(split.train, alphabets, args.inner_steps, args.batch, rng, args.imbalanced, dtype)
    if args.method == "maml":
        held_out = draw_batches(split.held_out, alphabets, 1, args.batch, rng, dtype=dtype)
        start = {name: t.expand(len(alphabets), *t.shape) for name, t in learner.theta.items()}
        support = [batches.take(k) for k in range(args.inner_steps)]
        loss = window_losses(learner, args, start, [*support, held_out.take(0)]).mean()
        loss.backward()
        return loss.detach().expand(2)
    losses: list[Tensor] = []
    running = fresh_statistics(len(alphabets), args, split.train.device)
    steps = _note_losses(trajectory(learner, args, batches, running, parts.take_step), losses)
    if args.method == "modgrad":
        held_out = draw_batches(split.held_out, alphabets, args.windows, args.batch, rng, dtype=dtype)
        places = torch.randperm(args.inner_steps - args.unroll + 1, generator=rng)[: args.windows].tolist()
        direction = modgrad_direction(learner, args, steps, batches, held_out, places, parts)
    elif args.method == "leap":
        direction = leap_direction(steps, parts.leap_segment)
    else:
        direction = DIRECTIONS[args.method](steps)
    for name, t in learner.theta.items():
        t.grad = direction[name].mean(0)
    return torch.stack([torch.stack(losses).mean(), losses[-1]])


def _note_losses(steps: Iterable[Step], losses: list[Tensor]) -> Iterator[Step]:
    for step in steps:
        losses.append(step.losses.mean())
        yield step


def episodes_step(learner: Learner, args: argparse.Namespace, classes: Tensor, rng: torch.Generator,
                  gradient: Callable[..., Tensor] | None = None) -> Tensor:
    """Few-shot: leave the meta-gradient of one meta-batch in .grad; (query loss, query accuracy), (2,).

    `gradient` is make_gradient's, which is costly to make anew when it is recorded.
    """
    batch, noise_rng = sample_episodes(classes, args.meta_batch, args, rng), ()
    if args.gradient_noise:
        noise_rng = torch.Generator(classes.device).manual_seed(int(torch.randint(2**62, (), generator=rng))),
    return (gradient or functools.partial(episodes_gradient, learner, args))(*batch, *noise_rng)


def episodes_gradient(learner: Learner, args: argparse.Namespace, support_x: Tensor, support_y: Tensor, query_x: Tensor,
                      query_y: Tensor, noise_rng: torch.Generator | None = None) -> Tensor:
    """What `episodes_step` does with the tasks it has drawn."""
    logits = adapt_and_predict(learner, args, support_x, support_y, query_x, noise_rng, train=True)
    loss = cross_entropy(logits, query_y).mean()
    for p in learner.parameters():
        p.grad = None
    loss.backward()
    return torch.stack([loss.detach(), accuracy(logits.detach(), query_y).mean()])


def make_gradient(learner: Learner, args: argparse.Namespace, device: torch.device) -> Callable[..., Tensor]:
    """episodes_gradient(tasks...), on a GPU recorded as a CUDA graph unless the flags forbid it."""
    gradient = functools.partial(episodes_gradient, learner, args)
    return replays(gradient, learner.parameters()) if takes_cuda_graph(args, device) else gradient


META_STEPS = {"multi-shot": alphabets_step, "few-shot": episodes_step}
PARTS = {"multi-shot": make_parts, "few-shot": make_gradient}     # of a meta-step, to be made once and passed to it
LOGGED = {"multi-shot": ("loss", "last_loss"), "few-shot": ("loss", "accuracy")}


def build_optimisers(learner: Learner, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """theta by SGD (multi-shot, LEAP) or Adam (few-shot); psi by Adam."""
    kind = torch.optim.SGD if args.protocol == "multi-shot" else torch.optim.Adam
    psi = [torch.optim.Adam(learner.generator.parameters(), lr=args.psi_lr)] if learner.generator else []
    return [kind(learner.theta.values(), lr=args.meta_lr), *psi]


def meta_train(learner: Learner, args: argparse.Namespace, run: Path, checkpoint: dict | None, splits: dict,
               device: torch.device) -> dict:
    """Train until `--meta-steps`, the time limit or a signal; returns the progress record; its "best" holds weights."""
    optimisers = build_optimisers(learner, args)
    rng = torch.Generator().manual_seed(args.seed)
    part = PARTS[args.protocol](learner, args, device)
    now = {"meta_step": 0, "seconds": 0.0, "best_accuracy": None, "best_meta_step": None, "best": None, "pending": [],
           "stopped": None}
    with Training(learner, args, run, checkpoint, "meta_step", now, {"optimisers": optimisers, "rng": rng},
                  last_is_due=False, loss_name="loss") as training:
        while training.goes_on():
            for optimiser in optimisers:
                optimiser.zero_grad(set_to_none=True)
            losses = META_STEPS[args.protocol](learner, args, splits["train"], rng, part)
            for optimiser in optimisers:
                optimiser.step()
            training.advance(losses)
            if training.due(args.log_every):
                loss, _ = training.log(*LOGGED[args.protocol])
                training.bar.set_postfix(loss=f"{loss:.3f}", val=f"{now['best_accuracy'] or 0:.1%}")
            if training.due(args.val_every):
                validate(learner, args, run, splits["val"], now, part)
            if training.due(args.checkpoint_every, args.val_every):
                training.save()
    return now


def validate(learner: Learner, args: argparse.Namespace, run: Path, split, now: dict, part: Parts | Callable | None = None) -> None:
    """Measure validation accuracy and keep the weights if they are the best so far. `part` is that of `evaluate`."""
    value, ci95 = mean_ci95(evaluate(learner, args, split, args.val_episodes, "validation", part)[0])
    append_log(run, {"meta_step": now["meta_step"], "val_accuracy": value, "val_ci95": ci95})
    if now["best"] is None or value > now["best_accuracy"]:
        now.update(best_accuracy=value, best_meta_step=now["meta_step"], best=learner.state())


# --- evaluate --------------------------------------------------------------------------------------------------------

def evaluate(learner: Learner, args: argparse.Namespace, split, episodes: int, what: str,
             part: Parts | Callable | None = None) -> tuple[list[float], dict]:
    """Accuracy of each task, and the multi-shot protocol's curves; the same tasks for every method and `--eval-batch`.

    few-shot: `episodes` tasks; multi-shot: every alphabet of the split once, with `part`, make_parts', where it is given.
    """
    rng = torch.Generator().manual_seed(EVALUATION_SEED)
    if args.protocol == "few-shot":
        return evaluate_episodes(learner, args, split, episodes, rng, what), {}
    alphabets, dtype = torch.arange(len(split.names)), activation_type(args)
    batches = draw_batches(split.train, alphabets, args.test_steps, args.batch, rng, args.imbalanced, dtype)
    held_out = draw_batches(split.held_out, alphabets, 1, split.held_out.shape[1], rng, dtype=dtype)
    curves = []
    with progress(len(alphabets), 0, what) as bar:
        for some in alphabets.split(args.eval_batch):
            curves.append(evaluate_alphabets(learner, args, batches.of(some), held_out.of(some), part.take_step if part else None))
            bar.update(len(some))
    return sum((curve["accuracy"][-1] for curve in curves), []), join_curves(curves, args.test_steps)


def evaluate_episodes(learner: Learner, args: argparse.Namespace, classes: Tensor, episodes: int, rng: torch.Generator,
                      what: str) -> list[float]:
    noise_rng = torch.Generator(classes.device).manual_seed(EVALUATION_SEED)
    accuracies = []
    with progress(episodes, 0, what) as bar:
        for group in torch.arange(episodes).split(DRAWN * math.ceil(args.eval_batch / DRAWN)):
            drawn = [sample_episodes(classes, len(part), args, rng) for part in group.split(DRAWN)]
            for support_x, support_y, query_x, query_y in zip(*(torch.cat(same).split(args.eval_batch) for same in zip(*drawn))):
                logits = adapt_and_predict(learner, args, support_x, support_y, query_x, noise_rng, train=False)
                accuracies += accuracy(logits, query_y).tolist()
                bar.update(len(logits))
    return accuracies


def evaluate_alphabets(learner: Learner, args: argparse.Namespace, batches: Batches, held_out: Batches,
                       take_step: Callable[..., Step] | None = None) -> dict[str, list[list[float]]]:
    """Adapt to each alphabet: {"loss": per step, "accuracy": per 10 steps, on all held-out images}, lists of T values.

    The running statistics of batch norm, not those of the held-out images, normalise the latter; as they start at mean
    0 and variance 1, accuracy stays near chance for the first 40 steps or so.
    """
    held_x, held_y = held_out.take(0)
    running = fresh_statistics(len(held_y), args, held_y.device)
    losses, accuracies = [], []
    for taken, step in enumerate(trajectory(learner, args, batches, running, take_step), start=1):
        losses.append(step.losses)
        if taken in measured_steps(args.test_steps):
            with torch.no_grad():
                accuracies.append(accuracy(classify(step.after, held_x, running, training=False), held_y))
    return {"loss": torch.stack(losses).tolist(), "accuracy": torch.stack(accuracies).tolist()}


def measured_steps(steps: int) -> list[int]:
    """Steps after which held-out accuracy is measured: 1, every tenth, the last."""
    return sorted({1, *range(10, steps + 1, 10), steps})


def join_curves(parts: list[dict], steps: int) -> dict:
    """Means over all tasks: training loss before each step, held-out accuracy after those of `measured_steps`."""
    mean = lambda key: [sum(map(sum, at)) / sum(map(len, at)) for at in zip(*(part[key] for part in parts))]
    return {"loss": mean("loss"), "accuracy_steps": measured_steps(steps), "accuracy": mean("accuracy")}


# --- figure and benchmark --------------------------------------------------------------------------------------------

def draw_figure(args: argparse.Namespace) -> None:
    """--figure: Fig. 5 from result files: training loss and held-out accuracy against the adaptation step."""
    curves: dict[str, list[dict]] = {}
    notes = set()
    for run in args.figure:
        try:
            result = json.loads((Path(run) / "result.json").read_text())
            config, own = result["config"], curves.setdefault(result["config"]["method"], [])
            own.append({key: result["curves"][key] for key in ("loss", "accuracy", "accuracy_steps")})
            if len(own[0]["loss"]) != len(own[-1]["loss"]):
                raise UsageError(f"{run} was tested with other --test-steps than the run of {config['method']} before it")
            notes.add(f"{'SYNTHETIC ' if result['synthetic'] else ''}{result['split']} alphabets; {config['channels']} "
                      f"filters, {result['meta_steps']} meta-steps of {config['meta_batch']} tasks, "
                      f"{config['inner_steps']} steps each")
        except (OSError, ValueError, LookupError) as error:
            raise UsageError(f"{run} holds no finished multi-shot run: {error!r}") from None
    plot_bands(args.picture, curves, "; ".join(sorted(notes)))
    print(f"{len(args.figure)} run(s): {args.picture}")


def plot_bands(path: str | Path, curves: dict[str, list[dict]], note: str) -> None:
    """Two panels; a line is the mean over seeds, a band reaches from the lowest seed to the highest."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), dpi=100)
    for method in [m for m in METHODS if m in curves]:
        runs = curves[method]
        steps = {"loss": range(len(runs[0]["loss"])), "accuracy": runs[0]["accuracy_steps"]}
        for axes, key, scale in zip(panels, steps, (1, 100)):
            values = scale * np.array([run[key] for run in runs], dtype=float)       # null of a result.json becomes nan
            label = f"{method} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
            line, = axes.plot(steps[key], values.mean(0), label=label, linewidth=1.5)
            axes.fill_between(steps[key], values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    panels[0].set(xlabel="adaptation step", ylabel="training loss")
    panels[1].set(xlabel="adaptation step", ylabel="held-out accuracy, %")
    panels[1].legend(frameon=False)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(note, fontsize=9)
    figure.tight_layout()
    save_atomically(path, lambda file: figure.savefig(file, format=Path(path).suffix[1:]))
    plt.close(figure)


def naive_reptile(learner: Learner, args: argparse.Namespace, batches: Batches) -> Tensors:
    """Reptile's direction as it is usually written: task by task, a module and an optimiser each, image by image."""
    block = lambda n: nn.Sequential(nn.Conv2d(n, args.channels, 3, padding=1), nn.MaxPool2d(2),
                                    nn.BatchNorm2d(args.channels), nn.ReLU())
    start = nn.Sequential(*(block(1 if k == 1 else args.channels) for k in BLOCKS), nn.Flatten(),
                          nn.Linear(args.channels, args.ways)).to(batches.images.device, batches.dtype)
    with torch.no_grad():
        for parameter, value in zip(start.parameters(), learner.theta.values()):
            parameter.copy_(value)
    ends = []
    for task in range(batches.rows.shape[1]):
        model = copy.deepcopy(start).train()
        optimiser = torch.optim.SGD(model.parameters(), lr=args.inner_lr)
        for k in range(len(batches.rows) - 1):
            images = [move(batches.images[row][None, None, None].float(), moves[None, None])[0]
                      for row, moves in zip(batches.rows[k, task], batches.moves[k, task])]
            optimiser.zero_grad()
            F.cross_entropy(model(torch.cat(images).to(batches.dtype)), batches.labels[k, task]).backward()
            optimiser.step()
        ends.append([p.detach() for p in model.parameters()])
    return {name: t.detach() - torch.stack(end) for (name, t), end in zip(learner.theta.items(), zip(*ends))}


def disagreement(learner: Learner, args: argparse.Namespace, batches: Batches) -> float:
    """Largest relative difference between the tensors of the two contenders' directions after two steps.

    In float64, as a step multiplies a difference by about a hundred. The biases before batch norm, which move by
    rounding alone, are left out.
    """
    learner = learner._replace(theta={name: t.detach().double() for name, t in learner.theta.items()})
    batches = Batches(batches.images, *(t[:3] for t in batches[1:4]), torch.float64)
    fresh = fresh_statistics(batches.rows.shape[1], args, batches.images.device)
    running = {k: (mean.double(), variance.double()) for k, (mean, variance) in fresh.items()}
    ours = reptile_direction(trajectory(learner, args, batches, running))
    theirs = naive_reptile(learner, args, batches)
    return max(((theirs[name] - t).norm() / t.norm()).item() for name, t in ours.items()
               if not (name.startswith("conv") and name.endswith("bias")))


def benchmark(args: argparse.Namespace, device: torch.device, repeats: int = 3) -> None:
    """--benchmark: seconds of Reptile's meta-step, all tasks in lock-step against `naive_reptile`, interleaved.

    With --precision bf16 ours keeps its activations in bfloat16, the naive one stays float32.
    """
    learner = build_learner(argparse.Namespace(**{**vars(args), "method": "reptile"}), device)
    split = split_alphabets(synthetic_drawings(), args.train_alphabets, args.seed, device)["train"]
    rng = torch.Generator().manual_seed(args.seed)
    batches = draw_batches(split.train, choose_alphabets(len(split.names), args.meta_batch, rng), args.inner_steps,
                           args.batch, rng)
    fresh = lambda: fresh_statistics(args.meta_batch, args, device)
    in_precision = batches._replace(dtype=activation_type(args))
    take_step = make_parts(learner, args, device).take_step
    contenders = {"lock-step": lambda: reptile_direction(trajectory(learner, args, in_precision, fresh(), take_step)),
                  "naive": lambda: naive_reptile(learner, args, batches)}
    taken = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            began = time.perf_counter()
            contender()["head.bias"].cpu()                                                   # waits for the device
            taken[name].append(time.perf_counter() - began)
    ours, theirs = (float(np.median(taken[name])) for name in contenders)
    print(f"reptile, {args.meta_batch} tasks x {args.inner_steps} steps x {args.batch} images, {args.channels} filters "
          f"on {device}, {args.precision}, {torch.get_num_threads()} thread(s): {60 / ours:.1f} meta-steps a minute, naive "
          f"{60 / theirs:.1f}, ratio {theirs / ours:.2f}; they differ by {disagreement(learner, args, batches):.1e}")


# --- main ------------------------------------------------------------------------------------------------------------

def load_data(args: argparse.Namespace, device: torch.device) -> tuple[dict, str, bool]:
    """Return ({split: Alphabets, or few-shot classes}, description, synthetic)."""
    root = Path(args.data or "data/omniglot")
    if args.download:
        download(root)
    if args.smoke or not (args.data or args.download or find_data(root)):
        drawings = synthetic_drawings()
        hint = "" if args.smoke else f"; no Omniglot in {root}: see README, 'Data', or pass --download"
        print(f"SYNTHETIC data: procedurally drawn alphabets, not Omniglot{hint}", flush=True)
    else:
        drawings = load_drawings(root)
        counts = f"{len(set(drawings.alphabets))} alphabets, {len(drawings.images)} characters"
        print(f"Omniglot in {root}: {counts}", flush=True)
    if args.protocol == "few-shot":
        splits = split_characters(drawings, device)
        for classes in splits.values():      # impossible sizes are refused before a run folder exists
            sample_episodes(classes, 1, args, torch.Generator())
    else:
        splits = split_alphabets(drawings, args.train_alphabets, args.seed, device)
    return splits, drawings.dataset, drawings.synthetic


def draw_curves(run: Path, title: str, method: str, curves: dict) -> None:
    """curves.png: multi-shot, the run's part of Fig. 5; few-shot, accuracy against meta-steps, from log.jsonl."""
    if curves:
        return plot_bands(run / "curves.png", {method: [curves]}, title)
    plot_log(run, title, "meta_step", "meta-steps", "accuracy, %",
             {"meta-training, query": "accuracy", "validation": "val_accuracy"}, scale=100)


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    device = setup(args)
    if args.figure:
        return draw_figure(args)
    if args.benchmark:
        return benchmark(args, device)
    splits, dataset, synthetic = load_data(args, device)
    try:
        takes_cuda_graph(args, device)
        backend = resolve_backend(args.kernel, device)
        learner = build_learner(args, device)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from None
    run, checkpoint = open_run(args.out, vars(args) | {"dataset": dataset}, args.resume)
    print(f"{args.method}, {args.protocol}, on {device} ({backend} kernel) -> {run}", flush=True)
    now = meta_train(learner, args, run, checkpoint, splits, device)
    if now["best"] is not None:
        learner.load(now["best"])
    accuracies, curves = evaluate(learner, args, splits[args.test_split], args.test_episodes, "test",
                                  PARTS[args.protocol](learner, args, device))
    value, ci95 = mean_ci95(accuracies)
    few_shot = args.protocol == "few-shot"
    kind = f"{args.ways}-way {args.shots}-shot" if few_shot else f"multi-shot, {args.test_steps} steps,"
    label = f"{'SYNTHETIC ' if synthetic else ''}{kind} {args.method}"
    draw_curves(run, f"{label}: {value:.1%} on {args.test_split}", args.method, curves)
    write_result(run, device, {
        "metric": "accuracy", "value": value, "ci95": ci95, "tasks": len(accuracies), "split": args.test_split,
        "dataset": dataset, "synthetic": synthetic, "config": vars(args), "seed": args.seed,
        "accuracies": accuracies if curves else None, "curves": curves, "meta_steps": now["meta_step"],
        "best_meta_step": now["best_meta_step"], "best_val_accuracy": now["best_accuracy"], "kernel": backend,
        "train_seconds": now["seconds"], "train_meta_steps_per_minute": 60 * now["meta_step"] / max(now["seconds"], 1e-9)})
    print(f"{label}, {args.test_split} accuracy: {100 * value:.2f} ± {100 * ci95:.2f} % over {len(accuracies)} tasks; "
          f"results in {run}")


if __name__ == "__main__":
    run_main(main)
