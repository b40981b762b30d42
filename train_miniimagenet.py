"""Few-shot classification on mini-ImageNet (Table 2 of the paper).

    python train_miniimagenet.py --backbone conv4 --shots 5

is the paper's main cell: ModGrad, Conv-4, 5-way 5-shot, one inner step (paper: 69.17 ± 0.69 %; 1-shot 53.20 ± 0.86 %).
Without the real images it runs on an embedded SYNTHETIC set. WRN-28-10 is first trained as a classifier:

    python train_miniimagenet.py --backbone wrn28-10 --method pretrain --out runs/wrn
    python train_miniimagenet.py --backbone wrn28-10 --start-from runs/wrn --freeze-prefix --shots 5

Shapes: T tasks, N images of a task, S image side.
"""

from __future__ import annotations

import argparse
import csv
import functools
import http.client
import json
import math
import os
import pickle
import re
import shutil
import urllib.request
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common import (Aside, DataError, DownloadError, HelpFormatter, Training, UsageError, add_cuda_graph_flag, add_run_flags,
                    append_log, cached_array, copy_weights, extract_archive, fetch_file, fill_in, fingerprint_files,
                    first_of_machine, from_first_rank, join_streams, load_weights, mean_ci95, non_negative_float, open_run,
                    parse_run, plot_log, positive_float, positive_int, progress, random_order, rank, ranks, replays, run_main,
                    setup, several_int, subfolders, sum_gradients, sum_over_ranks, takes_cuda_graph, to_device, whole_float32,
                    write_result)
from kernels import resolve_backend
from modgrad import Chain, Generator, LearnedRates, Transforms, adapt, conv4, resnet34, wide_resnet28

# --- flags -----------------------------------------------------------------------------------------------------------

EVALUATION_SEED = 20200823      # of validation and test tasks: the same for every run, so that results compare
DRAWN = 5                       # evaluation tasks drawn at once, whatever --eval-batch is: else it would choose them
CONVS = ("conv1", "conv2", "conv3", "conv4")
DEFAULTS = {                    # what differs between the methods
    "modgrad": {"inner_steps": 1, "inner_lr": 0.1},
    "maml": {"inner_steps": 5, "inner_lr": 0.01},        # of the mean loss; its code's, of a sum over the 5 classes, is 0.05 of the mean
    "metasgd": {"inner_steps": 1, "inner_lr": 0.05},
    "tnet": {"inner_steps": 1, "inner_lr": 2.0},         # its code's 0.4, likewise
    "cavia": {"inner_steps": 2, "inner_lr": 1.0, "adapt": ["context"], "context_dim": 100},
    "pretrain": {"adapt": [], "updates": 60_000, "batch_size": 64, "meta_lr": 0.1},
}
DEFAULTS["fomaml"] = DEFAULTS["maml"]
SMOKE = {"episodes": 24, "val_every": 12, "val_episodes": 8, "test_episodes": 16, "image_size": 32, "channels": 16,
         "log_every": 6, "checkpoint_every": 12, "context_dim": 32}


class Backbone(NamedTuple):
    build: Callable         # (ways, channels, image size) -> theta, chain
    modulated: list         # the tensors that ModGrad adapts, of the last two convolutions
    adapted: list | None    # those that MAML does; None: all of them
    defaults: dict          # flags of the paper's runs with it


BACKBONES = {
    "conv4": Backbone(conv4, ["conv3.weight", "conv3.bias", "conv4.weight", "conv4.bias"],
                      [f"{layer}.{kind}" for layer in (*CONVS, "head") for kind in ("weight", "bias")],
                      {"image_size": 84, "channels": 64, "augment": False, "episodes": 50_000}),
    "resnet34": Backbone(resnet34, ["layer4.2.conv1.weight", "layer4.2.conv2.weight"], None,
                         {"image_size": 224, "channels": 64, "augment": True, "episodes": 100_000}),
    "wrn28-10": Backbone(wide_resnet28, ["layer3.3.conv1.weight", "layer3.3.conv2.weight"], None,
                         {"image_size": 80, "channels": 160, "augment": True, "episodes": 50_000}),
}


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    task = parser.add_argument_group("task")
    task.add_argument("--data", help="folder with mini-ImageNet (default: data/mini-imagenet if it is there, else an "
                                     "embedded SYNTHETIC set)")
    task.add_argument("--download", action="store_true", help="fetch mini-ImageNet into --data first")
    task.add_argument("--ways", type=positive_int, default=5, help="classes per task (paper: 5)")
    task.add_argument("--shots", type=positive_int, default=5, help="support images per class (paper: 1, 5, 10, 15, 20)")
    task.add_argument("--queries", type=positive_int, default=15, help="query images per class (released code: 15)")
    task.add_argument("--image-size", type=positive_int, help="pixels per side (default: conv4 84, resnet34 224, wrn28-10 80)")
    task.add_argument("--resize-nearest", action="store_true", help="resize images by their nearest pixels, PIL's default until "
                      "Pillow 7 (2020), so perhaps the paper's, instead of the bicubic filter")
    task.add_argument("--augment", action=argparse.BooleanOptionalAction, help="train on random crops, flips and colours, test on "
                      "the centre of images 15 %% larger (default: resnet34 and wrn28-10)")

    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=tuple(DEFAULTS), default="modgrad",
                        help="metasgd: MAML with a learned rate for every adapted number; tnet: with a learned linear map behind "
                        "every adapted layer; cavia: adapts a context that scales Conv-4's third block; pretrain: classifies all "
                        "training classes, as a start for the others")
    method.add_argument("--backbone", choices=tuple(BACKBONES), default="conv4", help="the network")
    method.add_argument("--channels", type=positive_int, help="filters of each Conv-4 layer, or of a residual network's first "
                        "group (default: conv4 and resnet34 64, wrn28-10 160)")
    method.add_argument("--start-from", metavar="RUN", help="start theta from this run's best weights, all but a head that "
                        "does not fit; or from a file of named tensors (not ImageNet's: it holds the test classes)")
    method.add_argument("--freeze-prefix", action="store_true", help="keep what lies before the first adapted tensor as it starts")
    method.add_argument("--inner-steps", type=positive_int, help="K (default: modgrad, metasgd and tnet 1, cavia 2, maml 5)")
    method.add_argument("--inner-lr", type=positive_float, help="alpha (default: modgrad 0.1, maml 0.01, tnet 2, cavia 1), "
                        "metasgd's at the start (0.05, the middle of its authors' range)")
    method.add_argument("--adapt", nargs="+", metavar="NAME", help="tensors that the inner loop changes (default: "
                        "modgrad the last two convolutions, cavia the context, others Conv-4's convolutions and head, or all of "
                        "another network)")
    method.add_argument("--rank", type=positive_int, default=5, help="u, columns per sister network (paper: 5); "
                        "before its ReLU M has rank 1 whatever u is")
    method.add_argument("--context-dim", type=positive_int, help="D, length of nu (300, as in the paper) or of cavia's context (100)")
    method.add_argument("--hidden-cap", type=positive_int, default=256, help="largest hidden layer of a sister network")
    method.add_argument("--factors", choices=("flat", "natural"), default="flat",
                        help="matrix view of a convolution: flat (o k) x (i k), natural o x (i k k)")
    method.add_argument("--init", choices=("identity", "released"), default="identity",
                        help="M at the start of training: 1 (MAML), or PyTorch's default layers (M about 2e-4)")
    method.add_argument("--first-order", action="store_true", help="no second derivatives (fomaml implies it)")
    method.add_argument("--refine", action="store_true",
                        help="the authors' released code for K > 1: 2K passes from theta^0, all but the last refine nu")
    method.add_argument("--normalise-context", action="store_true",
                        help="divide nu by its root mean square, a departure from Eq. 9: psi then learns from the start")
    method.add_argument("--gradient-noise", type=non_negative_float, default=0.0,
                        help="eta, standard deviation of noise on the inner gradient (Fig. 9)")
    method.add_argument("--batch-norm", choices=("transductive", "support"), default="transductive",
                        help="query statistics: of all queries together (released code), or of the support set (not transductive)")
    method.add_argument("--kernel", choices=("auto", "triton", "closed", "eager"), default="auto",
                        help="the modulated update: auto is Triton on CUDA, closed forms on the CPU")

    train = parser.add_argument_group("meta-training")
    train.add_argument("--episodes", type=positive_int,
                       help="training tasks in all (default: 50,000, resnet34 100,000, as in the paper)")
    train.add_argument("--meta-batch", type=positive_int, default=3, help="tasks per outer update (released code: 3)")
    train.add_argument("--task-chunk", type=positive_int, help="tasks held in memory at once (default: all)")
    train.add_argument("--compile", action="store_true", help="compile the meta-step (minutes at the start)")
    add_cuda_graph_flag(train)
    train.add_argument("--updates", type=positive_int, help="of pretrain (60,000: 100 epochs), counted where others count episodes")
    train.add_argument("--batch-size", type=positive_int, help="images of an update of pretrain (64)")
    train.add_argument("--meta-lr", type=positive_float, help="Adam's rate for theta and psi (default: 1e-3, as in the paper); "
                       "pretrain: of SGD, falling as a cosine (0.1)")
    train.add_argument("--meta-lr-halve-every", type=positive_int, default=10_000, help="episodes (paper: 10,000)")
    train.add_argument("--val-every", type=positive_int, default=2_500, help="training episodes between validations")
    train.add_argument("--val-episodes", type=several_int, default=400, help="validation tasks (released code: 400)")
    train.add_argument("--log-every", type=positive_int, default=60, help="training episodes per line of log.jsonl")
    train.add_argument("--checkpoint-every", type=positive_int, default=300, help="training episodes between checkpoints")

    test = parser.add_argument_group("test")
    test.add_argument("--test-episodes", type=several_int, default=600, help="test tasks (paper: 600)")
    test.add_argument("--test-split", choices=("test", "val"), default="test", help="classes of the final evaluation")
    test.add_argument("--eval-batch", type=positive_int, default=5, help="tasks evaluated at once")
    test.add_argument("--smoke", action="store_true", help="a complete tiny run on SYNTHETIC data in under a minute")
    add_run_flags(parser, bf16=True)
    pretrain = {"episodes": None, "updates": 24, "batch_size": 16}
    return complete(parse_run(parser, argv, lambda given: SMOKE | (pretrain if given.method == "pretrain" else {}), unread))


def unread(args: argparse.Namespace) -> dict:
    """Flags that the method does not read: {whose they are: names}."""
    flags = {}
    if args.method != "modgrad":
        flags["for --method modgrad"] = ["refine", "normalise_context"]
    if args.method == "pretrain":
        flags["for meta-training"] = ["adapt", "inner_steps", "inner_lr", "first_order", "gradient_noise", "episodes", "meta_batch",
                                      "task_chunk", "meta_lr_halve_every", "compile", "cuda_graph"]
    else:
        flags["for --method pretrain (meta-training has --episodes and --meta-batch)"] = ["updates", "batch_size"]
    return flags


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the method or on --smoke, and refuse combinations that mean nothing."""
    backbone = BACKBONES[args.backbone]
    if args.freeze_prefix and not args.start_from:
        raise UsageError("--freeze-prefix keeps weights as they start: give it trained ones with --start-from")
    if args.method == "cavia" and args.backbone != "conv4":
        raise UsageError(f"--method cavia is for --backbone conv4: where its context would enter {args.backbone} is not settled")
    if args.adapt and (args.method == "cavia") != (args.adapt == ["context"]):
        raise UsageError(f"--adapt {' '.join(args.adapt)} with --method {args.method}: cavia adapts its context and nothing else, the "
                         "other methods adapt layers")
    fill_in(args, {"meta_lr": 1e-3, "context_dim": 300} | DEFAULTS[args.method])
    fill_in(args, backbone.defaults)
    if args.method == "pretrain":
        args.episodes = None
    if args.adapt is None:
        args.adapt = backbone.modulated if args.method == "modgrad" else backbone.adapted or every_tensor(args)
    args.first_order |= args.method == "fomaml"
    if args.compile and args.gradient_noise:
        raise UsageError("--compile cannot draw --gradient-noise from the run's own generator: leave one of them out")
    if args.smoke:
        if args.data or args.download:
            raise UsageError("--smoke runs on the embedded synthetic data: leave out --data and --download")
    args.out = args.out or f"runs/miniimagenet/{args.method}-{args.backbone}-{args.shots}shot-seed{args.seed}{'-smoke' * args.smoke}"
    return args


def every_tensor(args: argparse.Namespace) -> list[str]:
    """The names of the backbone's tensors."""
    try:
        with torch.device("meta"):
            return list(BACKBONES[args.backbone].build(args.ways, args.channels, args.image_size)[0])
    except ValueError as error:
        raise UsageError(str(error)) from None


# --- data -------------------------------------------------------------------------------------------------------------
# Shapes: C classes of a split, P images per class, S image side, T tasks, N rows of one task.

SPLITS = ("train", "val", "test")
STANDARD = {"train": (64, 600), "val": (16, 600), "test": (20, 600)}     # classes x images, Ravi & Larochelle
SYNTHETIC_PER_CLASS = 60      # enough for 20 shots + 15 queries; all 100 classes are drawn in seconds
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

LAYOUTS = """\
  images/*.jpg with train.csv, val.csv, test.csv (columns filename,label)
  train/CLASS/*.jpg (or .png), val/CLASS/..., test/CLASS/...
  mini-imagenet-cache-{train,val|validation,test}.pkl (image_data, class_dict)
  miniImageNet_category_split_{train_phase_train,val,test}.pickle (data, labels, catname2label)"""


class Images(NamedTuple):
    """One split: C classes with P images each, sorted by class name."""

    images: np.ndarray      # uint8 RGB (C, P, S, S, 3), read-only
    names: list             # C class names
    dataset: str            # description for logs, figures and result files
    synthetic: bool


def find_data(root):
    """Find a data set in `root` or up to two folders below: (folder, "csv" | "folders" | "pickles") or None.

    Raises DataError when several folders of one depth hold one, since a choice would be a guess.
    """
    level = [Path(root)]
    for _ in range(3):
        found = [(home, layout) for home in level if (layout := _sniff(home))]
        if len(found) > 1:
            places = ", ".join(str(home) for home, _ in found)
            raise DataError(f"{root} holds several data sets ({places}); point --data at one of them")
        if found:
            return found[0]
        level = [path for home in level for path in subfolders(home)]
    return None


def load_split(root, split, image_size=84, nearest=False):
    """Load one split as uint8 images, decoded once and cached beside the data as a memory-mapped array.

    Classes are sorted by name, images by file name (pickles: stored order). Images of another size are
    resized to image_size x image_size by PIL's bicubic filter, or to their `nearest` pixels; the authors' code
    takes PIL's default, which was the latter before Pillow 7 and is the former since.
    Returns Images. Raises UsageError for an unknown split or size, DataError where data is missing or broken,
    including classes of unequal size: episodes are drawn from one (C, P) block.
    """
    _check_request(split, image_size)
    if (source := find_data(root)) is None:
        raise DataError(f"no mini-ImageNet data in {Path(root).absolute()} or its subfolders; looked for\n"
                        f"{LAYOUTS}\nTo download it: python train_miniimagenet.py --download --data {root}")
    home, layout = source
    index = functools.cache(lambda: _read_index(home, layout))      # reads pickles only if the cache is stale
    inputs = _pickle_files(home).values() if layout == "pickles" else [
        *(home / f"{name}.csv" for name in SPLITS if layout == "csv"),
        *(path for files in index()[split].values() for path in files)]
    mark, cache = fingerprint_files(sorted(inputs)), home / "cache"
    names = cached_array(cache, f"{split}-names", mark, lambda: np.array(sorted(index()[split])))
    images = cached_array(cache, f"{split}-{image_size}{'-nearest' * nearest}", mark,
                          lambda: _decode(index()[split], image_size, split, Image.NEAREST if nearest else Image.BICUBIC))
    standard = STANDARD[split]
    note = "" if images.shape[:2] == standard else f", not the standard {standard[0]} x {standard[1]}"
    dataset = _describe(f"mini-ImageNet ({layout})", split, images) + note
    return Images(images, names.tolist(), dataset, synthetic=False)


def _describe(source, split, images):
    classes, count, size = images.shape[:3]
    return f"{source}, {split}: {classes} classes x {count} images of {size}x{size} pixels"


def _check_request(split, image_size):
    if split not in SPLITS:
        raise UsageError(f"split is {split!r}; allowed are {', '.join(SPLITS)}")
    if image_size < 1:
        raise UsageError(f"image_size is {image_size}; it must be at least 1 pixel")


def _sniff(home):
    """The layout that folder `home` holds, complete or not, so that a missing part can be named later."""
    if (home / "images").is_dir() and any((home / f"{split}.csv").is_file() for split in SPLITS):
        return "csv"
    if any(subfolders(home / split) for split in SPLITS):
        return "folders"
    return "pickles" if _pickle_files(home) else None


def _read_index(home, layout):
    """Read and check {split: {class: images}}, images being a list of paths or a uint8 array (P, H, W, 3)."""
    index = {"csv": _index_csv, "folders": _index_folders, "pickles": _index_pickles}[layout](home)
    owner = {}
    for split in SPLITS:
        counts = {name: len(images) for name, images in sorted(index.get(split, {}).items())}
        if not any(counts.values()):
            raise DataError(f"{home}: the {split} split is missing or empty; {', '.join(SPLITS)} are needed")
        short = [f"{name} has {count}" for name, count in counts.items() if count < max(counts.values())]
        if short:
            raise DataError(f"{home}: all {split} classes must hold as many images as the largest of them, "
                            f"{max(counts.values())}; {', '.join(short[:5])} ({len(short)} short in all)")
        if both := sorted(owner.keys() & counts):
            raise DataError(f"{home}: class {both[0]} is in both {owner[both[0]]} and {split}; "
                            "splits must not overlap")
        owner.update(dict.fromkeys(counts, split))
    return index


def _index_csv(home):
    present = set(os.listdir(home / "images"))
    index, seen = {}, {}
    for split in SPLITS:
        path = home / f"{split}.csv"
        if not path.is_file():
            raise DataError(f"{path} is missing; train.csv, val.csv and test.csv are needed beside images/")
        classes = index[split] = {}
        for line, filename, label in _csv_rows(path):
            if filename in seen:
                raise DataError(f"{path} line {line}: {filename} is already listed in {seen[filename]}")
            seen[filename] = f"{path.name} line {line}"
            classes.setdefault(label, []).append(filename)
    absent = [filename for filename in seen if filename not in present]
    if absent:
        raise DataError(f"{home / 'images'} lacks {len(absent)} of the {len(seen)} files the csv files name, "
                        f"the first being {absent[0]} ({seen[absent[0]]})")
    return {split: {label: [home / "images" / filename for filename in sorted(files)]
                    for label, files in classes.items()} for split, classes in index.items()}


def _csv_rows(path):
    """Yield (line number, filename, label)."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            rows = csv.reader(file)
            header = next(rows, [])
            if header != ["filename", "label"]:
                raise DataError(f"{path}: columns are {header}, expected ['filename', 'label']")
            for row in filter(None, rows):
                if len(row) != 2 or not all(row):
                    raise DataError(f"{path} line {rows.line_num}: {row} is not a filename and a label")
                yield rows.line_num, *row
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} cannot be read as a csv file in UTF-8 ({error})") from None


def _index_folders(home):
    index = {}
    for split in SPLITS:
        index[split] = {folder.name: sorted(folder.glob("[!.]*")) for folder in subfolders(home / split)}
        for path in (path for files in index[split].values() for path in files):
            if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
                raise DataError(f"{path} is not a .jpg or .png image; class folders may hold images only")
    return index


def _pickle_files(home):
    """{split: path} of the pickles in `home`. DataError if two files claim the same split."""
    files = {}
    # MetaOptNet's ..._train_phase_{val,test} hold held-out images of the train classes, so no split of ours.
    pattern = (r".*(?:cache-|category_split_(?:train_phase_(?=train))?)"
               r"(train|val|validation|test)\.(?:pkl|pickle)")
    for path in sorted(home.glob("*.p*kl*")):
        if match := re.fullmatch(pattern, path.name):
            split = match[1].replace("validation", "val")
            if split in files:
                raise DataError(f"{files[split]} and {path} both claim the {split} split; remove one of them")
            files[split] = path
    return files


def _index_pickles(home):
    return {split: _read_pickle_classes(path) for split, path in _pickle_files(home).items()}


def _read_pickle_classes(path):
    """{class: uint8 (P, H, W, 3)} of one pickle; which of the two formats it is shows in its keys."""
    content = load_pickle(path)
    keys = content.keys() if isinstance(content, dict) else ()
    try:
        if {"image_data", "class_dict"} <= set(keys):
            pixels, members = content["image_data"], content["class_dict"]
        elif {"data", "labels", "catname2label"} <= set(keys):
            pixels, labels = content["data"], np.asarray(content["labels"])
            named = content["catname2label"].items()
            members = {name: np.flatnonzero(labels == label) for name, label in named}
        else:
            found = sorted(map(str, keys)) or type(content).__name__
            raise DataError(f"{path} holds {found}; expected a dict of image_data and class_dict, or of "
                            "data, labels and catname2label")
        members = {str(name): np.asarray(rows, np.int64) for name, rows in members.items()}
        listed = np.sort(np.concatenate(list(members.values())))
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path}: its classes are not given by image numbers: {error}") from error
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 4
            and pixels.shape[3] == 3):
        found = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise DataError(f"{path}: images are {found}, expected uint8 (count, height, width, 3)")
    if not np.array_equal(listed, np.arange(len(pixels))):
        raise DataError(f"{path}: its {len(members)} classes list {len(listed)} images, not each of the "
                        f"{len(pixels)} images once")
    return {name: pixels[rows] for name, rows in members.items()}


class _NumpyUnpickler(pickle.Unpickler):
    """Builds numpy arrays and scalars, dicts, lists, strings, bytes and numbers, and nothing else."""

    path = None
    allowed = {"numpy ndarray": np.ndarray, "numpy dtype": np.dtype, 
               "_codecs encode": lambda text, _: text.encode("latin1")}     # bytes under protocols 0 to 2
    for core in ("numpy.core", "numpy._core"):      # the names in pickles written by numpy 1 and numpy 2
        allowed[f"{core}.multiarray _reconstruct"] = np.zeros(1).__reduce__()[0]
        allowed[f"{core}.multiarray scalar"] = np.float64(0).__reduce__()[0]
        allowed[f"{core}.numeric _frombuffer"] = np.zeros(1).__reduce_ex__(5)[0]

    def find_class(self, module, name):
        if f"{module} {name}" not in self.allowed:
            raise DataError(f"{self.path} refers to {module}.{name}; a data set may hold only numpy arrays, "
                            "dicts, lists, strings and numbers. Do not use this file")
        return self.allowed[f"{module} {name}"]


def load_pickle(path):
    """Read a pickle of plain numpy data without running what it may contain. Raises DataError."""
    with open(path, "rb") as file:
        unpickler = _NumpyUnpickler(file, encoding="latin1")
        unpickler.path = path
        try:
            return unpickler.load()
        except DataError:
            raise
        except Exception as error:      # a damaged pickle can raise nearly anything
            raise DataError(f"{path} is not a readable pickle: {type(error).__name__}: {error}") from error


def _decode(classes, size, split, resample):
    """Decode {class: paths or array} to uint8 (C, P, S, S, 3), on threads since PIL releases the GIL."""
    names = sorted(classes)
    count = len(classes[names[0]])
    out = np.empty((len(names), count, size, size, 3), np.uint8)

    def fill(row):
        for column, item in enumerate(classes[names[row]]):
            out[row, column] = _pixels(item, size, resample)

    workers = os.cpu_count()
    with progress(len(out) * count, 0, f"decoding {split}") as bar, ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(fill, range(len(names))):
            bar.update(count)
    return out


def _pixels(item, size, resample):
    """RGB uint8 (S, S, 3) of an image file or of a decoded image (H, W, 3)."""
    try:
        with Image.fromarray(item) if isinstance(item, np.ndarray) else Image.open(item) as image:
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{item} is not a readable image: {error}") from error
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), resample))


_ZENODO = "https://zenodo.org"
# Plain HTTP(S) copies, tried in order; "record" is Zenodo's API address that lists each file's md5 and size.
MIRRORS = (
    {"name": "zenodo-7978538", "record": f"{_ZENODO}/api/records/7978538",
     "urls": [f"{_ZENODO}/records/7978538/files/mini-imagenet-cache-{split}.pkl"
              for split in ("train", "validation", "test")]},
    {"name": "zenodo-7311663", "record": f"{_ZENODO}/api/records/7311663",
     "urls": [f"{_ZENODO}/records/7311663/files/brandoslearn2learnminiimagenet.zip"]},
    {"name": "hf-few-shot-datasets", "size": 2_089_692_471,
     "sha256": "fdc1a84b906855d49382fee772675b070354b6d906adfe143c009cbfb9b87a57",
     "urls": ["https://huggingface.co/datasets/pancake/few_shot_datasets/resolve/main/mini-imagenet.zip"]},
)
LICENCE = ("mini-ImageNet consists of ImageNet images: ImageNet's terms of access (non-commercial research "
           "and education, https://image-net.org/download) apply to every copy.")


def download(root):
    """Fetch mini-ImageNet into `root` from the first mirror that works, verify it, return find_data(root).

    A copy has to match its published checksum, where there is one, and the standard 64/16/20 x 600 images.
    Raises DownloadError with every mirror's failure and the manual way. Interrupted downloads resume.
    """
    root = Path(root)
    if source := find_data(root):
        print(f"mini-ImageNet is already in {source[0]}; nothing to download", flush=True)
        return source
    print(LICENCE, flush=True)
    links = "\n  ".join(MIRRORS[0]["urls"])
    manual = (f"By hand: download these files in a browser and put them into {root.absolute()}:\n  {links}\n"
              f"or put a copy there in any of these layouts:\n{LAYOUTS}")
    failures = []
    for mirror in MIRRORS:
        try:
            _fetch_mirror(mirror, root / ".download" / mirror["name"], root / mirror["name"], manual)
            return find_data(root)
        except (DownloadError, DataError) as error:
            failures.append(f"{mirror['name']}: {str(error).replace(manual, '').strip()}")
            print(f"mirror failed: {failures[-1]}", flush=True)
    raise DownloadError("no mirror delivered mini-ImageNet:\n" + "\n".join(failures) + f"\n{manual}")


def _fetch_mirror(mirror, stage, target, manual):
    """Download to `stage`, check there, and only then move to `target`, where find_data looks."""
    published = _published_checksums(mirror["record"]) if "record" in mirror else {}
    for url in mirror["urls"]:
        path = stage / url.rsplit("/", 1)[1]
        known = published.get(path.name, {key: mirror[key] for key in ("sha256", "size") if key in mirror})
        fetch_file([url], path, **known, manual=manual)
    archives, unpacked = list(stage.glob("*.zip")), stage / "unpacked"
    if unpacked.exists():           # of a call that was interrupted
        shutil.rmtree(unpacked)
    try:
        for path in archives:
            extract_archive(path, unpacked)
        _check_standard(unpacked if archives else stage)
    except DataError:
        shutil.rmtree(stage)        # kept, the damaged file would be taken for a finished one next time
        raise
    os.replace(unpacked if archives else stage, target)
    shutil.rmtree(stage, ignore_errors=True)


def _published_checksums(record):
    """{file name: {"md5": hex, "size": bytes}} from Zenodo's record API; {}, and a note, if it is silent."""
    try:
        with urllib.request.urlopen(record, timeout=30) as answer:
            return {file["key"]: {"md5": file["checksum"].removeprefix("md5:"), "size": file["size"]}
                    for file in json.load(answer)["files"]}
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
        print(f"no checksums from {record} ({error}); the content is verified instead", flush=True)
        return {}


def _check_standard(home):
    if (source := find_data(home)) is None:
        raise DataError("the download holds no known layout of mini-ImageNet")
    for split, classes in _read_index(*source).items():
        shape = len(classes), len(next(iter(classes.values())))
        if shape != STANDARD[split]:
            raise DataError("the download's {} split is {} classes x {} images, not {} x {}".format(
                split, *shape, *STANDARD[split]))


def synthetic_split(split, seed=0, image_size=84):
    """Draw the SYNTHETIC stand-in: 64/16/20 procedural classes x SYNTHETIC_PER_CLASS images, by `seed`.

    A class is a lobed outline with a hole, a striped or ringed texture, an orientation and a loose palette;
    the instances vary position, scale, rotation, colours, light, noise and a cluttered background. All splits
    draw their classes from this one family with independent parameters. Returns Images.
    """
    _check_request(split, image_size)
    classes = STANDARD[split][0]
    images = np.empty((classes, SYNTHETIC_PER_CLASS, image_size, image_size, 3), np.uint8)
    for number in range(classes):
        rng = np.random.default_rng([seed, SPLITS.index(split), number])
        images[number] = _draw_class(rng, SYNTHETIC_PER_CLASS, image_size)
    images.flags.writeable = False
    names = [f"synthetic-{split}-{number:02d}" for number in range(classes)]
    dataset = _describe(f"SYNTHETIC (procedural, seed {seed})", split, images)
    return Images(images, names, dataset, synthetic=True)


def _draw_class(rng, count, size):
    """One class: uint8 (count, S, S, 3). Scalars belong to the class, arrays (count, 1, 1) to instances."""
    def each(low, high):
        return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)

    def mix(colours, channel, share):       # from the first to the second colour of (count, 2, 3)
        first, second = np.moveaxis(colours[:, :, channel, None, None], 1, 0)
        return first + (second - first) * share

    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x, y = axis[None, :], axis[:, None]
    palette = rng.uniform(0, 1, (2, 3))
    inside, texture = _draw_object(rng, each, x, y)                             # (count, S, S) each
    colours = np.clip(palette + rng.normal(0, 0.2, (count, 2, 3)), 0, 1).astype(np.float32)
    ground = rng.uniform(0.2, 0.8, (count, 2, 3)).astype(np.float32)
    waves = [_grating(each, x, y, highest) for highest in (1.5, 5.0, 1.0)]      # cycles per half image
    clutter = np.clip(0.5 + 0.35 * (waves[0] + waves[1] * waves[2]), 0, 1)
    light = each(0.6, 1.2) * (1 + each(-0.3, 0.3) * x + each(-0.3, 0.3) * y)
    noise = rng.standard_normal((count, size, size), np.float32) * each(0.01, 0.08)
    out = np.empty((count, size, size, 3), np.uint8)
    for channel in range(3):
        behind = mix(ground, channel, clutter)
        shown = (behind + (mix(colours, channel, texture) - behind) * inside) * light + noise
        out[..., channel] = np.clip(shown, 0, 1) * 255 + 0.5
    return out


def _draw_object(rng, each, x, y):
    """Opacity and texture share in [0, 1], both (count, S, S), of one class's object in varied poses."""
    lobes, depth, twist = int(rng.integers(2, 8)), rng.uniform(0.1, 0.5), rng.uniform(-3, 3)
    squash, hole = rng.uniform(0.5, 1.0), rng.uniform(0, 0.35)
    frequency, slant, rings = rng.uniform(0.8, 4), rng.uniform(0, np.pi), rng.uniform(0, 1)
    angle = rng.uniform(0, 2 * np.pi) + each(-0.35, 0.35)
    scale, dx, dy = each(0.75, 1.1), x - each(-0.15, 0.15), y - each(-0.15, 0.15)
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / scale
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / (scale * squash)
    radius = np.sqrt(u * u + v * v)
    outline = 0.75 * (1 + depth * np.cos(lobes * np.arctan2(v, u) + twist * radius))
    inside = np.clip((outline - radius) * 12, 0, 1) * np.clip((radius - hole) * 12, 0, 1)
    along = (1 - rings) * (np.cos(slant) * u + np.sin(slant) * v) + rings * radius
    texture = np.sin(2 * np.pi * frequency * along + each(0, 2 * np.pi))
    return inside, np.clip(0.5 + 1.5 * texture, 0, 1)


def _grating(each, x, y, highest):
    angle, frequency = each(0, 2 * np.pi), each(0.3, highest)
    return np.sin(2 * np.pi * frequency * (np.cos(angle) * x + np.sin(angle) * y) + each(0, 2 * np.pi))


def to_tensor(images, device="cpu"):
    """The split as a uint8 tensor (C, P, S, S, 3) on `device`; on the CPU it shares the memory map."""
    with warnings.catch_warnings():     # the tensor is only read, so a read-only array is what we want
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(images.images).to(device)


def sample_episodes(data, tasks, ways, shots, queries, generator, share=slice(None)):
    """Draw T few-shot tasks: distinct classes per task, distinct images, support and query disjoint.

    data: uint8 (C, P, S, S, 3) of `to_tensor`, on any device. generator: a torch.Generator on the CPU, so
    that every device sees the same tasks. Returns (support_x, support_y, query_x, query_y): x uint8
    (T, ways * shots, 3, S, S) and (T, ways * queries, 3, S, S), views of channels-last memory; y int64
    (T, N). Rows interleave the classes, so each task's labels are 0..ways-1 repeated, as in the authors'
    code. `share` of the tasks is returned, the images of the others are not read. Raises UsageError for
    impossible sizes.
    """
    classes, per_class = data.shape[:2]
    if min(tasks, ways, shots, queries) < 1:
        raise UsageError(f"tasks={tasks}, ways={ways}, shots={shots}, queries={queries}: all must be above 0")
    if ways > classes:
        raise UsageError(f"ways is {ways}, but the split has only {classes} classes")
    if shots + queries > per_class:
        raise UsageError(f"shots + queries is {shots} + {queries} = {shots + queries}, but a class has only "
                         f"{per_class} images")
    chosen = random_order((tasks, classes), generator)[:, :ways]                            # (T, ways)
    members = random_order((tasks, ways, per_class), generator)[:, :, :shots + queries]     # (T, ways, n)
    rows = (chosen[:, :, None] * per_class + members).transpose(1, 2).reshape(tasks, -1)[share]     # (T, N)
    x = data.flatten(0, 1)[to_device(rows, data.device)].movedim(-1, 2)                     # (T, N, 3, S, S)
    y = torch.arange(ways, device=data.device).repeat(len(rows), shots + queries)           # (T, N)
    cut = ways * shots
    return x[:, :cut], y[:, :cut], x[:, cut:], y[:, cut:]


def sample_images(data, count, generator, share=slice(None)):
    """Draw images of any class: data as in `sample_episodes` -> x uint8 (1, B, 3, S, S), classes int64 (1, B), B the share."""
    rows = to_device(torch.randint(data.shape[0] * data.shape[1], (count,), generator=generator)[share], data.device)
    return data.flatten(0, 1)[rows].movedim(-1, 1).unsqueeze(0), (rows // data.shape[1]).unsqueeze(0)


def stored_size(args):
    """Side of the images as they are kept: with --augment 15 % above what the network sees, 224 from 257, 80 from 92."""
    return int(args.image_size * 1.15) if args.augment else args.image_size


def centre_crop(x, size):
    """(..., S, S) -> (..., size, size)."""
    start = (x.shape[-1] - size) // 2
    return x[..., start:start + size, start:start + size]


def augment(x, draws, size):
    """Random crops, flips and colours: uint8 (T, N, 3, S, S), draws (T, N, 8) uniform in [0, 1) -> floats in [0, 255],
    (T, N, 3, size, size).

    A crop has 8 to 100 % of the area and sides between 3:4 and 4:3, cut off where longer than the image; then a flip for
    every second image, and brightness, contrast and colour in this order, each between 0.6 and 1.4 times what it was.
    """
    images, draws = x.flatten(0, 1).float(), to_device(draws.flatten(0, 1), x.device)
    area, aspect, left, top, flip, *changes = draws.unbind(1)                               # (T N) each
    area, aspect = 0.08 + 0.92 * area, (4 / 3) ** (2 * aspect - 1)
    width, height = ((area * ratio).sqrt().clamp(max=1) for ratio in (aspect, 1 / aspect))
    zero = torch.zeros_like(area)
    columns = torch.stack([width * torch.where(flip < 0.5, -1, 1), zero, (1 - width) * (2 * left - 1)], 1)
    rows = torch.stack([zero, height, (1 - height) * (2 * top - 1)], 1)
    with whole_float32():
        grid = F.affine_grid(torch.stack([columns, rows], 1), [len(images), 3, size, size], align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    brightness, contrast, colour = (0.6 + 0.8 * change[:, None, None, None] for change in changes)
    images = (brightness * images).clamp(0, 255)
    for factor, plain in ((contrast, lambda grey: grey.mean((2, 3), keepdim=True)), (colour, lambda grey: grey)):
        plain = plain((images * _luma(x.device)).sum(1, keepdim=True))
        images = (plain + factor * (images - plain)).clamp(0, 255)
    return images.unflatten(0, x.shape[:2])


@functools.cache
def _luma(device):
    return torch.tensor([0.299, 0.587, 0.114], device=device).view(3, 1, 1)


def normalise(x, dtype=torch.float32):
    """Pixels (..., 3, S, S), 0 to 255 -> (x / 255 - mean) / std with ImageNet's statistics, contiguous, in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)        # half types are rounded once, at the end
    scale, shift = _pixel_transform(x.device, wide)         # (3, 1, 1) each
    pixels = x.to(wide, memory_format=torch.contiguous_format, copy=True)
    return pixels.mul_(scale).sub_(shift).to(dtype)


@functools.cache
def _pixel_transform(device, dtype):
    """Factor 1 / (255 std) and offset mean / std; cached, as a copy to the device would halt the loop."""
    mean = torch.tensor(IMAGENET_MEAN, device=device, dtype=dtype).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device, dtype=dtype).view(3, 1, 1)
    return 1 / (255 * std), mean / std


# --- network ---------------------------------------------------------------------------------------------------------

class Learner(NamedTuple):
    """What is meta-learned, and the network cut where adaptation begins."""
    theta: dict[str, Tensor]        # every tensor of the base network
    adapted: tuple[str, ...]        # names of those that the inner loop changes
    prefix: Chain                   # images -> features, the same before and after adaptation
    suffix: Chain                   # features -> logits, reads the adapted tensors
    generator: Generator | LearnedRates | Transforms | None      # psi, Meta-SGD's rates, T-Net's maps; None for MAML (M = 1)

    def parameters(self) -> list[Tensor]:
        own = [*self.theta.values(), *(self.generator.parameters() if self.generator else ())]
        return [t for t in own if t.requires_grad]

    state, load = copy_weights, load_weights        # state() -> a copy on the CPU, load(state)


def build_learner(args: argparse.Namespace, device: torch.device, classes: int = STANDARD["train"][0]) -> Learner:
    """`classes`: of the training split, which pretraining tells apart. Raises ValueError for impossible flags."""
    pretraining = args.method == "pretrain"
    build = functools.partial(conv4, context_dim=args.context_dim) if args.method == "cavia" else BACKBONES[args.backbone].build
    theta, network = build(classes if pretraining else args.ways, args.channels, args.image_size)
    theta = {name: nn.Parameter(t.detach().to(device), requires_grad=name != "context") for name, t in theta.items()}
    adapted = tuple(args.adapt)
    prefix, suffix = network.split(["head.weight"] if pretraining else adapted)
    if args.freeze_prefix:
        if not (frozen := {name for stage in prefix.stages for name in stage.reads}):
            raise UsageError(f"--freeze-prefix keeps what lies before the first adapted tensor, but nothing lies before {adapted[0]}: "
                             "name later layers with --adapt")
        for name in frozen:
            theta[name].requires_grad_(False)
    generator, shapes = None, {name: theta[name].shape for name in adapted}
    if args.method == "modgrad":
        generator = Generator(shapes, args.context_dim, args.rank, args.factors, args.init, args.hidden_cap).to(device)
    elif args.method == "metasgd":
        generator = LearnedRates(shapes, args.inner_lr).to(device)
    elif args.method == "tnet":
        generator = Transforms(shapes).to(device)
    return Learner(theta, adapted, prefix, suffix, generator)


@torch.no_grad()
def start_from(learner: Learner, path: str) -> None:
    """Take over theta from a run of this script or a file {name: tensor}; a head of another shape stays. Raises UsageError."""
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        stored = (stored["now"]["best"] or stored["weights"])["theta"] if "now" in stored else dict(stored)
    except Exception as error:
        raise UsageError(f"--start-from {path}: {file} cannot be read as weights ({error})") from None
    fits = lambda name, t: isinstance(stored.get(name), Tensor) and stored[name].shape == t.shape
    for name, t in learner.theta.items():
        if fits(name, t):
            t.copy_(stored[name])
        elif not name.startswith("head."):
            has = tuple(stored[name].shape) if isinstance(stored.get(name), Tensor) else "nothing"
            raise UsageError(f"--start-from {path} does not fit this --method, --backbone and --channels: {name} should be "
                             f"{tuple(t.shape)}, it has {has}")


# --- task loss -------------------------------------------------------------------------------------------------------

def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each task: logits (T, N, ways), labels (T, N) -> (T,)."""
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def adapt_and_predict(learner: Learner, args: argparse.Namespace, support_x: Tensor, support_y: Tensor,
                      query_x: Tensor, rng: torch.Generator | None, train: bool) -> Tensor:
    """Adapt to each support set, then classify its queries: (T, Ns, 3, S, S), (T, Ns), (T, Nq, 3, S, S) -> (T, Nq, ways).

    Without a tensor to adapt, after pretraining, the class whose mean support feature is nearest is the answer.
    """
    theta, (tasks, support) = learner.theta, support_x.shape[:2]
    if not learner.adapted:
        return nearest_mean(*features_of(learner, args, support_x, query_x), support_y, args.ways)
    prefix = functools.partial(learner.prefix, theta)
    transductive = args.batch_norm == "transductive"
    with torch.set_grad_enabled(train):
        aside = transductive and query_x.is_cuda and not torch.compiler.is_compiling()
        query = Aside(prefix, query_x) if aside else None
        features = prefix(support_x)
        tensors = lambda adapted: {**theta, **(learner.generator(adapted) if args.method == "tnet" else adapted)}
        loss = lambda adapted: cross_entropy(learner.suffix(tensors(adapted), features), support_y)
        rate = learner.generator() if args.method == "metasgd" else args.inner_lr
        generator = learner.generator if args.method == "modgrad" else None
        adapted = adapt(loss, {name: theta[name] for name in learner.adapted}, tasks, rate, generator,
                        steps=args.inner_steps, first_order=args.first_order, refine=args.refine,
                        normalise_context=args.normalise_context, noise_std=args.gradient_noise, rng=rng,
                        differentiable=train, kernel=args.kernel)
        adapted = tensors(adapted)
        if transductive:
            return learner.suffix(adapted, query.result() if aside else prefix(query_x))
        both = torch.cat([support_x, query_x], 1)
        return learner.suffix(adapted, prefix(both, support), support)[:, support:]


@torch.no_grad()
def features_of(learner: Learner, args: argparse.Namespace, support_x: Tensor, query_x: Tensor) -> tuple[Tensor, Tensor]:
    """What the head would read, scaled to length 1: (T, Ns, F), (T, Nq, F)."""
    support = support_x.shape[1]
    if args.batch_norm == "transductive":
        features = [learner.prefix(learner.theta, x) for x in (support_x, query_x)]
    else:
        features = learner.prefix(learner.theta, torch.cat([support_x, query_x], 1), support).tensor_split([support], 1)
    return tuple(F.normalize(x.flatten(2).float(), dim=2) for x in features)


def nearest_mean(support: Tensor, query: Tensor, support_y: Tensor, ways: int) -> Tensor:
    """Features (T, Ns, F), (T, Nq, F), labels (T, Ns) -> minus the distances to the means of the classes, (T, Nq, ways)."""
    classes = torch.arange(ways, device=support_y.device)
    members = (support_y.unsqueeze(2) == classes).to(support.dtype)                 # (T, Ns, ways)
    means = members.mT @ support / members.sum(1).unsqueeze(2)                      # (T, ways, F)
    return -torch.cdist(query, means)


def to_input(x: Tensor, args: argparse.Namespace) -> Tensor:
    """Images, 0 to 255 -> what the network reads: their centre, if they are larger, normalised."""
    return normalise(centre_crop(x, args.image_size), torch.bfloat16 if args.precision == "bf16" else torch.float32)


# --- meta-train ------------------------------------------------------------------------------------------------------

def make_predict(learner: Learner, args: argparse.Namespace) -> Callable[..., Tensor]:
    """adapt_and_predict for training, compiled if the flags say so: its inner gradients are traced into the same graph."""
    predict = functools.partial(adapt_and_predict, learner, args, train=True)
    return torch.compile(predict, fullgraph=True, dynamic=False) if args.compile else predict


def meta_gradient(learner: Learner, args: argparse.Namespace, episode_batch, rng: torch.Generator | None = None,
                  tasks: int | None = None, predict: Callable[..., Tensor] | None = None) -> Tensor:
    """Leave the meta-gradient of a meta-batch in the parameters, `--task-chunk` tasks at a time: returns (loss, accuracy), (2,).

    Of several ranks each brings its share, maybe none, of the meta-batch's `tasks`, by which everything is divided.
    `predict` is make_predict's, which is costly to make anew when it is compiled.
    """
    share, predict = len(episode_batch[0]), predict or make_predict(learner, args)
    tasks = tasks or share
    totals = torch.zeros(2, device=episode_batch[0].device)
    for p in learner.parameters():
        p.grad = None
    for chunk in zip(*(part.split(args.task_chunk or share) for part in episode_batch)) if share else ():
        support_x, support_y, query_x, query_y = chunk
        logits = predict(to_input(support_x, args), support_y, to_input(query_x, args), rng if args.gradient_noise else None)
        loss = cross_entropy(logits, query_y).sum() / tasks
        loss.backward()
        join_streams()
        hits = (logits.detach().argmax(-1) == query_y).float().mean(1).sum() / tasks
        totals += torch.stack([loss.detach(), hits])
    return totals


def make_gradient(learner: Learner, args: argparse.Namespace, device: torch.device) -> Callable[..., Tensor]:
    """meta_gradient(episode_batch, rng, tasks), on a GPU recorded as a CUDA graph unless the flags forbid it."""
    gradient = functools.partial(meta_gradient, learner, args, predict=make_predict(learner, args))
    if not takes_cuda_graph(args, device):
        return gradient
    of_tasks = functools.cache(lambda tasks: replays(lambda *batch: gradient(batch, None, tasks), learner.parameters()))

    def replayed(episode_batch, rng=None, tasks=None):
        return (of_tasks(tasks) if len(episode_batch[0]) else lambda *batch: gradient(batch, rng, tasks))(*episode_batch)

    return replayed


def meta_step(learner: Learner, optimiser: torch.optim.Optimizer, args: argparse.Namespace, episode_batch,
              rng: torch.Generator | None, tasks: int | None = None, gradient: Callable[..., Tensor] | None = None) -> Tensor:
    """One outer update: returns (loss, accuracy), (2,) on the device, of the whole meta-batch where several ranks share it.

    `gradient` is make_gradient's, which is costly to make anew when it is compiled or recorded.
    """
    gradient = gradient or functools.partial(meta_gradient, learner, args)
    totals = gradient(episode_batch, rng, tasks or len(episode_batch[0]))
    sum_gradients(learner.parameters(), totals)
    optimiser.step()
    return totals


def make_optimiser(learner: Learner, args: argparse.Namespace, device: torch.device) -> torch.optim.Optimizer:
    """Adam over theta and psi; on a GPU one kernel."""
    return torch.optim.Adam(learner.parameters(), lr=args.meta_lr, fused=device.type == "cuda")


def pretrain_step(learner: Learner, optimiser: torch.optim.Optimizer, args: argparse.Namespace, x: Tensor, y: Tensor) -> Tensor:
    """One update as a classifier of all training classes, x (1, B, 3, S, S), y (1, B): returns (loss, accuracy), (2,)."""
    totals = torch.zeros(2, device=x.device)
    optimiser.zero_grad(set_to_none=True)
    if y.numel():
        logits = learner.suffix(learner.theta, learner.prefix(learner.theta, to_input(x, args)))
        loss = F.cross_entropy(logits[0], y[0], reduction="sum") / args.batch_size
        loss.backward()
        totals += torch.stack([loss.detach(), (logits.detach().argmax(-1) == y).float().sum() / args.batch_size])
    sum_gradients(learner.parameters(), totals)
    optimiser.step()
    return totals


def draw_episodes(args: argparse.Namespace, images: Tensor, tasks: int, rng: torch.Generator) -> tuple[Tensor, ...]:
    """Training episodes as from `sample_episodes`, this rank's share of them, with --augment changed at random."""
    share = slice(rank(), None, ranks())
    support_x, support_y, query_x, query_y = sample_episodes(images, tasks, args.ways, args.shots, args.queries, rng, share)
    if args.augment:
        numbers = [args.ways * args.shots, args.ways * args.queries]
        draws = torch.rand(tasks, sum(numbers), 8, generator=rng)[share].split(numbers, 1)       # the same on every rank
        if len(support_x):
            support_x, query_x = (augment(x, part, args.image_size) for x, part in zip((support_x, query_x), draws))
    return support_x, support_y, query_x, query_y


def draw_images(args: argparse.Namespace, images: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch for `pretrain_step`, this rank's share of it."""
    share = slice(rank(), None, ranks())
    x, y = sample_images(images, args.batch_size, rng, share)
    if args.augment:
        draws = torch.rand(1, args.batch_size, 8, generator=rng)[:, share]
        x = augment(x, draws, args.image_size) if y.numel() else x
    return x, y


def train(learner: Learner, args: argparse.Namespace, run: Path, checkpoint: dict | None, splits: dict[str, Tensor],
          device: torch.device) -> dict:
    """Train until `--episodes` (pretrain: `--updates`), the time limit or a signal; returns the progress record, whose "best"
    holds weights."""
    pretraining = args.method == "pretrain"
    unit, per_update = ("update", 1) if pretraining else ("episode", args.meta_batch)
    if pretraining:
        optimiser = torch.optim.SGD(learner.parameters(), args.meta_lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        rate = lambda done: args.meta_lr * (1 + math.cos(math.pi * done / args.updates)) / 2
    else:
        optimiser = make_optimiser(learner, args, device)
        rate = lambda done: args.meta_lr * 0.5 ** (done // args.meta_lr_halve_every)
    episode_rng = torch.Generator().manual_seed(args.seed)
    noise_rng = torch.Generator(device).manual_seed(args.seed)
    gradient = make_gradient(learner, args, device)
    now = {unit: 0, "seconds": 0.0, "best_accuracy": None, f"best_{unit}": None, "best": None, "pending": [], "stopped": None}
    kept = {"optimiser": optimiser, "episode_rng": episode_rng}
    if args.gradient_noise:      # on its device: only without noise can a run be resumed on another kind of device
        kept["noise_rng"] = noise_rng
    with Training(learner, args, run, checkpoint, unit, now, kept, per_update) as training:
        while count := training.goes_on():
            for group in optimiser.param_groups:
                group["lr"] = rate(now[unit])
            if ranks() > 1:      # noise differs between ranks, so from one process's; a resumed run draws it again
                noise_rng.manual_seed(hash((args.seed, now[unit], rank())))
            if pretraining:
                losses = pretrain_step(learner, optimiser, args, *draw_images(args, splits["train"], episode_rng))
            else:
                batch = draw_episodes(args, splits["train"], count, episode_rng)
                losses = meta_step(learner, optimiser, args, batch, noise_rng, count, gradient)
            training.advance(losses)
            if training.due(args.log_every):
                loss, accuracy = training.log("loss", "accuracy")
                training.bar.set_postfix(loss=f"{loss:.3f}", acc=f"{accuracy:.1%}", val=f"{now['best_accuracy'] or 0:.1%}")
            if training.due(args.val_every):
                validate(learner, args, run, splits["val"], unit, now)
            if training.due(args.checkpoint_every, args.val_every):
                training.save()
    return now


def validate(learner: Learner, args: argparse.Namespace, run: Path, images: Tensor, unit: str, now: dict) -> None:
    """Measure validation accuracy and keep the weights if they are the best so far."""
    accuracy, ci95 = mean_ci95(evaluate(learner, args, images, args.val_episodes, "validation"))
    append_log(run, {unit: now[unit], "val_accuracy": accuracy, "val_ci95": ci95})
    if now["best"] is None or accuracy > now["best_accuracy"]:
        now.update({"best_accuracy": accuracy, f"best_{unit}": now[unit], "best": learner.state()})


# --- evaluate --------------------------------------------------------------------------------------------------------

def evaluate(learner: Learner, args: argparse.Namespace, images: Tensor, episodes: int, what: str) -> list[float]:
    """Accuracy of each of `episodes` tasks; the same tasks for every method, seed and device.

    Ranks take batches in turn, so that a batch's numbers do not depend on how many ranks there are (its noise does).
    """
    rng, noise_rng = torch.Generator().manual_seed(EVALUATION_SEED), None
    if args.gradient_noise:
        noise_rng = torch.Generator(next(iter(learner.theta.values())).device).manual_seed(EVALUATION_SEED + rank())
    accuracies = torch.zeros(episodes, dtype=torch.float64)
    with progress(episodes, 0, what) as bar:
        for k, batch in enumerate(accuracies.split(DRAWN * math.ceil(args.eval_batch / DRAWN))):
            mine = k % ranks() == rank()
            parts = [sample_episodes(images, len(part), args.ways, args.shots, args.queries, rng, slice(None) if mine else slice(0))
                     for part in batch.split(DRAWN)]
            tasks = (torch.cat(same).split(args.eval_batch) for same in zip(*parts))
            for results, support_x, support_y, query_x, query_y in zip(batch.split(args.eval_batch), *tasks) if mine else ():
                logits = adapt_and_predict(learner, args, to_input(support_x, args), support_y, to_input(query_x, args),
                                           noise_rng, train=False)
                right = (logits.argmax(-1) == query_y) & logits.isfinite().all(-1)      # of nan, argmax would answer the first class
                results.copy_(right.float().mean(1))
            bar.update(len(batch))
    sum_over_ranks([accuracies])      # the other ranks' tasks are zero here
    return accuracies.tolist()


# --- main ------------------------------------------------------------------------------------------------------------

def load_data(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Tensor], str, bool]:
    """Return ({split: uint8 (C, P, S, S, 3) on the device}, description, synthetic)."""
    root = Path(args.data or "data/mini-imagenet")
    if args.download:
        with first_of_machine():
            download(root)
    size = stored_size(args)
    if from_first_rank(lambda: args.smoke or not (args.data or args.download or (root.is_dir() and find_data(root)))):
        if args.resize_nearest:
            raise UsageError("--resize-nearest is for images of mini-ImageNet; SYNTHETIC ones are drawn at their size")
        splits = {split: synthetic_split(split, image_size=size) for split in SPLITS}
        hint = "" if args.smoke else f"; no mini-ImageNet in {root}: see README, 'Data', or pass --download"
        print(f"SYNTHETIC data: procedurally drawn classes, not mini-ImageNet{hint}", flush=True)
    else:
        with first_of_machine():
            splits = {split: load_split(root, split, size, args.resize_nearest) for split in SPLITS}
    first = splits["train"]
    if not first.synthetic:
        print("; ".join(images.dataset for images in splits.values()), flush=True)
    return ({split: to_tensor(images, device) for split, images in splits.items()},
            "synthetic" if first.synthetic else "mini-imagenet", first.synthetic)


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    device = setup(args)
    splits, dataset, synthetic = load_data(args, device)
    try:
        backend = resolve_backend(args.kernel, device)
        takes_cuda_graph(args, device)
        learner = build_learner(args, device, len(splits["train"]))
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from None
    for images in splits.values():      # impossible sizes are refused before a run folder exists
        sample_episodes(images, 1, args.ways, args.shots, args.queries, torch.Generator())
    if args.start_from:      # not needed again by a resumed run
        from_first_rank(lambda: args.resume and Path(args.out, "checkpoint.pt").exists() or start_from(learner, args.start_from))
    run, checkpoint = from_first_rank(lambda: open_run(args.out, vars(args) | {"dataset": dataset}, args.resume))
    learner.load(from_first_rank(learner.state))
    print(f"{args.method} {args.backbone} {args.ways}-way {args.shots}-shot on {device} ({backend} kernel), "
          f"{args.batch_norm} batch norm -> {run}", flush=True)
    now = train(learner, args, run, checkpoint, splits, device)
    if now["best"] is not None:
        learner.load(now["best"])
    accuracies = evaluate(learner, args, splits[args.test_split], args.test_episodes, "test")
    if rank() > 0:
        return
    accuracy, ci95 = mean_ci95(accuracies)
    pretraining = args.method == "pretrain"
    label = (f"{'SYNTHETIC ' if synthetic else ''}{args.ways}-way {args.shots}-shot "
             f"{'nearest class means' if pretraining else args.method}")
    unit, curve = ("update", "training") if pretraining else ("episode", "meta-training, query")
    plot_log(run, f"{label}: {accuracy:.1%} on {args.test_split}", unit, f"training {unit}s", "accuracy, %",
             {curve: "accuracy", "validation": "val_accuracy"}, scale=100)
    write_result(run, device, {
        "metric": "accuracy", "value": accuracy, "ci95": ci95, "tasks": len(accuracies), "split": args.test_split,
        "dataset": dataset, "synthetic": synthetic, "batch_norm": args.batch_norm, "config": vars(args),
        "seed": args.seed, f"{unit}s": now[unit], f"best_{unit}": now[f"best_{unit}"],
        "best_val_accuracy": now["best_accuracy"], "kernel": backend,
        "train_seconds": now["seconds"], f"train_{unit}s_per_second": now[unit] / max(now["seconds"], 1e-9)})
    print(f"{label}, {args.test_split} accuracy ({args.batch_norm} batch norm): {100 * accuracy:.2f} ± "
          f"{100 * ci95:.2f} % over {len(accuracies)} tasks; results in {run}")


if __name__ == "__main__":
    run_main(main, several_devices=True)
