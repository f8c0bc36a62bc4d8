"""Builds margin, precision, optimiser, loss scaler and parallel backbone from a config."""

import inspect

import torch
from torch.nn.parallel import DistributedDataParallel

from backbones import BackboneError, load_backbone
from core.config import ConfigError
from core.distributed import all_reduce_
from losses import ArcFace, CombinedMarginLoss, CosFace

# Each rank keeps its own BatchNorm statistics; rank 0's are saved. torch 2.15 renamed the option.
_KNOWN = inspect.signature(DistributedDataParallel).parameters
_WITHOUT_BUFFERS = {"forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers": False}


def margin_loss(cfg):
    """The margin that `loss`, `margin_list` and `margin_scale` describe."""
    m1, m2, m3 = cfg.margin_list
    if not {"arcface": (m1, m3) == (1, 0), "cosface": (m1, m2) == (1, 0), "combined": True}.get(cfg.loss):
        raise ConfigError(
            f"{cfg.config_file}: loss = {cfg.loss!r} does not fit margin_list = {cfg.margin_list}; "
            '"arcface" takes (1, m, 0), "cosface" (1, 0, m), "combined" any'
        )
    if cfg.interclass_filtering_threshold > 0 or cfg.loss == "combined":
        return CombinedMarginLoss(cfg.margin_scale, m1, m2, m3, cfg.interclass_filtering_threshold)
    return ArcFace(cfg.margin_scale, m2) if cfg.loss == "arcface" else CosFace(cfg.margin_scale, m3)


def set_precision(cfg, device):
    """Set CUDA's mixed-precision type, and TF32 for products that stay in float32."""
    if device.type != "cuda":
        return
    torch.set_autocast_dtype("cuda", getattr(torch, cfg.amp_dtype))
    torch.backends.cuda.matmul.allow_tf32 = cfg.tf32
    torch.backends.cudnn.allow_tf32 = cfg.tf32


def scales_loss(cfg, device):
    """Whether gradients need a loss scaler: small ones underflow in float16, not in bfloat16."""
    return cfg.fp16 and cfg.amp_dtype == "float16" and device.type == "cuda"


def make_optimizer(cfg, groups, device):
    """The optimiser of `cfg` over parameter `groups`; fused on CUDA."""
    fused = device.type == "cuda"
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=fused)
    optimizer = torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, fused=fused)
    start_momentum(optimizer)
    return optimizer


def start_momentum(optimizer):
    """Start SGD's momentum buffers at zero, which changes no step.

    Fused SGD allocates them uninitialised in its first step, and leaves them so if the scaler skips that step.
    """
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


# --- The float16 loss scaler, for fused optimisers and class shards that differ between ranks ------------------------


class _Scaler(torch.amp.GradScaler):
    """torch's scaler with one overflow flag for all ranks, and a count of skipped steps.

    `skipped` is a 0-d tensor on the device, so that counting never makes the host wait.
    """

    skipped = None

    def unscale_(self, optimizer):
        super().unscale_(optimizer)
        if not self.is_enabled():
            return
        flags = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
        for found_inf in flags:  # 0-d, 0 or 1: fused kernels skip at exactly 1, AdamW subtracts it from its count
            all_reduce_(found_inf, torch.distributed.ReduceOp.MAX)
        overflow = torch.stack(list(flags)).amax()
        self.skipped = overflow if self.skipped is None else self.skipped + overflow


def make_scaler(device, enabled):
    """A GradScaler for `device`; if gradients overflow on any rank, all ranks skip the step.

    Class shards differ between ranks, so one alone can overflow; skipping alone, it would diverge from the others.
    """
    return _Scaler(device=device.type, enabled=enabled, growth_interval=100)


def start_from_file(backbone, cfg):
    """Load the checkpoint `init_backbone` into the backbone; a softmax head, which no checkpoint needs, keeps its own.

    Raises ConfigError, with the key, for a file that is missing or not of this network and width.
    """
    try:
        loaded = load_backbone(cfg.init_backbone, cfg.network)
    except (BackboneError, FileNotFoundError) as error:
        raise ConfigError(f"{cfg.config_file}: init_backbone = {error}") from error
    if loaded.num_features != cfg.embedding_size:
        raise ConfigError(
            f"{cfg.config_file}: init_backbone = {cfg.init_backbone}: gives {loaded.num_features} features, but "
            f"embedding_size = {cfg.embedding_size}; set one to fit the other"
        )
    own = {key: value for key, value in backbone.state_dict().items() if key.startswith("cls_fc.")}
    backbone.load_state_dict({**own, **loaded.state_dict()})


# --- The parallel backbone ------------------------------------------------------------------------------------------


def replicate(module, cfg, device, world_size):
    """`module` on the device in training mode; with several ranks all get rank 0's weights and the summed gradients."""
    for key in ("sync_bn", "channels_last"):
        if cfg[key] and device.type != "cuda":
            # torch has no SyncBatchNorm on the CPU; the channels_last backward there crashed in torch 2.15.
            raise ConfigError(f"{cfg.config_file}: {key} = True needs CUDA; set {key} = False on the CPU")
    if cfg.compile and getattr(module, "checkpointing", False):
        raise ConfigError(
            f"{cfg.config_file}: compile = True does not work with network = {cfg.network!r}, which recomputes "
            "activations in the backward pass; set compile = False"
        )
    module = module.train().to(device)
    if cfg.channels_last:
        module = module.to(memory_format=torch.channels_last)
    if world_size > 1 and cfg.sync_bn:
        module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if cfg.compile:
        module.compile()  # in place, which keeps the names in the state dict
    if world_size == 1:
        return module
    module = DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        **_WITHOUT_BUFFERS,
        gradient_as_bucket_view=True,
        # DDP rebuilds its buckets after the first step, and on three or more ranks a sum depends on its position in a
        # bucket: a resumed run would differ in the last bits. It does not rebuild if parameters may be unused.
        find_unused_parameters=cfg.deterministic,
    )
    module.register_comm_hook(None, _sum_gradients)
    return module


def unwrap(module):
    """The network without its DistributedDataParallel wrapper."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def _sum_gradients(_, bucket):
    """DDP communication hook: the sum over the ranks; DDP's default is the mean."""
    return torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])
