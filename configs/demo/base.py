"""What the demo's runs share: networks and numbers that two CPU cores manage in minutes.

The data is drawn by tools/demo_data/; `make demo` sets `workspace` to demo/seed<SEED>: paths read as everywhere.
"""

from easydict import EasyDict as edict

config = edict()

config.network = "tiny"
config.embedding_size = 128
config.num_epoch = 24
config.warmup_epoch = 3.0           # s = 64 and m = 0.5 from random weights stall without it
