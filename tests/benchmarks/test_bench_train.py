"""The training benchmark, on the tiny network: its figures are there, agree with each other and with counts by hand."""

import io
import json
import pathlib
import sys
import tempfile
import types

import numpy as np
import pytest
import torch

from backbones.common import checkpointed
from benchmarks import bench_train, rounds
from benchmarks.common import old_feature_paths, write_old_features
from benchmarks.flops import MeasuredPeak, StatedPeak, classifier_flops, training_flops
from core.config import REPO, ConfigError, load_config
from losses import ArcFace, PartialFC
from tests.ranks import run_ranks

ARC = "configs/demo/f128_tiny_x2_arc_class70.py"
SMALL = "--network tiny --num_classes 20 --batch_size 4 --num_workers 1 --steps 2 --warmup 1 --rounds 2".split()


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setitem(MeasuredPeak.SIDE, "cpu", 128)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary directories are made; in the end none may be left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    assert not list(folder.glob("bench_train_*"))


def figures(folder, *words):
    bench_train.main([*words, *SMALL, "--json", str(folder / "figures.json")])
    return json.loads((folder / "figures.json").read_text())


def check_agreement(found, images, loops):
    """Every figure again from the rounds, and those of a median between the least and the largest."""
    records = found["rounds"]
    assert len(records) == 2 and found["steps"] == 2 and found["warmup_seconds"] > 0
    assert list(found["images_per_second"]) == ["run", *loops] and list(found["ratio"]) == loops
    for name, rate in found["images_per_second"].items():
        assert rate["min"] == pytest.approx(images / max(record[name] for record in records))
        assert rate["max"] == pytest.approx(images / min(record[name] for record in records))
    for name, ratio in found["ratio"].items():
        assert sorted((ratio["min"], ratio["max"])) == pytest.approx(sorted(r[name] / r["run"] for r in records))
        rates = found["images_per_second"]
        assert found["ratio_of_best"][name] == pytest.approx(rates["run"]["max"] / rates[name]["max"])
    assert all(0 <= record["wait"] <= 1 for record in records)
    assert found["mfu"]["max"] == pytest.approx(max(
        found["flops"]["per_step"] / record["run"] / record["peak"] for record in records
    ))
    for values in (*found["images_per_second"].values(), found["wait_share"], found["mfu"], found["peak_flops"]):
        assert 0 < values["min"] <= values["median"] <= values["max"]


def test_figures_of_a_method_on_drawn_records(tmp_path, temporary, capsys):
    found = figures(tmp_path, ARC, "--method", "MixBCT", "--fake-old", "--draw", "3", "--peak-tflops", "0.5")
    check_agreement(found, images=4, loops=["same losses", "minimal loop", "backbone alone"])
    assert found["method"] == "MixBCT" and found["settings"]["data"] == "3 drawn pictures"
    assert found["peak_flops"] == {"min": 5e11, "median": 5e11, "max": 5e11, "by": "--peak-tflops"}
    assert 0 < found["memory"]["largest worker's own"] < found["memory"]["process"]
    flops = found["flops"]
    assert flops["classifier_per_step"] == 6 * 4 * 128 * 20
    assert flops["per_step"] == 4 * flops["per_image"] + flops["classifier_per_step"]
    text = capsys.readouterr().out
    for part in ("MixBCT, tiny, 20 classes", "images/s   run / it", "data wait", "worker's own", "G forward", "MFU"):
        assert part in text
    assert "Global Step" not in text    # the run's own log


def test_figures_of_softmax_on_synthetic_images(tmp_path, temporary):
    config = "configs/demo/f128_tiny_softmax_class30.py"
    found = figures(tmp_path, config, "--rec", "synthetic", "--gradient_acc", "2", "--clock", "processor")
    check_agreement(found, images=8, loops=["minimal loop", "backbone alone"])
    assert found["method"] == "softmax" and "torch.matmul of 128 x 128 float32" in found["peak_flops"]["by"]
    assert found["flops"]["classifier_per_step"] == 0   # its head is the network's


def bench_on_a_rank(folder, words):
    tempfile.tempdir = folder
    bench_train.main([*words, *SMALL, "--json", str(pathlib.Path(folder) / "figures.json")])


def test_two_ranks_make_one_report(tmp_path):
    words = [ARC, "--method", "NCCL", "--queue_size", "8", "--fake-old", "--rec", "synthetic", "--gradient_acc", "2"]
    words += ["--peak-tflops", "1"]
    run_ranks(bench_on_a_rank, 2, str(tmp_path), words)
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    found = json.loads((tmp_path / "figures.json").read_text())
    check_agreement(found, images=16, loops=["same losses", "minimal loop", "backbone alone"])
    assert found["settings"]["ranks"] == 2
    assert found["flops"]["classifier_per_step"] == 6 * (2 * 4) * 128 * 10 * 2   # half the classes, two batches


# --- Side by side ----------------------------------------------------------------------------------------------------

FAKE = """
import json, os, signal, sys
value = sys.argv[-2].split("=")[1]
for number in range(3):
    open(os.environ["LOG"], "a").write(f"{value}{number} ")
    if (value, number) == ("crashes", 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if value == "fails":
        sys.exit("channels_last = True needs CUDA")
    print("ready", flush=True)
    assert sys.stdin.readline() == "go\\n"
print(json.dumps({"words": sys.argv[1:]}))
"""


def test_processes_take_turns_and_one_that_ends_takes_none_with_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(bench_train, "__file__", str(tmp_path / "fake.py"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setattr(bench_train, "report_comparison", lambda key, found: None)
    rest = ["--rounds=3", "--json", str(tmp_path / "all.json")]
    with pytest.raises(SystemExit):     # for not all of them came to an end
        bench_train.main([ARC, "--compare", "key=a,crashes,fails,b", *rest])
    # Each begins when the one before it waits for its turn; then the rounds go round.
    assert (tmp_path / "log").read_text().split() == "a0 crashes0 fails0 b0 a1 crashes1 b1 a2 b2".split()
    found = json.loads((tmp_path / "all.json").read_text())
    assert list(found) == ["a", "b"]
    assert found["b"]["words"] == [ARC, *rest, "--key=b", "--in-turn"]
    text = capsys.readouterr().out
    assert "key = crashes: ended by SIGKILL" in text and "key = fails: failed with exit code 1" in text


def test_one_of_these_processes(temporary, monkeypatch, capsys):
    words = [ARC, *SMALL, "--rec", "synthetic", "--lr=0.1", "--in-turn"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\ngo\n"))
    bench_train.main(words)
    *waiting, last = capsys.readouterr().out.splitlines()
    assert waiting == ["ready", "ready"]
    found = json.loads(last)
    check_agreement(found, images=4, loops=["minimal loop", "backbone alone"])

    bench_train.report_comparison("lr", {"0.1": found, "0.2": found})
    assert "1.000 (1.000 to 1.000)" in capsys.readouterr().out.splitlines()[-1]

    monkeypatch.setattr(sys, "stdin", io.StringIO(""))      # the other end has gone
    with pytest.raises(SystemExit):
        bench_train.main(words)


@pytest.mark.parametrize("words, message", [
    (["--draw", "3", "--num_image", "23"], "train.rec: an epoch has 5 steps, the rounds take 6; lower --steps"),
    (["--rec", "synthetic", "--method", "MixBTC"], "--method MixBTC: there is none of that name; known are arc, "),
    (["--rec", "synthetic", "--mix_ratio", "0.1"], "unknown key 'mix_ratio'"),
    (["--compare", "compile"], "it takes KEY=VALUE,VALUE"),
])
def test_errors_are_one_line(words, message, temporary, capsys):
    with pytest.raises(SystemExit):
        bench_train.main([ARC, *SMALL, *words])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# --- The clock -------------------------------------------------------------------------------------------------------


class Stub:
    """A trainer and its loader for which time passes only where this says so."""

    def __init__(self, clock):
        self.clock, self.loader, self.device = clock, self, torch.device("cpu")
        self.cfg = types.SimpleNamespace(gradient_acc=2)

    def __iter__(self):
        while True:
            self.clock.now += 1         # a batch is waited for
            yield "batch"

    def train(self):
        batches = iter(self.loader)
        while True:
            for _ in range(2):
                next(batches)
                self.clock.now += 3     # forward and backward
            self.clock.now += 2         # update


def test_time_is_counted_to_what_took_it(monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    args = types.SimpleNamespace(warmup=3, steps=4, rounds=2)

    def pass_time(seconds):
        clock.now += seconds

    watched = rounds.Rounds(
        Stub(clock), args, peak=lambda: pass_time(50) or 7.0, turn=lambda: pass_time(1000), clock=lambda: clock.now
    )
    monkeypatch.setattr(watched, "_make_loops", lambda: watched.loops.update(other=lambda: pass_time(6)))
    watched.measure()
    assert watched.warmup_seconds == 3 * 10
    assert watched.records == [{"run": 10.0, "wait": 0.2, "other": 6.0, "peak": 7.0}] * 2


# --- Counts ----------------------------------------------------------------------------------------------------------


class SmallNet(torch.nn.Module):
    """Convolutions with stride and groups, and a linear layer; the second one through `checkpointed`."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 5, stride=2, padding=2)              # 12 -> 6
        self.grouped = torch.nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False)
        self.norm = torch.nn.BatchNorm2d(16)
        self.last = torch.nn.Linear(16 * 6 * 6, 10)

    def forward(self, images):
        return self.last(torch.flatten(self.norm(checkpointed(self.grouped, self.first(images))), 1))


def test_operations_of_a_small_network_by_hand():
    first = 2 * (8 * 6 * 6) * (3 * 5 * 5)           # two an output value and weight that it takes part in
    grouped = 2 * (16 * 6 * 6) * (8 // 4 * 3 * 3)
    last = 2 * 10 * (16 * 6 * 6)
    forward, whole = training_flops(SmallNet, shape=(3, 12, 12))
    assert forward == first + grouped + last
    assert whole == 2 * first + 3 * grouped + 3 * last      # the images need no gradient


def test_operations_of_the_classifier_are_those_of_its_products():
    classifier = PartialFC(ArcFace(), embedding_size=16, num_classes=30)
    embeddings = torch.randn(5, 16, requires_grad=True)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        classifier(embeddings, torch.arange(5)).backward()
    assert counter.get_total_flops() == classifier_flops(5, 16, 30) == 6 * 5 * 16 * 30


def test_peaks():
    assert StatedPeak.of("NVIDIA H100 80GB HBM3", "float16")() == 989e12
    assert StatedPeak.of("NVIDIA H100 PCIe", "bfloat16")() == 756e12
    assert StatedPeak.of("NVIDIA H200 NVL", "float16")() == 835.5e12
    assert StatedPeak.of("NVIDIA A100-SXM4-80GB", "TF32")() == 156e12
    assert StatedPeak.of("Tesla V100-PCIE-16GB", "float16")() == 112e12
    assert StatedPeak.of("Tesla V100-SXM2-16GB", "bfloat16") is None
    for other in ("Some other card", "NVIDIA RTX A4000", "NVIDIA T400 4GB"):
        assert StatedPeak.of(other, "float16") is None
    seconds = iter([10.0, 10.5, 20.0, 20.25, 30.0, 31.0])     # half, a quarter of, and a second: the best counts
    assert MeasuredPeak(torch.device("cpu"), torch.float32, lambda: next(seconds))() == 2 * 128**3 / 0.25


# --- Configs ---------------------------------------------------------------------------------------------------------


def test_every_config_has_its_trainer():
    configs = [*REPO.glob("configs/**/f*.py"), *REPO.glob("BCT_methods/*/configs/**/*_to_*.py")]
    assert len(configs) > 40
    for path in configs:
        method = bench_train.method_of(path)
        kind = bench_train.trainer_class(method)
        if "BCT_methods" in path.parts:
            assert kind.__name__ == method == path.relative_to(REPO / "BCT_methods").parts[0]
        else:
            assert kind.__name__ == ("OldSoftmax" if "softmax" in path.stem else "OldArc")


def test_a_config_for_another_method_keeps_its_own_keys(tmp_path):
    path = bench_train.config_for(ARC, "NCCL", tmp_path)
    cfg, plain, method = load_config(path), load_config(ARC), load_config("BCT_methods/NCCL/configs/base.py")
    for key in plain:
        if key not in ("config_file", "name", "output"):
            assert cfg[key] == plain[key], key
    assert {key: cfg[key] for key in method if key not in plain} == {
        key: method[key] for key in method if key not in plain
    }
    assert bench_train.config_for(ARC, None, tmp_path) == bench_train.config_for(ARC, "arc", tmp_path)
    with pytest.raises(ConfigError, match="nowhere.py: no such config file"):
        load_config(bench_train.config_for("nowhere.py", "NCCL", tmp_path))


def test_old_features_are_of_the_right_shape(tmp_path):
    paths = old_feature_paths(tmp_path)
    write_old_features(paths, np.arange(9) % 4, 4, 8)
    shapes = [np.load(path).shape for path in paths.values() if path]
    assert shapes == [(9, 8), (9,), (4, 8), (9,)]
