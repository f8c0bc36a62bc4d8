"""A person as a vector: about seventy independent normal draws that set continuous traits of the face."""

from types import SimpleNamespace

import numpy as np

# name: (mean, standard deviation, weight of `sex`, weight of `age`). Lengths are in millimetres on a human head, with
# the origin between the pupils, x to the image's right, y down. The weights say how far sex (> 0: masculine) and age
# (> 0: older) shift a trait, in its own standard deviations, so that faces are plausible as a whole. Means and spreads
# follow common anthropometric tables, somewhat exaggerated.
TRAITS = {
    # head
    "face_width": (67.0, 4.0, 0.3, 0.2),
    "temple_width": (62.0, 3.2, 0.1, 0.0),
    "jaw_width": (53.0, 5.0, 0.5, 0.3),
    "jaw_y": (68.0, 5.0, 0.1, 0.2),
    "chin_width": (22.0, 5.0, 0.4, 0.1),
    "chin_y": (111.0, 6.5, 0.3, 0.0),
    "crown_y": (-108.0, 6.0, 0.0, 0.0),
    "ear_length": (30.0, 4.0, 0.2, 0.3),
    "ear_out": (4.0, 3.0, 0.1, 0.1),
    # eyes
    "eye_spacing": (31.5, 2.0, 0.1, 0.0),
    "eye_width": (14.8, 1.5, -0.1, 0.0),
    "eye_open": (5.6, 1.2, -0.3, -0.3),
    "eye_tilt": (3.0, 4.0, -0.2, -0.3),  # degrees, outer corner up
    "eye_peak": (0.0, 0.3, 0.0, 0.0),  # where the upper lid is highest: -1 inner corner, 1 outer corner
    "iris_radius": (6.1, 0.55, 0.0, 0.0),
    "iris_melanin": (0.55, 0.3, 0.0, 0.0),
    "iris_green": (0.3, 0.4, 0.0, 0.0),
    "lid_crease": (4.2, 1.5, -0.2, 0.2),
    "lash": (0.5, 0.3, -0.6, 0.0),
    "socket": (0.3, 0.25, 0.2, 0.5),  # darkness around the eye
    "eye_bag": (0.1, 0.25, 0.0, 0.6),
    # brows
    "brow_y": (-18.5, 2.6, 0.4, 0.0),
    "brow_thickness": (4.3, 1.3, 0.5, 0.0),
    "brow_arch": (3.2, 1.9, -0.4, 0.0),
    "brow_tilt": (2.0, 4.5, 0.0, -0.2),  # degrees, outer end up
    "brow_length": (38.0, 4.0, 0.0, 0.0),
    "brow_gap": (12.0, 2.8, -0.2, 0.0),  # inner end, from the middle
    "brow_density": (0.75, 0.2, 0.2, -0.2),
    # nose
    "nose_y": (37.0, 3.4, 0.1, 0.1),
    "nose_width": (17.0, 2.7, 0.3, 0.2),
    "nose_bridge": (6.5, 1.7, 0.2, 0.0),
    "nose_tip": (7.5, 1.7, 0.2, 0.2),
    "nose_depth": (20.0, 4.5, 0.2, 0.1),
    "nose_hump": (0.3, 0.3, 0.2, 0.2),
    "nostril": (3.0, 0.8, 0.0, 0.0),
    # mouth
    "mouth_y": (72.0, 3.4, 0.1, 0.1),
    "mouth_width": (25.0, 3.0, 0.1, 0.0),
    "lip_upper": (5.6, 1.8, -0.3, -0.3),
    "lip_lower": (8.0, 2.1, -0.3, -0.2),
    "lip_bow": (1.8, 1.0, -0.1, -0.1),
    "lip_red": (0.5, 0.28, -0.4, -0.1),
    "mouth_tilt": (0.0, 1.6, 0.0, -0.3),  # mm by which the corners lie above the middle
    "philtrum": (0.4, 0.25, 0.0, 0.0),
    # skin
    "melanin": (0.42, 0.28, 0.0, 0.0),  # 0 fair .. 1 dark
    "redness": (0.0, 1.0, 0.0, 0.1),
    "blush": (0.35, 0.25, -0.3, 0.0),
    "freckles": (-0.1, 0.7, 0.0, 0.0),
    "fold": (0.25, 0.25, 0.1, 0.6),  # nasolabial fold
    "wrinkles": (-0.3, 0.4, 0.0, 0.7),
    "cheekbone": (0.4, 0.35, 0.0, 0.0),
    "cleft": (-0.2, 0.45, 0.2, 0.0),  # chin
    # hair
    "hair_melanin": (0.58, 0.42, 0.0, 0.0),  # 0 blond .. 1 black
    "hair_red": (0.25, 0.45, 0.0, 0.0),
    "hair_grey": (-0.25, 0.5, 0.0, 0.9),
    "hairline": (62.0, 8.0, 0.0, 0.3),
    "hair_peak": (1.0, 5.0, 0.0, 0.0),
    "hair_recede": (4.0, 7.0, 0.5, 0.5),
    "hair_volume": (13.0, 5.5, -0.3, -0.3),
    "hair_length": (38.0, 55.0, -0.9, 0.0),  # y at which the side locks end
    "hair_wave": (0.9, 1.0, -0.1, 0.0),
    "hair_part": (0.0, 24.0, 0.0, 0.0),
    "stubble": (-0.15, 0.45, 0.9, 0.0),
    "beard": (-0.35, 0.75, 0.8, 0.2),
    "moustache": (-0.3, 0.75, 0.8, 0.2),
    # three moles: position, and size (none when negative)
    "mole0_x": (-28.0, 12.0, 0.0, 0.0),
    "mole0_y": (45.0, 22.0, 0.0, 0.0),
    "mole0_size": (0.2, 1.0, 0.0, 0.0),
    "mole1_x": (28.0, 12.0, 0.0, 0.0),
    "mole1_y": (50.0, 22.0, 0.0, 0.0),
    "mole1_size": (0.0, 1.0, 0.0, 0.0),
    "mole2_x": (0.0, 26.0, 0.0, 0.0),
    "mole2_y": (-38.0, 9.0, 0.0, 0.0),
    "mole2_size": (-0.4, 1.0, 0.0, 0.0),
}
# Limits that values are clipped to.
BOUNDS = {
    "eye_open": (3.4, 9.0),
    "lid_crease": (1.5, 9.0),
    "lip_upper": (2.2, 12.0),
    "lip_lower": (3.5, 14.0),
    "brow_thickness": (1.8, 8.5),
    "brow_density": (0.3, 1.0),
    "nostril": (1.2, 5.0),
    "nose_bridge": (3.0, 12.0),
    "hair_recede": (0.0, 16.0),
    "hair_volume": (2.0, 30.0),
    "hair_length": (-8.0, 130.0),
    "hair_wave": (0.0, 3.5),
    "hairline": (42.0, 84.0),
    "chin_width": (10.0, 36.0),
    "ear_out": (-2.0, 12.0),
    "eye_peak": (-0.7, 0.7),
    "iris_melanin": (0.0, 1.0),
    "iris_green": (0.0, 1.0),
    "melanin": (0.0, 1.0),
    "hair_melanin": (0.0, 1.0),
    "hair_red": (0.0, 1.0),
    "hair_grey": (0.0, 0.95),
    "lip_red": (0.0, 1.0),
    "lash": (0.0, 1.2),
    "socket": (0.0, 1.0),
    "eye_bag": (0.0, 1.0),
    "nose_hump": (0.0, 1.0),
    "philtrum": (0.0, 1.0),
    "blush": (0.0, 1.0),
    "freckles": (0.0, 1.0),
    "fold": (0.0, 1.0),
    "wrinkles": (0.0, 1.0),
    "cleft": (0.0, 1.0),
    "cheekbone": (0.0, 1.0),
    "stubble": (0.0, 0.6),
    "beard": (0.0, 0.95),
    "moustache": (0.0, 0.95),
    "nose_depth": (10.0, 34.0),
    "redness": (-1.8, 1.8),
}
SPREAD = 0.62  # of people around the mean face: 1 is the table above, less makes them more alike
DIMENSIONS = 2 + len(TRAITS)


def draw_identity(rng):
    """A new person: float64 [DIMENSIONS] of standard normal draws, clipped at ±2.2 to keep faces plausible."""
    return np.clip(rng.standard_normal(DIMENSIONS), -2.2, 2.2)


def traits(vector):
    """The vector's traits by name, in the units of `TRAITS` (a namespace of floats).

    The melanin of hair and eyes depends on the skin's, so dark skin mostly comes with dark hair and eyes.
    """
    if np.shape(vector) != (DIMENSIONS,):
        raise ValueError(f"an identity must have shape ({DIMENSIONS},), not {np.shape(vector)}")
    sex, age = vector[:2]
    values = {
        name: mean + SPREAD * sd * (z + sex_weight * sex + age_weight * age)
        for z, (name, (mean, sd, sex_weight, age_weight)) in zip(vector[2:], TRAITS.items())
    }
    values["hair_melanin"] += 0.7 * (values["melanin"] - 0.35)
    values["iris_melanin"] += 0.7 * (values["melanin"] - 0.35)
    for name, (low, high) in BOUNDS.items():
        values[name] = min(max(values[name], low), high)
    return SimpleNamespace(**{name: float(value) for name, value in values.items()})
