"""Drawing: anti-aliased shapes in millimetres, soft shadows, colours (BGR, 0 .. 255)."""

import math

import cv2
import numpy as np

SUBPIXEL = 4  # OpenCV takes coordinates in 1/16 pixel


def mix(a, b, share):
    """Colour between a (share 0) and b (share 1)."""
    return (1 - share) * np.asarray(a, float) + share * np.asarray(b, float)


def ramp(table, position):
    """Colour at `position` 0 .. 1 of a table of evenly spaced colours."""
    k = min(int(position * (len(table) - 1)), len(table) - 2)
    return mix(table[k], table[k + 1], position * (len(table) - 1) - k)


def muted(share):
    """A mostly grey colour for walls and clothes, from three numbers 0 .. 1."""
    return 30 + 205 * mix(np.full(3, share.mean()), share, 0.45)


def ellipse(x, y, a, b, turn=0.0, n=24):
    """Outline [n, 2] of an ellipse with half axes a, b, turned by `turn` radians."""
    phi = np.arange(n) * (2 * np.pi / n)
    cos, sin = math.cos(turn), math.sin(turn)
    across, down = a * np.cos(phi), b * np.sin(phi)
    points = np.empty((n, 2))
    points[:, 0], points[:, 1] = x + cos * across - sin * down, y + sin * across + cos * down
    return points


class Canvas:
    """Pixels under a 2×3 map from mm, with a coarse grey layer for soft shadows (128 = neutral)."""

    SOFT = 4  # image pixels per pixel of the shadow layer

    def __init__(self, matrix, width, height):
        self.matrix, self.scale = matrix, math.hypot(matrix[0, 0], matrix[1, 0])
        self.pixels = np.zeros((height, width, 3), np.uint8)
        self.soft = np.full((height // self.SOFT + 1, width // self.SOFT + 1), 128, np.uint8)

    def fixed(self, points, divide=1):
        """`points` [n, 2] as fixed-point pixels for OpenCV's drawing calls, for a layer `divide` times coarser."""
        factor = 2**SUBPIXEL / divide
        return np.rint(points @ (self.matrix[:, :2].T * factor) + self.matrix[:, 2] * factor).astype(np.int32)

    def fill(self, points, colour):
        cv2.fillPoly(self.pixels, [self.fixed(points)], bgr(colour), cv2.LINE_AA, SUBPIXEL)

    def stroke(self, points, colour, width, closed=False):
        """A line `width` mm thick, at least one pixel."""
        thick = max(1, round(width * self.scale))
        cv2.polylines(self.pixels, [self.fixed(points)], closed, bgr(colour), thick, cv2.LINE_AA, SUBPIXEL)

    def dot(self, point, colour, radius):
        centre = self.fixed(np.reshape(point, (1, 2)))[0]
        fixed_radius = max(4, round(radius * self.scale * 2**SUBPIXEL))
        cv2.circle(self.pixels, tuple(map(int, centre)), fixed_radius, bgr(colour), -1, cv2.LINE_AA, SUBPIXEL)

    def shade(self, points, amount):
        """Darken (amount < 0) or lighten softly; 1 would double the brightness, -1 is black."""
        value = int(np.clip(128 * (1 + amount), 0, 255))
        cv2.fillPoly(self.soft, [self.fixed(points, self.SOFT)], value, cv2.LINE_AA, SUBPIXEL)

    def shade_line(self, points, amount, width):
        value = int(np.clip(128 * (1 + amount), 0, 255))
        thick = max(1, round(width * self.scale / self.SOFT))
        cv2.polylines(self.soft, [self.fixed(points, self.SOFT)], False, value, thick, cv2.LINE_AA, SUBPIXEL)

    def blend(self, points_list, colour, share, soften):
        """Fill polygons with a soft edge of `soften` mm; `share` is the opacity inside."""
        mask = np.zeros(self.soft.shape, np.uint8)
        for points in points_list:
            cv2.fillPoly(mask, [self.fixed(points, self.SOFT)], int(255 * share), cv2.LINE_AA, SUBPIXEL)
        mask = cv2.GaussianBlur(mask, (0, 0), max(0.5, soften * self.scale / self.SOFT))
        height, width = self.pixels.shape[:2]
        size = (mask.shape[1] * self.SOFT, mask.shape[0] * self.SOFT)
        weight = cv2.resize(mask, size, interpolation=cv2.INTER_LINEAR)[:height, :width]
        paint = np.empty_like(self.pixels)
        paint[:] = bgr(colour)
        weight = cv2.merge([weight] * 3)
        self.pixels = cv2.add(
            cv2.multiply(paint, weight, scale=1 / 255),
            cv2.multiply(self.pixels, cv2.bitwise_not(weight), scale=1 / 255),
        )


def bgr(colour):
    """A colour for OpenCV's drawing calls."""
    blue, green, red = colour
    return min(max(float(blue), 0.0), 255.0), min(max(float(green), 0.0), 255.0), min(max(float(red), 0.0), 255.0)
