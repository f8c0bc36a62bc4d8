"""Coverage-guided fuzzing of engine/bin_files.py: whatever the bytes, a VerificationError or a set.

    python -m venv fuzzenv && fuzzenv/bin/pip install atheris numpy
    fuzzenv/bin/python tests/fuzz/fuzz_bin.py -max_total_time=900 -timeout=10 CORPUS

CORPUS is a directory, made and filled with seeds where it does not exist, and kept from run to run. An input that
breaks an invariant, or takes 10 s or 64 MiB, ends the run and leaves a file `crash-...` or `timeout-...`, which runs
alone when given instead of CORPUS. Fix it, and add it to tests/engine/test_bin_files.py.
"""

import pathlib
import sys
import tempfile

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

with atheris.instrument_imports(include=["engine", "pickle"]):
    import pickle

    import numpy as np

    from engine.bin_files import VerificationError, read_bin

from tests.fuzz import driver
from tests.pickles import python2_pickle

PATH = pathlib.Path(tempfile.mkdtemp(), "set.bin")
IMAGES, SAME = [b"\xff\xd8\xff one", b"two \\'\"\n\0", b"\x89PNG" + bytes(range(256)), b"two \\'\"\n\0"], [True, False]


def one_input(data):
    PATH.write_bytes(data)
    try:
        images, same = read_bin(PATH)
    except VerificationError as error:
        assert str(error).startswith(f"{PATH}: ") and len(str(error)) < len(str(PATH)) + 400, error
        return
    assert {type(image) for image in images} == {bytes} and same.dtype == bool and len(images) == 2 * len(same)


def seeds():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.dumps((IMAGES, SAME), protocol)
        yield pickle.dumps((np.array(IMAGES, object), np.array(SAME)), protocol)
        yield pickle.dumps(([bytearray(image) for image in IMAGES], list(np.array(SAME))), protocol)
    yield from (python2_pickle(IMAGES, SAME, protocol) for protocol in range(3))


if __name__ == "__main__":
    driver.run(one_input, seeds())
