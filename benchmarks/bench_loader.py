"""Images/s of one worker: `TrainLoader` against bare `cv2.imdecode` in this process.

    python benchmarks/bench_loader.py [--images 4096] [--rounds 8]

Draws its own training set (112 x 112 JPEGs of quality 95, 6 to 12 KB). Epochs of the loader, from records to
normalised, mirrored float batches on the CPU, alternate with decoding the same JPEGs from memory.
"""

import itertools
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

import cv2
import torch

from benchmarks.common import draw_record_set, in_turns, machine, median, options, print_ratio
from dataset import RecordDataset
from engine.loader import TrainLoader


def main():
    args = options(__doc__, images=4096, batch_size=128, rounds=8)
    images = args.images // args.batch_size * args.batch_size
    cv2.setNumThreads(0)
    torch.set_num_threads(1)  # one worker and one thread: compares the work, not spinning threads
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "train.rec")
        jpegs = draw_record_set(path, images)
        epochs = itertools.count()
        loader = TrainLoader(RecordDataset(path), args.batch_size, "cpu", num_workers=1)

        def epoch():
            loader.set_epoch(next(epochs))
            return [None for _ in loader]

        times = in_turns(
            {
                "bare cv2.imdecode": lambda: [cv2.imdecode(jpeg, cv2.IMREAD_COLOR) is None for jpeg in jpegs],
                "TrainLoader": epoch,
            },
            args.rounds,
        )
        print(f"{images} JPEGs, batches of {args.batch_size}, {machine()}")
        for name, spent in times.items():
            print(f"{name:20s} {median([images / one for one in spent], '8.0f')} images/s")
        print_ratio("speed of TrainLoader / bare", *times.values(), ".2f")


if __name__ == "__main__":
    main()
