"""Maps learned afterwards: planted maps are found, ridge against a plain solve, slerp by its formula, wrong input."""

import json
import math
import shutil

import numpy as np
import pytest

from backbones.model_files import ModelFile
from core.manifest import ManifestError, digest
from old_model import by_class
from old_model.feature_set import save_array
from tools.adapters.adapter import Adapter, AdapterError, load_adapter, slerp, unit
from tools.adapters.fit_adapter import STRENGTHS, fit, main, open_pairs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(by_class, "CHUNK", 64)


def orthonormal(height, width, random):
    """A map [height, width] that keeps the length of rows, or of columns if it is the taller one."""
    left, _, right = np.linalg.svd(random.normal(size=(height, width)), full_matrices=False)
    return left @ right


def draw(count, width, random):
    """Features of any length, not centred, more spread in some directions than in others."""
    rows = (random.normal(size=(count, width)) + 0.3) * np.linspace(0.5, 2, width)
    return rows * random.uniform(0.1, 20, (count, 1))


def run(folder, new, old, *options):
    """The command on two files; returns the Adapter that it has written."""
    for name, rows in (("new", new), ("old", old)):
        save_array(folder / f"{name}_feature.npy", rows, "features", records="both", model=f"of {name}")
    paths = "--new", str(folder / "new_feature.npy"), "--old", str(folder / "old_feature.npy")
    main([*paths, "--out", str(folder / "maps/map.npz"), *options])
    return load_adapter(folder / "maps/map.npz")


# --- what is found ----------------------------------------------------------------------------------------------


def test_a_planted_rotation_is_recovered(tmp_path, capsys):
    random = np.random.default_rng(0)
    new, rotation = draw(400, 12, random), orthonormal(12, 12, random)
    old = new @ rotation * random.uniform(0.1, 20, (400, 1))
    matrix, about = fit("procrustes", new, old)
    np.testing.assert_allclose(matrix, rotation, rtol=0, atol=1e-12)
    assert about == {"rows": 400, "held_out_cosine": 1.0, "strength": None}

    adapter = run(tmp_path, new.astype(np.float32), old.astype(np.float32))
    np.testing.assert_allclose(adapter.matrix, rotation, rtol=0, atol=1e-6)
    mapped = adapter.apply(new.astype(np.float32))
    assert mapped.dtype == np.float32
    np.testing.assert_allclose(mapped, unit(old), rtol=0, atol=1e-6)
    files = {name: str(tmp_path / f"{name}_feature.npy") for name in ("new", "old")}
    models = {"new_model": "of new", "old_model": "of old"}
    assert adapter.statement == {"kind": "procrustes", **files, "new_width": 12, "old_width": 12, **about, **models}
    assert capsys.readouterr().out == (
        f"wrote {tmp_path}/maps/map.npz: procrustes, width 12 to 12, fitted on 400 rows; "
        "mean cosine to old features held out of a first fit: 1.0000\n"
    )


def test_a_narrower_space_is_found_in_a_wider_one():
    random = np.random.default_rng(1)
    new, into = draw(300, 5, random), orthonormal(5, 9, random)
    matrix, about = fit("procrustes", new, new @ into)
    np.testing.assert_allclose(matrix, into, rtol=0, atol=1e-12)
    assert about["held_out_cosine"] == 1


@pytest.mark.parametrize("widths", [(9, 5), (5, 9), (6, 6)])
def test_no_orthogonal_map_has_a_larger_sum_of_inner_products(widths):
    random = np.random.default_rng(2)
    new, old = draw(300, widths[0], random), draw(300, widths[1], random)
    old += draw(300, widths[0], random) @ random.normal(size=widths)  # far from a rotation
    f, g = unit(new), unit(old)
    best, _ = fit("procrustes", new, old)
    inner = best.T @ best if widths[0] > widths[1] else best @ best.T
    np.testing.assert_allclose(inner, np.eye(min(widths)), atol=1e-12)
    reached = (f @ best * g).sum()
    near = [np.linalg.svd(best + 0.02 * random.normal(size=widths), full_matrices=False) for _ in range(50)]
    assert reached > max((f @ (left @ right) * g).sum() for left, _, right in near)


def slowly(new, old, strength):
    """Ridge regression as least squares over rows with the strength's root appended; coordinate by coordinate."""
    f, g = unit(new), unit(old)
    below = math.sqrt(strength * len(f) / f.shape[1]) * np.eye(f.shape[1])
    stacked, targets = np.concatenate([f, below]), np.concatenate([g, np.zeros((f.shape[1], g.shape[1]))])
    return np.stack([np.linalg.lstsq(stacked, column, rcond=None)[0] for column in targets.T], axis=1)


@pytest.mark.parametrize("count, noise", [(60, 1.0), (400, 0.1)])
def test_ridge_against_a_plain_solve_and_its_strength_by_the_held_out_tenth(count, noise):
    random = np.random.default_rng(3)
    new = draw(count, 16, random)
    old = unit(new) @ random.normal(size=(16, 7)) + noise * random.normal(size=(count, 7))
    matrix, about = fit("ridge", new, old)
    first = count - count // 10
    cosines = [
        (unit(unit(new[first:]) @ slowly(new[:first], old[:first], strength)) * unit(old[first:])).sum(axis=1).mean()
        for strength in STRENGTHS
    ]
    assert about["strength"] == STRENGTHS[int(np.argmax(cosines))]
    assert about["held_out_cosine"] == pytest.approx(max(cosines), abs=1e-6)
    np.testing.assert_allclose(matrix, slowly(new, old, about["strength"]), rtol=0, atol=1e-9)


def test_the_strength_follows_the_noise():
    """Few noisy rows want a stronger one than many clean ones."""
    random = np.random.default_rng(4)
    new, planted = draw(2000, 16, random), random.normal(size=(16, 7))
    clean, noisy = unit(new) @ planted, unit(new) @ planted + 2 * random.normal(size=(2000, 7))
    assert fit("ridge", new[:60], noisy[:60])[1]["strength"] > 100 * fit("ridge", new, clean)[1]["strength"]


def test_people_are_held_out_whole(tmp_path, capsys):
    """Few people with many images each, shuffled: what fits the same people is no measure for others."""
    random = np.random.default_rng(11)
    labels = random.permutation(np.repeat(np.arange(60), 20))
    new, old = (draw(60, 24, random)[labels] + 0.05 * random.normal(size=(1200, 24)) for _ in range(2))
    cosine = fit("ridge", new, old, labels)[1]["held_out_cosine"]
    assert fit("ridge", new, old)[1]["held_out_cosine"] > cosine + 0.2
    order = np.argsort(labels, kind="stable")
    assert fit("ridge", new[order], old[order], labels[order])[1]["held_out_cosine"] == pytest.approx(cosine, abs=1e-6)
    assert fit("ridge", new[order], old[order])[1]["held_out_cosine"] == pytest.approx(cosine, abs=1e-6)

    save_array(tmp_path / "new_label.npy", labels, "labels", records="both")
    written = run(tmp_path, new, old, "--kind", "ridge")
    assert written.statement["held_out_cosine"] == pytest.approx(cosine, abs=1e-4) and not capsys.readouterr().err
    shutil.rmtree(tmp_path / "maps")
    save_array(tmp_path / "new_label.npy", labels[1:], "labels", records="both")
    assert "new_label.npy: 1199 rows, but the features have 1200" in refused(tmp_path, new, old, capsys)
    save_array(tmp_path / "new_label.npy", labels, "labels", records="other")
    assert "new_label.npy: made from another record set than" in refused(tmp_path, new, old, capsys)


def test_a_map_that_stretches_is_found_by_ridge_alone():
    random = np.random.default_rng(5)
    new = draw(500, 8, random)
    old = new @ (orthonormal(8, 8, random) * np.geomspace(0.1, 10, 8))
    rotated, regressed = (fit(kind, new, old)[1]["held_out_cosine"] for kind in ("procrustes", "ridge"))
    assert rotated + 0.02 < regressed


def test_images_without_a_feature_are_left_out():
    random = np.random.default_rng(6)
    new, old = draw(300, 6, random), draw(300, 4, random)
    both = np.arange(300) % 3 > 0
    gaps_new, gaps_old = new.copy(), old.copy()
    gaps_new[0::6], gaps_old[3::6] = 0, 0
    matrix, about = fit("ridge", gaps_new, gaps_old)
    expected, of_both = fit("ridge", new[both], old[both])
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-12)
    assert about == of_both and about["rows"] == 200


# --- on the sphere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_slerp_is_its_formula(alpha):
    random = np.random.default_rng(7)
    g, v = unit(random.normal(size=(30, 6))), unit(random.normal(size=(30, 6)))
    between = slerp(5 * g, 0.1 * v, alpha)
    for row, a, b in zip(between, g, v):
        theta = math.acos(a @ b)
        q = (math.sin((1 - alpha) * theta) * a + math.sin(alpha * theta) * b) / math.sin(theta)
        np.testing.assert_allclose(row, q, rtol=0, atol=1e-12)
        assert math.acos(min(row @ a, 1)) == pytest.approx(alpha * theta, abs=1e-7)
    np.testing.assert_allclose(slerp(v, g, 1 - alpha), between, rtol=0, atol=1e-12)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-7, 0.9e-6, 1.1e-6, 1e-3])
def test_slerp_of_rows_that_almost_coincide(angle):
    g, v = np.array([[1.0, 0.0]]), np.array([[math.cos(angle), math.sin(angle)]])
    for alpha in (0.0, 0.25, 0.5, 1.0):
        expected = [[math.cos(alpha * angle), math.sin(alpha * angle)]]
        np.testing.assert_allclose(slerp(g, v, alpha), expected, rtol=0, atol=1e-16)


def test_slerp_of_opposite_rows_is_finite():
    g = np.array([[0.6, 0.8]])
    for alpha, expected in ((0.0, g), (0.3, g), (0.5, 0 * g), (0.7, -g), (1.0, -g)):
        np.testing.assert_allclose(slerp(g, -g, alpha), expected, atol=1e-9)


def test_slerp_keeps_float32_and_refuses_what_does_not_fit():
    g = np.ones((2, 3), np.float32)
    assert slerp(g, 2 * g).dtype == np.float32
    with pytest.raises(ValueError, match=r"mapped \[2, 3\] and old features \[2, 2\]"):
        slerp(g, g[:, :2])
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha = .* must be in"):
            slerp(g, g, alpha)


# --- wrong input ------------------------------------------------------------------------------------------------


def refused(folder, new, old, capsys):
    """The line that the command ends with, after a note on labels if it reads as far."""
    with pytest.raises(SystemExit) as ended:
        run(folder, new, old)
    assert ended.value.code == 1 and not (folder / "maps").exists()
    *notes, line = capsys.readouterr().err.splitlines()
    assert all("no new_label.npy" in note for note in notes) and len(notes) < 2
    return line


def test_files_that_are_no_pair(tmp_path, capsys):
    rows = np.ones((30, 4), np.float32)
    assert "new_feature.npy: 30 rows, but" in refused(tmp_path, rows, rows[:29], capsys)
    assert "expected 2-D" in refused(tmp_path, rows[0], rows, capsys)
    for name, records in (("new", "first"), ("old", "second")):
        save_array(tmp_path / f"{name}_feature.npy", rows, "features", records=records)
    with pytest.raises(ManifestError, match="new_feature.npy: made from another record set than .*/old_feature.npy; "):
        open_pairs(tmp_path / "new_feature.npy", tmp_path / "old_feature.npy")


def test_a_map_of_another_model(tmp_path):
    random = np.random.default_rng(10)
    adapter = run(tmp_path, draw(50, 4, random), draw(50, 4, random))
    models = {name: tmp_path / f"{name}.pt" for name in ("new", "old", "other")}
    for name, path in models.items():
        path.write_text(name)
    adapter.statement.update({f"{name}_model": digest(models[name]) for name in ("new", "old")})
    models = {name: ModelFile(str(path)) for name, path in models.items()}
    adapter.require(models["new"], models["old"])
    with pytest.raises(AdapterError, match="map.npz: fitted to .*/new_feature.npy, which is not of .*/other.pt; fit"):
        adapter.require(models["other"], models["old"])
    adapter.statement["new_model"] = None
    adapter.require(models["other"], models["old"])
    with pytest.raises(AdapterError, match="fitted to .*/old_feature.npy, which is not of .*/other.pt"):
        adapter.require(models["new"], models["other"])


def test_rows_that_determine_no_map(tmp_path, capsys):
    random = np.random.default_rng(8)
    few = draw(16, 16, random)
    assert "do not determine a map of features of width 16" in refused(tmp_path, few, few, capsys)
    late = draw(40, 3, random)
    late[30:] = 0  # the last tenth has no old feature
    assert "and 0 held out" in refused(tmp_path, draw(40, 3, random), late, capsys)
    rows = draw(200, 3, random)
    rows[150, 1] = np.nan
    for new, old, name in ((rows, draw(200, 3, random), "new"), (draw(200, 3, random), rows, "old")):
        assert f"{name}_feature.npy: row 150 is not finite; rewrite it" in refused(tmp_path, new, old, capsys)


def test_a_map_of_another_width_or_no_map_at_all(tmp_path):
    random = np.random.default_rng(9)
    adapter = run(tmp_path, draw(50, 4, random), draw(50, 3, random), "--kind", "ridge")
    assert adapter.apply(np.zeros((2, 4), np.float32)).tolist() == [[0, 0, 0]] * 2
    with pytest.raises(AdapterError, match=r"map.npz: maps features of width 4, not \[2, 5\]"):
        adapter.apply(np.ones((2, 5), np.float32))
    path = tmp_path / "maps/map.npz"
    whole = path.read_bytes()
    for content in (b"", b"no zip at all", whole[:200]):
        path.write_bytes(content)
        with pytest.raises(AdapterError, match="map.npz: not a map of fit_adapter.py"):
            load_adapter(path)
    for matrix, statement in (
        (adapter.matrix.T, adapter.statement),
        (adapter.matrix * math.nan, adapter.statement),
        (adapter.matrix, {"new_width": 4, "old_width": 3}),
        (adapter.matrix, [4, 3]),
    ):
        with open(path, "wb") as file:
            np.savez(file, matrix=matrix, statement=json.dumps(statement))
        with pytest.raises(AdapterError, match="map.npz: not a map of fit_adapter.py"):
            load_adapter(path)
    with pytest.raises(AdapterError, match="none.npz: no such file; write it with"):
        load_adapter(tmp_path / "none.npz")
    with pytest.raises(AdapterError, match="cannot be written .*choose another --out"):
        Adapter(adapter.matrix, adapter.statement, path / "below.npz").save()
