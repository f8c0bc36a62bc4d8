"""Shared by the tests: one thread per process, GPUs for marked tests alone, and a factory of tiny training sets."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch comes in; inherited by the processes that tests start

import pathlib
import signal

import cv2
import numpy as np
import pytest
import torch

import recordio
from core.distributed import default_device

# Asked before they are hidden: the driver keeps to its first answer.
GPUS = torch.cuda.device_count() if default_device() == "cuda" else 0
_VISIBLE, _is_available = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.is_available
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if GPUS:
    torch.cuda.is_available = lambda: False


# A script's background jobs have SIGINT ignored, those of nohup SIGHUP; tests of stops, and what they start, need both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


LONG = ("test_own_road.py", "test_readme.py", "test_torchrun.py", "test_kill_and_resume.py", "test_every_method.py")


def pytest_collection_modifyitems(items):
    """Files of long tests first: of several processes none is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def _gpus_where_marked(request):
    """Tests marked `gpu` see the machine's GPUs, or are skipped where it has too few; all others see none."""
    marker = request.node.get_closest_marker("gpu")
    if marker is None:
        yield
        return
    needed = marker.args[0] if marker.args else 1
    if GPUS < needed:
        pytest.skip(f"needs {needed} GPUs, this machine has {GPUS}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", _is_available)
        patch.delenv("CUDA_VISIBLE_DEVICES")
        if _VISIBLE is not None:
            patch.setenv("CUDA_VISIBLE_DEVICES", _VISIBLE)
        yield


def draw_image(rng, size=112):
    """A smooth random picture, BGR uint8 [size, size, 3], which JPEG keeps nearly as it is."""
    coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def draw_record_set(path, labels, num_classes=None, header=True, size=112, seed=0):
    """Write a training set of random images and return the path of its `.rec`.

    Args:
        path: the `.rec` file, or a directory that gets a `train.rec`.
        labels: the class of each image; image i has the key i + 1 (i where there is no header).
        num_classes: as the header states it; by default the largest label + 1.
        header: True writes a header record of the form [images + 1, classes]; "insightface" one of the original form,
            with identity records after the images; False none.
        size: side of the images in pixels.
        seed: of the images' contents.
    """
    path = pathlib.Path(path)
    path = path / "train.rec" if path.is_dir() else path
    num_classes = max(labels, default=-1) + 1 if num_classes is None else num_classes
    rng, end = np.random.default_rng(seed), len(labels) + 1
    with recordio.RecordWriter(path) as writer:
        if header:
            counts = [end, end + num_classes if header == "insightface" else num_classes]
            writer.write(0, recordio.pack(recordio.IRHeader(0, counts, 0, 0), b""))
        for key, label in enumerate(labels, start=1 if header else 0):
            jpeg = cv2.imencode(".jpg", draw_image(rng, size), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
            writer.write(key, recordio.pack(recordio.IRHeader(0, float(label), key, 0), jpeg))
        for label in range(num_classes if header == "insightface" else 0):
            keys = [key for key, its in enumerate(labels, start=1) if its == label]
            span = [min(keys), max(keys) + 1] if keys else [0, 0]
            writer.write(end + label, recordio.pack(recordio.IRHeader(0, span, end + label, 0), b""))
    return path


@pytest.fixture(scope="session")
def make_record_set():
    """The function `draw_record_set`."""
    return draw_record_set
