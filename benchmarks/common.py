"""Shared by the benchmarks: timer, memory, a line about the machine, drawn images and random old features."""

import argparse
import os
import pathlib
import platform
import re
import statistics
import threading
import time

import cv2
import numpy as np
import torch

import recordio


def options(doc, **defaults):
    """Parse options --like-this with these names, types and defaults; False makes a switch."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        how = {"action": "store_true"} if value is False else {"type": type(value), "default": value}
        parser.add_argument(f"--{name.replace('_', '-')}", **how)
    return parser.parse_args()


def synchronize(device):
    """Wait until `device` is idle."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function, device="cpu", clock=time.perf_counter):
    """Duration of one call by `clock`, including the device's work."""
    synchronize(device)
    start = clock()
    function()
    synchronize(device)
    return clock() - start


def in_turns(parts, rounds, device="cpu", warmup=1):
    """`{name: [seconds of each round]}` of the functions `parts`, run alternately so that load slows all equally."""
    times = {name: [] for name in parts}
    for number in range(warmup + rounds):
        for name, part in parts.items():
            spent = seconds(part, device)
            if number >= warmup:
                times[name].append(spent)
    return times


def median(values, form=".3f"):
    """Median and range as text."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def print_ratio(what, over, under, form=".3f"):
    """Print the line that docs quote: median and range of over / under in each round."""
    print(f"ratio  {what}: {median([a / b for a, b in zip(over, under)], form)}", flush=True)


class PeakMemory:
    """`with PeakMemory(device) as peak`: peak.mib is the peak memory above that at the start.

    On the CPU the process's anonymous pages (Linux, sampled 50 times/s), without mapped files; on CUDA what torch
    allocated.
    """

    def __init__(self, device="cpu"):
        self.cuda, self.mib = torch.device(device).type == "cuda", 0

    def __enter__(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.start, self.stop = self._held(), threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    def _watch(self):
        done = False
        while not done:
            done = self.stop.wait(0.02)
            self.mib = max(self.mib, (self._held() - self.start) / 2**20)

    def _held(self):
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return 1024 * int(re.search(r"RssAnon:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[1])


def machine(device="cpu"):
    """CPU or GPU and versions, in one line."""
    if torch.device(device).type == "cuda":
        what = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        named = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
        what = f"{named[1] if named else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{what}, torch {torch.__version__}, Python {platform.python_version()}"


def draw_jpeg(rng):
    """A smooth image with some grain, as a JPEG as large as a face at quality 95."""
    image = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (112, 112), interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, 6, (112, 112, 1))
    return cv2.imencode(".jpg", np.clip(image + grain, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 95])[1]


def draw_record_set(path, pictures, records=None, num_classes=10):
    """Write a training set; returns its JPEGs.

    path: the .rec file; pictures: number of different images; records: number of records, repeating the images
    (default: each once). Image i is of class i % num_classes.
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


def write_index_lines(path, offsets):
    """Write a `.idx` whose line i is the key i and offsets[i], int64 [n]; a second for five million lines."""
    with open(path, "wb") as file:
        for start in range(0, len(offsets), 1 << 20):
            columns = [np.arange(start, min(start + (1 << 20), len(offsets))), offsets[start : start + (1 << 20)]]
            widths = [np.searchsorted(10 ** np.arange(1, 19), column, "right") + 1 for column in columns]
            cuts = np.flatnonzero(np.diff(widths).any(axis=0)) + 1  # lines of one length in between
            for keys, places in zip(*(np.split(column, cuts) for column in columns)):
                lines = [*_digits(keys), np.full_like(keys, ord("\t")), *_digits(places), np.full_like(keys, ord("\n"))]
                file.write(np.stack(lines, axis=1).astype(np.uint8).data)


def _digits(numbers):
    """The decimal digits, as characters, of numbers of one length: a list of int64 [n]."""
    return [ord("0") + numbers // 10**power % 10 for power in reversed(range(len(str(numbers[0]))))]


def write_features(path, labels, num_classes, width, seed=0):
    """Write float32 [N, width], clustered by class, to the .npy file `path`; returns the class centres."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((num_classes, width), dtype=np.float32)
    features = np.lib.format.open_memmap(path, "w+", np.float32, (len(labels), width))
    for start in range(0, len(labels), 1 << 16):
        part = slice(start, start + (1 << 16))
        features[part] = centres[labels[part]] + rng.standard_normal(features[part].shape, np.float32)
    features.flush()
    return centres


def old_feature_paths(folder):
    """Config keys of an old model's files, all in `folder`; the other such keys empty."""
    names = ("old_embedding", "old_embedding_label", "old_prototype", "credible_old_feature")
    paths = {name: str(pathlib.Path(folder) / f"{name}.npy") for name in names}
    return {**paths, "old_model_path": "", "center_radius": ""}


def write_old_features(paths, labels, num_classes, width):
    """Write random old-model files at the paths of `old_feature_paths`, for a training set with labels [N]."""
    centres = write_features(paths["old_embedding"], labels, num_classes, width)
    np.save(paths["old_embedding_label"], np.asarray(labels, np.int64))
    np.save(paths["old_prototype"], centres / np.linalg.norm(centres, axis=1, keepdims=True))
    np.save(paths["credible_old_feature"], np.random.default_rng(0).random(len(labels)) < 0.9)
