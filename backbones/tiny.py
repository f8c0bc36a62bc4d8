"""A network that trains in minutes on a CPU, for the demo and for tests. Not a published one."""

import torch
from torch import nn

from backbones.common import FixedScaleBatchNorm1d, SoftmaxHead, full_precision, half_precision

WIDTHS = (16, 32, 64, 128)


class Tiny(SoftmaxHead, nn.Module):
    """Images float32 [B, 3, 112, 112] in [-1, 1] -> embedding float32 [B, num_features], not normalised.

    Four convolutions with BatchNorm and PReLU, the first of stride 4, the others of 2: activations are 28, 14, 7 and 4
    wide. Then as in IResNet: flatten, dropout, `fc`, BatchNorm `features` of fixed scale.
    width: factor on the 16, 32, 64 and 128 channels; other arguments as in `IResNet`.
    """

    def __init__(self, width=1, num_features=512, dropout=0.0, fp16=False, num_classes=None):
        super().__init__()
        self.num_features = num_features
        self.fp16 = fp16
        parts = []
        in_channels = 3
        for number, channels in enumerate(width * base for base in WIDTHS):
            kernel, stride = (5, 4) if number == 0 else (3, 2)
            parts += [
                nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(channels),
                nn.PReLU(channels),
            ]
            in_channels = channels
        self.layers = nn.Sequential(*parts)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels * 4 * 4, num_features)
        self.features = FixedScaleBatchNorm1d(num_features)
        self.add_head(num_classes)

    def embed(self, images):
        """The embedding [B, num_features], with or without a softmax head, in training and eval mode."""
        with half_precision(images, self.fp16):
            x = self.dropout(torch.flatten(self.layers(images), 1))
        with full_precision(x):
            return self.features(self.fc(x.float()))
