"""What the demo's runs share: networks and numbers that two CPU cores manage in minutes.

The data is drawn by tools/demo_data/; `make demo` sets `workspace` to demo/seed<SEED>, so that paths read as everywhere.
"""

from easydict import EasyDict as edict

config = edict()

config.network = "tiny"
config.embedding_size = 128
config.num_epoch = 40
config.batch_size = 128
