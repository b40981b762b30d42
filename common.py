"""What the training scripts share: flags of a run, its folder, checkpoints, frame of training, statistics, downloads.

Nothing here knows a data set, nor more of a method than that a learner has theta and maybe psi. A run folder holds
config.json, log.jsonl (deterministic numbers only, so that a resumed log equals an uninterrupted one), checkpoint.pt,
result.json and figures.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import functools
import hashlib
import http.client
import importlib.util
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                  # Windows
    fcntl = None


class UsageError(Exception):
    """Bad input; scripts print its text and exit with status 2."""


class DataError(UsageError):
    """A data set that is missing, damaged or not what it should be."""


class DownloadError(UsageError):
    """No mirror gave the file."""


def _output_is_unread() -> bool:
    """Whether what read this program's output has gone, as `| head` does; then nothing more is written to it."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def run_main(main: Callable[[], None], several_devices: bool = False) -> None:
    """Call a script's main; UsageError, that of a file or of memory becomes one line on stderr and status 2, Ctrl-C status 130.

    `several_devices` tells that the script shares out its work when torchrun starts several processes.
    """
    store = join_ranks() if several_devices else None
    try:
        if not several_devices and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UsageError("this script works on one device: start it without torchrun")
        with first_rank_speaks():
            main()
            sys.stdout.flush()
            max_over_ranks(0)                                      # no rank leaves while another still reads from it
    except BrokenPipeError:
        if not _output_is_unread():                                # it was another pipe, such as a video encoder's
            raise
        leave(1)
    except (UsageError, OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.filename is None:      # not about a file that cannot be read or written
            raise
        error = f"not enough memory: {error}" if isinstance(error, MemoryError) else error
        if store is None or store.add("errors", 1) == 1:           # of several ranks, the first to fail says why
            print(f"error: {error}", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted", file=sys.stderr)
        leave(130)
    leave(0)


# --- flags and set-up ------------------------------------------------------------------------------------------------

def _number(kind: type, allowed: str, test: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and test(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return value
    return parse


positive_int = _number(int, "an integer of at least 1", lambda v: v >= 1)
several_int = _number(int, "an integer of at least 2, without which there is no interval", lambda v: v >= 2)
share_float = _number(float, "a number of 0 to 1", lambda v: 0 <= v <= 1)
seed_number = _number(int, "an integer of 0 to 2**63 - 1", lambda v: 0 <= v < 2**63)       # what PyTorch and NumPy both take
positive_float = _number(float, "a number above 0", lambda v: v > 0)
non_negative_float = _number(float, "a number of at least 0", lambda v: v >= 0)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that adds the default of each flag whose text does not speak of one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        known = action.default is None or isinstance(action.default, bool) or action.default is argparse.SUPPRESS
        stated = known or "(default" in (action.help or "")
        return action.help if stated else f"{action.help or ''} (default: %(default)s)".lstrip()


def add_run_flags(parser: argparse.ArgumentParser, bf16: bool = False) -> None:
    """Add the flags that every script has: where the run is kept, its seed, device and limits. `bf16`: offer that precision."""
    run = parser.add_argument_group("run")
    run.add_argument("--out", help="run folder (default: below runs/, named after the method, the kind of task and the seed)")
    run.add_argument("--resume", action="store_true", help="continue the run in --out from its checkpoint")
    run.add_argument("--seed", type=seed_number, default=1, help="of initialisation, episodes and noise")
    run.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:N")
    run.add_argument("--threads", type=positive_int, help="CPU threads (default: PyTorch's choice)")
    run.add_argument("--max-minutes", type=positive_float, help="stop training after this time, earlier parts of a resumed run "
                     "included, then test as usual")
    text = "fp32, or tf32 for matrix products and convolutions (CUDA, 10-bit mantissa)"
    if bf16:
        text += ("; bf16 activations of convolutional networks (fast on CUDA and on CPUs with AVX512-BF16 or AMX). Weights and "
                 "updates stay float32")
    run.add_argument("--precision", choices=("fp32", "tf32", "bf16")[: 2 + bf16], default="fp32", help=text)


def parse_run(parser: argparse.ArgumentParser, argv: Sequence[str] | None, smoke: Callable[[argparse.Namespace], dict],
              unread: Callable[[argparse.Namespace], dict]) -> argparse.Namespace:
    """Parse; with --smoke, `smoke(flags)` are the defaults of flags that are not given.

    `unread(flags)` names what the run would not read, {whose flags these are: names}. Raises UsageError for one of them that has
    another value than its default: whoever gave it expects that it does something. The sizes of ModGrad's networks are never among
    them, so that a loop over methods can hand the same ones to all.
    """
    args = parser.parse_args(argv)
    if args.smoke:
        parser.set_defaults(**smoke(args))
        args = parser.parse_args(argv)
    for whose, flags in unread(args).items():
        for flag in flags:
            if getattr(args, flag) != parser.get_default(flag):
                raise UsageError(f"--{flag.replace('_', '-')} is {whose} and does nothing here: leave it out")
    return args


def fill_in(args: argparse.Namespace, defaults: dict) -> None:
    """Give the flags that were left out the defaults of the chosen method."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def setup(args: argparse.Namespace) -> torch.device:
    """Seed everything, set precision, threads and the memory allocator; return the device. Raises UsageError."""
    device = _device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)                              # NCCL, Triton and synchronize() work on the current device
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    allow_tf32(args.precision == "tf32")
    torch.backends.cudnn.deterministic = True                      # it costs nothing that could be measured
    keep_freed_memory()
    return device


def allow_tf32(on: bool) -> None:
    """Whether a GPU may multiply float32 numbers with mantissas of 10 bits, in matrix products and convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


@contextlib.contextmanager
def whole_float32() -> Iterator[None]:
    """Matrix products with all of float32's bits, whatever --precision says: for places in an image, not for activations."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is no device: use auto, cpu, cuda or cuda:N") from None
    if ranks() > 1 and device.type == "cuda":
        if device.index is not None:
            raise UsageError(f"--device {name}: torchrun gives each process its own device; use auto, cuda or cpu")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s); use --device cpu")
    return device


def use_available_kernel(args: argparse.Namespace, device: torch.device) -> None:
    """A run that was trained on a GPU with --kernel triton is used with the automatic choice where there is none."""
    if args.kernel == "triton" and device.type != "cuda":
        args.kernel = "auto"


def to_device(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a small CPU tensor without making the CPU wait for what the GPU is doing."""
    if device.type != "cuda":
        return t.to(device)
    return t.contiguous().pin_memory().to(device, non_blocking=True)               # an expanded tensor cannot be pinned


class CudaGraph:
    """A computation on a GPU, recorded with its backward pass at once and replayed by one launch at each call.

    function(*inputs) -> a tensor or a tuple of them; it may leave gradients in `parameters`, which each call finds there. It must not
    read a number from the GPU or draw random ones, and calls must bring the shapes of `inputs`, the first ones.
    """

    def __init__(self, function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]], inputs: Sequence[torch.Tensor],
                 parameters: Iterable[torch.Tensor] = ()):
        self.inputs, self.parameters = [t.clone() for t in inputs], list(parameters)
        others = torch.cuda.Stream(priority=-1)                                       # as PyTorch asks for before recording
        others.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(others):
            for _ in range(2):                                                        # kernels are compiled and chosen now
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(others)
        for p in self.parameters:
            p.grad = None                                                             # the recording makes its own
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=others):                             # before what goes aside, if both wait
            self.output = function(*self.inputs)
        self.gradients = [p.grad for p in self.parameters]

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        copy_all(inputs, self.inputs)
        self.graph.replay()
        for p, gradient in zip(self.parameters, self.gradients):
            p.grad = gradient
        if not isinstance(self.output, tuple):
            return self.output.clone()
        copies = tuple(torch.empty_like(t) for t in self.output)
        copy_all(self.output, copies)
        return copies


def copy_all(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Copy each tensor into one of its shape and dtype, on a GPU in one launch for each dtype."""
    by_type: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for pair in zip(targets, sources, strict=True):
        by_type.setdefault(pair[0].dtype, []).append(pair)
    for pairs in by_type.values():
        torch._foreach_copy_(*map(list, zip(*pairs)))


def replays(function: Callable, parameters: Iterable[torch.Tensor] = ()) -> Callable:
    """The function as `CudaGraph` replays it, recorded once for each set of its inputs' shapes."""
    parameters, recorded = list(parameters), {}

    def replayed(*inputs: torch.Tensor):
        shapes = tuple(t.shape for t in inputs)
        if shapes not in recorded:
            recorded[shapes] = CudaGraph(function, inputs, parameters)
        return recorded[shapes](*inputs)

    return replayed


def add_cuda_graph_flag(group) -> None:
    """--cuda-graph for a script whose meta-step can be recorded; see `takes_cuda_graph`."""
    group.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, help="record the meta-step once and replay it, so "
                       "that no operation is launched singly (default: on CUDA, where nothing forbids it)")


def takes_cuda_graph(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether the meta-step is to be recorded: on a GPU unless the flags forbid it. Raises UsageError where it cannot be."""
    if args.cuda_graph and args.gradient_noise:
        raise UsageError("--cuda-graph cannot record --gradient-noise, which is drawn anew for each step")
    if args.cuda_graph and device.type != "cuda":
        raise UsageError(f"--cuda-graph needs a CUDA device, this is {device}")
    return device.type == "cuda" and not args.gradient_noise if args.cuda_graph is None else args.cuda_graph


class Aside:
    """function(*inputs), a tensor, computed on a GPU beside what comes next there, until it is asked for by `result()`.

    Its backward pass, too, goes beside the rest, as autograd repeats the order of the streams, until `join_streams` waits for it.
    """

    def __init__(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor):
        self.main, side = torch.cuda.current_stream(), _side_stream(inputs[0].device)
        side.wait_stream(self.main)
        _begun.add(side)
        if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):      # two streams are meant here
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        with torch.cuda.stream(side):
            self.value = function(*inputs)
        self.done = side.record_event()
        for t in inputs:
            t.record_stream(side)          # not to be given to others while it is still read there
        self.value.record_stream(self.main)

    def result(self) -> torch.Tensor:
        self.main.wait_event(self.done)
        return self.value


_begun: set[torch.cuda.Stream] = set()      # streams with work that no one has waited for


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def join_streams() -> None:
    """Let a GPU's current stream wait for all that `Aside` began, backward passes included."""
    while _begun:
        torch.cuda.current_stream().wait_stream(_begun.pop())


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks: mapping and unmapping a step's activations took a third of its time on a CPU."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    mmap_max, trim_threshold, top_pad = -4, -1, -2                # names in malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(top_pad, 2**26)


# --- several devices -------------------------------------------------------------------------------------------------
# torchrun starts one process, a rank, per device. Every rank draws all tasks from one seed and works on its share.

LONGEST_WAIT = timedelta(minutes=30)      # for a rank that works alone: the first one downloads and decodes the images


def join_ranks() -> dist.Store | None:
    """Meet the other processes that torchrun started; return what they share, or None where this process is alone.

    CUDA tensors go through NCCL, CPU tensors through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    store, number, count = next(dist.rendezvous("env://", timeout=LONGEST_WAIT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=LONGEST_WAIT)
    return store


def rank() -> int:
    """Number of this process: 0 writes the files and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def first_rank_speaks() -> Iterator[None]:
    """Drop what ranks other than 0 print, bars included; an exception that leaves the block is still reported."""
    if rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def _lost_rank_is_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"another process of this run ended or does not answer ({reason}); see what it said, then use "
                         f"--resume") from None


def leave(status: int) -> None:
    """Exit; of several ranks without tearing down the process group, whose threads can abort or block that."""
    if ranks() == 1:
        if status:
            sys.exit(status)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def sum_over_ranks(tensors: Sequence[torch.Tensor]) -> None:
    """Replace tensors of one dtype and device by their sums over the ranks, in one all_reduce. Raises UsageError."""
    if ranks() == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    with _lost_rank_is_named():
        dist.all_reduce(flat)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(total.view_as(t))


def sum_gradients(parameters: Iterable[torch.Tensor], totals: torch.Tensor) -> None:
    """Sum the gradients and `totals` over the ranks; a rank whose share was empty adds zeros. Raises UsageError."""
    if ranks() == 1:
        return
    parameters = list(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    sum_over_ranks([*(p.grad for p in parameters), totals])


def max_over_ranks(value: int) -> int:
    """The largest value of any rank; waits for all of them, but for no device. Raises UsageError."""
    if ranks() == 1:
        return value
    box = torch.tensor(value)
    with _lost_rank_is_named():
        dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def from_first_rank(call: Callable[[], object]):
    """Call `call` on rank 0 only; return its result, whose tensors are on the CPU, on every rank. Raises UsageError."""
    if ranks() == 1:
        return call()
    box = [call() if rank() == 0 else None]
    with _lost_rank_is_named():
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


@contextlib.contextmanager
def first_of_machine() -> Iterator[None]:
    """One rank of each machine runs the block before the others, so that they find the files it made."""
    waits = ranks() > 1 and int(os.environ["LOCAL_RANK"]) > 0
    if waits:
        max_over_ranks(0)
    yield
    if not waits:
        max_over_ranks(0)


# --- run folder ------------------------------------------------------------------------------------------------------

RUN_FILES = "config.json", "checkpoint.pt", "log.jsonl", "result.json"
MAY_CHANGE = {"resume", "out", "max_minutes", "device", "threads", "test_split", "test_episodes", "test_images", "eval_batch",
              "download", "checkpoint_every", "kernel", "task_chunk", "compile", "cuda_graph", "data"}      # by a resumed run


def open_run(out: str | Path, config: dict, resume: bool, may_change: Set[str] = frozenset()) -> tuple[Path, dict | None]:
    """Create the run folder, or with `resume` reopen it; return (folder, checkpoint or None).

    `may_change`: settings that this script lets a resumed run change, besides those of MAY_CHANGE.

    Reopening cuts log.jsonl back to where the checkpoint was written; without a checkpoint the run starts afresh, and a log that
    is there is kept as log.jsonl.old. Raises UsageError where a run would be overwritten, continued with other settings, or its
    checkpoint cannot be read.
    """
    run = Path(out)
    if run.is_dir():
        _lock(run)
    checkpoint_file, config_file = run / "checkpoint.pt", run / "config.json"
    there = [name for name in RUN_FILES if (run / name).exists()]
    if there and not resume:
        raise UsageError(f"{run} already holds a run ({', '.join(there)}): continue it with --resume, or choose another --out")
    if not resume or not checkpoint_file.exists():
        if "result.json" in there:
            raise UsageError(f"{run} holds a finished run without its checkpoint.pt: put that back, or choose another --out")
        if config_file.exists():
            _check_same(_settings(config_file), json.loads(json.dumps(config)), run, may_change)
        log, kept = run / "log.jsonl", ""
        if resume and log.exists() and log.stat().st_size:
            kept = "; the log there is now log.jsonl.old"
        if resume:
            print(f"nothing to resume in {run}: starting afresh{kept}", file=sys.stderr)
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {run} cannot be a folder: {error}") from None
        _lock(run)
        _remove_leftovers(run)
        save_atomically(config_file, lambda file: file.write(json.dumps(config, indent=1, sort_keys=True).encode()))
        if kept:
            log.replace(run / "log.jsonl.old")
        log.write_bytes(b"")
        return run, None
    _remove_leftovers(run)
    _check_same(_settings(config_file), json.loads(json.dumps(config)), run, may_change)
    try:
        checkpoint = torch.load(checkpoint_file, map_location="cpu", weights_only=True)
        offset = checkpoint["log_bytes"]
    except Exception as error:
        raise UsageError(f"{checkpoint_file} cannot be read ({error!r}): it is damaged; choose another --out to start afresh") from None
    log_file = run / "log.jsonl"
    if not log_file.exists() or log_file.stat().st_size < offset:
        raise UsageError(f"{log_file} is missing or shorter than at the checkpoint: it was changed by something else; put it back")
    os.truncate(log_file, offset)
    return run, checkpoint


_locked: dict[tuple[int, int], int] = {}      # folders that this process holds: (device, inode) -> open file


def _lock(run: Path) -> None:
    """Keep the run folder for this process until its training or itself ends, however it ends; no-op where the system cannot.

    Raises UsageError if another process has it: two would mix their logs and overwrite each other's checkpoints.
    """
    if fcntl is None:
        return
    folder = os.open(run, os.O_RDONLY)
    status = os.fstat(folder)
    key = status.st_dev, status.st_ino
    try:
        if key not in _locked:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _locked[key] = folder
    except BlockingIOError:
        raise UsageError(f"another process is at work in {run}: wait for it or stop it, or choose another --out") from None
    except OSError:                                  # a file system without locks
        pass
    finally:
        if _locked.get(key) != folder:
            os.close(folder)


def _unlock(run: Path) -> None:
    with contextlib.suppress(OSError):               # the folder was removed: its lock is nobody's concern
        status = os.stat(run)
        if (folder := _locked.pop((status.st_dev, status.st_ino), None)) is not None:
            os.close(folder)


def _remove_leftovers(run: Path) -> None:
    """What `save_atomically` left behind as it was killed."""
    for leftover in run.glob("*.*.tmp"):
        if re.fullmatch(r"(checkpoint\.pt|config\.json|result\.json|\w+\.png)\.\d+\.tmp", leftover.name):
            leftover.unlink()


def _settings(config_file: Path) -> dict:
    try:
        return json.loads(config_file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{config_file} cannot be read ({error}), so that the run's settings are unknown: choose another --out, or "
                         f"put the file back") from None


def _check_same(before: dict, now: dict, run: Path, may_change: Set[str]) -> None:
    """A flag that is younger than the run, and off, is no other setting."""
    before = {**{k: value for k, value in now.items() if not value}, **before}
    differs = sorted(k for k in {*before, *now} - MAY_CHANGE - may_change if before.get(k) != now.get(k))
    if differs:
        changes = "; ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in differs)
        raise UsageError(f"{run} was started with other settings ({changes}): use those, or another --out")


def append_log(run: Path, record: dict) -> None:
    """Append one line to log.jsonl, on rank 0. Raises ValueError for a number that is not finite."""
    line = json.dumps(record, allow_nan=False) + "\n"
    if rank() > 0:
        return
    with _full_disk_is_named(run), open(run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(line)


def read_log(run: Path) -> list[dict]:
    """Return the lines of log.jsonl."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def save_checkpoint(run: Path, state: dict) -> None:
    """Write checkpoint.pt, on rank 0, so that at any moment, even after a kill, the old or the new one is whole."""
    if rank() > 0:
        return
    state = {**state, "log_bytes": (run / "log.jsonl").stat().st_size}
    save_atomically(run / "checkpoint.pt", lambda file: torch.save(state, file))


def save_atomically(path: str | Path, write: Callable) -> None:
    """Call write(binary file) on a temporary neighbour of `path`, flush it to disk, then rename it.

    The temporary file is this process's own, so that two runs that build one cache at once do not disturb each other.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _full_disk_is_named(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _full_disk_is_named(path: Path, then: str = "use --resume") -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:      # torch.save raises RuntimeError, in the course of the failed write's OSError
        cause = error
        while cause is not None and getattr(cause, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise UsageError(f"cannot write {path}: the disk is full ({cause}); what was there before is kept. "
                         f"Free some space, then {then}") from None


@contextlib.contextmanager
def stop_signal(max_minutes: float | None = None, spent_seconds: float = 0.0) -> Iterator[SimpleNamespace]:
    """Yield an object whose `requested()` tells whether to stop, with `reason` "signal" (SIGINT, SIGTERM) or "time".

    A second Ctrl-C interrupts at once. `spent_seconds` of an earlier part of the run count against the limit. Several
    ranks stop together, at the same call of `requested()`.
    """
    state, reasons, heard = SimpleNamespace(reason=None), (None, "time", "signal"), []
    deadline = time.monotonic() + 60 * max_minutes - spent_seconds if max_minutes else math.inf

    def requested() -> bool:
        if state.reason is None and time.monotonic() >= deadline:
            state.reason = "time"
        if agreed := max_over_ranks(reasons.index(state.reason)):
            state.reason = reasons[agreed]
        return state.reason is not None

    def on_signal(number, frame):
        if heard:                                  # by this rank: a signal to another one is no first Ctrl-C here
            raise KeyboardInterrupt
        heard.append(number)
        state.reason = "signal"
        print("stopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)

    state.requested = requested
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_finite(value: float, what: str, where: str, run: Path) -> None:
    """Raise UsageError, naming the place and the checkpoint that is left, unless `value` is finite."""
    if not math.isfinite(value):
        kept = run / "checkpoint.pt"
        left = f"the last good checkpoint is {kept}" if kept.exists() else "no checkpoint was written yet"
        raise UsageError(f"non-finite {what} ({value}) at {where}; {left}. A smaller learning rate usually helps")


# --- meta-training ---------------------------------------------------------------------------------------------------
# A learner has theta {name: tensor} and `generator`, the module of psi or None.

def copy_weights(learner) -> dict:
    """A copy of all weights, on the CPU."""
    copy = lambda tensors: {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
    psi = copy(learner.generator.state_dict()) if learner.generator else None
    return {"theta": copy(learner.theta), "generator": psi}


@torch.no_grad()
def load_weights(learner, weights: dict) -> None:
    """Put what `copy_weights` returned into the learner's own tensors."""
    for name, t in learner.theta.items():
        t.copy_(weights["theta"][name])
    if learner.generator:
        learner.generator.load_state_dict(weights["generator"])


class Training:
    """What surrounds a loop of meta-training: it resumes, counts, logs, saves, and ends at a signal or a time limit.

        with Training(learner, args, run, checkpoint, "iteration", now, kept={"optimiser": optimiser}) as training:
            while training.goes_on():
                training.advance(meta_step(...))
                if training.due(args.checkpoint_every):
                    training.save()

    `unit`: what is counted; the flag of this name with an s says how many. `now`: the record that checkpoint.pt keeps,
    {unit: 0, "seconds": 0.0, "stopped": None, ...}, with "pending": [] where updates return losses. `kept`: optimisers,
    or lists of them, and random generators, by their names in checkpoint.pt. These and the weights continue from
    `checkpoint` if it is not None. The end of the block saves; then, if a signal had stopped the loop, it raises
    KeyboardInterrupt. `per_update`: units of one update. `last_is_due`: everything is due after the last update.
    """

    def __init__(self, learner, args: argparse.Namespace, run: Path, checkpoint: dict | None, unit: str, now: dict,
                 kept: dict, per_update: int = 1, last_is_due: bool = True, loss_name: str = "meta-loss"):
        self.learner, self.run, self.unit, self.now, self.kept = learner, run, unit, now, kept
        self.total, self.max_minutes, self.name = getattr(args, unit + "s"), args.max_minutes, unit.replace("_", "-")
        self.per_update, self.last_is_due, self.loss_name = per_update, last_is_due, loss_name
        if checkpoint:
            if missing := {"weights", "now", *kept} - set(checkpoint):
                raise UsageError(f"{run / 'checkpoint.pt'} lacks {', '.join(sorted(missing))}: another version or method wrote it; "
                                 "choose another --out to start afresh")
            load_weights(learner, checkpoint["weights"])
            for name, part in kept.items():
                _set_state(part, checkpoint[name])
            now.update(checkpoint["now"])
        self.started = time.monotonic() - now["seconds"]

    def __enter__(self) -> Training:
        self.open = contextlib.ExitStack()
        self.open.callback(_unlock, self.run)
        self.stop = self.open.enter_context(stop_signal(self.max_minutes, self.now["seconds"]))
        self.bar = self.open.enter_context(progress(self.total, self.now[self.unit], self.name + "s"))
        return self

    def __exit__(self, error, *details) -> None:
        with self.open:
            if error is None:
                self.save()
        if error is None and "signal" in (self.now["stopped"], self.stop.reason):      # the second: after the last update
            raise KeyboardInterrupt

    def goes_on(self) -> int:
        """Units of the next update, the last one may have fewer; 0 after it and after a request to stop."""
        left = 0 if self.stop.requested() else max(self.total - self.now[self.unit], 0)     # ranks ask together
        if not left:
            self.now["stopped"] = self.stop.reason
        return min(self.per_update, left)

    def advance(self, losses: torch.Tensor | None = None) -> None:
        """Count an update. losses: (2,), its loss and another number, left on the device until they are logged."""
        if losses is not None:
            self.now["pending"].append(losses)
        self.before = self.now[self.unit]
        self.now[self.unit] = min(self.before + self.per_update, self.total)
        self.now["seconds"] = time.monotonic() - self.started
        self.bar.update(self.now[self.unit] - self.before)

    def due(self, *every: int) -> bool:
        """Whether the update reached a multiple of any of these numbers of units."""
        done = self.now[self.unit]
        return any(done // n > self.before // n for n in every) or self.last_is_due and done == self.total

    def log(self, *names: str) -> list[float]:
        """One line of log.jsonl: means of the losses since the last one, which are returned. Raises UsageError."""
        means = [sum(column) / len(column) for column in zip(*self._losses())]
        append_log(self.run, {self.unit: self.now[self.unit], **dict(zip(names, means))})
        self.now["pending"] = []
        return means

    def save(self) -> None:
        """Write checkpoint.pt; raises UsageError, and leaves the last one, if a loss since then or a weight is not finite."""
        if "pending" in self.now:
            self.now["pending"] = self._losses()
        weights = copy_weights(self.learner)
        for name, t in {**weights["theta"], **(weights["generator"] or {})}.items():
            if not t.isfinite().all():
                check_finite(math.nan, f"numbers in {name}", f"{self.name} {self.now[self.unit]}", self.run)
        save_checkpoint(self.run, {"weights": weights, "now": self.now,
                                   **{name: _get_state(part) for name, part in self.kept.items()}})

    def _losses(self) -> list[list[float]]:
        max_over_ranks(0)                                  # a lost rank is named here; numbers of a GPU would be waited for
        pending = [p if isinstance(p, list) else p.tolist() for p in self.now["pending"]]
        for k, (loss, _) in enumerate(reversed(pending)):
            check_finite(loss, self.loss_name, f"{self.name} {self.now[self.unit] - k * self.per_update}", self.run)
        return pending


def _get_state(part):
    if isinstance(part, list):
        return [_get_state(one) for one in part]
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _set_state(part, state) -> None:
    if isinstance(part, list):
        for one, its_state in zip(part, state):
            _set_state(one, its_state)
    elif isinstance(part, torch.Generator):
        try:
            part.set_state(state)
        except RuntimeError:
            raise UsageError(f"the run's noise was drawn on another kind of device than {part.device}: resume it there") from None
    else:      # which of PyTorch's implementations computes the update is this device's affair
        groups = [saved | {"fused": own["fused"]} if "fused" in own else saved
                  for saved, own in zip(state["param_groups"], part.param_groups)]
        part.load_state_dict(state | {"param_groups": groups})


# --- statistics, machine, figures ------------------------------------------------------------------------------------

def mean_ci95(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the 95 % interval over independent tasks: 1.96 sigma / sqrt(N), population sigma, as is usual in the field; of
    fewer than 30 tasks Student's, with the sample's sigma, which for Omniglot's 10 alphabets is 22 % wider; nan of a single one."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 1:
        return float(values[0]), math.nan
    if len(values) < 30:
        return float(values.mean()), float(student_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()), float(1.96 * values.std() / math.sqrt(len(values)))


def student_quantile(freedom: int) -> float:
    """What 97.5 % of Student's t stay below: for t = sqrt(freedom) tan(angle) the angle's density is cos(angle)^(freedom - 1)."""
    ends = np.linspace(0, np.pi / 2, 100_001)
    mass = np.cumsum(np.cos((ends[1:] + ends[:-1]) / 2) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * mass[-1], mass, ends[1:]))


def progress(total: int, initial: int, description: str, **options) -> tqdm:
    """A bar with rate and time left on stderr; one line every half minute where stderr is not a terminal."""
    quiet = {} if sys.stderr.isatty() else {"mininterval": 30.0, "ascii": True, "ncols": 100}
    return tqdm(total=total, initial=initial, desc=description, dynamic_ncols=sys.stderr.isatty(), **quiet, **options)


def progress_over(count: int, description: str) -> Iterator[int]:
    """0 ... count - 1, with a bar."""
    with progress(count, 0, description) as bar:
        for k in range(count):
            yield k
            bar.update(1)


def describe_machine(device: torch.device) -> dict:
    """Name of the device, CPU threads, versions and the repository's commit: what a measurement needs beside it."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if importlib.util.find_spec("triton"):
        versions["triton"] = importlib.import_module("triton").__version__
    commit = _git("rev-parse", "HEAD")
    dirty = None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"device_name": name, "threads": torch.get_num_threads(), "versions": versions,
            "commit": commit, "dirty": dirty}


def _git(*command: str) -> str | None:
    """What git says, or None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak memory of this process: allocated on the GPU, or resident on the CPU (None where that is unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource                                            # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_result(run: Path, device: torch.device, record: dict) -> None:
    """Write result.json: `record` with peak memory (of this process) and the description of the machine.

    JSON has no numbers that are not finite, as where an inner loop diverged: they become null and are counted in "non_finite".
    """
    record = {**record, "ranks": ranks(), "peak_memory_bytes": peak_memory_bytes(device), **describe_machine(device)}
    lost = []
    record = _without_non_finite(record, lost)
    if lost:
        record["non_finite"] = len(lost)
        print(f"{len(lost)} number(s) of the result are not finite: null in {run / 'result.json'}", file=sys.stderr)
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    save_atomically(run / "result.json", lambda file: file.write(text.encode()))


def _without_non_finite(value, lost: list):
    """A copy with None for floats that are not finite, which are appended to `lost`."""
    if isinstance(value, Mapping):
        return {key: _without_non_finite(part, lost) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_non_finite(part, lost) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return lost.append(value)
    return value


def plot_curves(path: Path, title: str, series: dict[str, tuple[Sequence[float], Sequence[float]]], xlabel: str,
                ylabel: str) -> None:
    """Draw {label: (x, y)} into a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=120)
    for label, (x, y) in series.items():
        axes.plot(x, y, label=label, linewidth=1.6, marker="o" if len(x) <= 30 else None, markersize=3.5)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    save_atomically(path, lambda file: figure.savefig(file, format="png"))
    plt.close(figure)


def plot_log(run: Path, title: str, unit: str, xlabel: str, ylabel: str, keys: dict[str, str],
             scale: float = 1) -> None:
    """curves.png: {label: key of log.jsonl}, times `scale`, against `unit`; a key that the log lacks is left out."""
    log = read_log(run)
    pick = lambda key: tuple(zip(*((line[unit], scale * line[key]) for line in log if key in line)))
    series = {label: xy for label, key in keys.items() if (xy := pick(key))}
    plot_curves(run / "curves.png", title, series, xlabel, ylabel)


# --- data ------------------------------------------------------------------------------------------------------------

def fetch_file(urls: Sequence[str], target: str | Path, *, sha256: str | None = None, md5: str | None = None,
               size: int | None = None, manual: str) -> Path:
    """Download to `target` from the first mirror that gives the right file; resumes `target`.part.

    Args: urls in order of preference; sha256, md5 (hex) and size (bytes) as far as known; manual: what the user can do
    when every mirror fails. Raises DownloadError with each mirror's reason.
    """
    target = Path(target)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part, reasons = target.with_name(target.name + ".part"), []
    for url in urls:
        for attempt in range(3):
            try:
                with _full_disk_is_named(part, "start the download again"):
                    _download(url, part, size)
                _verify(part, sha256, md5, size)
                os.replace(part, target)
                return target
            except DataError as error:                             # a wrong file: nothing of it is worth keeping
                part.unlink(missing_ok=True)
                reasons.append(f"{url}: {error}")
                break
            except urllib.error.HTTPError as error:
                reasons.append(f"{url}: {error}")
                break
            except (OSError, EOFError, http.client.HTTPException) as error:      # a broken connection: try again from where it broke
                reasons.append(f"{url}: {error}")
                time.sleep(0.2 * 2**attempt)
    raise DownloadError(f"cannot download {target.name}:\n  " + "\n  ".join(reasons) + f"\n{manual}")


def _download(url: str, part: Path, size: int | None) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "modgrad"} | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:                             # nothing is left to send: the part may be whole
            return
        raise
    with response:
        if "text/html" in response.headers.get("Content-Type", ""):
            raise DataError("got a web page, not the file")
        resumed = response.status == 206
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        expected = have + int(length) if length else size
        with open(part, "ab" if resumed else "wb") as file, progress(expected, have, part.stem, unit="B",
                                                                      unit_scale=True) as bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
    if expected and part.stat().st_size < expected:
        raise EOFError(f"the connection ended after {part.stat().st_size} of {expected} bytes")


def _verify(path: Path, sha256: str | None, md5: str | None, size: int | None) -> None:
    if size is not None and path.stat().st_size != size:
        raise DataError(f"got {path.stat().st_size} bytes, expected {size}")
    for name, expected in (("sha256", sha256), ("md5", md5)):
        if expected:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, name).hexdigest() if hasattr(hashlib, "file_digest") else \
                    hashlib.new(name, file.read()).hexdigest()
            if found != expected:
                raise DataError(f"{name} is {found}, expected {expected}")


def extract_archive(path: str | Path, target: str | Path) -> Path:
    """Unpack a zip or tar file into the folder `target`; nothing appears there before all of it is unpacked.

    Raises DataError for a damaged archive, for members that are links, devices or would land outside, and for a
    member that is already there; UsageError where the disk is full.
    """
    path, target = Path(path), Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=target.name + ".", suffix=".tmp", dir=target.parent))
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    kind = stat.S_IFMT(member.external_attr >> 16)
                    _check_member(path, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
                with _full_disk_is_named(stage, "unpack it again"):
                    archive.extractall(stage)
        elif path.exists() and tarfile.is_tarfile(path):
            with tarfile.open(path) as archive:
                for member in archive:
                    _check_member(path, member.name, member.isfile() or member.isdir())
                with _full_disk_is_named(stage, "unpack it again"):
                    archive.extractall(stage, filter="data")
        else:
            raise DataError(f"{path} is no zip or tar file, or is damaged: remove it and fetch it again")
        target.mkdir(exist_ok=True)
        there = [entry.name for entry in stage.iterdir() if (target / entry.name).exists()]
        if there:
            raise DataError(f"{target / there[0]} is already there: move it away to unpack {path} again")
        for entry in stage.iterdir():
            os.replace(entry, target / entry.name)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be unpacked: {error}; remove it and fetch it again") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return target


def _check_member(archive: Path, name: str, plain: bool) -> None:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or not plain:
        raise DataError(f"{archive} holds the unsafe member {name!r}; it was not unpacked")


def subfolders(home: Path) -> list[Path]:
    """Sorted folders in `home`; hidden ones and the __MACOSX of zip files hold no data."""
    if not home.is_dir():
        return []
    with os.scandir(home) as entries:
        return sorted(Path(entry) for entry in entries if not entry.name.startswith((".", "__")) and entry.is_dir())


def fingerprint_files(paths: Sequence[Path]) -> str:
    """A text that changes with the names, sizes and times of the files."""
    lines = []
    for path in sorted(map(Path, paths)):
        status = path.stat()
        lines.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def cached_array(folder: str | Path, stem: str, fingerprint: str, build: Callable[[], np.ndarray]) -> np.ndarray:
    """Return build()'s array, read-only and memory-mapped from a file whose name carries the fingerprint.

    A damaged file is built anew; where the folder cannot be written the array stays in memory, which is said.
    """
    path = Path(folder) / f"{stem}-{hashlib.sha256(fingerprint.encode()).hexdigest()[:12]}.npy"
    if path.exists():
        with contextlib.suppress(ValueError, EOFError, OSError):
            return np.load(path, mmap_mode="r", allow_pickle=False)
    array = build()
    try:
        save_atomically(path, lambda file: np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False))
    except (OSError, UsageError) as error:
        print(f"no cache: {error}; decoding will be repeated next time", file=sys.stderr)
        array.flags.writeable = False
        return array
    return np.load(path, mmap_mode="r", allow_pickle=False)


def random_order(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """Independent uniform permutations of the last axis; float64 keys make ties, so a bias, negligible."""
    return torch.rand(shape, generator=rng, dtype=torch.float64).argsort(-1)
