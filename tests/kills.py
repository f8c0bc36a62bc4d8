"""Runs that are killed with SIGKILL and resumed: in a chosen line of the code, or from outside at any moment.

`whole_run` trains without interruption, every checkpoint kept aside. `kill_and_resume` trains the same config again,
each attempt killed at another point, and compares the disk with the whole run: after every kill the newest
complete set, bit for bit; at the end all files of the run. tests/engine/test_kill_and_resume.py does
it with a few dozen kills, tests/soak.py for as long as you like.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import signal
import socket
import time
from multiprocessing.connection import wait

import cv2
import numpy as np
import torch

import engine.trainer
from engine import checkpoint
from tests.BCT_methods.whole_runs import sets_of, write_config, write_old_features
from tests.conftest import draw_image, draw_record_set
from tests.ranks import PRELOAD

NUM_IMAGE, NUM_CLASSES = 38, 5
SECONDS = 120  # after which an attempt counts as hanging
TO_NOTICE = 30  # seconds for a rank to end by itself after another was killed
# Calls before and after which a run can be killed, by name, such as "before update"; for those that change names on the
# disk the file's kind stands beside it, "after replace rank". "half of save": as many bytes of a file are written.
WATCHED = (
    (os, "replace"),
    (os, "fsync"),
    (pathlib.Path, "unlink"),
    (torch, "save"),
    (engine.trainer, "restore"),
    (engine.trainer.Trainer, "update"),
    (engine.trainer.Trainer, "verify"),
)
# What may differ between two states of the same run.
NOT_COMPARED = ("output", "resume")


@dataclasses.dataclass(frozen=True)
class Task:
    """A config to be run on some ranks; `folder` holds its data, its runs' outputs, and what they print."""

    folder: pathlib.Path
    method: str
    ranks: int
    config: pathlib.Path

    def output(self, name):
        return self.folder / name

    def steps(self, name):
        return [step for step, _ in sets_of(self.output(name))]

    def log(self, name, rank, suffix):
        return self.folder / f"{name}_rank_{rank}{suffix}"


@dataclasses.dataclass(frozen=True)
class Kill:
    """`ranks` are killed when they come to `moment` for the `number`-th time, or, "outside", after `number` seconds."""

    moment: str
    number: float
    ranks: tuple

    def __str__(self):
        when = f"after {self.number:.2f} s" if self.moment == "outside" else f"{self.moment} {self.number}"
        return f"{when} on rank {' and '.join(map(str, self.ranks))}"


def make_task(folder, method, ranks, seed=0, **keys):
    """Draw a training set, old features and a verification set in `folder`; config keys over those of a small run."""
    folder = pathlib.Path(folder)
    labels = np.arange(NUM_IMAGE) % NUM_CLASSES
    draw_record_set(folder / "set.rec", labels.tolist(), seed=seed)
    write_old_features(folder, labels, seed=seed)
    np.save(folder / "credible.npy", labels != 3)
    random = np.random.default_rng(seed)
    images = [cv2.imencode(".png", draw_image(random))[1].tobytes() for _ in range(12)]
    (folder / "pairs.bin").write_bytes(pickle.dumps((images, [True, False] * 3)))
    own = {"NCCL": {"queue_size": 10}}.get(method, {})
    if method in ("MixBCT", "NCCL"):
        own["credible_old_feature"] = str(folder / "credible.npy")
    usual = {"batch_size": 4 // ranks, "num_epoch": 3, "checkpoint_steps": 3, "warmup_epoch": 0.5, "seed": seed}
    return Task(folder, method, ranks, write_config(folder, method, "run", **{**usual, **own, **keys}))


# --- one attempt -------------------------------------------------------------------------------------------------


def whole_run(task):
    """Train to the end into "whole"; "all" gets its checkpoints, with those that it deletes on the way.

    Returns `{moment: {rank: how many times it came to it}}` and the seconds that it took.
    """
    task.output("all").mkdir()
    assert attempt(task, "whole", None, keep=task.output("all"))
    for path in task.output("whole").glob("checkpoints/*/*"):
        _link(path, task.output("all"))
    counts = [json.loads(task.log("whole", rank, ".json").read_text()) for rank in range(task.ranks)]
    seconds = max(count.pop("seconds") for count in counts)
    names = {name for count in counts for name in count}
    return {name: {rank: count[name] for rank, count in enumerate(counts) if name in count} for name in names}, seconds


def _link(path, output):
    """Give the file of a set, `path`, its name in another `output` as well."""
    kept = output.joinpath(*path.parts[-3:])
    kept.parent.mkdir(parents=True, exist_ok=True)
    os.link(path, kept)


def attempt(task, name, kill, *overrides, keep=None):
    """Start the task's ranks, writing to `<folder>/<name>`; whether the run came to its end.

    keep: an output that gets the checkpoints that the run deletes.

    Raises AssertionError, with what was printed, where it did not though nobody was killed. Nothing is left running.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    for path in task.folder.glob(f"{name}_rank_*"):
        path.unlink()
    store = task.folder / f"{name}_rank_store"
    words = [str(task.config), "--output", str(task.output(name)), *overrides]
    ranks = [
        context.Process(target=_rank_main, args=(task, name, rank, str(store), words, kill, keep))
        for rank in range(task.ranks)
    ]
    try:
        for process in ranks:
            process.start()
        if kill is not None and kill.moment == "outside":
            wait([process.sentinel for process in ranks], timeout=kill.number)
            log = task.log(name, 0, ".log")
            together = log.exists() and " ranks on cpu" in log.read_text()  # else they may wait for each other for long
            for rank in kill.ranks if together else range(task.ranks):
                _kill_group(ranks[rank])
        hanging = _wait(ranks)
    finally:
        for process in ranks:
            _kill_group(process)
            process.join()
    codes = [process.exitcode for process in ranks]
    printed = "\n".join(path.read_text()[-3000:] for path in sorted(task.folder.glob(f"{name}_rank_*.log")))
    assert not hanging, f"{kill}: ranks {hanging} hang\n{printed}"
    assert not any(codes) or -signal.SIGKILL in codes, f"{kill}: exit codes {codes}\n{printed}"
    return not any(codes)


def _wait(ranks):
    """Wait until all have ended; returns those that have not in time."""
    deadline = time.monotonic() + SECONDS
    running = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while running and time.monotonic() < deadline:
        for sentinel in wait(list(running), timeout=max(0, deadline - time.monotonic())):
            rank = running.pop(sentinel)
            ranks[rank].join()
            if ranks[rank].exitcode != 0:
                deadline = min(deadline, time.monotonic() + TO_NOTICE)
    return sorted(running.values())


def _kill_group(process):
    """The rank and its workers."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()  # so early that it has no group of its own yet


def _rank_main(task, name, rank, store, words, kill, keep):
    begin = time.monotonic()
    os.setpgid(0, 0)
    log = os.open(task.log(name, rank, ".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(CUDA_VISIBLE_DEVICES="")
    multiprocessing.set_start_method("fork", force=True)  # the loader's workers, as outside the tests
    torch.set_num_threads(1)
    if task.ranks > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(task.ranks), LOCAL_RANK=str(rank))
        if any(interface == "lo" for _, interface in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # works without a network
        store = torch.distributed.FileStore(store, task.ranks)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=task.ranks)
    method = getattr(importlib.import_module(f"BCT_methods.{task.method}.train"), task.method)
    moments = _Moments(kill if kill is not None and rank in kill.ranks else None, keep)
    method.main(words)
    task.log(name, rank, ".json").write_text(json.dumps({**moments.counts, "seconds": time.monotonic() - begin}))


class _Moments:
    """Counts the moments of this process, and ends it at the one that `kill` names."""

    def __init__(self, kill, keep):
        self.kill, self.keep, self.counts = kill, keep, {}
        for owner, name in WATCHED:
            setattr(owner, name, self._watched(getattr(owner, name)))

    def come_to(self, moment):
        """Whether this is the one; the caller is to end the process."""
        self.counts[moment] = self.counts.get(moment, 0) + 1
        return self.kill is not None and (moment, self.counts[moment]) == (self.kill.moment, self.kill.number)

    def _watched(self, function):
        @functools.wraps(function)
        def watched(*args, **kwargs):
            name = function.__name__
            if name in ("replace", "unlink"):
                kind = pathlib.Path(args[-1]).name.partition(".")[0].partition("_")[0]
                if kind not in ("rank", "DONE", "model", "softmax"):
                    return function(*args, **kwargs)  # temporary files, and what is written once, at the start
                name += f" {kind}"
            if self.keep and name in ("unlink rank", "unlink DONE"):
                _link(args[0], self.keep)
            if self.come_to(f"before {name}"):
                _die()
            if name == "save" and self.come_to("half of save"):
                _write_half(function, *args)
                _die()
            try:
                return function(*args, **kwargs)
            finally:
                if self.come_to(f"after {name}"):
                    _die()

        return watched


def _write_half(save, state, file):
    whole = io.BytesIO()
    save(state, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()


def _die():
    os.killpg(0, signal.SIGKILL)


# --- many of them ------------------------------------------------------------------------------------------------


def draw_kills(random, task, moments, seconds, number, outside):
    """`outside` kills at any time and then `number` at moments of the code, each another one as far as there are.

    moments, seconds: of the `whole_run`. An attempt comes no further than its share of the whole, so that the next
    has something left to do (from outside, if the machine is no faster than then).
    """
    share = 1 / (number + outside)
    kills = [Kill("outside", random.uniform(0, share * seconds), _some(random, task.ranks)) for _ in range(outside)]
    names = [str(name) for _ in range(-(-number // len(moments))) for name in random.permutation(sorted(moments))]
    for name in names[:number]:
        most = int(2 * share * max(moments[name].values()))
        kills.append(Kill(name, 1 + int(random.integers(max(1, most))), _some(random, sorted(moments[name]))))
    return kills


def _some(random, ranks):
    """One of the ranks (their number, or a list of them), or several."""
    ranks = random.permutation(ranks)
    return tuple(sorted(ranks[: random.integers(1, len(ranks) + 1)].tolist()))


def kill_and_resume(task, kills, name="killed", tell=print):
    """Run after run, killed by `kills` in turn, until one finishes; compares each with the whole run.

    Returns how many were killed, for one may end before it comes to its kill. `tell` gets a line for each.
    """
    steps, ended = [], False
    for killed, kill in enumerate([*kills, None]):  # noqa: B007  (returned)
        ended = attempt(task, name, kill, "--resume", "True")
        steps = check_sets(task, name, steps)
        tell(f"{task.method} on {task.ranks}: {kill or 'to the end'}: {'ended' if ended else 'killed'}; sets {steps}")
        if ended:
            break
    check_end(task, name)
    return killed


def check_sets(task, name, before=()):
    """Hold the checkpoints of `name` against those of the whole run; returns their steps, which were `before`.

    The newest set must be whole, the one before it must be there, and no progress must be lost.
    """
    written, found = task.steps("all"), task.steps(name)
    assert set(found) <= set(written), f"{found} are not among {written}"
    assert max(found, default=0) >= max(before, default=0), f"{before} became {found}"
    if not found:
        return found
    newest = written.index(found[-1])
    last = written[max(newest + 1 - checkpoint.KEEP, 0) : newest + 1]
    assert found[-checkpoint.KEEP :] == last, f"{found} of {written}"
    folder = checkpoint.complete_sets(task.output(name))[-1]
    for path in (folder / f"rank_{rank}_of_{task.ranks}.pt" for rank in range(task.ranks)):
        checkpoint.check_whole(path)
        assert_same(task.output("all").joinpath(*path.parts[-3:]), path)
    return found


def check_end(task, name):
    """Compare all files of a finished run with the whole run's: names and contents.

    One that was killed after its last checkpoint, but before it deleted an older one, has that, or a part of it, left.
    """
    whole, ended, written = (_files(task.output(run)) for run in ("whole", name, "all"))
    assert set(whole) <= set(ended) and set(ended) - set(whole) <= set(written)
    for key, path in whole.items():
        if key.endswith(".pt"):
            assert_same(path, ended[key])


def _files(output):
    """`{name: path}`; TensorBoard's have a time and a process in their names, the folder stands for them."""
    return {
        str(path.relative_to(output)): path
        for path in output.rglob("*")
        if path.parent.name != "tensorboard" and (path.is_file() or path.parent == output)
    }


def assert_same(first, second):
    found = differences(checkpoint.load(first), checkpoint.load(second))
    assert not found, f"{second}: not as in {first}: {found}"


def differences(first, second, path=""):
    """Names of what differs between two states of nested dicts and sequences; tensors are compared bit for bit."""
    if type(first) is not type(second):
        return [path]
    if isinstance(first, dict):
        keys = [key for key in {**first, **second} if key not in NOT_COMPARED]
        return [name for key in keys for name in differences(first.get(key), second.get(key), f"{path}.{key}")]
    if isinstance(first, (list, tuple)):
        pairs = enumerate(zip(first, second))
        return [path] * (len(first) != len(second)) + [n for i, p in pairs for n in differences(*p, f"{path}.{i}")]
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [path]
    return [] if first == second else [path]
