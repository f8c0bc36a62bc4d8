"""What the benchmarks share: the machine in words, time and memory, drawn images, old features out of thin air."""

import contextlib
import os
import pathlib
import platform
import threading
import time

import cv2
import numpy as np
import torch

import recordio


def machine(device="cpu"):
    """Processor or GPU and the versions that a figure depends on, in one line."""
    if torch.device(device).type == "cuda":
        version = torch.backends.cudnn.version()
        what = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN {version}"
    else:
        what = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{what}, torch {torch.__version__}, Python {platform.python_version()}"


def _processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def synchronize(device):
    """Wait until `device` has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function, device="cpu", clock=time.perf_counter):
    """How long one call takes by `clock`, the device's work included."""
    synchronize(device)
    start = clock()
    function()
    synchronize(device)
    return clock() - start


def memory_held(pid="self"):
    """Bytes of a process by kind, from Linux's /proc: {"VmHWM": largest resident set so far, "RssAnon": now, its own,
    "RssFile": now, pages of mapped files, ...}. Empty where the process or /proc is not there."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return _bytes(lines)


def private_memory(pid="self"):
    """Bytes that a process shares with no other, as forked ones share what neither has changed since. 0 if unknown."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    held = _bytes(lines)
    return held["Private_Clean"] + held["Private_Dirty"]


def _bytes(lines):
    fields = (line.partition(":")[::2] for line in lines)
    return {key: 1024 * int(value.split()[0]) for key, value in fields if value.endswith(" kB")}


def forget_peak():
    """Have "VmHWM" count from here on (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


class PeakMemory:
    """`with PeakMemory() as peak`: peak.own and peak.mapped, in bytes, the most held at once beyond the start (Linux).

    Looked at 50 times a second. Pages of mapped files, which all processes share and the system may drop at any time,
    are told apart from the process's own.
    """

    def __enter__(self):
        self.own = self.mapped = 0
        self.start, self.stop = self._read(), threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    def _watch(self):
        while not self.stop.wait(0.02):
            own, mapped = (now - start for now, start in zip(self._read(), self.start))
            self.own, self.mapped = max(self.own, own), max(self.mapped, mapped)

    @staticmethod
    def _read():
        held = memory_held()
        return held.get("RssAnon", 0), held.get("RssFile", 0)


def draw_jpeg(rng):
    """A smooth picture with some grain, as a JPEG of the size that faces have at quality 95."""
    image = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (112, 112), interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, 6, (112, 112, 1))
    return cv2.imencode(".jpg", np.clip(image + grain, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 95])[1]


def draw_record_set(path, pictures, records=None, num_classes=100):
    """Write a training set; returns its JPEGs.

    path: the .rec file; pictures: how many different ones are drawn; records: how many are written, the pictures over
    and over (default: each once). Image i is of class i % num_classes.
    """
    rng = np.random.default_rng(0)
    jpegs = [draw_jpeg(rng) for _ in range(pictures)]
    with recordio.RecordWriter(path) as writer:
        end = (records or pictures) + 1
        writer.write(0, recordio.pack(recordio.IRHeader(0, [end, num_classes], 0, 0), b""))
        for key in range(1, end):
            header = recordio.IRHeader(0, float((key - 1) % num_classes), key, 0)
            writer.write(key, recordio.pack(header, jpegs[(key - 1) % pictures].tobytes()))
    return jpegs


def write_features(path, labels, centres, rng):
    """float32 [N, D] that cluster by class, `centres` [C, D] and noise, written a part at a time."""
    features = np.lib.format.open_memmap(path, "w+", np.float32, (len(labels), centres.shape[1]))
    step = 1 << 16
    for start in range(0, len(labels), step):
        part = labels[start:start + step]
        features[start:start + step] = centres[part] + rng.standard_normal((len(part), centres.shape[1]), np.float32)
    features.flush()


def old_feature_paths(folder):
    """The config keys of an old model's files, all in `folder`; the other such keys empty."""
    names = ("old_embedding", "old_embedding_label", "old_prototype", "credible_old_feature")
    paths = {name: str(pathlib.Path(folder) / f"{name}.npy") for name in names}
    return {**paths, "old_model_path": "", "center_radius": ""}


def write_old_features(paths, labels, num_classes, width):
    """Random files of an old model, where `old_feature_paths` has them, for a training set of these labels [N]."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((num_classes, width), dtype=np.float32)
    write_features(paths["old_embedding"], labels, centres, rng)
    np.save(paths["old_embedding_label"], np.asarray(labels, np.int64))
    np.save(paths["old_prototype"], centres / np.linalg.norm(centres, axis=1, keepdims=True))
    np.save(paths["credible_old_feature"], rng.random(len(labels)) < 0.9)
