"""Random reads by `recordio.RecordReader` against `mxnet.recordio.MXIndexedRecordIO` on the same file.

    python benchmarks/bench_recordio.py [--records 4000] [--rounds 7]

Draws its own records (6 to 12 KB, as JPEGs of 112 x 112 faces are), then reads them in the same random order by both,
in turns. Where mxnet does not import, a plain-Python reader (seek, read, unpack) stands in for it.
"""

import argparse
import pathlib
import random
import statistics
import struct
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

import numpy as np

import recordio


class PlainReader:
    """The format read in the most direct way: an index in a dict, then seek and read."""

    def __init__(self, path):
        self.file = open(path, "rb")
        lines = recordio.index_path(path).read_text().splitlines()
        self.offsets = {int(key): int(offset) for key, offset in (line.split("\t") for line in lines)}

    def read(self, key):
        self.file.seek(self.offsets[key])
        magic, length = struct.unpack("<II", self.file.read(8))
        assert magic == recordio.MAGIC and length < 1 << 29
        return self.file.read(length)


def other_reader(path):
    """`(name, function from key to payload)`"""
    if "bool" not in vars(np):
        np.bool = bool  # mxnet 1.9.1 needs the name that NumPy 1.24 took away
    try:
        import mxnet
    except Exception as error:  # a broken install raises more than ImportError
        print(f"mxnet does not import ({type(error).__name__}); comparing with a plain-Python reader")
        return "plain Python", PlainReader(path).read
    return "mxnet", mxnet.recordio.MXIndexedRecordIO(str(recordio.index_path(path)), str(path), "r").read_idx


def seconds(read, keys):
    begin = time.perf_counter()
    for key in keys:
        read(key)
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "bench.rec")
        with recordio.RecordWriter(path) as writer:
            for key in range(args.records):
                writer.write(key, draw.randbytes(draw.randrange(6000, 12000)))
        reader = recordio.RecordReader(path)
        name, other = other_reader(path)
        assert all(reader.read(key) == other(key) for key in range(args.records))
        rounds = []
        for _ in range(args.rounds):
            keys = draw.choices(range(args.records), k=4 * args.records)
            rounds.append((seconds(reader.read, keys), seconds(other, keys)))
        ours, theirs = (statistics.median(times) / len(keys) * 1e6 for times in zip(*rounds))
        ratio = statistics.median(b / a for a, b in rounds)
        print(f"random reads, {args.records} records of 6 to 12 KB, median of {args.rounds} rounds:")
        print(f"  recordio      {ours:8.2f} us a read")
        print(f"  {name:12s}  {theirs:8.2f} us a read")
        print(f"  ratio         {ratio:8.2f} x")


if __name__ == "__main__":
    main()
