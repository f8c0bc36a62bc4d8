"""One worker's images a second: `TrainLoader` against bare `cv2.imdecode` and a per-sample torchvision pipeline.

    python benchmarks/bench_loader.py [--images 4096] [--rounds 8]

Draws its own training set (112 x 112 JPEGs of quality 95, 6 to 12 KB). Then, in turns:
- bare: `cv2.imdecode` over the same JPEGs, held in memory, one thread, in this process;
- loader: an epoch of `TrainLoader` with one worker, up to normalised, mirrored float batches on the CPU;
- per sample: the items of the same `RecordDataset`, each through ToPILImage, RandomHorizontalFlip, ToTensor and
  Normalize, in a `DataLoader` with one worker.
Both loaders keep their worker from round to round, so that its start is not counted; both begin with an empty queue.
The ratios are given twice: median over the rounds, and of each one's fastest round, which other load disturbs least.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.common import draw_record_set
from dataset import RecordDataset
from engine.loader import TrainLoader


class PerSample(Dataset):
    """Each image on its own through torchvision's transforms."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.transform = transforms.Compose([
            transforms.ToPILImage(),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]),
        ])

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, row):
        image, label, _ = self.dataset[row]
        return self.transform(image.numpy()), label


def rate(batches, images):
    """Images a second over one pass through `batches`."""
    begin = time.perf_counter()
    for _ in batches:
        pass
    return images / (time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096, help="rounded down to whole batches")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    images = args.images // args.batch_size * args.batch_size
    cv2.setNumThreads(0)
    torch.set_num_threads(1)  # one worker, one thread beside it: what is compared is the work, not the spinning
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "train.rec")
        jpegs = draw_record_set(path, images)
        dataset = RecordDataset(path)
        loader = TrainLoader(dataset, args.batch_size, "cpu", num_workers=1)
        per_sample = DataLoader(
            PerSample(dataset), args.batch_size, shuffle=True, num_workers=1, persistent_workers=True
        )
        rounds = []
        for turn in range(args.rounds + 1):
            loader.set_epoch(turn)
            bare = rate((cv2.imdecode(jpeg, cv2.IMREAD_COLOR) for jpeg in jpegs), images)
            rounds.append((bare, rate(loader, images), rate(per_sample, images)))
        rounds = rounds[1:]  # the first starts the workers
        best = [max(rates) for rates in zip(*rounds)]
        bare, ours, theirs = (statistics.median(rates) for rates in zip(*rounds))
        print(f"{images} JPEGs, mean {np.mean([len(jpeg) for jpeg in jpegs]) / 1024:.1f} KB, batches of "
              f"{args.batch_size}, {torch.get_num_threads()} torch threads, median of {args.rounds} rounds:")
        print(f"  bare cv2.imdecode     {bare:8.0f} images/s, fastest {best[0]:8.0f}")
        print(f"  TrainLoader           {ours:8.0f} images/s, fastest {best[1]:8.0f}")
        print(f"  per-sample pipeline   {theirs:8.0f} images/s, fastest {best[2]:8.0f}")
        to_bare = statistics.median(b / a for a, b, _ in rounds)
        to_theirs = statistics.median(b / c for _, b, c in rounds)
        print(f"  TrainLoader / bare        {to_bare:6.2f}, of the fastest {best[1] / best[0]:6.2f}")
        print(f"  TrainLoader / per-sample  {to_theirs:6.2f}, of the fastest {best[1] / best[2]:6.2f}")


if __name__ == "__main__":
    main()
