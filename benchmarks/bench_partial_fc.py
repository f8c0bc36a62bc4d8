"""Time and memory of a PartialFC step beside the plain softmax with the same margin, in one process.

    python benchmarks/bench_partial_fc.py                                # a shard of 93,431 classes on 8 ranks
    python benchmarks/bench_partial_fc.py --classes 93431 --batch 1024 --fp16           # a GPU, all classes
    python benchmarks/bench_partial_fc.py --classes 250000 --sample-rate 0.1 --optimizer
    python benchmarks/bench_partial_fc.py --classes 2000000 --sample-rate 0.1 --optimizer --alone

A step is forward and backward from given embeddings, with --optimizer also an SGD step with momentum. Both are
timed in turn, so that a busy machine slows both; the ratio is the median of the rounds' ratios. The plain softmax
is F.linear of normalised rows, the margin by ordinary tensor operations with autograd, and F.cross_entropy.
"""

import argparse
import pathlib
import resource
import statistics
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))   # the repo root

import torch
import torch.nn.functional as F

from benchmarks.common import machine, seconds
from losses import ArcFace, PartialFC

S, MARGIN = 64.0, 0.5


class PlainSoftmax(torch.nn.Module):
    """ArcFace as one writes it first: every class, every operation by autograd."""

    def __init__(self, embedding_size, num_classes, fp16):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(num_classes, embedding_size) * 0.01)
        self.fp16 = fp16

    def forward(self, embeddings, labels):
        with torch.autocast("cuda", torch.float16, enabled=self.fp16 and embeddings.is_cuda):
            cosines = F.linear(F.normalize(embeddings), F.normalize(self.weight)).float().clamp(-1, 1)
        target = cosines.gather(1, labels[:, None])
        moved = target * torch.cos(torch.tensor(MARGIN)) - (1 - target ** 2).sqrt() * torch.sin(torch.tensor(MARGIN))
        return F.cross_entropy(cosines.scatter(1, labels[:, None], moved) * S, labels)


def build(name, args, device):
    """A closure that runs one step."""
    torch.manual_seed(0)
    embeddings = torch.randn(args.batch, args.embedding_size, device=device, requires_grad=True)
    labels = torch.randint(args.classes, (args.batch,), device=device)
    if name == "plain":
        classifier = PlainSoftmax(args.embedding_size, args.classes, args.fp16).to(device)
    else:
        margin = ArcFace(S, MARGIN)
        classifier = PartialFC(margin, args.embedding_size, args.classes, args.sample_rate, args.fp16).to(device)
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


def peak(name, args, device):
    """MiB that three steps allocate at most, centres and gradients included (CPU: growth of the resident set)."""
    small = argparse.Namespace(**{**vars(args), "classes": 16, "batch": 2})
    build(name, small, device)()        # what the libraries take when first used does not count
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = build(name, args, device)
    for _ in range(3):
        step()
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=93431 // 8, help="of this process (default 93,431 / 8)")
    parser.add_argument("--batch", type=int, default=128, help="global batch, as gathered (default 128)")
    parser.add_argument("--embedding-size", type=int, default=512)
    parser.add_argument("--sample-rate", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--fp16", action="store_true", help="float16 cosines (CUDA only)")
    parser.add_argument("--optimizer", action="store_true", help="time the optimiser's step as well")
    parser.add_argument("--alone", action="store_true", help="without the plain softmax, which may not fit into memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", choices=["plain", "PartialFC"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:       # in a process of its own: the resident set only grows
        print(peak(args.peak, args, args.device))
        return

    names = ["PartialFC"] if args.alone else ["plain", "PartialFC"]
    memory = {}
    for name in names:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak", name]
        memory[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    steps = {name: build(name, args, args.device) for name in names}
    times = {name: [] for name in names}
    for round_number in range(args.rounds + 2):
        for name in names:
            elapsed = seconds(steps[name], args.device)
            if round_number >= 2:       # the first are warm-up
                times[name].append(elapsed)

    size = f"batch {args.batch}, {args.classes} classes, sample rate {args.sample_rate:g}"
    print(f"{machine(args.device)}; {size}")
    for name in names:
        print(f"{name:10} {1000 * statistics.median(times[name]):9.2f} ms/step   peak {memory[name]:8.0f} MiB")
    if args.alone:
        return
    ratio = statistics.median(ours / plain for ours, plain in zip(times["PartialFC"], times["plain"]))
    share = memory["PartialFC"] / memory["plain"]
    print(f"PartialFC / plain: {ratio:.3f} of the time, {share:.3f} of the memory")


if __name__ == "__main__":
    main()
