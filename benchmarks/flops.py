"""Floating-point operations that a training step needs, and what a device could do in the same time.

A multiplication and the addition that follows it are two operations. Counted are convolutions, matrix products and
attention, forward and backward, as the model needs them: not what activation checkpointing computes twice, and not
normalisation, activation functions, margins and optimiser, which move memory rather than compute.
"""

import math
import re
import time
import unittest.mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import seconds

PRECISIONS = ("float16", "bfloat16", "TF32", "float32")
# Dense TFLOP/s in each of them by the makers' data sheets: on tensor cores, but float32. The first that fits counts.
PEAK_TFLOPS = {
    "H200 NVL": (835.5, 835.5, 417.5, 60),
    "H200": (989, 989, 494.5, 67),
    "H100 NVL": (835.5, 835.5, 417.5, 60),
    "H100 PCIe": (756, 756, 378, 51),
    "H100": (989, 989, 494.5, 67),
    "A100": (312, 312, 156, 19.5),
    "A40": (149.7, 149.7, 74.8, 37.4),
    "L40S": (362, 362, 183, 91.6),
    "V100-PCIE": (112, None, 14, 14),       # TF32 is float32 there
    "V100": (125, None, 15.7, 15.7),
    "T4": (65, None, 8.1, 8.1),
}
BACKWARD = torch.ops.aten.convolution_backward


def convolution_backward_flops(grad, images, weight, *others, out_shape=None, **_):
    """Of the gradients that are asked for, each a product as large as the forward one. torch's own formula counts a
    grouped convolution's as if it were not grouped. Takes shapes; nothing here is a transposed convolution."""
    wanted = others[-1]     # of images, weight and bias
    product = 2 * math.prod(grad) * math.prod(weight[1:])
    return product * (wanted[0] + wanted[1])


def training_flops(build, shape=(3, 112, 112), rows=2):
    """`(forward, forward and backward)` operations an image of the network that `build()` makes.

    Its input [rows, *shape] needs no gradient, which saves the first layer one of its three products. Nothing is
    computed: the network and its images are on the meta device. At least two rows, for BatchNorm.
    """
    with torch.device("meta"):
        network, images = build().train(), torch.empty(rows, *shape)
    whole = FlopCounterMode(display=False, custom_mapping={BACKWARD: convolution_backward_flops})
    # Without checkpointing: model FLOPs are what has to be computed once.
    with unittest.mock.patch("backbones.common.checkpoint", lambda part, x, **_: part(x)), whole:
        with FlopCounterMode(display=False) as forward:
            output = network(images)
        output.sum().backward()
    return forward.get_total_flops() / rows, whole.get_total_flops() / rows


def classifier_flops(batch, embedding_size, classes):
    """Of cosines [batch, classes] and their two gradients: three products of 2 * batch * embedding_size * classes."""
    return 6 * batch * embedding_size * classes


class StatedPeak:
    """FLOP/s that someone vouches for; called, it gives them."""

    def __init__(self, flops, by):
        self.flops, self.by = flops, by

    @classmethod
    def of(cls, device_name, precision):
        """Of a GPU whose name has one of PEAK_TFLOPS's as its words, or None. precision: one of PRECISIONS."""
        for name, peaks in PEAK_TFLOPS.items():
            peak = peaks[PRECISIONS.index(precision)]
            if re.search(rf"\b{name}\b", device_name):
                return peak and cls(peak * 1e12, f"{name}, {precision}, by the data sheet")
        return None

    def __str__(self):
        return self.by

    def __call__(self):
        return self.flops


class MeasuredPeak:
    """FLOP/s of a torch.matmul of two large square matrices of `dtype` on `device`; a call measures it by `clock`."""

    SIDE = {"cuda": 8192, "cpu": 2048}

    def __init__(self, device, dtype, clock=time.perf_counter):
        self.device, self.dtype, self.clock, self.operands = device, dtype, clock, None
        self.size = self.SIDE[device.type]

    def __str__(self):
        return f"torch.matmul of {self.size} x {self.size} {str(self.dtype).removeprefix('torch.')} in the same rounds"

    def __call__(self):
        """The best of three."""
        if self.operands is None:   # not earlier, for the run's memory is measured before
            shape = (self.size, self.size)
            self.operands = [torch.randn(shape, device=self.device).to(self.dtype) for _ in range(3)]
        a, b, out = self.operands
        spent = min(seconds(lambda: torch.matmul(a, b, out=out), self.device, self.clock) for _ in range(3))
        return 2 * self.size**3 / spent
