"""What varies between images of one person: pose, expression, light, camera, occlusion."""

import dataclasses
import math

import numpy as np

OCCLUDERS = ("", "glasses", "sunglasses", "hand", "block")
OCCLUDER_SHARE = (0.58, 0.18, 0.06, 0.09, 0.09)


@dataclasses.dataclass
class Conditions:
    """One image's conditions; angles in radians, lengths in mm on the head unless noted."""

    yaw: float  # > 0: to the image's right
    pitch: float  # > 0: upwards
    roll: float  # in-plane, of loose crops; alignment removes it
    distance: float  # of the camera
    smile: float  # -1 .. 1
    mouth_open: float
    eye_open: float  # factor on the identity's own
    brow_raise: float
    gaze: tuple
    hair_volume: float  # factor on the identity's own
    hair_length: float  # mm added to the identity's own
    light: tuple  # direction of the light: x, y (image); the rest is towards the viewer
    contrast: float  # 0 flat light .. 1 hard light
    tint: tuple  # factor on blue, green and red
    gamma: float
    exposure: float
    resolution: float  # share of the image width that the camera resolved
    blur: float  # standard deviation in pixels at 112 across
    motion: tuple  # dx, dy of the motion blur, pixels at 112 across
    noise: float  # standard deviation in grey levels
    grain: int  # seed of the noise
    jpeg: int
    occluder: str
    occluder_place: tuple
    scenery: np.ndarray  # [8, 9] random numbers for background, clothes and occluder
    jitter: np.ndarray  # [5, 2] error of the landmark detector, in pixels of the aligned face

    def quality(self):
        """A face detector's score for the image, 0 .. 1; near 1 for a sharp frontal face."""
        soft = self.blur + 0.25 * math.hypot(*self.motion) + 1.2 * max(0.0, 0.9 - self.resolution)
        turned = abs(self.yaw) + 0.7 * abs(self.pitch)
        hidden = {"": 0.0, "glasses": 0.1, "sunglasses": 0.3, "hand": 0.5, "block": 0.5}[self.occluder]
        return float(np.clip(1.05 - 0.16 * soft - 0.35 * turned - 0.3 * hidden - 0.006 * self.noise, 0.05, 1.0))


def draw_conditions(rng, variation=1.0, harm=1.0):
    """New conditions. `variation` scales everything that varies, `harm` scales camera faults on top."""
    n = rng.standard_normal(18) * variation
    u = rng.random(8)
    harm = harm * variation
    angle = 2 * math.pi * u[0]
    resolution = 1.0 if u[1] > 0.5 * harm else 1.0 - 0.62 * (1 - u[1] / (0.5 * harm)) ** 1.2
    return Conditions(
        yaw=float(np.clip(0.28 * n[0], -0.65, 0.65)),
        pitch=float(np.clip(0.14 * n[1], -0.32, 0.32)),
        roll=float(np.clip(0.22 * n[2], -0.7, 0.7)),
        distance=float(500 + 1500 * u[2]),
        smile=float(np.clip(0.25 + 0.45 * n[3], -0.7, 1.0)),
        mouth_open=float(max(0.0, 3.5 * n[4] - 1.0)),
        eye_open=float(np.clip(1 + 0.2 * n[5], 0.35, 1.4)),
        brow_raise=float(1.6 * n[6]),
        gaze=(float(np.clip(1.8 * n[7], -4.5, 4.5)), float(np.clip(0.5 * n[8], -1.2, 1.2))),
        hair_volume=float(np.clip(1 + 0.3 * n[9], 0.4, 1.8)),
        hair_length=float(18 * n[10]),
        light=(float(0.75 * math.cos(angle)), float(0.45 * math.sin(angle) - 0.25)),
        contrast=float(np.clip(0.42 + 0.2 * n[11], 0.05, 0.85)),
        tint=tuple(float(np.clip(1 + 0.07 * k, 0.75, 1.3)) for k in (n[12], 0.4 * n[13], n[14])),
        gamma=float(np.exp(0.22 * n[15])),
        exposure=float(np.clip(1 + 0.2 * n[16], 0.55, 1.45)),
        resolution=float(resolution),
        blur=float(0.3 + harm * max(0.0, 1.5 * u[3] - 0.7)),
        motion=_motion(rng, harm),
        noise=float(1.0 + harm * 7.0 * u[4] ** 2),
        grain=int(rng.integers(2**62)),
        jpeg=int(95 - 55 * min(harm, 1.2) * u[5] ** 1.5),
        occluder=OCCLUDERS[int(np.searchsorted(np.cumsum(OCCLUDER_SHARE)[:-1], rng.random(), side="right"))],
        occluder_place=(float(u[6]), float(u[7])),
        scenery=rng.random((8, 9)),
        jitter=rng.standard_normal((5, 2)) * 1.1 * variation,
    )


def next_frame(rng, before, variation=1.0):
    """The next frame of the same video: same scene and camera, the person moves a little."""
    n = rng.standard_normal(9) * variation
    return dataclasses.replace(
        before,
        yaw=float(np.clip(before.yaw + 0.09 * n[0], -0.65, 0.65)),
        pitch=before.pitch + 0.05 * float(n[1]),
        roll=before.roll + 0.05 * float(n[2]),
        smile=float(np.clip(before.smile + 0.2 * n[3], -0.7, 1.0)),
        mouth_open=float(max(0.0, before.mouth_open + 1.5 * n[4])),
        eye_open=float(np.clip(before.eye_open + 0.12 * n[5], 0.2, 1.4)),
        gaze=(float(np.clip(before.gaze[0] + n[6], -4.5, 4.5)), before.gaze[1]),
        blur=float(max(0.2, before.blur + 0.2 * n[7])),
        motion=_motion(rng, variation),
        grain=int(rng.integers(2**62)),
        jitter=rng.standard_normal((5, 2)) * 1.1 * variation,
    )


def _motion(rng, harm):
    """Motion blur, in one image out of five."""
    chance, length, angle = rng.random(3)
    length = 4.5 * harm * length if chance < 0.2 else 0.0
    return float(length * math.cos(math.pi * angle)), float(length * math.sin(math.pi * angle))
