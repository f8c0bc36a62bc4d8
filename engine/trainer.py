"""The training loop, written once. A method subclasses `Trainer` and says what its losses are.

    class MyMethod(Trainer):
        def setup(self):                              # optional: load what the old model left behind
            ...
        def losses(self, images, labels, index):      # named terms of the loss, see below
            return {"cls": self.classifier(self.backbone(images), labels)}

    if __name__ == "__main__":
        MyMethod.main()

Every term is a scalar of the global batch, the same on all ranks (engine/distributed.py has the collectives).
Gradients of the backbone are summed over the ranks; the classifier's shards are each rank's own.
"""

import argparse
import contextlib
import os
import pathlib
import random

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

import backbones
from dataset import open_train_set
from engine import checkpoint, distributed
from engine.amp import make_scaler, start_momentum
from engine.config import ConfigError, load_config
from engine.errors import report_errors
from engine.monitor import Monitor, init_logging, log
from engine.schedule import make_schedule
from engine.verification import Verifier
from loader import TrainLoader
from losses import ArcFace, CombinedMarginLoss, CosFace, PartialFC


class Trainer:
    """One training run of one config.

    What a method uses: `cfg`, `train_set`, `backbone` (images [B, 3, 112, 112] -> embeddings [B, D]),
    `classifier` (PartialFC: embeddings, labels -> loss), `generator` (seeded, on the CPU), `device`, `rank`,
    `world_size`, `epoch`, `step` (optimiser steps done) and `total_steps`. `setup` may put modules of the method's own
    into `extra`: their parameters train with the backbone's settings, their gradients are summed over the ranks,
    and their parameters and buffers are in every checkpoint (not in model.pt).
    """

    def __init__(self, cfg):
        self.rank, self.world_size, self.device = distributed.init_distributed()
        self.cfg = cfg
        init_logging(cfg.output, self.rank == 0)
        seed_everything(cfg.seed + self.rank, cfg.deterministic)
        self.generator = torch.Generator().manual_seed(cfg.seed + self.rank)
        if cfg.dali:
            raise ConfigError(
                f"{cfg.config_file}: dali = True is not supported; set dali = False and raise num_workers instead"
            )

        if cfg.rec == "synthetic" and not (cfg.num_classes and cfg.num_image):
            raise ConfigError(f'{cfg.config_file}: rec = "synthetic" needs num_classes and num_image')
        self.train_set = open_train_set(cfg.rec, cfg.num_classes, cfg.num_image)
        cfg.num_classes, cfg.num_image = self.train_set.num_classes, self.train_set.num_image
        if cfg.num_image < cfg.batch_size * self.world_size:
            raise ConfigError(
                f"{cfg.config_file}: a step takes batch_size = {cfg.batch_size} on each of {self.world_size} ranks, "
                f"more than the {cfg.num_image} images of {self.train_set.path}; set a smaller batch_size"
            )
        self.loader = TrainLoader(
            self.train_set, cfg.batch_size, self.device, cfg.num_workers, cfg.seed, self.rank, self.world_size
        )
        self.steps_per_epoch = len(self.loader) // cfg.gradient_acc
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"{cfg.config_file}: gradient_acc = {cfg.gradient_acc} is more than the "
                f"{len(self.loader)} batches of an epoch"
            )
        self.total_steps = self.steps_per_epoch * cfg.num_epoch
        self.epoch = self.step = 0

        self.backbone = self.parallel(self.build_backbone())
        self.classifier = self.build_classifier()
        self.extra = torch.nn.ModuleDict()
        self.setup()
        self.extra.train().to(self.device)
        for parameter in self.extra.parameters():
            distributed.broadcast_(parameter.data)
        self.optimizer = self.build_optimizer()
        self.schedule = make_schedule(self.optimizer, cfg, self.steps_per_epoch)
        self.scaler = make_scaler(self.device, self.world_size, cfg.fp16 and self.device.type == "cuda")
        self.verifier = Verifier(cfg.rec_val, cfg.val_targets, cfg.batch_size, self.device)

    # --- what a run is made of; a method overrides what it does otherwise -----------------------------------------

    def build_backbone(self):
        return backbones.get_model(
            self.cfg.network, num_features=self.cfg.embedding_size, dropout=self.cfg.dropout, fp16=self.cfg.fp16
        )

    def build_classifier(self):
        cfg = self.cfg
        classifier = PartialFC(
            margin_loss(cfg), cfg.embedding_size, cfg.num_classes, cfg.sample_rate, cfg.fp16, cfg.seed
        )
        return classifier.train().to(self.device)

    def setup(self):
        """Load a method's old features, prototypes, extra modules; runs after the data and the models exist."""

    def begin_epoch(self):
        """Runs before the first batch of every epoch, on all ranks."""

    def losses(self, images, labels, index):
        """The loss terms `{name: scalar}` of a batch; their sum is minimised.

        images: float32 [B, 3, 112, 112] in [-1, 1], labels: int64 [B], both on the device; index: int64 [B] on
        the CPU, the images' rows in the training set and in every feature file.
        """
        raise TypeError(f"{type(self).__name__} must define losses(images, labels, index)")

    # --- set-up ---------------------------------------------------------------------------------------------------

    def parallel(self, module):
        """`module` on the device, replicated: rank 0's initial weights everywhere, gradients summed over the ranks."""
        module = module.train().to(self.device)
        if self.cfg.sync_bn and self.device.type != "cuda":
            raise ConfigError(
                f"{self.cfg.config_file}: sync_bn = True needs CUDA; torch has no SyncBatchNorm for the CPU"
            )
        if self.world_size == 1:
            return module
        if self.cfg.sync_bn:
            module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
        module = DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,  # BatchNorm statistics stay each rank's own; rank 0's are saved
            gradient_as_bucket_view=True,
        )
        module.register_comm_hook(None, _sum_gradients)
        return module

    def parameter_groups(self):
        groups = [{"params": [p for p in [*self.backbone.parameters(), *self.extra.parameters()] if p.requires_grad]}]
        if self.classifier is not None:
            groups.append({"params": list(self.classifier.parameters())})
        return groups

    def build_optimizer(self):
        cfg, fused = self.cfg, self.device.type == "cuda"
        if cfg.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                self.parameter_groups(), lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, fused=fused
            )
            start_momentum(optimizer)
        elif cfg.optimizer == "adamw":
            optimizer = torch.optim.AdamW(
                self.parameter_groups(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=fused
            )
        else:
            raise ConfigError(f'{cfg.config_file}: optimizer = {cfg.optimizer!r}; it must be "sgd" or "adamw"')
        if self.classifier is not None:
            self.classifier.attach(optimizer)
        return optimizer

    # --- the loop -------------------------------------------------------------------------------------------------

    def train(self):
        cfg = self.cfg
        if cfg.resume:
            self.resume()
        writer = SummaryWriter(os.path.join(cfg.output, "tensorboard")) if self.rank == 0 else None
        self.log_start()
        self.monitor = Monitor(
            cfg, self.total_steps, cfg.batch_size * cfg.gradient_acc * self.world_size, self.step, writer
        )
        while self.epoch < cfg.num_epoch:
            self.train_epoch()
            self.epoch += 1
            self.save_models()
            if cfg.save_all_states:
                self.save_checkpoint()
        if writer is not None:
            writer.close()

    def train_epoch(self):
        cfg = self.cfg
        done = self.step - self.epoch * self.steps_per_epoch  # not 0 after resuming within an epoch
        self.loader.set_epoch(self.epoch, start_step=done * cfg.gradient_acc)
        if done == 0:
            self.begin_epoch()
            self.monitor.restart_clock(self.step)
        batches = iter(self.loader)
        for _ in range(done, self.steps_per_epoch):
            for micro in range(cfg.gradient_acc):
                self.accumulate(*next(batches), last=micro == cfg.gradient_acc - 1)
            self.update()
            if self.step % cfg.frequent == 0 or self.step == self.total_steps:
                self.monitor.line(self.step, self.epoch, self.schedule.get_last_lr()[0], self.scaler)
            if self.verifier and (self.step % cfg.verbose == 0 or self.step == self.total_steps):
                self.verify()
        self.monitor.flush()

    def accumulate(self, images, labels, index, last):
        """Forward and backward of one batch; gradients are exchanged with the `last` one before an update."""
        exchange = last or self.world_size == 1
        with contextlib.nullcontext() if exchange else self.backbone.no_sync():
            terms = self.losses(images, labels, index)
            self.monitor.update(self.step, terms, index)
            self.scaler.scale(sum(terms.values()) / self.cfg.gradient_acc).backward()

    def update(self):
        for parameter in self.extra.parameters():
            if parameter.grad is not None:
                distributed.all_reduce_(parameter.grad)
        self.scaler.unscale_(self.optimizer)
        if self.cfg.clip_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.backbone.parameters(), self.cfg.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1

    def verify(self):
        distributed.broadcast_buffers(self.backbone)  # of the model that is saved, rank 0's, on every rank
        for name, value in self.verifier.run(unwrap(self.backbone)).items():
            log.info("[%s][%d]Accuracy-Flip: %.5f", name, self.step, value)
            if self.monitor.writer is not None:
                self.monitor.writer.add_scalar(f"val/{name}", value, self.step)
        self.monitor.restart_clock(self.step)

    def log_start(self):
        for key, value in sorted(self.cfg.items()):
            log.info(": %s%s", key.ljust(32), value)
        log.info(
            "%d ranks on %s, %d images, %d classes, %d steps an epoch, %d in all",
            *(self.world_size, self.device.type, self.cfg.num_image, self.cfg.num_classes),
            *(self.steps_per_epoch, self.total_steps),
        )

    # --- files ----------------------------------------------------------------------------------------------------

    def save_models(self):
        """`model.pt`: the backbone of rank 0; `softmax_fc_gpu_{rank}.pt`: each rank's class centres."""
        output = pathlib.Path(self.cfg.output)
        if self.rank == 0:
            checkpoint.save_atomically(unwrap(self.backbone).state_dict(), output / "model.pt")
        if self.classifier is not None:
            checkpoint.save_atomically(self.classifier.state_dict(), output / f"softmax_fc_gpu_{self.rank}.pt")

    def same_run(self):
        """What must not have changed between a checkpoint and the run that goes on from it."""
        keys = ["network", "embedding_size", "num_classes", "num_image"]
        keys += ["batch_size", "gradient_acc", "optimizer", "sample_rate"]
        return {**{key: self.cfg[key] for key in keys}, "fp16": self.scaler.is_enabled()}

    def state_dict(self):
        """The whole state of this rank, of tensors and plain values only."""
        return {
            "same_run": self.same_run(),
            "epoch": self.epoch,
            "step": self.step,
            "backbone": unwrap(self.backbone).state_dict(),
            "classifier": self.classifier.state_dict() if self.classifier is not None else {},
            "extra": self.extra.state_dict(),
            "sampler": self.classifier.generator_state() if self.classifier is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_state(self.generator, self.device),
        }

    def load_state_dict(self, state):
        self.epoch, self.step = state["epoch"], state["step"]
        unwrap(self.backbone).load_state_dict(state["backbone"])
        if self.classifier is not None:
            self.classifier.load_state_dict(state["classifier"])
            self.classifier.set_generator_state(state["sampler"])
        self.extra.load_state_dict(state["extra"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"], self.generator, self.device)

    def save_checkpoint(self):
        path = checkpoint.checkpoint_path(self.cfg.output, self.step, self.rank, self.world_size)
        checkpoint.save_atomically(self.state_dict(), path)
        distributed.barrier()  # the set is complete before an older one goes
        checkpoint.remove_old(self.cfg.output, self.rank)

    def resume(self):
        sets = checkpoint.complete_sets(self.cfg.output)
        if not sets:
            log.warning(
                "resume = True, but %s holds no complete checkpoint: starting from the beginning", self.cfg.output
            )
            return
        step, world_size = sets[-1]
        if world_size != self.world_size:
            raise checkpoint.CheckpointError(
                f"{self.cfg.output}: the newest checkpoint is of {world_size} ranks, this run has {self.world_size}; "
                f"start with --nproc_per_node={world_size}, or another `output`"
            )
        path = checkpoint.checkpoint_path(self.cfg.output, step, self.rank, world_size)
        state = checkpoint.load(path, self.device)
        for key, value in self.same_run().items():
            if state["same_run"][key] != value:
                raise checkpoint.CheckpointError(
                    f"{path}: written with {key} = {state['same_run'][key]!r}, this run has {value!r}; "
                    f"set {key} back to go on from it, or choose another `output`"
                )
        self.load_state_dict(state)
        log.info("resumed from %s: epoch %d, step %d", path, self.epoch, self.step)

    # --- the command line -----------------------------------------------------------------------------------------

    @classmethod
    def main(cls, argv=None):
        parser = argparse.ArgumentParser(
            description=cls.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="Any key of the config can be overridden, after it: --key value. configs/base.py explains each.",
            allow_abbrev=False,
        )
        parser.add_argument("config", help="config file, such as configs/f128_r18_softmax_class30.py; it comes first")
        # Older launchers pass --local_rank, today's --local-rank; the environment is what counts.
        parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
        args, overrides = parser.parse_known_args(argv)
        if not args.config.endswith(".py"):
            parser.error(f"{args.config} is no config file; the config comes first, then --key value")
        with report_errors():
            cls(load_config(args.config, overrides)).train()
        distributed.shutdown()


def margin_loss(cfg):
    """The margin that `loss`, `margin_list` and `margin_scale` describe."""
    m1, m2, m3 = cfg.margin_list
    if not {"arcface": (m1, m3) == (1, 0), "cosface": (m1, m2) == (1, 0), "combined": True}.get(cfg.loss):
        raise ConfigError(
            f"{cfg.config_file}: loss = {cfg.loss!r} does not go with margin_list = {cfg.margin_list}; "
            '"arcface" takes (1, m, 0), "cosface" (1, 0, m), "combined" any'
        )
    if cfg.interclass_filtering_threshold > 0 or cfg.loss == "combined":
        return CombinedMarginLoss(cfg.margin_scale, m1, m2, m3, cfg.interclass_filtering_threshold)
    return ArcFace(cfg.margin_scale, m2) if cfg.loss == "arcface" else CosFace(cfg.margin_scale, m3)


def seed_everything(seed, deterministic):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def random_state(generator, device):
    """Python's, NumPy's, torch's and the run's own generator, as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "run": generator.get_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state, generator, device):
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    generator.set_state(state["run"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def unwrap(module):
    return module.module if isinstance(module, DistributedDataParallel) else module


def _sum_gradients(_, bucket):
    """DDP communication hook: the sum over the ranks, where DDP's own is the mean."""
    return torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])
