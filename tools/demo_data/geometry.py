"""The head in space: smooth curves on its surface, turned and projected to the image plane, in millimetres."""

import functools
import math

import numpy as np

# Eyes, nose tip and mouth corners of an aligned 112×112 face (left in the image first).
STANDARD_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.729904, 92.2041]]
)
DEPTH = 92.0  # mm from the head's axis to its front


@functools.cache
def _spline_weights(steps):
    """Catmull-Rom weights [4, steps] of four neighbours at `steps` positions between the middle two."""
    t = np.arange(steps) / steps
    return 0.5 * np.stack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3])


def smooth(points, closed=False, steps=6):
    """Catmull-Rom spline through `points` [..., n, 2], sampled `steps` times per segment -> [..., m, 2]."""
    p = np.asarray(points, float)
    first, last = (p[..., -1:, :], p[..., :2, :]) if closed else (p[..., :1, :], p[..., -1:, :])
    p = np.concatenate([first, p, last], axis=-2)
    segments = p.shape[-2] - 3
    weights = _spline_weights(steps)[..., None]
    curve = sum(p[..., i : i + segments, None, :] * weights[i] for i in range(4))  # [..., segments, steps, 2]
    curve = curve.reshape(*p.shape[:-2], segments * steps, 2)
    return curve if closed else np.concatenate([curve, last], axis=-2)


def similarity(source, target):
    """Least-squares rotation, uniform scale and shift that takes `source` [n, 2] to `target` [n, 2] -> [2, 3]."""
    s, t = (np.asarray(p, float) @ np.array([1, 1j]) for p in (source, target))
    centre_s, centre_t = s.mean(), t.mean()
    a = np.vdot(s - centre_s, t - centre_t) / np.vdot(s - centre_s, s - centre_s).real
    b = centre_t - a * centre_s
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def apply(matrix, points):
    """Affine `matrix` [2, 3] on `points` [n, 2]."""
    return points @ matrix[:, :2].T + matrix[:, 2]


class Head:
    """An ellipsoid of the identity's width, turned and seen by a camera.

    `yaw` > 0 turns the face to the image's right, `pitch` > 0 upwards (radians); `distance` of the camera, in mm, sets
    the perspective.
    """

    def __init__(self, traits, yaw, pitch, distance):
        self.half_width = traits.face_width + 5.0
        self.sin_yaw, self.cos_yaw = math.sin(yaw), math.cos(yaw)
        self.sin_pitch, self.cos_pitch = math.sin(pitch), math.cos(pitch)
        self.distance = distance

    def depth(self, points):
        """Distance of surface points [..., 2] from the head's axis, towards the viewer -> [...]."""
        x, y = points[..., 0] * (1 / self.half_width), (points[..., 1] - 5.0) * (1 / 121.0)
        return DEPTH * np.sqrt(np.maximum(1.0 - x * x - y * y, 0.03))

    def project(self, points, lift=0.0):
        """Points [..., 2] on the surface, raised by `lift` mm (number or [...]) -> points in the image plane, mm."""
        points = np.asarray(points, float)
        x, y, z = points[..., 0], points[..., 1], self.depth(points) + lift
        x, z = x * self.cos_yaw + z * self.sin_yaw, z * self.cos_yaw - x * self.sin_yaw
        y, z = y * self.cos_pitch - z * self.sin_pitch, z * self.cos_pitch + y * self.sin_pitch
        scale = self.distance / (self.distance + DEPTH - z)
        image = np.empty(points.shape)
        image[..., 0], image[..., 1] = x * scale, y * scale
        return image


def face_outline(t):
    """The face's contour over chin and crown -> [m, 2], closed."""
    right = [
        (0.42 * t.temple_width, t.crown_y + 8),
        (0.86 * t.temple_width, -72),
        (t.temple_width, -36),
        (t.face_width, 8),
        (0.96 * t.face_width, 38),
        (t.jaw_width, t.jaw_y),
        (0.5 * (t.jaw_width + t.chin_width) - 3, 0.5 * (t.jaw_y + t.chin_y) + 5),
        (t.chin_width, t.chin_y - 5),
    ]
    left = [(-x, y) for x, y in reversed(right)]
    return smooth([(0, t.crown_y), *right, (0, t.chin_y), *left], closed=True, steps=5)


def eye(t, side, openness, gaze):
    """One eye's curves on the head -> dict of [n, 2]: upper, lower, crease, bag, iris, pupil, glint.

    `side` is 1 or -1 (x > 0, x < 0), `openness` scales the lids (0 closed), `gaze` (dx, dy) moves the iris in mm.
    """
    u = np.linspace(-1, 1, 15)  # -1 the inner corner, 1 the outer
    bend = u - 0.35 * t.eye_peak * (1 - u * u)
    upper = -t.eye_open * openness * 1.15 * (1 - bend * bend) ** 0.8
    lower = t.eye_open * (0.25 + 0.55 * openness) * (1 - u * u)
    x = u * t.eye_width
    angle = -math.radians(t.eye_tilt)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    def place(px, py):
        local = np.stack([px, py], axis=1) @ turn.T
        return local * (side, 1) + (side * t.eye_spacing, 0)

    def disc(radius, squeeze=1.0):
        phi = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        px = side * gaze[0] + radius * squeeze * np.cos(phi)
        py = np.clip(gaze[1] - 0.6 + radius * np.sin(phi), np.interp(px, x, upper), np.interp(px, x, lower))
        return place(px, py)

    crease = upper - t.lid_crease * (0.5 + 0.5 * (1 - u * u))
    return {
        "upper": place(x, upper),
        "lower": place(x, lower),
        "crease": place(x, crease)[2:-1],
        "bag": place(x, lower + 4.5)[3:-2],
        "iris": disc(t.iris_radius),
        "pupil": disc(0.42 * t.iris_radius),
        "glint": place(np.array([side * (gaze[0] - 1.8)]), np.array([min(gaze[1], 0.0) - 2.2])),
    }


def brow(t, side, raised):
    """One brow's outline -> [m, 2], closed; `raised` in mm."""
    u = np.linspace(0, 1, 9)
    x = t.brow_gap - 2 + u * t.brow_length
    tilt = math.tan(math.radians(t.brow_tilt))
    y = t.brow_y - raised - t.brow_arch * np.sin(np.pi * u**1.25) - tilt * (u - 0.3) * t.brow_length * 0.6
    half = 0.5 * t.brow_thickness * (0.75 + 0.5 * u) * np.where(u > 0.55, (1.02 - u) / 0.47, 1.0)
    edge = np.concatenate([np.stack([x, y - half], 1), np.stack([x, y + half], 1)[::-1]])
    return edge * (side, 1)


def mouth(t, smile, opening):
    """The mouth's curves -> dict of [n, 2]: corners (left, right), upper and lower lip, gap, teeth, and its middle.

    `smile` is -1 .. 1, `opening` the gap between the lips in mm.
    """
    half = t.mouth_width * (1 + 0.16 * smile) - 0.2 * opening
    u = np.linspace(-1, 1, 17)
    corner = t.mouth_tilt + 3.2 * smile  # mm above the middle of the mouth line
    line = t.mouth_y - corner * np.abs(u) ** 1.6 + 0.35 * t.lip_bow * np.exp(-((u / 0.16) ** 2))
    swell = 1 - u * u
    thin = 1 - 0.2 * max(smile, 0)
    bow = t.lip_bow * (np.exp(-(((np.abs(u) - 0.24) / 0.2) ** 2)) - 0.7 * np.exp(-((u / 0.12) ** 2)))
    gap = opening * swell
    top = line - 0.3 * gap
    bottom = line + 0.7 * gap
    x = u * half
    upper = top - thin * t.lip_upper * swell**0.75 - bow * swell
    lower = bottom + thin * t.lip_lower * swell**0.6
    teeth = np.minimum(top + 0.55 * gap, bottom)

    def between(a, b):
        return np.concatenate([np.stack([x, a], 1), np.stack([x, b], 1)[::-1]])

    return {
        "corners": np.array([[-half, line[0]], [half, line[-1]]]),
        "upper": between(upper, top),
        "lower": between(bottom, lower),
        "gap": between(top, bottom),
        "teeth": between(top, teeth),
        "line": np.stack([x, top], 1),
        "shine": np.stack([x, 0.6 * bottom + 0.4 * lower], 1)[5:12],
        "below": np.stack([x, lower + 3.0], 1)[4:13],
    }


def hair(t, volume, length):
    """The hair in front of the head -> (outline [m, 2] closed, lower edge [k, 2], crown point [2])."""
    w, top = t.face_width, t.crown_y - volume
    sideburn = max(min(length, 118.0), -6.0)
    out = w + 0.45 * volume + (3 if sideburn > 30 else 0)
    inner = w - 3.5 - (4.0 if sideburn > 30 else 0.0)
    edge = [
        (0.97 * inner, -18),
        (0.9 * t.temple_width, -40),
        (0.66 * t.temple_width, -0.8 * t.hairline - t.hair_recede),
        (0.36 * t.temple_width, -t.hairline - 0.5 * t.hair_recede),
    ]
    right = [(inner + 1, sideburn), (inner, 0.4 * sideburn), *edge]
    peak = (0.5 * t.hair_part, -t.hairline + t.hair_peak)
    lower = smooth([*right, peak, *[(-x, y) for x, y in reversed(right)]], steps=4)
    dome = [
        (-out, sideburn),
        (-out, min(0.3 * sideburn, 0.0)),
        (-0.98 * out, -45),
        (-0.84 * out, 0.74 * top),
        (-0.48 * out, 0.95 * top),
        (0.0, top),
    ]
    dome += [(-x, y) for x, y in reversed(dome[:-1])]
    outer = smooth(dome, steps=4)
    if t.hair_wave > 0.5:
        outer = outer * (1 + 0.012 * t.hair_wave * np.sin(np.arange(len(outer)) * 1.9))[:, None]
    return np.concatenate([outer, lower]), lower, np.array([t.hair_part, 0.88 * top])
