"""Each benchmark runs, tiny, and prints its ratio; its clock counts what it says; the documents quote what exists."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types

import pytest

from benchmarks import bench_train, common
from core import distributed
from core.config import REPO, load_config
from tests.ranks import run_ranks

TINY = "--network tiny --num_classes 20 --batch_size 4 --num_workers 1 --steps 2 --warmup 1 --rounds 2"
METHOD = "BCT_methods/{0}/configs/OPclass_ms1mv3_r18_to_r50_{0}_arc_to_arc_f512.py"


def run(command, monkeypatch):
    """Run `script options` as from the command line."""
    script, *words = command.split()
    monkeypatch.setattr(sys, "argv", [script, *words])
    importlib.import_module(f"benchmarks.{script}").main()


def in_a_process(command, tmp_path):
    """MXNet starts threads in every process that is forked after its import: data workers of later tests, too."""
    if importlib.util.find_spec("mxnet") is None:
        pytest.skip("MXNet is not installed")
    script, *words = command.split()
    done = subprocess.run(
        [sys.executable, REPO / f"benchmarks/{script}.py", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "command, ratios",
    [
        ("bench_bootstrap --scale 0.02 --rounds 1 --resamples 20", 1),
        ("bench_features --rows 2000 --width 8 --classes 50 --loop-rows 500", 4),
        ("bench_folder_to_rec --images 20 --rounds 1 --workers 1", 1),
        ("bench_folder_to_rec --images 20 --rounds 1 --workers 1 --side 60", 1),
        ("bench_ijb --scale 0.02 --rounds 1", 1),
        ("bench_loader --images 32 --batch-size 16 --rounds 2", 1),
        ("bench_methods --num-classes 40 --batch-size 4 --network tiny --embedding-size 16 --rounds 1", 9),
        ("bench_partial_fc --classes 500 --batch 8 --embedding-size 32 --rounds 2 --sample-rate 0.5 --optimizer", 2),
        ("bench_recordio --records 50 --rounds 2", 1),
        ("bench_scale --lines 2000 --images 1000 --classes 200 --rows 500", 2),
        (f"bench_train configs/demo/f128_tiny_softmax_class30.py {TINY} --rec synthetic --gradient_acc 2", 1),
        (f"bench_train {METHOD.format('MixBCT')} {TINY} --draw 3 --fake-old --cold --clock processor", 1),
        (f"bench_train {METHOD.format('UniBCT')} {TINY} --rec synthetic --fake-old", 1),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_it_prints_its_ratio(command, ratios, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if "recordio" in command:
        output = in_a_process(command, tmp_path)
    else:
        run(command, monkeypatch)
        output = capsys.readouterr().out
    printed = re.findall(r"^ratio  .+: ([\d.]+)%? \([\d.]+%? to [\d.]+%?\)$", output, re.M)
    assert len(printed) == ratios and all(float(value) > 0 for value in printed)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")]


def bench_on_a_rank(folder, words):
    """The names of some calls, in their order."""
    tempfile.tempdir, sys.argv, order = folder, ["bench_train", *words.split()], []
    for owner, name in ((bench_train.TimedLoader, "time_bare_steps"), (distributed, "barrier"), (shutil, "rmtree")):
        called = getattr(owner, name)
        setattr(owner, name, lambda *args, its=called, name=name, **how: order.append(name) or its(*args, **how))
    bench_train.main()
    return order


def test_ranks_share_a_run_and_its_files_to_the_end(tmp_path):
    words = f"{METHOD.format('L2')} {TINY} --draw 3 --fake-old --gradient_acc 2"
    first, second = run_ranks(bench_on_a_rank, 2, str(tmp_path), words)
    assert first[-3:] == ["time_bare_steps", "barrier", "rmtree"] and second[-2:] == first[-3:-1]
    assert not list(tmp_path.iterdir())


def test_too_few_steps_are_an_error(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(f"bench_train configs/f512_r50_arc_data100.py {TINY} --rec synthetic --num_image 23", monkeypatch)
    assert "an epoch of 5 steps is too short" in capsys.readouterr().err


class Stub:
    """A trainer and its loader for which time passes only where this says so."""

    device, world_size, monitor, schedule, step = "cpu", 1, None, None, 0

    def __init__(self, clock):
        self.clock, self.loader = clock, self
        self.cfg = types.SimpleNamespace(gradient_acc=2)

    def __iter__(self):
        while True:
            self.clock.now += 1  # a batch is waited for
            yield "batch"

    def accumulate(self, batch, last):
        self.clock.now += 3

    def update(self):
        self.clock.now += 2

    def train(self):
        batches = iter(self.loader)
        while True:
            for micro in range(2):
                self.accumulate(next(batches), last=micro)
            self.update()
            self.clock.now += 5  # what is not in a bare step


def test_time_is_counted_to_what_took_it(monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setitem(bench_train.CLOCKS, "stub", lambda: clock.now)
    trainer = Stub(clock)
    args = types.SimpleNamespace(warmup=3, steps=4, rounds=2, clock="stub", cold=False)
    timed = bench_train.TimedLoader(trainer, args)
    with pytest.raises(bench_train.Done):
        trainer.train()
    assert timed.run == [2 * 4 + 2 + 5] * 2 and timed.wait == [2] * 2 and timed.bare == [2 * 3 + 2] * 3


def test_parts_take_turns(monkeypatch):
    order = []
    monkeypatch.setattr(common, "seconds", lambda part, device: part())
    times = common.in_turns({"a": lambda: order.append("a") or 1, "b": lambda: order.append("b") or 2}, rounds=2)
    assert "".join(order) == "ababab" and times == {"a": [1, 1], "b": [2, 2]}


def test_the_documents_quote_commands_that_exist():
    text = "\n".join((REPO / name).read_text(encoding="utf-8") for name in ("README.md", "docs/benchmarks.md"))
    commands = re.findall(r"bench_(\w+)\.py([^`|\n;]*)", text)
    assert len(commands) > 10
    for script, words in commands:
        source = (REPO / "benchmarks" / f"bench_{script}.py").read_text(encoding="utf-8")
        known = {name.replace("-", "_") for name in re.findall(r'"--([\w-]+)"|(\w+)=', source) for name in name if name}
        known |= set(load_config("configs/base.py")) if script == "train" else set()
        for option in re.findall(r"--([\w-]+)", words):
            assert option.replace("-", "_") in known, f"bench_{script}.py has no --{option}"
