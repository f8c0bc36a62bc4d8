"""Every shared key with its default. A run's own file sets only what differs; core/config.py explains the layers.

Paths are relative to `workspace`, by default the repo root. Any key can be overridden on the command line:
`--lr 0.02 --num_epoch 20`.
"""

from easydict import EasyDict as edict

config = edict()

# --- Model -----------------------------------------------------------------------------------------------------
config.network = "r50"              # a name of backbones.names()
config.embedding_size = 512         # width of the feature; a new model's may differ from the old one's
config.init_backbone = ""           # a checkpoint of this network and width to start from; "" = random weights
config.dropout = 0.0                # probability, before the last linear layer
config.fp16 = True                  # mixed precision on CUDA, in amp_dtype; the CPU stays float32
config.amp_dtype = "float16"        # "float16" with a loss scaler, or "bfloat16" without one
config.tf32 = True                  # CUDA: float32 products in TF32 (10 bits of mantissa, as float16)
config.channels_last = False        # CUDA: backbone activations in memory as [B, H, W, C]; no effect on ViTs
config.compile = False              # torch.compile the backbone: takes minutes at the start, needs a C++ compiler;
                                    # not for vit_b, vit_l and r2060, which recompute activations
config.sync_bn = False              # CUDA: BatchNorm statistics over all ranks instead of each rank's batch

# --- Loss and classifier ---------------------------------------------------------------------------------------
config.loss = "arcface"             # "arcface", "cosface" or "combined" (cos(m1·θ + m2) − m3)
config.margin_list = (1.0, 0.5, 0.0)    # (m1, m2, m3): m1 factor on θ, m2 radians, m3 cosine
config.margin_scale = 64.0          # s: factor on the cosines before the softmax
config.interclass_filtering_threshold = 0.0 # cosine; other classes above it get logit 0, no gradient; 0 = off
config.sample_rate = 1.0            # share of the class centres used per step (PartialFC); 1 = all

# --- Optimisation ----------------------------------------------------------------------------------------------
config.optimizer = "sgd"            # "sgd" or "adamw"
config.lr = 0.1                     # for the global batch as it is; never rescaled
config.momentum = 0.9               # sgd
config.weight_decay = 5e-4
config.batch_size = 128             # images per rank and forward pass
config.gradient_acc = 1             # batches whose gradients are averaged per optimiser step
config.num_epoch = 35
config.warmup_epoch = 0.0           # epochs of linear warm-up from 0; may be a fraction. -1: decay one epoch ahead
# The paper says linear decay; its published code, and this one, use power 2.
config.decay_epoch = []             # epochs at which lr drops ×0.1; empty = polynomial decay of power 2 to 0
config.clip_grad_norm = 5.0         # maximum L2 norm of the gradient of backbone and extra modules; 0 = no clipping

# --- Data ------------------------------------------------------------------------------------------------------
config.workspace = ""               # directory that relative paths start from; "" = the repo root
config.scenario = ""                # a file of configs/scenarios/: sets rec, embedding_size and the old model's files
config.rec = "dataset/ms1m-retinaface-t1"   # .rec file, or a directory with train.rec; "synthetic" = random images
config.num_classes = 0              # 0 = from the header record; any other value must match it
config.num_image = 0                # likewise; "synthetic" needs both
config.num_workers = 2              # decoding processes per rank
config.rec_val = ""                 # directory of the .bin verification sets; "" = the directory of `rec`
config.val_targets = []             # .bin sets to verify on while training, such as ["lfw", "agedb_30"]; where the old
                                    # model lies at old_model_path, M(new, old) is logged beside M(new, new)
config.best_by = "self"             # which of the two chooses model_best.pt: "self" or "cross"

# --- Run -------------------------------------------------------------------------------------------------------
config.seed = 666                   # rank r seeds its generators with seed + r
config.deterministic = False        # slower; bit-identical weights on the same machine, also resumed on 3+ ranks
config.output = ""                  # directory of model.pt, logs and checkpoints; "" = work_dirs/<config name>
config.resume = False               # resume from the newest complete checkpoint in `output`
config.overwrite = False            # begin anew over an unfinished run in `output`, or one of other values
config.save_all_states = True       # write a checkpoint (all ranks, full state) at the end of each epoch
config.checkpoint_steps = 0         # also every so many steps within an epoch; 0 = off
config.verbose = 2000               # steps between verifications on val_targets; model.pt is saved before each
config.timeout = 30.0               # minutes that ranks wait for each other before they give up
config.frequent = 10                # steps between log lines
