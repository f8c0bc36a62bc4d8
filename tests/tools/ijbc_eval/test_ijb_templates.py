import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.ijbc_eval.files import EvalError
from tools.ijbc_eval.templates import Setting, template_features


def random_faces(rng, images=40, templates=6, media=3, width=5):
    template = np.concatenate([np.arange(templates), rng.integers(0, templates, images - templates)])
    medium = np.unique(template * media + rng.integers(0, media, images), return_inverse=True)[1]
    faces = types.SimpleNamespace(
        image=np.arange(images),
        template=template,
        medium=medium,
        template_ids=np.arange(templates),
        scores=rng.uniform(0.2, 1, images).astype(np.float32),
    )
    embs = rng.normal(size=(2, images, width)).astype(np.float32)
    return faces, embs[0], embs[1]


def by_loops(embs, embs_f, faces, setting, bad):
    features = []
    for template in range(len(faces.template_ids)):
        total = np.zeros(embs.shape[1])
        for medium in set(faces.medium[faces.template == template].tolist()):
            chosen = [row for row in range(len(embs)) if faces.medium[row] == medium and not bad[row]]
            parts = []
            for row in chosen:
                part = embs[row].astype(np.float64) + (embs_f[row] if setting.flip else 0)
                part = part / np.linalg.norm(part) if setting.normalise else part
                parts.append(part * faces.scores[row] if setting.detector_score else part)
            total += np.mean(parts, axis=0) if parts else 0
        features.append(total / np.linalg.norm(total))
    return np.array(features)


@pytest.mark.parametrize("setting", Setting.all(), ids=lambda setting: setting.name)
@pytest.mark.parametrize("with_bad", [False, True])
def test_equals_loops(setting, with_bad):
    faces, embs, embs_f = random_faces(np.random.default_rng(1))
    bad = np.zeros(40, bool)
    if with_bad:
        bad[[7, 8, 30]] = True
        embs[bad] = np.nan
    found = template_features(embs, embs_f, faces, setting, bad)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_loops(embs, embs_f, faces, setting, bad), atol=2e-6)


def test_a_long_video_weighs_as_much_as_a_portrait():
    faces = types.SimpleNamespace(
        image=np.arange(11),
        template=np.zeros(11, int),
        medium=np.array([0] * 10 + [1]),
        template_ids=np.array([5]),
        scores=np.ones(11, np.float32),
    )
    embs = np.array([[1.0, 0.0]] * 10 + [[0.0, 1.0]], np.float32)
    found = template_features(embs, embs, faces)
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5]], atol=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_order_of_images_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    faces, embs, embs_f = random_faces(rng)
    expected = template_features(embs, embs_f, faces)
    rows, lines = rng.permutation(40), rng.permutation(40)  # of the images, and of the lines that list them
    place = np.argsort(rows)
    shuffled = types.SimpleNamespace(
        image=place[faces.image][lines],
        template=faces.template[lines],
        medium=faces.medium[lines],
        template_ids=faces.template_ids,
        scores=faces.scores[rows],
    )
    np.testing.assert_allclose(template_features(embs[rows], embs_f[rows], shuffled), expected, atol=2e-6)


@pytest.mark.parametrize("setting", Setting.all(), ids=lambda setting: setting.name)
@pytest.mark.parametrize("factor", [1e-42, 1e-30, 1e-19, 1e17, 1e25])
def test_squares_that_float32_cannot_hold(setting, factor):
    """Of small scores once came "cosines" of 6e9, of large ones zeros."""
    faces, embs, embs_f = random_faces(np.random.default_rng(2))
    expected = template_features(embs, embs_f, faces, setting)
    faces.scores *= np.float32(factor)
    tolerance = 0.02 if factor < 1e-38 else 1e-6  # subnormal scores have three digits
    np.testing.assert_allclose(template_features(embs, embs_f, faces, setting), expected, atol=tolerance)
    faces.scores /= np.float32(factor)
    if factor > 1e-38:
        scaled = np.float32(factor) * embs, np.float32(factor) * embs_f
        np.testing.assert_allclose(template_features(*scaled, faces, setting), expected, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e31])
def test_features_that_are_not_finite_are_refused(value):
    faces, embs, embs_f = random_faces(np.random.default_rng(2))
    faces.template_ids = faces.template_ids + 100
    embs[3, 2] = value
    with pytest.raises(EvalError, match="^template 103: .*not finite, or above 1e[+]30"):
        template_features(embs, embs_f, faces)
    faces, embs, embs_f = random_faces(np.random.default_rng(2))
    faces.scores[3] = min(value, 3e38) if value == value else value
    with pytest.raises(EvalError, match="^template 3: "):
        template_features(embs, embs_f, faces)
