"""Time and memory of a PartialFC step against a plain softmax with the same margin, in one process.

    python benchmarks/bench_partial_fc.py                                # a shard of 93,431 classes on 8 ranks
    python benchmarks/bench_partial_fc.py --classes 93431 --batch 1024 --fp16           # a GPU, all classes
    python benchmarks/bench_partial_fc.py --classes 250000 --sample-rate 0.1 --optimizer
    python benchmarks/bench_partial_fc.py --classes 2000000 --sample-rate 0.1 --optimizer --alone

A step is forward and backward from given embeddings, with --optimizer also an SGD step with momentum; both alternate.
The plain softmax is F.linear of normalised rows, the margin by tensor operations, and F.cross_entropy.
"""

import argparse
import functools
import multiprocessing
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

import torch
import torch.nn.functional as F

from benchmarks.common import PeakMemory, in_turns, machine, median, options, print_ratio
from losses import ArcFace, PartialFC

S, MARGIN = 64.0, 0.5


class PlainSoftmax(torch.nn.Module):
    """ArcFace in its simplest form: all classes, every operation by autograd."""

    def __init__(self, embedding_size, num_classes, fp16):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(num_classes, embedding_size) * 0.01)
        self.fp16 = fp16

    def forward(self, embeddings, labels):
        with torch.autocast("cuda", torch.float16, enabled=self.fp16 and embeddings.is_cuda):
            cosines = F.linear(F.normalize(embeddings), F.normalize(self.weight)).float().clamp(-1, 1)
        target = cosines.gather(1, labels[:, None])
        moved = target * torch.cos(torch.tensor(MARGIN)) - (1 - target**2).sqrt() * torch.sin(torch.tensor(MARGIN))
        return F.cross_entropy(cosines.scatter(1, labels[:, None], moved) * S, labels)


def build(name, args):
    """A closure that runs one step."""
    torch.manual_seed(0)
    embeddings = torch.randn(args.batch, args.embedding_size, device=args.device, requires_grad=True)
    labels = torch.randint(args.classes, (args.batch,), device=args.device)
    if name == "plain":
        classifier = PlainSoftmax(args.embedding_size, args.classes, args.fp16)
    else:
        classifier = PartialFC(ArcFace(S, MARGIN), args.embedding_size, args.classes, args.sample_rate, args.fp16)
    classifier = classifier.to(args.device)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    if name != "plain":
        classifier.attach(optimizer)

    def step():
        classifier(embeddings, labels).backward()
        if args.optimizer:
            optimizer.step()
        optimizer.zero_grad()
        embeddings.grad = None

    return step


def peak_mib(args, name):
    """Peak of three steps, with centres and gradients; in its own process, since freed memory stays allocated."""
    build(name, argparse.Namespace(**{**vars(args), "classes": 16, "batch": 2}))()  # the libraries' one-time memory
    with PeakMemory(args.device) as peak:
        step = build(name, args)
        for _ in range(3):
            step()
    return peak.mib


def main():
    args = options(
        __doc__,
        classes=93431 // 8,
        batch=128,
        embedding_size=512,
        sample_rate=1.0,
        fp16=False,
        optimizer=False,
        alone=False,
        device="cuda" if torch.cuda.is_available() else "cpu",
        rounds=10,
    )
    names = ["PartialFC"] if args.alone else ["plain", "PartialFC"]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = dict(zip(names, pool.map(functools.partial(peak_mib, args), names, chunksize=1)))
    times = in_turns({name: build(name, args) for name in names}, args.rounds, args.device, warmup=2)
    print(f"{machine(args.device)}; batch {args.batch}, {args.classes} classes, sample rate {args.sample_rate:g}")
    for name in names:
        print(f"{name:10} {median([1000 * one for one in times[name]], '.1f')} ms/step, at most {memory[name]:.0f} MiB")
    if not args.alone:
        print_ratio("time of PartialFC / plain", times["PartialFC"], times["plain"])
        print_ratio("memory of PartialFC / plain", [memory["PartialFC"]], [memory["plain"]])


if __name__ == "__main__":
    main()
