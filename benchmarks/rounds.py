"""Rounds of a Trainer's own run, timed from within its loader, and in turn with them of loops that do less."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import time

import torch

from benchmarks.common import memory_held, private_memory, seconds, synchronize
from core import distributed
from engine.build import make_scaler
from engine.build import make_optimizer, replicate, scales_loss


def no_exchange(module, micro, cfg):
    """Gradients are exchanged with the last of the batches of a step."""
    last = micro == cfg.gradient_acc - 1 or distributed.world_size() == 1
    return contextlib.nullcontext() if last else module.no_sync()


class Minimal:
    """A trainer's backbone, classifier and optimiser, made anew, on random tensors."""

    def __init__(self, trainer):
        cfg, device = trainer.cfg, trainer.device
        self.cfg = cfg
        self.backbone = replicate(trainer.build_backbone(), cfg, device, trainer.world_size)
        self.classifier = trainer.build_classifier().train().to(device)
        self.images = torch.rand(cfg.batch_size, 3, 112, 112, device=device) * 2 - 1
        self.labels = torch.randint(cfg.num_classes, (cfg.batch_size,), device=device)
        self.gradient = None
        groups = [[p for p in self.backbone.parameters() if p.requires_grad]]
        self.backbone_optimizer = make_optimizer(cfg, [{"params": groups[0]}], device)
        groups.append(list(self.classifier.parameters()))
        self.optimizer = make_optimizer(cfg, [{"params": group} for group in groups if group], device)
        self.classifier.attach(self.optimizer)
        self.scaler = make_scaler(device, trainer.world_size, scales_loss(cfg, device))

    def loss(self):
        return self.classifier(self.backbone(self.images), self.labels)

    def step(self):
        for micro in range(self.cfg.gradient_acc):
            with no_exchange(self.backbone, micro, self.cfg):
                self.scaler.scale(self.loss() / self.cfg.gradient_acc).backward()
        self.scaler.unscale_(self.optimizer)    # here all ranks agree on whether to skip the step
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def backbone_step(self):
        for micro in range(self.cfg.gradient_acc):
            with no_exchange(self.backbone, micro, self.cfg):
                output = self.backbone(self.images)
                if self.gradient is None:   # of a sum there would be none: BatchNorm is the last layer
                    self.gradient = torch.randn_like(output) / len(output)
                output.backward(self.gradient)
        self.backbone_optimizer.step()
        self.backbone_optimizer.zero_grad()


def same_losses_step(trainer, batch):
    """A step on a given batch with nothing but the losses and the optimiser.

    It trains on, with the run's own scaler: what keeps the ranks and the weights in order is left in.
    """
    acc = trainer.cfg.gradient_acc
    for micro in range(acc):
        with no_exchange(trainer.backbone, micro, trainer.cfg):
            trainer.scaler.scale(sum(trainer.losses(*batch).values()) / acc).backward()
    for parameter in trainer.extra.parameters():
        if parameter.grad is not None:
            distributed.all_reduce_(parameter.grad)
    trainer.scaler.unscale_(trainer.optimizer)
    if trainer.cfg.clip_grad_norm > 0:
        together = [*trainer.backbone.parameters(), *trainer.extra.parameters()]
        torch.nn.utils.clip_grad_norm_(together, trainer.cfg.clip_grad_norm)
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    trainer.optimizer.zero_grad()


def steps_needed(args):
    """Of the run, args.warmup and args.steps a round: the batch after the last step stops the clock."""
    return args.warmup + args.rounds * args.steps + 1


class Measured(Exception):
    """All rounds are done; ends the run."""


@contextlib.contextmanager
def halted(processes):
    """Processes stopped for the time of the block: they neither work ahead nor take the processor from others."""
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)


class Rounds:
    """Rounds of a Trainer's `train()`, timed from within its loader, and of the loops that do less.

    trainer: one whose `train()` has not begun; an epoch must have `steps_needed` steps. peak: a function that gives
    the device's FLOP/s, called once a round. turn: called before each round. plain: its losses are the minimal loop's.
    clock: time.perf_counter, or time.process_time for the processor's time of this process alone.
    measure() runs them. Then `records` has of each round the seconds a step of every loop, "wait", the share of the
    run's time that was spent in the loader's `next`, and "peak"; `memory` has the most bytes held by the run alone.
    """

    def __init__(self, trainer, args, peak, turn, plain=False, clock=time.perf_counter):
        self.trainer, self.args, self.peak, self.turn, self.plain = trainer, args, peak, turn, plain
        self.clock = clock
        self.records, self.memory, self.loops = [], {}, {}
        self.wait = 0
        self.start = clock()

    def measure(self):
        loader = self.trainer.loader
        kind, watch = type(loader), self._watch
        loader.__class__ = type(kind.__name__, (kind,), {"__iter__": lambda loader: watch(kind.__iter__(loader))})
        with contextlib.suppress(Measured):
            self.trainer.train()

    def _watch(self, batches):
        """The loader's batches; between two of them a round may end and another begin."""
        for number in itertools.count():
            step, micro = divmod(number, self.trainer.cfg.gradient_acc)
            if micro == 0:
                self._between_steps(step)
            start = self.clock()
            self.batch = next(batches)
            self.wait += self.clock() - start
            yield self.batch

    def _between_steps(self, step):
        done, rest = divmod(step - self.args.warmup, self.args.steps)
        if step == 0 or done < 0 or rest:
            return
        synchronize(self.trainer.device)
        spent = self.clock() - self.start
        with halted(multiprocessing.active_children()):
            if done == 0:
                self.warmup_seconds = spent
                self._take_memory()
                self._make_loops()
            else:
                record = {"run": spent / self.args.steps, "wait": self.wait / spent}
                self.records.append(record | self._run_loops(self.args.steps))
            if done == self.args.rounds:
                raise Measured
            self.turn()
            distributed.barrier()
        synchronize(self.trainer.device)
        self.wait, self.start = 0, self.clock()

    def _take_memory(self):
        """Before the other loops exist: what the run itself has held at most."""
        if self.trainer.device.type == "cuda":
            self.memory["device"] = torch.cuda.max_memory_allocated(self.trainer.device)
            self.memory["device, reserved"] = torch.cuda.max_memory_reserved(self.trainer.device)
            free, whole = torch.cuda.mem_get_info(self.trainer.device)
            self.memory["device, in all"] = whole - free    # with CUDA's own, NCCL's, nvJPEG's; and other processes'
        self.memory["process"] = memory_held().get("VmHWM", 0)
        workers = multiprocessing.active_children()
        self.memory["largest worker's own"] = max((private_memory(worker.pid) for worker in workers), default=0)

    def _make_loops(self):
        minimal = Minimal(self.trainer)
        if not self.plain:
            batch = self.batch
            self.loops["same losses"] = lambda: same_losses_step(self.trainer, batch)
        self.loops["minimal loop"] = minimal.step
        self.loops["backbone alone"] = minimal.backbone_step
        self._run_loops(self.args.warmup)

    def _run_loops(self, steps):
        def several(step):
            for _ in range(steps):
                step()

        record = {
            name: seconds(lambda: several(step), self.trainer.device, self.clock) / steps
            for name, step in self.loops.items()
        }
        return record | {"peak": self.peak()}
