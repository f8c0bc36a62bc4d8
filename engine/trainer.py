"""The training loop, written once. A method subclasses `Trainer` and defines its losses.

    class MyMethod(Trainer):
        old_features = "rows"           # batches include the old model's features

        def losses(self, batch):        # named loss terms
            new = self.backbone(batch.images)
            return {"cls": self.classifier(new, batch.labels), "near": global_mean(distance(new, batch.old))}

    if __name__ == "__main__":
        MyMethod.main()

Every term is a scalar of the global batch, the same on all ranks (core/distributed.py has the collectives).
Gradients are summed over the ranks, except those of class shards, which are each rank's own (losses/classifier.py).
"""

import argparse
import contextlib
import inspect
import itertools
import os
import pathlib
import sys

import torch
from torch.utils.tensorboard import SummaryWriter

import backbones
from core import distributed
from core.agreement import check_ranks_agree, check_same_start, failing_together
from core.config import ConfigError, load_config, require
from core.errors import LostRank, UserError, lost_rank, report_errors, warn
from core.manifest import write_manifest
from core.state_file import save_atomically, write_atomically
from dataset import open_train_set
from engine import checkpoint
from engine.build import (
    make_optimizer,
    make_scaler,
    margin_loss,
    replicate,
    scales_loss,
    set_precision,
    start_from_file,
    unwrap,
)
from engine.loader import OldRows, TrainLoader
from engine.monitor import Monitor, NonFiniteLoss, init_logging, log, log_to_file
from engine.post_mortem import explain
from engine.run_state import refuse_non_finite_weights, restore, seed_everything, settings_of, state_of
from engine.schedule import make_schedule
from engine.stop import StopRequest, resume_command, warn_of_static_rendezvous
from engine.verification import Verifier
from losses import PartialFC, part_compared
from losses.classifier import replicated_parameters
from old_model.old_features import OldFeatures
from old_model.provenance import made_from


class Trainer:
    """One training run of one config.

    A method sets `old_features`: "rows" (batches have old features and credible flags; labels are checked), "labels"
    (only checked) or None; and `same_run`: those of its own keys that a resumed run must not change.

    It uses `cfg`, `train_set`, `old` (the OldFeatures, or None), `backbone` (images [B, 3, 112, 112] -> embeddings
    [B, D]), `classifier` (embeddings, labels -> loss; PartialFC), `generator` (seeded, on the CPU), `device`, `rank`,
    `world_size`, `epoch`, `step` (optimiser steps done) and `total_steps`. `setup` may add modules to `extra`: their
    parameters train with the backbone's settings, their gradients are summed over the ranks and clipped together with
    the backbone's, and they are saved in checkpoints (not in model.pt).
    """

    old_features = None
    same_run = ()

    def __init__(self, cfg):
        self.rank, self.world_size, self.device = distributed.init_distributed(cfg.timeout)
        if self.world_size > 1 and (problem := distributed.gpu_problem()):
            raise UserError(f"{self.world_size} ranks would train on the CPU: {problem}")
        self.cfg = cfg
        init_logging(self.rank == 0)
        set_precision(cfg, self.device)
        seed_everything(cfg.seed + self.rank, cfg.deterministic)
        self.generator = torch.Generator().manual_seed(cfg.seed + self.rank)
        check_same_start(cfg, self.device)
        with failing_together():
            self.train_set = self.open_train_set()
            self.made_from = made_from(cfg, self.train_set)
        check_ranks_agree(**self.made_from)
        self.old = self.open_old_features() if self.old_features else None
        if self.old:
            self.log_widths(self.old.width)
        self.loader = TrainLoader(
            self.train_set,
            cfg.batch_size,
            self.device,
            cfg.num_workers,
            cfg.seed,
            self.rank,
            self.world_size,
            old=OldRows(self.old, rows=self.old_features == "rows") if self.old else None,
        )
        self.steps_per_epoch = len(self.loader) // cfg.gradient_acc
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"{cfg.config_file}: gradient_acc = {cfg.gradient_acc} is more than the {len(self.loader)} batches of "
                "an epoch; lower gradient_acc or batch_size"
            )
        self.total_steps = self.steps_per_epoch * cfg.num_epoch
        self.global_batch = cfg.batch_size * cfg.gradient_acc * self.world_size
        self.epoch = self.step = 0
        self.best = {"accuracy": -1.0, "step": 0}  # of the verifications so far

        backbone = self.build_backbone()
        if cfg.init_backbone:
            start_from_file(backbone, cfg)
        self.backbone = replicate(backbone, cfg, self.device, self.world_size)
        alone = cfg.batch_size == 1 and any(isinstance(one, torch.nn.BatchNorm1d) for one in self.backbone.modules())
        require(cfg, "batch_size", not alone, "at least 2: BatchNorm has no statistics of one image")
        self.classifier = self.build_classifier().train().to(self.device)
        self.extra = torch.nn.ModuleDict()
        self.setup()
        self.extra.train().to(self.device)
        self.replicated = replicated_parameters(self.extra) + replicated_parameters(self.classifier)
        for parameter in self.replicated:
            distributed.broadcast_(parameter.data)
        self.optimizer = make_optimizer(cfg, self.parameter_groups(), self.device)
        self.classifier.attach(self.optimizer)
        self.schedule = make_schedule(self.optimizer, cfg, self.steps_per_epoch)
        self.scaler = make_scaler(self.device, scales_loss(cfg, self.device))
        old = self.open_old_model() if cfg.val_targets else None
        self.verifier = Verifier(cfg.rec_val, cfg.val_targets, cfg.batch_size, self.device, old)

    # --- hooks: the parts of a run that a method may override -----------------------------------------------------

    def build_backbone(self):
        return backbones.get_model(
            self.cfg.network, num_features=self.cfg.embedding_size, dropout=self.cfg.dropout, fp16=self.cfg.fp16
        )

    def open_train_set(self):
        """The training set of `rec`; completes `num_classes` and `num_image`."""
        cfg = self.cfg
        if cfg.rec == "synthetic" and not (cfg.num_classes and cfg.num_image):
            raise ConfigError(f'{cfg.config_file}: rec = "synthetic" needs num_classes and num_image')
        train_set = open_train_set(cfg.rec, cfg.num_classes, cfg.num_image)
        cfg.num_classes, cfg.num_image = train_set.num_classes, train_set.num_image
        if cfg.num_classes < self.world_size:
            raise ConfigError(
                f"{cfg.config_file}: {train_set.path} has {cfg.num_classes} classes, fewer than the "
                f"{self.world_size} ranks; start fewer ranks"
            )
        if cfg.num_image < cfg.batch_size * self.world_size:
            raise ConfigError(
                f"{cfg.config_file}: batch_size = {cfg.batch_size} on {self.world_size} ranks is more than the "
                f"{cfg.num_image} images of {train_set.path}; lower batch_size"
            )
        return train_set

    def build_classifier(self, width=None):
        """A losses.Classifier of embeddings of `width`, by default the new model's."""
        cfg = self.cfg
        width = width or cfg.embedding_size
        return PartialFC(margin_loss(cfg), width, cfg.num_classes, cfg.sample_rate, cfg.fp16, cfg.seed)

    def open_old_features(self):
        """The old model's features of the training set, from the keys in old_model/keys.py."""
        cfg = self.cfg
        if "old_embedding" not in cfg:
            raise ConfigError(
                f"{cfg.config_file}: {type(self).__name__} uses old features, but its configs/base.py declares no "
                "old_embedding; start it with `config = edict(keys)`, keys from old_model.keys"
            )
        return OldFeatures(self.train_set, cfg.old_embedding, cfg.old_embedding_label, cfg.get("credible_old_feature"))

    def open_old_model(self):
        """The old model, for cross-tests on val_targets; None unless old_model_path is a state dict."""
        cfg, path = self.cfg, self.cfg.get("old_model_path") or ""
        there = os.path.isfile(path) and path.endswith((".pt", ".pth", ".safetensors"))
        require(cfg, "best_by", cfg.best_by == "self" or there, '"self" where old_model_path is no state dict')
        return backbones.load_backbone(path, device=self.device) if there else None

    def setup(self):
        """Check a method's keys, load prototypes, add extra modules; runs once data and models exist."""

    def begin_epoch(self):
        """Runs before the first batch of every epoch, on all ranks."""

    def losses(self, batch):
        """The loss terms `{name: scalar}` of an `engine.loader.Batch`; their sum is minimised."""
        raise TypeError(f"{type(self).__name__} must define losses(batch)")

    def parameter_groups(self):
        groups = [{"params": [p for p in [*self.backbone.parameters(), *self.extra.parameters()] if p.requires_grad]}]
        if centres := list(self.classifier.parameters()):
            groups.append({"params": centres})
        return groups

    # --- the loop -------------------------------------------------------------------------------------------------

    def train(self):
        """Train to the end, or until a stop signal: then finish the step and write a checkpoint."""
        cfg = self.cfg
        self.claimed = checkpoint.claim(cfg.output)
        if self.rank == 0:
            log_to_file(cfg.output)
        # By torchrun --max-restarts, whose agents on different machines may disagree on the count.
        restarted = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=self.device)
        restarted = bool(distributed.all_reduce_(restarted, torch.distributed.ReduceOp.MAX))
        again = cfg.resume or checkpoint.continues(cfg.output, restarted, cfg.overwrite)
        if not (again and self.resume()):
            checkpoint.start_afresh(cfg.output, settings_of(self), cfg.overwrite)
        checkpoint.sign(cfg.output, settings_of(self))
        if self.epoch >= cfg.num_epoch:
            warn("nothing to do: %d epochs are done; to train longer, raise num_epoch = %d", self.epoch, cfg.num_epoch)
        warn_of_static_rendezvous()
        writer = SummaryWriter(f"{cfg.output}/tensorboard", purge_step=self.step) if self.rank == 0 else None
        self.log_start()
        self.monitor = Monitor(self.total_steps, self.global_batch, self.step, writer)
        with self.monitor, StopRequest(self.device) as self.stop:
            stopped = None
            try:
                while self.epoch < cfg.num_epoch and not stopped:
                    stopped = self.train_epoch()
            except NonFiniteLoss as error:
                explain(self, error)  # inside StopRequest: the launcher's SIGTERM must not end ranks that still write
                raise
            except RuntimeError as error:
                if lost := lost_rank(error):
                    raise LostRank(f"step {self.step}: {lost}") from error
                raise
        if stopped and self.epoch < cfg.num_epoch:
            log.info("stopped by %s at step %d; resume with: %s", stopped, self.step, resume_command())

    def train_epoch(self):
        """Train the rest of the epoch. Returns the name of the stop signal, or None."""
        cfg = self.cfg
        done = self.step - self.epoch * self.steps_per_epoch  # not 0 after resuming within an epoch
        self.loader.set_epoch(self.epoch, start_step=done * cfg.gradient_acc)
        if done == 0:
            with self.monitor.pause():
                self.begin_epoch()
        batches, stopped = iter(self.loader), None
        while done < self.steps_per_epoch:
            for micro in range(cfg.gradient_acc):
                self.accumulate(next(batches), last=micro == cfg.gradient_acc - 1)
            self.update()
            done += 1
            if self.step % cfg.frequent == 0 or self.step == self.total_steps:
                self.monitor.line(self.step, self.epoch, self.schedule.get_last_lr()[0], self.scaler)
            if self.verifier and (self.step % cfg.verbose == 0 or self.step == self.total_steps):
                with self.monitor.pause():
                    self.verify()
            stopped = self.stop.agreed()
            due = cfg.checkpoint_steps and self.step % cfg.checkpoint_steps == 0
            if done < self.steps_per_epoch and (stopped or due):
                with self.monitor.pause():
                    self.save_checkpoint()
                if stopped:
                    return stopped
        self.epoch += 1
        with self.monitor.pause():
            self.save_models()
            due = cfg.checkpoint_steps and (self.step % cfg.checkpoint_steps == 0 or self.step == self.total_steps)
            if cfg.save_all_states or stopped or due:
                self.save_checkpoint()
        return stopped

    def accumulate(self, batch, last):
        """Forward and backward of one batch; the ranks exchange gradients on the `last` one before an update."""
        exchange = last or self.world_size == 1
        with contextlib.nullcontext() if exchange else self.backbone.no_sync():
            terms = self.losses(batch)
            for name, term in terms.items():
                if term.ndim:
                    raise UserError(
                        f"{type(self).__name__}.losses: {name!r} has shape {list(term.shape)}; a term is a scalar: "
                        "take its mean, and of that global_mean"
                    )
            self.monitor.update(self.step, terms, batch.index)
            self.scaler.scale(sum(terms.values()) / self.cfg.gradient_acc).backward()

    def update(self):
        distributed.sum_over_ranks_([p.grad for p in self.replicated if p.grad is not None])
        self.scaler.unscale_(self.optimizer)
        if self.cfg.clip_grad_norm > 0:
            together = [*self.backbone.parameters(), *self.extra.parameters()]
            torch.nn.utils.clip_grad_norm_(together, self.cfg.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1

    def verify(self):
        self.save_models()  # first: nothing that fails in here may cost the model
        distributed.broadcast_buffers(self.backbone)  # every rank verifies the model that is saved, rank 0's
        tests = self.verifier.run(unwrap(self.backbone))
        for test, title, place in (("self", "Accuracy-Flip", "val"), ("cross", "Accuracy-Cross", "val_cross")):
            for name, value in tests.get(test, {}).items():
                log.info("[%s][%d]%s: %.5f", name, self.step, title, value)
                self.monitor.scalar(f"{place}/{name}", value, self.step)
        chosen = tests[self.cfg.best_by]
        mean = sum(chosen.values()) / len(chosen)
        if mean > self.best["accuracy"]:
            self.best = {"accuracy": mean, "step": self.step}
            self.save_backbone("model_best.pt")
        log.info("[mean][%d]Accuracy-Highest: %.5f at step %d", self.step, self.best["accuracy"], self.best["step"])

    def log_widths(self, old_width):
        """Say which part of a new feature is compared with old ones, if they differ in width."""
        width = self.cfg.embedding_size
        if width != old_width:
            part = part_compared(width, old_width)
            log.info("old features of width %d: new ones, of %d, are compared with them %s", old_width, width, part)

    def log_start(self):
        for key, value in sorted(self.cfg.items()):
            log.info(": %s%s", key.ljust(32), value)
        log.info(
            "%d ranks on %s, %d images, %d classes, %d steps per epoch, %d in all",
            *(self.world_size, self.device.type, self.cfg.num_image, self.cfg.num_classes),
            *(self.steps_per_epoch, self.total_steps),
        )
        for name, value in self.verifier.old_accuracies.items():
            log.info("[%s]Accuracy-Old: %.5f, to be exceeded by Accuracy-Cross", name, value)

    # --- files ----------------------------------------------------------------------------------------------------

    def network_state(self):
        """The state dict that model.pt has."""
        return unwrap(self.backbone).state_dict()

    def save_backbone(self, name):
        """Save rank 0's backbone, for `backbones.load_backbone`, with its manifest."""
        if self.rank == 0:
            path, cfg = pathlib.Path(self.cfg.output) / name, self.cfg
            facts = {"network": cfg.network, "width": cfg.embedding_size, "method": type(self).__name__}
            facts |= {"step": self.step, "finished": self.step == self.total_steps}
            facts |= {key: self.made_from.get(key) for key in ("records", "old_model", "init_backbone")}

            def write(file):
                torch.save(self.network_state(), file)
                write_manifest(path, file, "backbone", **facts)

            write_atomically(write, path)

    def save_models(self):
        """Save the backbone as `model.pt`, each rank's class centres as `softmax_fc_gpu_{rank}.pt`."""
        self.check_weights()
        self.save_backbone("model.pt")
        if centres := self.classifier.state_dict():
            output = pathlib.Path(self.cfg.output)
            save_atomically(centres, output / f"softmax_fc_gpu_{self.rank}.pt")
            others = range(self.world_size + self.rank, 10**6, self.world_size)
            for path in itertools.takewhile(pathlib.Path.exists, (output / f"softmax_fc_gpu_{r}.pt" for r in others)):
                path.unlink()  # from before a resume on fewer ranks

    def check_weights(self):
        """Raise rather than save or rank non-finite weights, or those of a step with a non-finite loss."""
        self.monitor.flush()
        refuse_non_finite_weights(self)

    def save_checkpoint(self):
        self.check_weights()
        checkpoint.save_set(self.cfg.output, state_of(self))

    def resume(self):
        """Restore the newest set; False if there is none."""
        found = checkpoint.load_newest(self.cfg.output, self.device)
        if found is None:
            warn("no checkpoint in %s: starting from scratch", self.cfg.output)
            return False
        restore(self, *found)
        log.info("resumed from %s: epoch %d, step %d", found[1], self.epoch, self.step)
        return True

    # --- the command line -----------------------------------------------------------------------------------------

    @classmethod
    def main(cls, argv=None):
        parser = argparse.ArgumentParser(
            usage="%(prog)s [-h] config [--key value ...]",
            description=sys.modules[cls.__module__].__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="Any config key can be overridden after the config: --key value. configs/base.py explains each.",
            allow_abbrev=False,
        )
        parser.add_argument("config", help="config file, such as configs/f128_r18_softmax_class30.py; it comes first")
        # Passed by old launchers as --local_rank, by new ones as --local-rank; ranks come from the environment.
        parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
        with report_errors():
            args, overrides = parser.parse_known_args(argv)
            if not args.config.endswith(".py"):
                parser.error(f"{args.config} is not a config file; put the config first, then --key value")
            cls(load_config(args.config, overrides, inspect.getfile(cls))).train()
        distributed.shutdown()
