import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.ijbc_eval.align import REFERENCE, align, misfit, similarity_matrices


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 9),
    spread=st.sampled_from([0.1, 5.0, 60.0]),
    mirrored=st.booleans(),
)
def test_equals_umeyama_by_singular_values(plain_class, seed, count, spread, mirrored):
    rng = np.random.default_rng(seed)
    landmarks = REFERENCE * rng.uniform(0.3, 4) + rng.normal(0, spread, (count, 5, 2)) + rng.uniform(-100, 100, 2)
    if mirrored:  # the best fit would be a reflection, which a similarity must not be
        landmarks[..., 0] *= -1
    expected = np.stack([plain_class.umeyama(points) for points in landmarks])
    np.testing.assert_allclose(similarity_matrices(landmarks), expected, rtol=1e-7, atol=1e-7)


def test_carries_a_transformed_reference_back():
    turn = 1.7 * np.array([[np.cos(0.6), -np.sin(0.6)], [np.sin(0.6), np.cos(0.6)]])
    landmarks = REFERENCE @ turn.T + [30, -12]
    matrix = similarity_matrices(landmarks[None])[0]
    np.testing.assert_allclose(landmarks @ matrix[:, :2].T + matrix[:, 2], REFERENCE, atol=1e-9)


def test_coinciding_points_have_no_solution():
    assert np.isnan(similarity_matrices(np.full((1, 5, 2), 3.0))).all()


def test_misfit_tells_a_face_from_points_in_another_order():
    rng = np.random.default_rng(0)
    landmarks = 0.4 * REFERENCE + rng.normal(0, 1, (200, 5, 2)) + [30, -12]
    matrices = similarity_matrices(landmarks)
    moved = landmarks @ matrices[:, :, :2].transpose(0, 2, 1) + matrices[:, None, :, 2]
    expected = np.sqrt(((moved - REFERENCE) ** 2).sum(axis=2).mean(axis=1))
    np.testing.assert_allclose(misfit(landmarks), expected, rtol=1e-9)
    assert 2 < expected.mean() < 3 and expected.max() < 6
    for order in ([1, 0, 2, 4, 3], [1, 0, 2, 3, 4], [2, 0, 1, 3, 4], [3, 4, 2, 0, 1]):
        assert misfit(landmarks[:, order]).min() > 12
    assert np.isinf(misfit(landmarks[:, ::-1])).all()  # as a face it fits, but upside down


def test_misfit_of_a_turned_face():
    turns = np.radians([-90, -65, -55, 0, 55, 65, 90, 180])
    turned = np.stack([REFERENCE @ [[np.cos(one), np.sin(one)], [-np.sin(one), np.cos(one)]] for one in turns])
    assert np.isinf(misfit(turned)).tolist() == [True, True, False, False, False, True, True, True]


def test_warp_is_bilinear_with_black_outside():
    image = np.random.default_rng(0).integers(1, 255, (90, 120, 3)).astype(np.uint8)
    matrix = np.array([[1.0, 0.0, 10.0], [0.0, 1.0, 20.0]])
    aligned = align(image, matrix)
    assert aligned.shape == (112, 112, 3)
    np.testing.assert_array_equal(aligned[20:110, 10:], image[:90, :102])
    assert not aligned[:20].any() and not aligned[:, :10].any() and not aligned[110:].any()
    half = align(image, np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]))
    mean = (image[:90, :111].astype(float) + image[:90, 1:112]) / 2
    assert np.abs(half[:90, 1:] - mean).max() <= 1
