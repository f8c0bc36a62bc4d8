"""MobileFaceNet (arXiv:1804.07573) in the two widths of the checkpoints in circulation: mbf and mbf_large."""

from torch import nn
from torch.nn import functional as F

from backbones.common import full_precision, half_precision

# Factor on the channels of the paper's first layers, and the residual blocks of the four stages.
SIZES = {"mbf": (2, (1, 4, 6, 2)), "mbf_large": (4, (2, 8, 12, 4))}


class LinearBlock(nn.Module):
    """Convolution without bias and BatchNorm."""

    def __init__(self, in_channels, out_channels, kernel=1, stride=1, padding=0, groups=1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x):
        return self.layers(x)


class ConvBlock(LinearBlock):
    """Convolution without bias, BatchNorm, PReLU."""

    def __init__(self, in_channels, out_channels, kernel=1, stride=1, padding=0, groups=1):
        super().__init__(in_channels, out_channels, kernel, stride, padding, groups)
        self.layers.append(nn.PReLU(out_channels))


class DepthWise(nn.Module):
    """Bottleneck (paper, section 3.2): 1×1 to `groups` channels, depth-wise 3×3 with the stride, linear 1×1.

    residual: add the input; needs equal shapes.
    """

    def __init__(self, in_channels, out_channels, groups, stride=1, residual=False):
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            ConvBlock(in_channels, groups),
            ConvBlock(groups, groups, 3, stride, 1, groups),
            LinearBlock(groups, out_channels),
        )

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


class Residual(nn.Module):
    """`depth` bottlenecks that keep the shape, each added to its input."""

    def __init__(self, channels, depth, groups):
        super().__init__()
        self.layers = nn.Sequential(*(DepthWise(channels, channels, groups, residual=True) for _ in range(depth)))

    def forward(self, x):
        return self.layers(x)


class Embedding(nn.Module):
    """Global depth-wise convolution (paper, section 3.1), linear, BatchNorm1d: [B, 512, 7, 7] -> [B, num_features]."""

    def __init__(self, num_features, dropout):
        super().__init__()
        self.dropout = dropout
        self.layers = nn.Sequential(
            LinearBlock(512, 512, 7, groups=512),
            nn.Flatten(),
            nn.Linear(512, num_features, bias=False),
            nn.BatchNorm1d(num_features),
        )

    def forward(self, x):
        convolution, flatten, linear, norm = self.layers
        # A Dropout module among the layers would shift the published parameter names.
        x = F.dropout(flatten(convolution(x)), self.dropout, self.training)
        return norm(linear(x))


class MobileFaceNet(nn.Module):
    """Images float32 [B, 3, 112, 112] in [-1, 1] -> embedding float32 [B, num_features], not normalised.

    scale, blocks: see SIZES; dropout: probability on the 512 values before the linear layer;
    fp16: `layers` run in float16 on CUDA, `conv_sep` and `features` in float32.
    """

    def __init__(self, scale, blocks, num_features=512, dropout=0.0, fp16=False):
        super().__init__()
        self.num_features = num_features
        self.fp16 = fp16
        c, d = 64 * scale, 128 * scale
        second = ConvBlock(c, c, 3, 1, 1, groups=64) if blocks[0] == 1 else Residual(c, blocks[0], 128)
        self.layers = nn.Sequential(
            ConvBlock(3, c, 3, 2, 1),  # 112 -> 56
            second,
            DepthWise(c, c, 128, stride=2),  # 28
            Residual(c, blocks[1], 128),
            DepthWise(c, d, 256, stride=2),  # 14
            Residual(d, blocks[2], 256),
            DepthWise(d, d, 512, stride=2),  # 7
            Residual(d, blocks[3], 256),
        )
        self.conv_sep = ConvBlock(d, 512)
        self.features = Embedding(num_features, dropout)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):
        with half_precision(images, self.fp16):
            x = self.layers(images)
        with full_precision(x):
            return self.features(self.conv_sep(x.float()))
