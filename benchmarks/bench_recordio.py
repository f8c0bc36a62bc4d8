"""Random reads by `recordio.RecordReader` against `mxnet.recordio.MXIndexedRecordIO` on the same file.

    python benchmarks/bench_recordio.py [--records 4000] [--rounds 7]

Writes random records of 6 to 12 KB, like JPEGs of 112 x 112 faces; both readers, alternating, read them in the same
random order. Needs mxnet, which supports Python up to 3.11.
"""

import pathlib
import random
import statistics
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

import numpy as np

import recordio
from benchmarks.common import in_turns, options, print_ratio


def main():
    args = options(__doc__, records=4000, rounds=7)
    vars(np).setdefault("bool", bool)  # mxnet 1.9.1 needs this name, which NumPy 1.24 removed
    import mxnet

    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "bench.rec")
        with recordio.RecordWriter(path) as writer:
            for key in range(args.records):
                writer.write(key, draw.randbytes(draw.randrange(6000, 12000)))
        other = mxnet.recordio.MXIndexedRecordIO(str(recordio.index_path(path)), str(path), "r")
        readers = {"recordio": recordio.RecordReader(path).read, "mxnet": other.read_idx}
        keys = draw.choices(range(args.records), k=4 * args.records)
        assert all(readers["recordio"](key) == readers["mxnet"](key) for key in keys)
        times = in_turns(
            {name: lambda read=read: [read(key) for key in keys] for name, read in readers.items()}, args.rounds
        )
        for name, spent in times.items():
            print(f"{name:12s} {statistics.median(spent) / len(keys) * 1e6:8.2f} us per read of 6 to 12 KB")
        print_ratio("mxnet / recordio", times["mxnet"], times["recordio"], ".1f")


if __name__ == "__main__":
    main()
