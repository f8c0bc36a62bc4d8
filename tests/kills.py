"""Programs that are killed with SIGKILL and started again: before a chosen call of their code, or at any moment.

A `Task` is a program and its folder. `whole_run` runs it undisturbed; `kill_and_rerun` starts it again and again, each
time killed at another point, and checks the disk after every kill and at every end. Here are training runs: after a
kill the newest complete set must be whole, at the end all files, bit for bit. tests/tools/test_kill_and_rerun.py has
the tools; tests/soak.py does it for as long as you like.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import importlib
import io
import json
import multiprocessing
import operator
import os
import pathlib
import pickle
import re
import shutil
import signal
import sys
import time
from multiprocessing.connection import wait

import cv2
import numpy as np
import torch

import engine.trainer
from core import state_file
from engine import checkpoint
from tests.BCT_methods.whole_runs import sets_of, write_config, write_old_features
from tests.conftest import draw_image, draw_record_set
from tests.ranks import as_they_end, join_group, started

NUM_IMAGE, NUM_CLASSES = 38, 5
# The moments at which a program can be killed: before a name in its folder `work` changes or a file there is opened for
# writing (audit events of Python), such as "replace rank", by the first word of the name; before one of these calls;
# and "half of save", when so many bytes of a file are written.
AUDITED = {"os.rename": "replace", "os.remove": "unlink", "open": "open"}
WATCHED = ((engine.trainer.Trainer, "update"), (engine.trainer.Trainer, "verify"))


@dataclasses.dataclass(frozen=True)
class Kill:
    """`ranks` are killed when they come to `moment` for the `number`-th time, or, "outside", after `number` seconds."""

    moment: str
    number: float
    ranks: tuple

    def __str__(self):
        when = f"after {self.number:.2f} s" if self.moment == "outside" else f"at {self.moment} {self.number}"
        return f"{when} on rank {' and '.join(map(str, self.ranks))}"


class Task:
    """A program: `main`, "module:function", with the command line `words`, on some ranks.

    It changes `folder`/work alone. before/ has what was there at first, whole/ what an undisturbed run leaves, all/
    that and the files that it deletes on the way. resumes: it goes on where it was killed.
    check(task, ended): AssertionError for a wrong file in work/, after a kill or at the end; returns a few words.
    """

    def __init__(self, folder, name, ranks, main, words, check, resumes=False):
        self.name, self.ranks, self.main, self.words = name, ranks, main, [str(word) for word in words]
        self.check, self.resumes, self.folder = check, resumes, pathlib.Path(folder)
        self.work, self.before, self.whole, self.all = (
            self.folder / place for place in ("work", "before", "whole", "all")
        )

    def whole_run(self):
        """Undisturbed. Sets `moments`, {moment: {rank: how many times it came to it}}, and `seconds`, its duration."""
        shutil.copytree(self.work, self.before)
        self.attempt(keep=True)
        shutil.copytree(self.work, self.whole)
        shutil.copytree(self.work, self.all, dirs_exist_ok=True)
        counts = [json.loads(self.printed(rank, "json").read_text()) for rank in range(self.ranks)]
        self.seconds = max(count.pop("seconds") for count in counts)
        names = sorted({name for count in counts for name in count})
        self.moments = {
            name: {rank: count[name] for rank, count in enumerate(counts) if name in count} for name in names
        }
        self.begin_afresh()

    def begin_afresh(self):
        shutil.rmtree(self.work)
        shutil.copytree(self.before, self.work)
        self.steps = []

    def printed(self, rank, kind="log"):
        return self.folder / f"rank_{rank}.{kind}"

    def attempt(self, kill=None, keep=False):
        """Start the ranks; whether they came to their end. keep: link what they delete to all/.

        AssertionError, with what was printed, where they did not though nobody was killed. Nothing is left running.
        """
        for path in self.folder.glob("rank_*"):
            path.unlink()
        with started(_rank_main, self.ranks, self, kill, keep, end=_kill_group) as ranks:
            if kill is not None and kill.moment == "outside":
                wait([process.sentinel for process in ranks], timeout=kill.number)
                # Before they are a group, one would wait long for another.
                together = all(self.printed(rank, "together").exists() for rank in range(self.ranks))
                for rank in kill.ranks if together else range(self.ranks):
                    _kill_group(ranks[rank])
            codes, trouble = [None] * self.ranks, ""
            try:
                for rank in as_they_end(ranks):
                    codes[rank] = ranks[rank].exitcode
            except TimeoutError as error:
                trouble = str(error)
        killed = kill is not None and -signal.SIGKILL in codes
        if trouble or any(codes) and not killed:
            logs = "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("rank_*.log")))
            raise AssertionError(f"{self}, {kill}: exit codes {codes} {trouble}\n{logs}")
        return not killed

    def __str__(self):
        return f"{self.name} on {self.ranks}"


def _kill_group(process):
    """The rank and its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()  # so early that it has no group of its own yet


def _rank_main(rank, world_size, task, kill, keep):
    begin = time.monotonic()
    os.setpgid(0, 0)
    log = os.open(task.printed(rank), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    os.environ.update(CUDA_VISIBLE_DEVICES="")
    multiprocessing.set_start_method("fork", force=True)  # the data workers, as outside the tests
    torch.set_num_threads(1)
    if world_size > 1:
        join_group(rank, world_size, task.printed(0, "store"))
    task.printed(rank, "together").touch()
    module, _, function = task.main.partition(":")
    main = operator.attrgetter(function)(importlib.import_module(module))
    moments = _Moments(task, kill if kill is not None and rank in kill.ranks else None, keep)
    sys.argv = [module, *task.words]
    main()
    task.printed(rank, "json").write_text(json.dumps({**moments.counts, "seconds": time.monotonic() - begin}))


class _Moments:
    """Counts the moments of this process, and ends it at the one that `kill` names."""

    def __init__(self, task, kill, keep):
        self.task, self.kill, self.keep, self.counts, self.process = task, kill, keep, {}, os.getpid()
        self.save, torch.save = torch.save, self._save
        for owner, name in WATCHED:
            setattr(owner, name, self._watched(getattr(owner, name)))
        sys.addaudithook(self._audit)

    def is_at(self, moment):
        self.counts[moment] = self.counts.get(moment, 0) + 1
        return self.kill is not None and (moment, self.counts[moment]) == (self.kill.moment, self.kill.number)

    def come_to(self, moment):
        if self.is_at(moment):
            os.killpg(0, signal.SIGKILL)

    def _audit(self, event, args):
        if event not in AUDITED or os.getpid() != self.process or event == "open" and not args[2] & os.O_ACCMODE:
            return
        name = args[event == "os.rename"]
        path = pathlib.Path(os.path.abspath("." if isinstance(name, int) else os.fsdecode(name)))
        if self.task.work in path.parents:
            word = re.search(r"(?<![^\W_])[a-zA-Z]{4,}(?![^\W_])", path.name)  # none in a digest
            kind = "temporary" if is_temporary(path) else word[0] if word else "file"
            self.come_to(f"{AUDITED[event]} {kind}")
            if self.keep and event == "os.remove" and kind != "temporary":
                kept = self.task.all / path.relative_to(self.task.work)
                kept.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    os.link(path, kept)

    def _watched(self, function):
        @functools.wraps(function)
        def watched(*args, **kwargs):
            self.come_to(function.__name__)
            return function(*args, **kwargs)

        return watched

    def _save(self, state, file, **how):
        if hasattr(file, "name") and self.is_at("half of save"):  # not in memory, as for a collective of objects
            whole = io.BytesIO()
            self.save(state, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            os.killpg(0, signal.SIGKILL)
        self.save(state, file, **how)


def is_temporary(path):
    return path.name.startswith(".") and path.name.endswith(".tmp")


# --- many of them ------------------------------------------------------------------------------------------------


def draw_kills(random, task, number, outside):
    """In any order `outside` kills at any time of a whole run, from before its first line to after its last, and
    `number` at moments of the code, each another one as far as there are.

    One that resumes comes there no further than its share of the whole, so that the next has something left to do.
    """
    share = 2 / (number + outside) if task.resumes else 1
    times = random.uniform(0, 1.1 * task.seconds, outside)
    kills = [Kill("outside", float(seconds), _some(random, task.ranks)) for seconds in times]
    names = [name for _ in range(-(-number // len(task.moments))) for name in random.permutation(list(task.moments))]
    for name in map(str, names[:number]):
        most = int(share * max(task.moments[name].values()))
        kills.append(Kill(name, 1 + int(random.integers(max(1, most))), _some(random, list(task.moments[name]))))
    return [kills[place] for place in random.permutation(len(kills))]


def _some(random, ranks):
    """One of the ranks (their number, or a list of them), or several."""
    ranks = random.permutation(ranks)
    return tuple(sorted(ranks[: random.integers(1, len(ranks) + 1)].tolist()))


def kill_and_rerun(task, kills, tell=print):
    """Start the task until each kill had its turn and it has come to an end; what has ended before begins afresh.

    Returns how many attempts were killed, for one may end before it comes to its kill. `tell` gets a line for each.
    """
    killed = 0
    for kill in [*kills, None]:
        ended = task.attempt(kill)
        found = task.check(task, ended)
        tell(f"{task}: {kill or 'to the end'}: {'ended' if ended else 'killed'}; {found}")
        killed += not ended
        if ended:
            task.begin_afresh()
    return killed


# --- training ----------------------------------------------------------------------------------------------------


def make_training(folder, method, ranks, seed=0, **keys):
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
    config = write_config(folder, method, "work", **{**usual, **own, **keys})
    (folder / "work").mkdir()
    main = f"BCT_methods.{method}.train:{method}.main"
    return Task(folder, method, ranks, main, [config, "--resume", "True"], check_training, resumes=True)


def check_training(task, ended):
    """Hold the checkpoints against those of the whole run: the newest set must be whole, the one before it must be
    there, and no progress must be lost. No file is half written; at the end all are as the whole run's.
    """
    written, found = ([step for step, _ in sets_of(place)] for place in (task.all, task.work))
    assert set(found) <= set(written), f"{found} are not among {written}"
    assert max(found, default=0) >= max(task.steps, default=0), f"{task.steps} became {found}"
    task.steps = found
    for path in task.work.rglob("*.pt"):
        state_file.check_whole(path)
    if found:
        newest = written.index(found[-1])
        last = written[max(newest + 1 - checkpoint.KEEP, 0) : newest + 1]
        assert found[-checkpoint.KEEP :] == last, f"{found} of {written}"
        for path in checkpoint.complete_sets(task.work)[-1].glob("rank_*"):
            assert_same(task.all / path.relative_to(task.work), path)
    if ended:
        check_end(task)
    return f"sets {found}"


def check_end(task):
    """Compare all files of a finished run with the whole run's: names and contents.

    One that was killed after its last checkpoint, but before it deleted an older one, has that, or a part of it, left.
    """
    whole, ended, written = (_files(place) for place in (task.whole, task.work, task.all))
    assert set(whole) <= set(ended) and set(ended) - set(whole) <= set(written), (sorted(whole), sorted(ended))
    for name, path in whole.items():
        if path.name.startswith("rank_"):
            assert_same(path, ended[name])
        elif path.is_file() and path.name not in ("training.log", ".lock"):
            assert path.read_bytes() == ended[name].read_bytes(), f"{name}: not as in {task.whole}"


def _files(output):
    """`{name: path}`; TensorBoard's have a time and a process in their names, the folder stands for them."""
    return {
        str(path.relative_to(output)): path
        for path in output.rglob("*")
        if path.parent.name != "tensorboard" and (path.is_file() or path.parent == output)
    }


def assert_same(first, second):
    """Of states: their bytes depend on which equal strings were one object."""
    found = differences(state_file.load(first), state_file.load(second))
    assert not found, f"{second}: not as in {first}: {found}"


def differences(first, second, path=""):
    """Names of what differs between two states of nested dicts and sequences; tensors are compared bit for bit."""
    if type(first) is not type(second):
        return [path]
    if isinstance(first, dict):
        return [n for key in {**first, **second} for n in differences(first.get(key), second.get(key), f"{path}.{key}")]
    if isinstance(first, (list, tuple)):
        pairs = enumerate(zip(first, second))
        return [path] * (len(first) != len(second)) + [n for i, p in pairs for n in differences(*p, f"{path}.{i}")]
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [path]
    return [] if first == second else [path]
