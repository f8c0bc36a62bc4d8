"""Every key that a run understands, with its default. A run's own file states only what differs.

How the layers add up is told in core/config.py. Paths are relative to `workspace`, which is the repo root unless
it is set. Any key can be overridden on the command line: `--lr 0.02 --num_epoch 20`.
"""

from easydict import EasyDict as edict

config = edict()

# --- Model -----------------------------------------------------------------------------------------------------
config.network = "r50"              # a name of backbones.names()
config.embedding_size = 512         # width of the feature; a new model must have the old model's
config.dropout = 0.0                # probability, before the last linear layer
config.fp16 = True                  # mixed precision on CUDA, in amp_dtype; the CPU stays float32
config.amp_dtype = "float16"        # "float16" with a loss scaler, or "bfloat16" without one
config.tf32 = True                  # CUDA: what stays in float32 multiplies in TF32 (10 bits of mantissa, as float16)
config.channels_last = False        # CUDA: activations of the backbone as [B, H, W, C] in memory; ViTs have none
config.compile = False              # torch.compile the backbone: minutes at the start, needs a C++ compiler; not for
                                    # vit_b, vit_l and r2060, which compute activations again
config.sync_bn = False              # BatchNorm statistics over all ranks instead of each rank's own batch

# --- Loss and classifier ---------------------------------------------------------------------------------------
config.loss = "arcface"             # "arcface", "cosface" or "combined" (cos(m1·θ + m2) − m3)
config.margin_list = (1.0, 0.5, 0.0)    # (m1, m2, m3): m1 factor on θ, m2 radians, m3 cosine
config.margin_scale = 64.0          # s: what the cosines are multiplied by before the softmax
config.interclass_filtering_threshold = 0.0 # cosine; other classes above it get logit 0, no gradient; 0 = off
config.sample_rate = 1.0            # share of the class centres that a step sees (PartialFC); 1 = all

# --- Optimisation ----------------------------------------------------------------------------------------------
config.optimizer = "sgd"            # "sgd" or "adamw"
config.lr = 0.1                     # for the global batch as it is; nothing rescales it
config.momentum = 0.9               # sgd
config.weight_decay = 5e-4
config.batch_size = 128             # images a rank and step
config.gradient_acc = 1             # steps whose gradients are averaged before the weights move
config.num_epoch = 35
config.warmup_epoch = 0.0           # epochs of linear warm-up from 0; may be a fraction. -1: decay one epoch ahead
# The published text says linear decay; the published code, and this, power 2.
config.decay_epoch = []             # epochs at which lr drops ×0.1; empty = polynomial decay of power 2 to 0
config.clip_grad_norm = 5.0         # largest L2 norm of the gradient of backbone and extra modules; 0 = no clipping

# --- Data ------------------------------------------------------------------------------------------------------
config.workspace = ""               # directory that the relative paths of a config lie under; "" = the repo root
config.scenario = ""                # a file of configs/scenarios/: sets rec, embedding_size and the old model's files
config.rec = "dataset/ms1m-retinaface-t1"   # .rec file, or a directory with train.rec; "synthetic" = random images
config.num_classes = 0              # 0 = from the header record; stated, it must agree with it
config.num_image = 0                # likewise; "synthetic" needs both
config.num_workers = 2              # decoding processes a rank
config.rec_val = ""                 # directory of the .bin verification sets; "" = the directory of `rec`
config.val_targets = []             # .bin sets to verify on while training, such as ["lfw", "agedb_30"]

# --- Run -------------------------------------------------------------------------------------------------------
config.seed = 666                   # rank r seeds its generators with seed + r
config.deterministic = False        # slower, same weights every time on the same machine; resumed, too, on 3+ ranks
config.output = ""                  # directory of model.pt, logs and checkpoints; "" = work_dirs/<config name>
config.resume = False               # resume from the newest complete checkpoint in `output`
config.save_all_states = True       # write a checkpoint (every rank, whole state) at the end of each epoch
config.checkpoint_steps = 0         # and within epochs, whenever so many steps are done; 0 = not
config.verbose = 2000               # steps between two verifications on val_targets
config.frequent = 10                # steps between two log lines
