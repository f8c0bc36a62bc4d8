"""Draws a person under given conditions: from millimetres on the head to pixels of an image (BGR, uint8).

A `Portrait` has the five landmarks; its `paint` takes the 2×3 map from the image plane (mm) to pixels. It draws flat
colour with soft shadows on top; camera faults are added later (`capture`).
"""

import math

import cv2
import numpy as np

from tools.demo_data import geometry
from tools.demo_data.canvas import SUBPIXEL, Canvas, bgr, ellipse, mix, muted, ramp
from tools.demo_data.geometry import Head

SKIN = np.array([[215, 226, 250], [150, 186, 232], [92, 134, 188], [60, 88, 136], [38, 52, 84]], float)  # BGR
HAIR = np.array([[130, 190, 226], [70, 118, 168], [42, 68, 104], [26, 32, 46], [20, 18, 20]], float)
IRIS = np.array([[196, 158, 108], [120, 140, 110], [50, 96, 138], [30, 52, 84], [18, 28, 42]], float)
# Freckles follow a fixed low-discrepancy sequence; people differ in how many show.
_K = np.arange(1, 41)
FRECKLES = np.stack([(_K * 0.618034 % 1 - 0.5) * 84, 8 + (_K * 0.754878 % 1) * 40], axis=1)


class Palette:
    """The identity's colours (BGR)."""

    def __init__(self, t):
        skin = ramp(SKIN, t.melanin)
        self.skin = np.clip(skin * (1 - 0.015 * t.redness, 1 - 0.025 * t.redness, 1 + 0.02 * t.redness), 0, 255)
        self.dark = self.skin * (0.60, 0.62, 0.70)
        hair = mix(ramp(HAIR, t.hair_melanin), (30, 62, 150), 0.75 * t.hair_red * (1 - 0.6 * t.hair_melanin))
        self.hair = mix(hair, (188, 188, 190), t.hair_grey)
        self.iris = mix(ramp(IRIS, t.iris_melanin), (84, 138, 104), 0.6 * t.iris_green * (1 - t.iris_melanin))
        lip = mix(self.skin * (0.72, 0.66, 0.88), (66, 50, 176), 0.55 * t.lip_red)
        self.lip = mix(lip, self.dark, 0.35 * t.melanin)
        self.lip_upper = self.lip * 0.86


class Portrait:
    """A person (`identity.traits`) under `conditions`: `landmarks` [5, 2] in mm, and `paint`."""

    def __init__(self, t, conditions):
        self.t, self.c = t, conditions
        self.head = Head(t, conditions.yaw, conditions.pitch, conditions.distance)
        self.colours = Palette(t)
        self.mouth = geometry.mouth(t, conditions.smile, conditions.mouth_open)
        on = self.head.project
        self.landmarks = np.concatenate(
            [
                on([(-t.eye_spacing, 0.0), (t.eye_spacing, 0.0)]),
                on([(0.0, t.nose_y)], t.nose_depth),
                on(self.mouth["corners"]),
            ]
        )

    def paint(self, matrix, width, height):
        """BGR uint8 [height, width, 3]; `matrix` [2, 3] takes mm of the image plane to pixels."""
        canvas = Canvas(matrix, width, height)
        _background(canvas, self.c.scenery)
        _behind(canvas, self)
        outline = self.head.project(geometry.face_outline(self.t))
        canvas.fill(outline, self.colours.skin)
        _skin(canvas, self)
        _nose(canvas, self)
        _mouth(canvas, self)
        for side in (-1, 1):
            _eye(canvas, self, side)
            canvas.fill(
                self.head.project(geometry.brow(self.t, side, self.c.brow_raise)),
                mix(self.colours.skin, self.colours.hair * 0.8, self.t.brow_density),
            )
        _hair(canvas, self)
        canvas.pixels = _lit(canvas, self)
        _occluder(canvas, self)
        return canvas.pixels


def _background(canvas, scenery):
    """A blurred wall with a few shapes on it, drawn coarsely."""
    low = np.empty((24, 24, 3), np.float32)
    low[:] = muted(scenery[0, :3]) + np.linspace(-1, 1, 24)[:, None, None] * (scenery[0, 3:6] * 60 - 30)
    for row in scenery[1:6]:
        colour, (x, y, a, b) = muted(row[:3]), row[3:7]
        if row[7] < 0.5:
            axes = (1 + int(9 * a), 1 + int(9 * b))
            cv2.ellipse(low, (int(24 * x), int(24 * y)), axes, 180 * row[8], 0, 360, bgr(colour), -1)
        else:
            cv2.rectangle(low, (int(24 * x), int(24 * y)), (int(24 * (x + a)), int(24 * (y + b))), bgr(colour), -1)
    low = cv2.GaussianBlur(low, (0, 0), 0.6 + 1.5 * scenery[0, 6])
    height, width = canvas.pixels.shape[:2]
    canvas.pixels = np.clip(cv2.resize(low, (width, height)), 0, 255).astype(np.uint8)


def _behind(canvas, p):
    """Long hair, neck, shoulders and ears, behind the face."""
    t, project, skin = p.t, p.head.project, p.colours.skin
    length = t.hair_length + p.c.hair_length
    if length > 12:
        wide, top = t.face_width + 0.6 * t.hair_volume * p.c.hair_volume, t.crown_y
        mass = [
            (-0.9 * wide, -40),
            (-wide, 10),
            (-1.04 * wide, length),
            (0, length + 14),
            (1.04 * wide, length),
            (wide, 10),
            (0.9 * wide, -40),
            (0, top),
        ]
        canvas.fill(project(geometry.smooth(mass, closed=True, steps=4), -70), p.colours.hair * 0.62)
    neck = 0.8 * t.jaw_width
    shift = 25 * p.head.sin_yaw
    cloth = muted(p.c.scenery[6, :3])
    body = [(-neck - 95, 300), (-neck - 85, 185), (-neck, 160), (neck, 160), (neck + 85, 185), (neck + 95, 300)]
    canvas.fill(np.array([(-neck, 40), (neck, 40), (neck + 6, 175), (-neck - 6, 175)], float) + (shift, 0), skin * 0.72)
    canvas.fill(np.array(body, float) + (shift, 0), cloth)
    canvas.fill(ellipse(shift, 160, neck * 0.8, 16), skin * 0.78)
    for side in (-1, 1):
        x, turn = t.face_width + 0.5 * t.ear_out, side * 0.12
        ear = ellipse(side * x, 14, 7 + 0.5 * t.ear_out, t.ear_length, turn)
        canvas.fill(project(ear, -38), skin * 0.94)
        inside = ellipse(side * (x + 1), 12, 3.5 + 0.3 * t.ear_out, 0.62 * t.ear_length, turn)
        canvas.stroke(project(inside, -38), p.colours.dark, 1.4)


def _skin(canvas, p):
    """Details of the skin: blush, folds, cheekbones, beard, freckles, moles."""
    t, project, colours = p.t, p.head.project, p.colours
    if t.blush > 0.05:
        cheeks = [project(ellipse(side * 41, 38, 15, 11)) for side in (-1, 1)]
        canvas.blend(cheeks, mix(colours.skin, (92, 80, 214), 0.5), 0.75 * t.blush * (1 - 0.6 * t.melanin), 6)
    for side in (-1, 1):
        canvas.shade(project(ellipse(side * 50, 62, 9, 22, side * 0.5)), -0.30 * t.cheekbone)
        fold = [
            (side * (t.nose_width + 4), t.nose_y - 2),
            (side * (t.mouth_width + 2), t.mouth_y - 14),
            (side * (t.mouth_width + 7), t.mouth_y + 3),
        ]
        depth = -0.06 - 0.35 * t.fold - 0.15 * max(p.c.smile, 0)
        canvas.shade_line(project(geometry.smooth(fold, steps=4)), depth, 3.0)
        if t.fold > 0.35:
            canvas.stroke(project(geometry.smooth(fold, steps=4)), mix(colours.skin, colours.dark, 0.5 * t.fold), 0.8)
    for k in range(3):
        if t.wrinkles > 0.15 * k:
            line = [(-30, -36 - 9 * k), (0, -38.5 - 9 * k), (30, -36 - 9 * k)]
            crease = mix(colours.skin, colours.dark, 0.6 * t.wrinkles)
            canvas.stroke(project(geometry.smooth(line, steps=4)), crease, 0.9)
    _beard(canvas, p)
    for point in FRECKLES[: int(len(FRECKLES) * t.freckles)]:
        canvas.dot(project(point[None])[0], mix(colours.skin, (44, 84, 150), 0.4), 0.9)
    for k in range(3):
        x, y, size = (getattr(t, f"mole{k}_{what}") for what in ("x", "y", "size"))
        if size > 0.1:
            canvas.dot(project(np.array([[x, y]]))[0], mix(colours.dark, (30, 34, 54), 0.6), 0.6 + 0.9 * size)
    canvas.shade(project(ellipse(0, t.chin_y - 9, 0.55 * t.chin_width + 3, 6)), 0.10)
    if t.cleft > 0.05:
        cleft = np.array([(0, t.chin_y - 14), (0, t.chin_y - 5)])
        canvas.stroke(project(cleft), mix(colours.skin, colours.dark, t.cleft), 1.2)


def _beard(canvas, p):
    t, project = p.t, p.head.project
    density = max(t.beard, t.stubble * 0.6)
    hair = p.colours.hair * 0.85
    if density > 0.05:
        right = [(0.99 * t.face_width, 28), (t.jaw_width + 1, t.jaw_y), (t.chin_width + 2, t.chin_y - 3)]
        inner = [
            (0.30 * t.mouth_width, t.mouth_y + 15),
            (t.mouth_width + 5, t.mouth_y + 6),
            (t.mouth_width + 12, t.mouth_y - 10),
            (0.86 * t.face_width, 34),
        ]
        half = [*inner, *right]  # from the middle of the mouth around the cheek to the chin
        loop = [*half, (0, t.chin_y + 2), *[(-x, y) for x, y in reversed(half)]]
        canvas.blend([project(np.array(loop))], hair, density, 2.5)
    if max(t.moustache, t.stubble * 0.6) > 0.05:
        y = 0.5 * (t.nose_y + t.mouth_y) + 5
        end, half = t.mouth_width + 2, 0.5 * t.mouth_width
        loop = [
            (-end, t.mouth_y + 2),
            (-half, y - 2),
            (0, y),
            (half, y - 2),
            (end, t.mouth_y + 2),
            (half, y + 7),
            (0, y + 7),
            (-half, y + 7),
        ]
        canvas.blend([project(np.array(loop))], hair, max(t.moustache, t.stubble * 0.6), 1.3)


def _nose(canvas, p):
    t, project, colours = p.t, p.head.project, p.colours
    side_of_light = 1 if p.c.light[0] > 0 else -1
    bridge = np.array([0.25, 0.55, 1.0])
    for side in (-1, 1):
        lit = -side * side_of_light  # 1: in shadow
        line = [
            (side * (t.nose_bridge + 3), -9),
            (side * t.nose_bridge, 4),
            (side * (t.nose_bridge + t.nose_hump), 0.45 * t.nose_y),
            (side * (t.nose_tip + 1), 0.85 * t.nose_y),
        ]
        lift = np.array([0.0, *(bridge * 0.7 * t.nose_depth)])
        canvas.shade_line(project(np.array(line), lift), -0.28 - 0.16 * lit, 4.5)
        wing = np.array([(0.72, -8), (1.0, 1), (0.78, 7), (0.5, 6)]) * (side * t.nose_width, 1) + (0, t.nose_y)
        canvas.stroke(project(geometry.smooth(wing, steps=4), 6.0), mix(colours.skin, colours.dark, 0.85), 1.5)
        hole = ellipse(side * 0.48 * t.nose_width, t.nose_y + 6, 0.85 * t.nostril + 0.8, 0.5 * t.nostril, side * 0.35)
        canvas.fill(project(hole, 0.45 * t.nose_depth), colours.dark * 0.5)
        if t.nose_hump > 0.2:
            hump = np.array([(0.9 * t.nose_bridge, 6), (0.8 * t.nose_bridge + t.nose_hump, 0.55 * t.nose_y)])
            crease = mix(colours.skin, colours.dark, 0.5 * t.nose_hump)
            canvas.stroke(project(hump * (side, 1), 0.5 * t.nose_depth), crease, 1.0)
    canvas.shade(project(ellipse(0, t.nose_y + 9, 0.9 * t.nose_width, 3.5)), -0.34)
    ridge = np.array([(0, 2), (0, 0.5 * t.nose_y), (0, 0.86 * t.nose_y)], float)
    canvas.shade_line(project(ridge, bridge * t.nose_depth), 0.24, 4.0)
    tip = ellipse(0, t.nose_y - 1, t.nose_tip, 0.8 * t.nose_tip)
    canvas.shade(project(tip, t.nose_depth), 0.20)
    under = ellipse(0, t.nose_y, t.nose_tip, 0.9 * t.nose_tip)[2:11]
    canvas.stroke(project(under, 0.9 * t.nose_depth), mix(colours.skin, colours.dark, 0.55), 1.3)
    if t.philtrum > 0.1:
        for side in (-1, 1):
            line = np.array([(side * 3.2, t.nose_y + 11), (side * 4.2, t.mouth_y - t.lip_upper - 2)])
            canvas.stroke(project(line), mix(colours.skin, colours.dark, 0.45 * t.philtrum), 1.0)


def _mouth(canvas, p):
    project, m, colours = p.head.project, p.mouth, p.colours
    if p.c.mouth_open > 0.6:
        canvas.fill(project(m["gap"], 3), (34, 26, 70))
        canvas.fill(project(m["teeth"], 3), (228, 236, 240))
    canvas.fill(project(m["upper"], 4), colours.lip_upper)
    canvas.fill(project(m["lower"], 4), colours.lip)
    canvas.stroke(project(m["shine"], 5), mix(colours.lip, (255, 255, 255), 0.22), 1.6)
    canvas.stroke(project(m["line"], 3), colours.lip * 0.45, 1.1)
    canvas.shade_line(project(m["below"], 2), -0.30, 4.5)


def _eye(canvas, p, side):
    t, project, colours = p.t, p.head.project, p.colours
    e = geometry.eye(t, side, p.c.eye_open, p.c.gaze)
    socket = ellipse(side * t.eye_spacing, -4, 1.45 * t.eye_width, 11 + t.lid_crease)
    canvas.shade(project(socket), -0.10 - 0.32 * t.socket)
    white = np.concatenate([e["upper"], e["lower"][::-1]])
    canvas.fill(project(white), mix((236, 238, 240), colours.skin, 0.12))
    canvas.fill(project(e["iris"], 1), colours.iris)
    canvas.stroke(project(e["iris"], 1), colours.iris * 0.45, 0.8, closed=True)
    canvas.fill(project(e["pupil"], 1), (16, 14, 14))
    if p.c.eye_open > 0.55:
        canvas.dot(project(e["glint"], 1)[0], (250, 250, 250), 1.1)
    canvas.stroke(project(e["lower"]), mix(colours.skin, colours.dark, 0.8), 0.9)
    lash = mix(colours.dark * 0.5, (12, 12, 14), 0.5 + 0.4 * min(t.lash, 1))
    canvas.stroke(project(e["upper"]), lash, 1.2 + 1.6 * t.lash)
    canvas.stroke(project(e["crease"]), mix(colours.skin, colours.dark, 0.75), 1.1)
    if t.eye_bag > 0.05:
        canvas.shade_line(project(e["bag"]), -0.42 * t.eye_bag, 3.0)
        canvas.stroke(project(e["bag"]), mix(colours.skin, colours.dark, 0.55 * t.eye_bag), 0.9)


def _hair(canvas, p):
    """The hair in front: a flat shape, strands within it, and its soft shadow on the skin."""
    t, project, colour = p.t, p.head.project, p.colours.hair
    outline, lower, crown = geometry.hair(t, t.hair_volume * p.c.hair_volume, t.hair_length + p.c.hair_length)
    canvas.shade_line(project(lower), -0.30, 6.0)
    shape = project(outline, 4)
    canvas.fill(shape, colour)
    inside = np.zeros(canvas.pixels.shape[:2], np.uint8)
    cv2.fillPoly(inside, [canvas.fixed(shape)], 255, cv2.LINE_8, SUBPIXEL)
    bald = canvas.pixels
    canvas.pixels = canvas.pixels.copy()
    roots = lower[::2, None]  # [strands, 1, 2]
    along = np.array([0.08, 0.38, 0.7, 1.02])
    strands = crown + (roots * (1.1, 1.0) - crown) * along[:, None]  # [strands, 4, 2]
    strands[..., 0] *= 1 + 0.35 * np.sin(np.pi * along)  # they follow the skull
    strands[..., 0] += t.hair_wave * 1.8 * np.sin(1.3 * np.arange(len(roots))[:, None] + 2.1 * np.arange(4))
    for k, strand in enumerate(project(geometry.smooth(strands, steps=4), 5)):
        canvas.stroke(strand, colour * (0.84, 1.14)[k % 2] + 5 * (k % 2), 2.2)
    canvas.pixels = cv2.copyTo(canvas.pixels, inside, bald)


def _lit(canvas, p):
    """The lit image: the head's curvature and the soft shadows as one factor per pixel."""
    height, width = canvas.pixels.shape[:2]
    rows, columns = canvas.soft.shape
    inverse = cv2.invertAffineTransform(canvas.matrix)
    x = np.arange(columns)[None] * Canvas.SOFT
    y = np.arange(rows)[:, None] * Canvas.SOFT
    px = (inverse[0, 0] * x + inverse[0, 1] * y + inverse[0, 2] - 35 * p.head.sin_yaw) / (1.35 * p.head.half_width)
    py = (inverse[1, 0] * x + inverse[1, 1] * y + inverse[1, 2] - 5) / 165.0
    lx, ly = p.c.light
    depth = np.sqrt(np.clip(1 - px * px - py * py, 0.04, 1))
    lit = np.clip(px * lx + py * ly + depth * math.sqrt(max(0.05, 1 - lx * lx - ly * ly)), 0, None)
    factor = (1.0 - p.c.contrast) + p.c.contrast * 1.25 * lit
    soft = cv2.GaussianBlur(canvas.soft, (0, 0), max(0.6, 2.1 * canvas.scale / Canvas.SOFT))
    factor = (factor * soft * (1 / 128)).astype(np.float32)
    size = (columns * Canvas.SOFT, rows * Canvas.SOFT)
    factor = cv2.resize(factor, size, interpolation=cv2.INTER_LINEAR)[:height, :width]
    return cv2.multiply(canvas.pixels, cv2.merge([factor] * 3), dtype=cv2.CV_8U)


def _occluder(canvas, p):
    """Glasses, a hand or an object in front of the face; not part of the identity."""
    t, c, project = p.t, p.c, p.head.project
    look = c.scenery[7]
    if c.occluder in ("glasses", "sunglasses"):
        colour = look[:3] * 120
        for side in (-1, 1):
            square = 0.7 + 0.3 * look[3]
            frame = ellipse(side * (t.eye_spacing + 1), 3, 22 + 4 * look[4], 15 + 4 * look[5])
            frame = (frame - frame.mean(0)) * (1, square) + frame.mean(0)
            if c.occluder == "sunglasses":
                canvas.fill(project(frame, 10), colour * 0.4 + 8)
            canvas.stroke(project(frame, 10), colour, 1.6 + 1.4 * look[6], closed=True)
            arm = np.array([(side * (t.eye_spacing + 24), -2), (side * (t.face_width + 4), -4)], float)
            canvas.stroke(project(arm, np.array([6, -20])), colour, 2.0)
        canvas.stroke(project(np.array([(-9, 0), (0, -3), (9, 0)], float), 14), colour, 2.2)
    elif c.occluder == "hand":
        x, y = (-1 if c.occluder_place[0] < 0.5 else 1) * 42, 62 + 50 * c.occluder_place[1]
        for k in range(4):
            finger = ellipse(x + 11 * k - 16, y + 4 * abs(k - 1), 7, 34, 0.15 * (k - 1.5))
            canvas.fill(finger, p.colours.skin * (0.82 + 0.04 * k) * (1 - 0.3 * c.contrast))
        canvas.fill(ellipse(x, y + 44, 30, 30), p.colours.skin * 0.86 * (1 - 0.3 * c.contrast))
    elif c.occluder == "block":
        x, y = 120 * c.occluder_place[0] - 60, -60 + 170 * c.occluder_place[1]
        box = ellipse(x, y, 16 + 18 * look[3], 14 + 16 * look[4], 3 * look[5], n=4 if look[6] < 0.6 else 20)
        canvas.fill(box, look[:3] * 220 + 15)
