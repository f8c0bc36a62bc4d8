"""Coverage-guided fuzzing of engine/bin_files.py: whatever the bytes, a VerificationError or what pickle itself reads.

    python -m venv fuzzenv && fuzzenv/bin/pip install atheris numpy
    fuzzenv/bin/python tests/fuzz/fuzz_bin.py -max_total_time=900 -timeout=10 CORPUS

CORPUS is a directory, made and filled with seeds where it does not exist, and kept from run to run. What breaks an
invariant, takes 10 s or 64 MiB ends the run and leaves a file `crash-...` or `timeout-...`, which

    fuzzenv/bin/python tests/fuzz/fuzz_bin.py crash-...

runs alone. Mend it, and add it to tests/engine/test_bin_files.py in words of its own.

Last: 3,097,280 inputs in 20 minutes without a finding; 2.2 million before them found opcodes that go across the end of
a frame, which Python refuses.
"""

import pathlib
import pickle
import sys
import tempfile

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

with atheris.instrument_imports(include=["engine"]):
    from engine.bin_files import VerificationError, read_bin

from tests.fuzz import driver
from tests.pickles import plain_load, python2_pickle

PATH = pathlib.Path(tempfile.mkdtemp(), "set.bin")
IMAGES, SAME = [b"\xff\xd8\xff one", b"two \\'\"\n\0", b"\x89PNG" + bytes(range(256)), b"two \\'\"\n\0"], [True, False]


def one_input(data):
    PATH.write_bytes(data)
    try:
        images, same = read_bin(PATH)
    except VerificationError as error:
        assert str(error).startswith(f"{PATH}: ") and len(str(error)) < len(str(PATH)) + 400, error
        return
    # Python's own unpickler is safe here: what read_bin accepts has neither giant lengths nor giant memo indices.
    assert (images, same.tolist()) == plain_load(data)


def seeds():
    yield from (pickle.dumps((IMAGES, SAME), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1))
    yield from (python2_pickle(IMAGES, SAME, protocol) for protocol in range(3))


if __name__ == "__main__":
    driver.run(one_input, seeds())
