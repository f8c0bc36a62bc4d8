"""Coverage-guided fuzzing of dataset.py's decoding: a ValueError, or 112 x 112 as OpenCV decodes it.

    python -m venv fuzzenv && fuzzenv/bin/pip install atheris numpy opencv-python-headless
    fuzzenv/bin/python tests/fuzz/fuzz_image.py -max_total_time=900 -timeout=5 -close_fd_mask=2 CORPUS

CORPUS is a directory, made and filled with seeds where it does not exist, and kept from run to run. What breaks an
invariant, takes 5 s or 64 MiB ends the run and leaves a file `crash-...` or `timeout-...`, which

    fuzzenv/bin/python tests/fuzz/fuzz_image.py crash-...

runs alone. Mend it, and add it to tests/test_dataset_image.py in words of its own. (-close_fd_mask=2 hides what the
decoders print. They are not instrumented: the coverage that guides is that of dataset.py.)

Last: 28,834,057 inputs in 15 minutes without a finding, then under a limit of 512 MiB in all; the 121,430 before them
found that OpenCV looks for chunks behind a PNG's end, and reserves 600 MB for one.
"""

import pathlib
import sys

import atheris
import cv2
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

with atheris.instrument_imports(include=["dataset"]):
    from dataset import decode_bgr, image_header

from tests.fuzz import driver


def one_input(data):
    size, end, _ = image_header(data)
    array = np.frombuffer(data, np.uint8)
    try:
        image = decode_bgr(array)
    except ValueError as error:
        assert len(str(error)) < 100, error
    else:
        assert size == (112, 112) and image.shape == (112, 112, 3) and image.dtype == np.uint8
        flags = (cv2.IMREAD_COLOR, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        assert any(np.array_equal(image, cv2.imdecode(array[:end], each)) for each in flags)


def seeds():
    cv2.setNumThreads(0)
    image = np.kron(np.arange(49, dtype=np.uint8).reshape(7, 7) * 5, np.ones((16, 16), np.uint8))
    for kind, *options in ((".jpg",), (".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (".png",)):
        for picture in (image, image[:, :-1]):
            yield cv2.imencode(kind, picture, options)[1].tobytes()
    jpeg = cv2.imencode(".jpg", image)[1].tobytes()
    yield jpeg[:2] + b"\xff\xfe\x00\x04ab\xff" + jpeg[2:]


if __name__ == "__main__":
    driver.run(one_input, seeds())
