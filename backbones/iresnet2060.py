"""r2060: IResNet of 1030 blocks, with activation checkpointing in its two deep layers (arXiv:1604.06174)."""

from backbones.common import checkpointed
from backbones.iresnet import IResNet

DEPTHS = (3, 128, 896, 3)

# Memory grows with (number of segments) + (activations inside one segment, about six per block);
# the minimum is near sqrt(896 / 6) = 12 blocks per segment for 896 blocks, near 5 for 128.
BLOCKS_PER_SEGMENT = 8


class IResNet2060(IResNet):
    """As `IResNet`; the activations of layers 2 and 3 are recomputed in the backward pass."""

    checkpointing = True

    def __init__(self, num_features=512, dropout=0.0, fp16=False, depths=DEPTHS):
        super().__init__(depths, num_features, dropout, fp16)

    def run_layer(self, number, x):
        layer = getattr(self, f"layer{number}")
        if number not in (2, 3):
            return layer(x)
        for start in range(0, len(layer), BLOCKS_PER_SEGMENT):
            x = checkpointed(layer[start : start + BLOCKS_PER_SEGMENT], x)
        return x
