"""Image completion on CelebA faces (Table 3 and Fig. 7 of the paper): a task is one image, a sample one of its pixels.

    python train_celeba.py --pixels 10 --order random

is the paper's first cell: ModGrad, a network from a pixel's place to its colour, one inner step on 10 random pixels
(paper: mean squared error 0.034; here, as in CAVIA's code, over all 1,024 pixels). `--method maml|cavia|cnp` are the
paper's baselines. Without the real images it runs on embedded SYNTHETIC faces. Shapes: T tasks (images), P = 1,024
pixels, k given pixels, D size of the context.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common import (DataError, HelpFormatter, Training, UsageError, add_cuda_graph_flag, add_run_flags, append_log,
                    cached_array, check_finite, copy_weights, extract_archive, fetch_file, fill_in, fingerprint_files,
                    load_weights, mean_ci95, non_negative_float, open_run, parse_run, plot_log, positive_float, positive_int,
                    progress, replays, run_main, save_atomically, setup, several_int, takes_cuda_graph, to_device,
                    use_available_kernel, write_result)
from kernels import linear, resolve_backend
from modgrad import Chain, Generator, LinearUpdate, Stage, adapt, adapt_linear, mlp

# --- flags -----------------------------------------------------------------------------------------------------------

EVALUATION_SEED = 20200823      # of validation and test pixels: the same for every run, so that results compare
SIDE = 32                       # pixels per side of a task's image
PIXELS = SIDE * SIDE
HIDDEN_LAYERS = 5               # fc1 ... fc5; fc6 is the output
EVERY_LAYER = [f"fc{k}.{kind}" for k in range(1, HIDDEN_LAYERS + 2) for kind in ("weight", "bias")]
# DEVIATION: alpha is 10 for modgrad; the paper gives a "learning rate" of 0.1. Only alpha M enters the step and M's
# scale is free; from M = 1, training is faster with 10 (results/celeba). With three such steps single images
# can make the loss explode (seed 1: infinite at iteration 305), hence clip_norm, several times the usual length of the
# outer gradient (0.03 to 0.08). CAVIA's clamp of outer gradients is left out.
DEFAULTS = {                    # what differs between the methods
    "modgrad": {"inner_steps": 1, "inner_lr": 10.0, "adapt": ["fc5.weight", "fc5.bias"], "clip_norm": 0.3},
    "maml": {"inner_steps": 5, "inner_lr": 0.1, "adapt": EVERY_LAYER, "clip_norm": None},
    "cavia": {"inner_steps": 5, "inner_lr": 1.0, "adapt": ["context"], "clip_norm": None},
    "cnp": {"inner_steps": None, "inner_lr": None, "adapt": None, "clip_norm": None},
}
SMOKE = {"iterations": 40, "val_every": 20, "val_images": 20, "test_images": 50, "width": 32, "context_dim": 16,
         "log_every": 10, "checkpoint_every": 20}


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    task = parser.add_argument_group("task")
    task.add_argument("--data", help="folder with CelebA (default: data/celeba if it is there, else SYNTHETIC faces)")
    task.add_argument("--download", action="store_true", help="fetch the aligned images into --data first (1.4 GB)")
    task.add_argument("--pixels", type=positive_int, default=10, help="k, given pixels per image (paper: 10, 100)")
    task.add_argument("--order", choices=("random", "ordered"), default="random",
                      help="which pixels are given: k of the 1,024 at random, or the first k in row-major order")

    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=tuple(DEFAULTS), default="modgrad", help="the meta-learner; cnp has no inner loop")
    method.add_argument("--width", type=positive_int, default=128, help="units per hidden layer (paper: 128)")
    method.add_argument("--inner-steps", type=positive_int, help="K (default: modgrad 1, maml and cavia 5)")
    method.add_argument("--inner-lr", type=positive_float, help="alpha (default: modgrad 10, maml 0.1, cavia 1)")
    method.add_argument("--adapt", nargs="+", metavar="NAME", help="tensors that the inner loop changes: fc1.weight, "
                        "fc1.bias, ..., fc6.bias, or context, a vector appended to the input (default: modgrad the "
                        "layer before the last, maml all layers, cavia the context)")
    method.add_argument("--rank", type=positive_int, default=5, help="u, columns per sister network (paper: 5)")
    method.add_argument("--context-dim", type=positive_int, default=128,
                        help="D, length of nu, of cavia's context and of cnp's representation (paper: 128)")
    method.add_argument("--hidden-cap", type=positive_int, default=256, help="largest hidden layer of a sister network")
    method.add_argument("--init", choices=("identity", "released"), default="identity",
                        help="M at the start of training: 1 (MAML), or PyTorch's default layers (M near 0)")
    method.add_argument("--first-order", action="store_true", help="no second derivatives")
    method.add_argument("--refine", action="store_true",
                        help="the authors' released code for K > 1: 2K passes from theta^0, all but the last refine nu")
    method.add_argument("--normalise-context", action="store_true",
                        help="divide nu by its root mean square, a departure from Eq. 9: psi then learns from the start")
    method.add_argument("--gradient-noise", type=non_negative_float, default=0.0,
                        help="eta, standard deviation of noise on the inner gradient")
    method.add_argument("--kernel", choices=("auto", "triton", "closed", "eager"), default="auto",
                        help="the modulated update: auto is low-rank for few pixels, else Triton on CUDA, closed forms on "
                        "the CPU")

    train = parser.add_argument_group("meta-training")
    train.add_argument("--iterations", type=positive_int, default=50_000, help="outer updates (CAVIA: 50,000)")
    train.add_argument("--meta-batch", type=positive_int, default=25, help="images per outer update (CAVIA: 25)")
    train.add_argument("--outer-pixels", type=positive_int, default=PIXELS,
                       help="pixels in the outer loss: all 1,024 (CAVIA), or fewer, drawn anew for each update")
    train.add_argument("--meta-lr", type=positive_float, default=1e-3, help="Adam's rate (CAVIA: 1e-3)")
    train.add_argument("--meta-lr-schedule", choices=("constant", "cosine"), default="constant",
                       help="constant (CAVIA), or a cosine to zero at --iterations, for shorter runs")
    train.add_argument("--clip-norm", type=positive_float,
                       help="shorten a longer outer gradient to this norm (default: modgrad 0.3, the others never)")
    add_cuda_graph_flag(train)
    train.add_argument("--val-every", type=positive_int, default=500, help="iterations between validations")
    train.add_argument("--val-images", type=several_int, default=500, help="validation images, the first ones")
    train.add_argument("--log-every", type=positive_int, default=50, help="iterations per line of log.jsonl")
    train.add_argument("--checkpoint-every", type=positive_int, default=500, help="iterations between checkpoints")

    test = parser.add_argument_group("test")
    test.add_argument("--test-images", type=several_int, help="test images, the first ones (default: all)")
    test.add_argument("--test-split", choices=("test", "val"), default="test", help="images of the final evaluation")
    test.add_argument("--eval-batch", type=positive_int, default=50, help="images evaluated at once")
    test.add_argument("--smoke", action="store_true", help="a complete tiny run on SYNTHETIC data in under a minute")

    use = parser.add_argument_group("trained runs")
    use.add_argument("--figure", nargs="+", metavar="RUN", help="draw test images completed by these runs")
    use.add_argument("--complete", metavar="IMAGE", help="complete an image of your own with the run in --checkpoint")
    use.add_argument("--checkpoint", metavar="RUN", help="run folder for --complete")
    use.add_argument("--picture", default="completions.png", help="file that --figure and --complete write (.png, .pdf, .svg)")
    use.add_argument("--benchmark", action="store_true",
                     help="time meta-training against a loop over tasks, train nothing (needs the tests folder)")
    add_run_flags(parser)
    return complete(parse_run(parser, argv, lambda given: SMOKE, unread))


def unread(args: argparse.Namespace) -> dict:
    """Flags that the method does not read: {whose they are: names}."""
    flags = {}
    if args.method != "modgrad":
        flags["for --method modgrad"] = ["refine", "normalise_context"]
    if args.method == "cnp":
        flags["for methods with an inner loop"] = ["adapt", "inner_steps", "inner_lr", "gradient_noise", "first_order"]
    return flags


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the method or on --smoke, and refuse combinations that mean nothing."""
    if args.adapt and args.method in ("cavia", "maml") and (args.method == "cavia") != (args.adapt == ["context"]):
        raise UsageError(f"--adapt {' '.join(args.adapt)} with --method {args.method}: cavia adapts its context and nothing else, maml "
                         "adapts layers")
    fill_in(args, DEFAULTS[args.method])
    for name in ("pixels", "outer_pixels"):
        if getattr(args, name) > PIXELS:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but an image has {PIXELS} pixels")
    if sum(map(bool, (args.figure, args.complete, args.benchmark))) > 1:
        raise UsageError("--figure, --complete and --benchmark are three different things to do: name one")
    if bool(args.complete) != bool(args.checkpoint):
        raise UsageError("--complete IMAGE and --checkpoint RUN go together")
    if not args.picture.endswith((".png", ".pdf", ".svg")):
        raise UsageError(f"--picture {args.picture}: give it a name that ends in .png, .pdf or .svg")
    if args.smoke:
        if args.data or args.download:
            raise UsageError("--smoke runs on the embedded synthetic data: leave out --data and --download")
    args.out = args.out or f"runs/celeba/{args.order}{args.pixels}-{args.method}-seed{args.seed}{'-smoke' * args.smoke}"
    return args


# --- data ------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "val", "test")
STANDARD = {"train": 162_770, "val": 19_867, "test": 19_962}        # images 1 ... 202,599 in this order
SYNTHETIC = {"train": 2_000, "val": 200, "test": 400}
PARTITION = "list_eval_partition.txt"
ARCHIVE = {"urls": ["https://s3.amazonaws.com/pytorch-tutorial-assets/img_align_celeba.zip"], "size": 1_443_490_838,
           "sha256": "46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74"}
LICENCE = ("CelebA is for non-commercial research (https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html); its terms apply "
           "to every copy.")


def find_data(root: Path) -> Path | None:
    """The folder that holds img_align_celeba/: `root` or root/celeba; None if neither does."""
    return next((home for home in (root, root / "celeba") if (home / "img_align_celeba").is_dir()), None)


def load_splits(root: str | Path) -> dict[str, np.ndarray]:
    """{split: uint8 (images, 32, 32, 3)} in the order of the file names, decoded once and cached beside the data."""
    if (home := find_data(Path(root))) is None:
        raise DataError(f"no CelebA in {Path(root).absolute()}: looked for img_align_celeba/*.jpg and {PARTITION}. "
                        f"To download it: python train_celeba.py --download --data {root}")
    files, splits = list_images(home), {}
    for split in SPLITS:
        if not files[split]:
            raise DataError(f"{home}: the {split} split of {PARTITION if (home / PARTITION).exists() else 'the official ranges'} has no "
                            f"image; {', '.join(SPLITS)} are needed")
        build = lambda: decode(files[split], split)
        splits[split] = cached_array(home / "cache", f"{split}-{SIDE}", fingerprint_files(files[split]), build)
    return splits


def list_images(home: Path) -> dict[str, list[Path]]:
    """By list_eval_partition.txt, or without it by the official ranges: {split: sorted paths}."""
    folder, partition = home / "img_align_celeba", home / PARTITION
    folder = folder / folder.name if (folder / folder.name).is_dir() else folder         # as some archives unpack
    present = {entry.name for entry in os.scandir(folder) if entry.name.endswith(".jpg")}
    text = partition.read_bytes() if partition.exists() else official_partition(present, folder)
    files = {split: [] for split in SPLITS}
    for number, line in enumerate(text.decode("utf-8", errors="replace").rstrip().splitlines(), start=1):
        if not (match := re.fullmatch(r"(\d{6}\.jpg)\s+([012])\s*", line)):
            raise DataError(f"{partition} line {number}: {line[:80]!r} is not a name NNNNNN.jpg and 0 (train), 1 (val) "
                            "or 2 (test)")
        if match[1] not in present:
            raise DataError(f"{partition} line {number} lists {match[1]}, which {folder} lacks; remove {partition} to "
                            "use the images that are there")
        files[SPLITS[int(match[2])]].append(folder / match[1])
    listed = [path for paths in files.values() for path in paths]
    if len(set(listed)) != len(listed):
        raise DataError(f"{partition} lists an image more than once")
    return {split: sorted(paths) for split, paths in files.items()}


def official_partition(names: Iterable[str], folder: Path) -> bytes:
    """The official list_eval_partition.txt, byte by byte, restricted to `names`: three ranges of image numbers."""
    lines = []
    for name in sorted(names):
        number = int(name[:-4]) if re.fullmatch(r"\d{6}\.jpg", name) else 0
        if not 1 <= number <= sum(STANDARD.values()):
            raise DataError(f"{folder / name} is not named as a CelebA image, 000001.jpg to 202599.jpg")
        part = (number > STANDARD["train"]) + (number > STANDARD["train"] + STANDARD["val"])
        lines.append(f"{name} {part}\r\n")
    return "".join(lines).encode()


def decode(paths: list[Path], split: str) -> np.ndarray:
    """uint8 (images, 32, 32, 3), on threads since PIL releases the GIL."""
    out = np.empty((len(paths), SIDE, SIDE, 3), np.uint8)
    with progress(len(paths), 0, f"decoding {split}") as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, pixels in enumerate(pool.map(read_image, paths)):
            out[row] = pixels
            bar.update(1)
    return out


def read_image(path: str | Path) -> np.ndarray:
    """The whole image, uncropped, at 32 x 32: uint8 (32, 32, 3). The aspect ratio changes, as in CAVIA's protocol."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB").resize((SIDE, SIDE), Image.LANCZOS))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not a readable image: {error}") from error


def download(root: Path) -> None:
    """Fetch the aligned images into `root`; the partition file needs no download."""
    if home := find_data(root):
        return print(f"CelebA is already in {home}; nothing to download", flush=True)
    print(LICENCE, flush=True)
    archive = root / "img_align_celeba.zip"
    fetch_file(ARCHIVE["urls"], archive, sha256=ARCHIVE["sha256"], size=ARCHIVE["size"],
               manual=f"By hand: unpack img_align_celeba.zip from the project's page in {root.absolute()}")
    extract_archive(archive, root)
    archive.unlink()


def synthetic_split(split: str, seed: int = 0) -> np.ndarray:
    """Draw the SYNTHETIC stand-in, uint8 (images, 32, 32, 3): hair, face, eyes and mouth before a smooth background."""
    rng, count = np.random.default_rng([seed, SPLITS.index(split)]), SYNTHETIC[split]
    each = lambda low, high: rng.uniform(low, high, (count, 1, 1)).astype(np.float32)
    colour = lambda low, high: rng.uniform(low, high, (count, 1, 1, 3)).astype(np.float32)
    axis = (np.arange(SIDE, dtype=np.float32) + 0.5) * (2 / SIDE) - 1
    x, y = axis[None, :], axis[:, None]

    def paint(image, tint, left, top, width, height, sharpness=6.0):
        """Lay an ellipse over the images; its edge is soft, as a face's is at 32 pixels."""
        radius = np.sqrt(((x - left) / width) ** 2 + ((y - top) / height) ** 2)
        return image + np.clip((1 - radius) * sharpness + 0.5, 0, 1)[..., None] * (tint - image)

    slope = np.clip(0.5 + each(-0.5, 0.5) * x + each(-0.5, 0.5) * y, 0, 1)[..., None]
    image = colour(0.1, 0.9) * slope + colour(0.1, 0.9) * (1 - slope)
    left, top, width = each(-0.12, 0.12), each(-0.05, 0.15), each(0.42, 0.55)
    tone = rng.uniform(0.35, 1, (count, 1, 1, 1)).astype(np.float32)
    skin = tone * np.array([0.95, 0.75, 0.62], np.float32) + colour(-0.05, 0.05)
    image = paint(image, colour(0.05, 0.6), left, 1.25, 2 * width, 0.5)                      # shoulders
    image = paint(image, colour(0.02, 0.6), left, top - 0.15, width * each(1.1, 1.5), each(0.75, 1.0))
    image = paint(image, skin, left, top + 0.12, width, 0.62)
    look, apart, eyes = each(-0.06, 0.06), width * each(0.4, 0.5), colour(0.02, 0.25)
    for side in (-1, 1):
        image = paint(image, eyes, left + look + side * apart, top, 0.11, 0.07, 2.0)
    lips = skin * np.array([0.8, 0.45, 0.45], np.float32)
    image = paint(image, lips, left + look, top + 0.48, each(0.12, 0.24), each(0.05, 0.09), 2.0)
    light = each(0.7, 1.15) * (1 + each(-0.3, 0.3) * x)
    return (np.clip(image * light[..., None], 0, 1) * 255 + 0.5).astype(np.uint8)


def sample_pixels(tasks: int, k: int, order: str, rng: torch.Generator) -> Tensor:
    """Row-major numbers of the k given pixels of each task, (T, k), distinct."""
    if order == "ordered":
        return torch.arange(k).expand(tasks, k)
    return torch.rand(tasks, PIXELS, generator=rng).topk(k).indices


def coordinates(device: torch.device) -> Tensor:
    """The network's input for every pixel in row-major order: (row / 32, column / 32), (P, 2)."""
    axis = torch.arange(SIDE, device=device) / SIDE
    return torch.cartesian_prod(axis, axis)


def colours(images: Tensor) -> Tensor:
    """uint8 (T, 32, 32, 3) -> RGB in [0, 1], (T, P, 3)."""
    return images.flatten(1, 2).float() / 255


# --- network ---------------------------------------------------------------------------------------------------------

class Learner(NamedTuple):
    """What is meta-learned, and the network cut where adaptation begins."""
    theta: dict[str, Tensor]        # every tensor of the base network
    adapted: tuple[str, ...]        # names of those that the inner loop changes; none for CNP
    prefix: Chain                   # coordinates -> features, the same for all tasks; CNP: the encoder
    suffix: Chain                   # features -> colours, reads the adapted tensors; CNP: the decoder
    generator: Generator | None     # psi; None for the baselines

    def parameters(self) -> list[Tensor]:
        """All but cavia's context, which starts every task at zero."""
        theta = [t for name, t in self.theta.items() if name != "context"]
        return [*theta, *(self.generator.parameters() if self.generator else ())]

    state, load = copy_weights, load_weights        # state() -> a copy on the CPU, load(state)


def build_learner(args: argparse.Namespace, device: torch.device) -> Learner:
    hidden = [args.width] * HIDDEN_LAYERS
    if args.method == "cnp":
        encoded, encoder = named("encoder", *mlp([2 + 3, *hidden, args.context_dim]))
        decoded, decoder = named("decoder", *mlp([2 + args.context_dim, *hidden, 2 * 3]))
        return Learner(trainable({**encoded, **decoded}, device), (), encoder, decoder, None)
    with_context = "context" in args.adapt
    theta, network = mlp([2 + args.context_dim * with_context, *hidden, 3])
    theta = trainable(theta, device)
    if with_context:
        theta["context"] = torch.zeros(args.context_dim, device=device)
        network = Chain([Stage(("context", *network.stages[0].reads), first_layer_with_context), *network.stages[1:]])
    prefix, suffix = network.split(args.adapt)
    generator = None
    if args.method == "modgrad":
        generator = Generator({name: theta[name].shape for name in args.adapt}, args.context_dim, args.rank,
                              init=args.init, hidden_cap=args.hidden_cap).to(device)
    return Learner(theta, tuple(args.adapt), prefix, suffix, generator)


def trainable(theta: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: nn.Parameter(t.detach().to(device)) for name, t in theta.items()}


def named(prefix: str, theta: dict[str, Tensor], network: Chain) -> tuple[dict[str, Tensor], Chain]:
    """The same network with its tensors called PREFIX.NAME, so that two networks can share one theta."""
    def renamed(stage: Stage) -> Stage:
        own = lambda theta: {name: theta[f"{prefix}.{name}"] for name in stage.reads}
        return Stage(tuple(f"{prefix}.{name}" for name in stage.reads),
                     lambda theta, x, support: stage.apply(own(theta), x, support))
    return {f"{prefix}.{name}": t for name, t in theta.items()}, Chain([renamed(stage) for stage in network.stages])


def first_layer_with_context(theta: dict[str, Tensor], x: Tensor, support: int | None) -> Tensor:
    """relu(W [x, context] + b), x (T, N, 2) -> (T, N, width), without a copy of the context for every pixel."""
    columns = theta["fc1.weight"].mT                                                         # ([T,] 2 + D, width)
    of_task = theta["context"].unsqueeze(-2) @ columns[..., 2:, :] + theta["fc1.bias"].unsqueeze(-2)
    return F.relu(x @ columns[..., :2, :] + of_task)


# --- task loss -------------------------------------------------------------------------------------------------------

def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over pixels and channels of each task: (T, N, 3 or 6), (T, N, 3) -> (T,); of a CNP's output the means."""
    return (output[..., :3] - target).square().mean((1, 2))


def outer_loss(output: Tensor, target: Tensor) -> Tensor:
    """(T,): the squared error, or for a CNP's (T, N, 6) its Gaussians' negative log-likelihood, up to a constant."""
    if output.shape[-1] == 3:
        return squared_error(output, target)
    mean, raw = output.chunk(2, -1)
    std = 0.1 + 0.9 * F.softplus(raw)                       # bounded below, as in the CNP authors' notebook
    return (((target - mean) / std).square() / 2 + std.log()).mean((1, 2))


def adapt_and_predict(learner: Learner, args: argparse.Namespace, given: Tensor, given_colours: Tensor,
                      query: Tensor | None, rng: torch.Generator | None, train: bool) -> Tensor:
    """Adapt to the given pixels, then predict others: (T, k), (T, k, 3) -> (T, N, 3), or (T, N, 6) for CNP.

    query: numbers of the N pixels to predict, the same for all tasks; None for all 1,024.
    """
    theta, tasks = learner.theta, len(given)
    with torch.set_grad_enabled(train):
        x = coordinates(given.device)
        wanted = slice(None) if query is None else query
        if args.method == "cnp":
            code = learner.prefix(theta, torch.cat([x[given], given_colours], -1)).mean(1, keepdim=True)    # (T, 1, D)
            places = x[wanted].expand(tasks, -1, -1)
            return learner.suffix(theta, torch.cat([places, code.expand(-1, places.shape[1], -1)], -1))
        features = learner.prefix(theta, x.unsqueeze(0))[0]                              # (P, F), once for all tasks
        if few_pixels(args):
            z, update = adapt_to_few(learner, args, features, given, given_colours, train)
            return output_layer(theta, update(z[wanted], features[wanted]))
        support = features[given]                                                        # (T, k, F)
        loss = lambda adapted: squared_error(learner.suffix({**theta, **adapted}, support), given_colours)
        adapted = adapt(loss, {name: theta[name] for name in learner.adapted}, tasks, args.inner_lr, learner.generator,
                        steps=args.inner_steps, first_order=args.first_order, refine=args.refine,
                        normalise_context=args.normalise_context, noise_std=args.gradient_noise, rng=rng,
                        differentiable=train, kernel=args.kernel)
        return learner.suffix({**theta, **adapted}, features[wanted].expand(tasks, -1, -1))


# --- the same for fc5 and few pixels, without a weight matrix for each task ------------------------------------------

def few_pixels(args: argparse.Namespace) -> bool:
    """Whether fc5 alone is modulated, and its update of so low a rank that it is cheaper as two thin factors."""
    return (args.kernel == "auto" and args.method == "modgrad" and args.adapt == DEFAULTS["modgrad"]["adapt"]
            and not args.refine and not args.gradient_noise and args.pixels * args.inner_steps <= args.width // 2)


def output_layer(theta: dict[str, Tensor], z: Tensor) -> Tensor:
    """fc5's output before its ReLU -> colours, (..., width) -> (..., 3)."""
    return F.linear(F.relu(z), theta["fc6.weight"], theta["fc6.bias"])


def adapt_to_few(learner: Learner, args: argparse.Namespace, features: Tensor, given: Tensor, given_colours: Tensor,
                 train: bool) -> tuple[Tensor, LinearUpdate]:
    """fc5's output before adaptation for all pixels, (P, width), and what the inner loop adds to fc5."""
    z = linear(features, learner.theta["fc5.weight"], learner.theta["fc5.bias"])
    loss = lambda z: squared_error(output_layer(learner.theta, z), given_colours)
    update = adapt_linear(loss, features[given], z[given], args.inner_lr, learner.generator, learner.adapted,
                          steps=args.inner_steps, first_order=args.first_order,
                          normalise_context=args.normalise_context, differentiable=train)
    return z, update


class OuterError(torch.autograd.Function):
    """Mean squared error over tasks, pixels and channels of weight relu(z + keys^T values + bias) + offset.

    The forward pass computes the gradients too, one task after the other: a task's activations (512 KiB) are used while
    they are in cache, where autograd keeps those of all tasks in memory.
    z (N, width); keys (T, R, N); values (T, R, width); bias (T, width); weight (3, width); offset (3,); target
    (T, N, 3).
    """

    @staticmethod
    def forward(ctx, z, keys, values, bias, weight, offset, target):
        d_z, d_keys, d_values, d_bias, d_weight = (torch.zeros_like(t) for t in (z, keys, values, bias, weight))
        errors = offset.unsqueeze(1) - target.mT.contiguous()                            # (T, 3, N), to be completed
        h, d_h = torch.empty_like(z), torch.empty_like(z)                                # (N, width), of one task
        for t, error in enumerate(errors):
            torch.addmm(z, keys[t].mT, values[t], out=h).add_(bias[t]).relu_()
            error.addmm_(weight, h.mT)
            torch.mm(error.mT, weight, out=d_h)
            d_z.add_(torch.ops.aten.threshold_backward(d_h, h, 0, grad_input=d_h))
            torch.mm(values[t], d_h.mT, out=d_keys[t])
            torch.mm(keys[t], d_h, out=d_values[t])
            torch.sum(d_h, 0, out=d_bias[t])
            d_weight.addmm_(error, h)
        ctx.scale = 2 / target.numel()
        ctx.save_for_backward(d_z, d_keys, d_values, d_bias, d_weight, errors.sum((0, 2)))
        return errors.square().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return *(slope * ctx.scale * t for t in ctx.saved_tensors), None


# --- meta-train ------------------------------------------------------------------------------------------------------

def sample_tasks(images: Tensor, args: argparse.Namespace,
                 rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """A meta-batch: colours (T, P, 3), given pixels (T, k), and the pixels of the outer loss, None for all.

    rng is on the CPU, so that every device sees the same tasks; what it draws goes to where the images are.
    """
    chosen = torch.randint(len(images), (args.meta_batch,), generator=rng)
    given = sample_pixels(args.meta_batch, args.pixels, args.order, rng)
    query = None if args.outer_pixels == PIXELS else sample_pixels(1, args.outer_pixels, "random", rng)[0]
    chosen, given, query = (t if t is None else to_device(t, images.device) for t in (chosen, given, query))
    return colours(images[chosen]), given, query


def meta_gradient(learner: Learner, args: argparse.Namespace, target: Tensor, given: Tensor, query: Tensor | None = None,
                  rng: torch.Generator | None = None) -> Tensor:
    """Leave a meta-batch's meta-gradient in the parameters: returns (loss, squared error), (2,) on the device."""
    given_colours = target.gather(1, given.unsqueeze(-1).expand(-1, -1, 3))                  # (T, k, 3)
    target = target if query is None else target[:, query]
    if few_pixels(args) and target.device.type == "cpu":
        features = learner.prefix(learner.theta, coordinates(given.device).unsqueeze(0))[0]
        z, update = adapt_to_few(learner, args, features, given, given_colours, train=True)
        z, features = (z, features) if query is None else (z[query], features[query])
        loss = mse = OuterError.apply(z, update.keys(features), update.left, update.bias, learner.theta["fc6.weight"],
                                      learner.theta["fc6.bias"], target)
    else:
        output = adapt_and_predict(learner, args, given, given_colours, query, rng, train=True)
        loss, mse = outer_loss(output, target).mean(), squared_error(output.detach(), target).mean()
    for p in learner.parameters():
        p.grad = None
    loss.backward()
    return torch.stack([loss.detach(), mse.detach()])


def make_gradient(learner: Learner, args: argparse.Namespace, device: torch.device) -> Callable[..., Tensor]:
    """meta_gradient(target, given, query, rng), on a GPU recorded as a CUDA graph unless the flags forbid it."""
    gradient = functools.partial(meta_gradient, learner, args)
    if not takes_cuda_graph(args, device):
        return gradient
    replayed = replays(gradient, learner.parameters())
    return lambda target, given, query, rng: replayed(*(t for t in (target, given, query) if t is not None))


def meta_step(learner: Learner, optimiser: torch.optim.Optimizer, args: argparse.Namespace, batch,
              rng: torch.Generator | None, gradient: Callable[..., Tensor] | None = None) -> Tensor | None:
    """One outer update on a meta-batch: returns (loss, squared error), (2,) on the device; None, and nothing is
    updated, if the gradient is not finite, as when the inner loop diverges on an image.

    `gradient` is make_gradient's, which is costly to make anew when it is recorded.
    """
    losses = (gradient or functools.partial(meta_gradient, learner, args))(*batch, rng)
    if not nn.utils.clip_grad_norm_(learner.parameters(), args.clip_norm or math.inf).isfinite():
        return None
    optimiser.step()
    return losses


def meta_train(learner: Learner, args: argparse.Namespace, run: Path, checkpoint: dict | None,
               splits: dict[str, Tensor], device: torch.device) -> dict:
    """Train until `--iterations`, the time limit or a signal; returns the record, whose "best" holds weights."""
    optimiser = torch.optim.Adam(learner.parameters(), lr=args.meta_lr, fused=True)         # one pass over memory
    task_rng = torch.Generator().manual_seed(args.seed)
    noise_rng = torch.Generator(device).manual_seed(args.seed)
    gradient = make_gradient(learner, args, device)
    now = {"iteration": 0, "seconds": 0.0, "best_mse": None, "best_iteration": None, "best": None, "pending": [],
           "skipped": 0, "diverged": 0, "stopped": None}           # diverged: validations in a row
    kept = {"optimiser": optimiser, "task_rng": task_rng}
    if args.gradient_noise:      # on its device: only without noise can a run be resumed on another kind of device
        kept["noise_rng"] = noise_rng
    with Training(learner, args, run, checkpoint, "iteration", now, kept) as training:
        while training.goes_on():
            for group in optimiser.param_groups:
                group["lr"] = meta_lr(args, now["iteration"])
            batch = sample_tasks(splits["train"], args, task_rng)
            losses = meta_step(learner, optimiser, args, batch, noise_rng, gradient)
            training.advance(losses)
            now["skipped"] += losses is None
            if now["skipped"] > 10 + now["iteration"] / 100:
                raise UsageError(f"the outer gradient was not finite in {now['skipped']} of {now['iteration']} "
                                 "iterations: a smaller --inner-lr or --meta-lr usually helps")
            if training.due(args.log_every) and now["pending"]:
                _, mse = training.log("loss", "mse")
                training.bar.set_postfix(mse=f"{mse:.4f}", val=f"{now['best_mse'] or math.nan:.4f}")
            if training.due(args.val_every):
                validate(learner, args, run, splits["val"], now)
            if training.due(args.checkpoint_every, args.val_every):
                training.save()
    return now


def meta_lr(args: argparse.Namespace, iteration: int) -> float:
    share = 1.0 if args.meta_lr_schedule == "constant" else (1 + math.cos(math.pi * iteration / args.iterations)) / 2
    return args.meta_lr * share


def validate(learner: Learner, args: argparse.Namespace, run: Path, images: Tensor, now: dict) -> None:
    """Measure the validation error and keep the weights if they are the best so far.

    Weights whose inner loop diverges on an image are passed over; raises UsageError where none before them did better, or
    the third time in a row.
    """
    errors = evaluate(learner, args, images[: args.val_images], "validation")
    if diverged := sum(not math.isfinite(error) for error in errors):
        now["diverged"] += 1
        if now["best"] is None or now["diverged"] > 2:
            check_finite(math.inf, "validation error", f"iteration {now['iteration']}", run)
        append_log(run, {"iteration": now["iteration"], "val_diverged": diverged})
        return print(f"\niteration {now['iteration']}: the inner loop diverged on {diverged} of {len(errors)} validation "
                     f"images; the best weights remain those of iteration {now['best_iteration']}", file=sys.stderr)
    now["diverged"] = 0
    mse, ci95 = mean_ci95(errors)
    append_log(run, {"iteration": now["iteration"], "val_mse": mse, "val_ci95": ci95})
    if now["best"] is None or mse < now["best_mse"]:
        now.update(best_mse=mse, best_iteration=now["iteration"], best=learner.state())


# --- evaluate --------------------------------------------------------------------------------------------------------

def complete_images(learner: Learner, args: argparse.Namespace, images: Tensor, given: Tensor,
                    noise_rng: torch.Generator | None = None) -> Tensor:
    """The completed images: uint8 (T, 32, 32, 3) and given pixels (T, k) -> colours (T, P, 3)."""
    given = given.to(images.device)
    given_colours = colours(images).gather(1, given.unsqueeze(-1).expand(-1, -1, 3))
    return adapt_and_predict(learner, args, given, given_colours, None, noise_rng, train=False)[..., :3]


def evaluate(learner: Learner, args: argparse.Namespace, images: Tensor, what: str) -> list[float]:
    """Mean squared error over all pixels of each image; the same given pixels for every method, seed and device."""
    given = sample_pixels(len(images), args.pixels, args.order, torch.Generator().manual_seed(EVALUATION_SEED))
    noise_rng = torch.Generator(images.device).manual_seed(EVALUATION_SEED)
    errors = []
    with progress(len(images), 0, what) as bar:
        for batch, pixels in zip(images.split(args.eval_batch), given.split(args.eval_batch)):
            completed = complete_images(learner, args, batch, pixels, noise_rng)
            errors += squared_error(completed, colours(batch)).tolist()
            bar.update(len(batch))
    return errors


# --- trained runs ----------------------------------------------------------------------------------------------------

def load_run(run: str | Path, device: torch.device) -> tuple[argparse.Namespace, Learner]:
    """The settings of a finished or running run and its learner with the weights of the best validation."""
    try:
        recorded = json.loads((Path(run) / "config.json").read_text())
        if recorded["method"] not in DEFAULTS:
            raise LookupError(f"no method {recorded['method']}")
        defaults = vars(parse_flags(["--method", recorded["method"]]))         # of flags that are younger than the run
        args = argparse.Namespace(**{**defaults, **recorded})
        use_available_kernel(args, device)
        checkpoint = torch.load(Path(run) / "checkpoint.pt", map_location="cpu", weights_only=True)
        learner = build_learner(args, device)
        learner.load(checkpoint["now"]["best"] or checkpoint["weights"])
    except Exception as error:      # whatever a damaged file, or another script's, leads to
        raise UsageError(f"{run} holds no run of train_celeba.py that can be read: {error!r}") from None
    return args, learner


def masked(images: np.ndarray, given: Tensor, grey: int = 200) -> np.ndarray:
    """What the inner loop sees: uint8 (T, 32, 32, 3) with all but the given pixels in grey."""
    shown = np.full_like(images, grey).reshape(len(images), PIXELS, 3)
    rows = np.arange(len(images))[:, None]
    shown[rows, given.cpu().numpy()] = images.reshape(len(images), PIXELS, 3)[rows, given.cpu().numpy()]
    return shown.reshape(images.shape)


def to_picture(completed: Tensor) -> np.ndarray:
    """Colours (T, P, 3) -> uint8 (T, 32, 32, 3)."""
    return (completed.clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu().numpy().reshape(-1, SIDE, SIDE, 3)


def draw_grid(path: str | Path, rows: list[tuple[str, np.ndarray]], title: str = "") -> None:
    """Write a picture with one labelled row of images (uint8 (T, 32, 32, 3)) after the other."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    count = max(len(images) for _, images in rows)
    size = (1.1 * count + 1.6, 1.1 * len(rows) + 0.3)
    figure, axes = plt.subplots(len(rows), count, figsize=size, dpi=100, squeeze=False, layout="constrained")
    for line, (label, images) in zip(axes, rows):
        for ax, image in zip(line, images):
            ax.imshow(image, interpolation="nearest")
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=9)
    save_atomically(path, lambda file: figure.savefig(file, format=Path(path).suffix[1:]))
    plt.close(figure)


def draw_figure(args: argparse.Namespace, device: torch.device, count: int = 8) -> None:
    """--figure: test images, the pixels given of them, and their completion by each run."""
    splits, dataset, synthetic = load_data(args, device)
    images = splits["test"][:: max(1, len(splits["test"]) // count)][:count]
    rows, shown = [("original", images.cpu().numpy())], None
    runs = [load_run(run, device) for run in args.figure]
    for run_args, learner in sorted(runs, key=lambda run: (run[0].order != "random", run[0].pixels)):
        cell = (run_args.pixels, run_args.order)
        given = sample_pixels(len(images), *cell, torch.Generator().manual_seed(EVALUATION_SEED))
        if cell != shown:
            rows.append((f"{cell[0]} pixels, {cell[1]}", masked(rows[0][1], given)))
            shown = cell
        rows.append((run_args.method, to_picture(complete_images(learner, run_args, images, given))))
    draw_grid(args.picture, rows, "SYNTHETIC faces" if synthetic else "CelebA test images")
    print(f"{len(images)} {dataset} test images, {len(runs)} run(s): {args.picture}")


def complete_photo(args: argparse.Namespace, device: torch.device) -> None:
    """--complete: the user's image at 32 x 32, the pixels given of it, and its completion."""
    image = read_image(args.complete)[None]
    run_args, learner = load_run(args.checkpoint, device)
    given = sample_pixels(1, run_args.pixels, run_args.order, torch.Generator().manual_seed(args.seed))
    images = torch.from_numpy(image).to(device)
    completed = complete_images(learner, run_args, images, given)
    mse = squared_error(completed, colours(images)).item()
    panels = (image, masked(image, given), to_picture(completed))
    draw_grid(args.picture, [("", np.concatenate(panels))], f"original, {run_args.pixels} {run_args.order} pixels, "
              f"{run_args.method}")
    print(f"{args.complete}: mean squared error {mse:.4f} with {run_args.method}; {args.picture}")


def one_at_a_time(learner: Learner, args: argparse.Namespace, batch) -> Tensor:
    """The loss of a meta-batch and its gradients as tests/naive.py computes them, task by task, the whole network."""
    from tests import naive
    x, psi = coordinates(batch[0].device), dict(learner.generator.named_parameters()) if learner.generator else None
    losses = []
    for target, given in zip(*batch[:2]):
        support = lambda theta: F.mse_loss(naive.mlp_output(theta, x[given]), target[given])
        adapted = naive.adapt_one(support, learner.theta, learner.adapted, psi, args.inner_lr, args.context_dim,
                                  args.rank, args.inner_steps, args.first_order,
                                  normalise_context=args.normalise_context)
        loss = F.mse_loss(naive.mlp_output(adapted, x), target) / len(batch[0])
        loss.backward()
        losses.append(loss.detach())
    return sum(losses)


def benchmark(args: argparse.Namespace, device: torch.device, repeats: int = 21) -> None:
    """--benchmark: images per second of whole meta-steps, ours and the loop over tasks."""
    if args.method not in ("modgrad", "maml") or "context" in args.adapt or args.outer_pixels < PIXELS or args.refine or args.gradient_noise:
        raise UsageError("--benchmark compares modgrad or maml on the layers' tensors, all pixels in the outer loss, no noise")
    learner, images = build_learner(args, device), torch.from_numpy(synthetic_split("val")).to(device)
    optimiser = torch.optim.Adam(learner.parameters(), lr=args.meta_lr, fused=True)         # one pass over memory
    batch = sample_tasks(images, args, torch.Generator().manual_seed(args.seed))

    def naive_step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        loss = one_at_a_time(learner, args, batch)
        optimiser.step()
        return loss

    gradient = make_gradient(learner, args, device)
    start, losses, taken = learner.state(), [0.0, 0.0], ([], [])
    for _ in range(repeats + 1):                            # interleaved, so that noise hits both alike
        for k, step in enumerate((lambda: meta_step(learner, optimiser, args, batch, None, gradient)[0], naive_step)):
            learner.load(start)
            began = time.perf_counter()
            losses[k] = step().item()                       # waits for the device
            taken[k].append(time.perf_counter() - began)
    rounding = 1e-2 if args.precision == "tf32" else 1e-4   # of TF32's products 5e-4 each, of float32's sums about 1e-6
    if abs(losses[0] - losses[1]) > rounding * losses[1]:
        raise RuntimeError(f"the contenders disagree: their losses are {losses}")
    ours, theirs = (args.meta_batch / float(np.median(seconds[1:])) for seconds in taken)
    print(f"{args.method}, {args.pixels} pixels, {args.meta_batch} images a step, {device}, {torch.get_num_threads()} "
          f"thread(s): {ours:.0f} images/s, one at a time {theirs:.0f}, ratio {ours / theirs:.1f}")


# --- main ------------------------------------------------------------------------------------------------------------

def load_data(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Tensor], str, bool]:
    """Return ({split: uint8 (images, 32, 32, 3) on the device}, description, synthetic)."""
    root = Path(args.data or "data/celeba")
    if args.download:
        download(root)
    synthetic = args.smoke or not (args.data or args.download or find_data(root))
    if synthetic:
        splits = {split: synthetic_split(split) for split in SPLITS}
        hint = "" if args.smoke else f"; no CelebA in {root}: see README, 'Data', or pass --download"
        print(f"SYNTHETIC data: procedurally drawn faces, not CelebA{hint}", flush=True)
    else:
        splits = load_splits(root)
        counts = ", ".join(f"{split} {len(images):,} of {STANDARD[split]:,}" for split, images in splits.items())
        print(f"CelebA, aligned images at {SIDE}x{SIDE}: {counts}", flush=True)
    return ({split: torch.from_numpy(np.array(images)).to(device) for split, images in splits.items()},
            "synthetic" if synthetic else "celeba", synthetic)


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    device = setup(args)
    for wanted, action in ((args.figure, draw_figure), (args.complete, complete_photo), (args.benchmark, benchmark)):
        if wanted:
            return action(args, device)
    for name in ("figure", "complete", "checkpoint", "picture", "benchmark"):       # no settings of a run
        delattr(args, name)
    splits, dataset, synthetic = load_data(args, device)
    try:
        takes_cuda_graph(args, device)
        backend = "low-rank" if few_pixels(args) else resolve_backend(args.kernel, device)
        learner = build_learner(args, device)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from None
    run, checkpoint = open_run(args.out, vars(args) | {"dataset": dataset}, args.resume)
    print(f"{args.method}, {args.pixels} pixels, {args.order}, on {device} ({backend} kernel) -> {run}", flush=True)
    now = meta_train(learner, args, run, checkpoint, splits, device)
    if now["best"] is not None:
        learner.load(now["best"])
    errors = evaluate(learner, args, splits[args.test_split][: args.test_images], "test")
    mse, ci95 = mean_ci95(errors)
    label = f"{'SYNTHETIC ' if synthetic else ''}{args.order} {args.pixels} pixels, {args.method}"
    plot_log(run, f"{label}: {mse:.4f} on {args.test_split}", "iteration", "iterations", "mean squared error",
             {"meta-training": "mse", "validation": "val_mse"})
    images = now["iteration"] * args.meta_batch
    write_result(run, device, {
        "metric": "mse", "value": mse, "ci95": ci95, "tasks": len(errors), "split": args.test_split, "dataset": dataset,
        "synthetic": synthetic, "split_sizes": {split: len(images) for split, images in splits.items()},
        "config": vars(args), "seed": args.seed, "iterations": now["iteration"], "images": images,
        "skipped_iterations": now["skipped"], "best_iteration": now["best_iteration"],
        "best_val_mse": now["best_mse"], "kernel": backend,
        "train_seconds": now["seconds"], "train_images_per_second": images / max(now["seconds"], 1e-9)})
    print(f"{label}, {args.test_split} mean squared error: {mse:.4f} ± {ci95:.4f} over {len(errors)} images; "
          f"results in {run}")


if __name__ == "__main__":
    run_main(main)
