"""IResNet, the network of ArcFace (arXiv:1801.07698, section 3.1): residual units BN-conv-BN-PReLU-conv-BN.

Parameter names match the checkpoints in circulation, which load with strict=True.
"""

import torch
from torch import nn

from backbones.common import FixedScaleBatchNorm1d, SoftmaxHead, full_precision, half_precision

# Blocks in each of the four layers.
DEPTHS = {
    "r18": (2, 2, 2, 2),
    "r34": (3, 4, 6, 3),
    "r50": (3, 4, 14, 3),
    "r100": (3, 13, 30, 3),
    "r200": (6, 26, 60, 6),
}
WIDTHS = (64, 128, 256, 512)


class IBasicBlock(nn.Module):
    """[B, in, H, W] -> [B, out, H/stride, W/stride]; no activation after the shortcut is added."""

    def __init__(self, in_channels, out_channels, stride=1, shortcut=False):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.prelu = nn.PReLU(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if shortcut:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x):
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        out = self.bn3(self.conv2(out))
        return out + (x if self.downsample is None else self.downsample(x))


class IResNet(SoftmaxHead, nn.Module):
    """Images float32 [B, 3, 112, 112] in [-1, 1] -> embedding float32 [B, num_features], not normalised.

    depths: blocks in each of the four layers; dropout: probability on the flattened 512·7·7 activations;
    fp16: everything up to the flatten runs in float16 on CUDA, `fc` and `features` in float32;
    num_classes: see `SoftmaxHead`.
    """

    def __init__(self, depths, num_features=512, dropout=0.0, fp16=False, num_classes=None):
        super().__init__()
        self.num_features = num_features
        self.fp16 = fp16
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.prelu = nn.PReLU(WIDTHS[0])
        in_channels = WIDTHS[0]
        for number, (depth, width) in enumerate(zip(depths, WIDTHS), start=1):
            blocks = [IBasicBlock(in_channels, width, stride=2, shortcut=True)]
            blocks += [IBasicBlock(width, width) for _ in range(depth - 1)]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
            in_channels = width
        self.bn2 = nn.BatchNorm2d(in_channels)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels * 7 * 7, num_features)
        self.features = FixedScaleBatchNorm1d(num_features)
        self.add_head(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def run_layer(self, number, x):
        """Layer 1 … 4 on its input [B, C, H, W]; networks that save memory override it."""
        return getattr(self, f"layer{number}")(x)

    def embed(self, images):
        """The embedding [B, num_features], with or without a softmax head, in training and eval mode."""
        with half_precision(images, self.fp16):
            x = self.prelu(self.bn1(self.conv1(images)))
            for number in range(1, 5):
                x = self.run_layer(number, x)
            x = self.dropout(torch.flatten(self.bn2(x), 1))
        with full_precision(x):
            return self.features(self.fc(x.float()))
