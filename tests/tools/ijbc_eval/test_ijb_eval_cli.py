"""ijbc_eval.py from the command line, held against plain loops."""

import hashlib
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from core.errors import UserError
from tools.ijbc_eval import compat_report, ijbc_eval, options
from tools.ijbc_eval.files import sha256_of
from tools.ijbc_eval.metrics import FPIRS, FPRS, TOP

ROOT = pathlib.Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tools" / "ijbc_eval" / "ijbc_eval.py"


@pytest.fixture
def run(tmp_path, monkeypatch, shared_set, shared_models, shared_cache):
    """Run in an empty directory with the shared cache; gives the arrays of the result file."""
    monkeypatch.chdir(tmp_path)

    def call(*options, made=shared_set, result=None):
        arguments = ["-m", str(shared_models["new_model"]), "-net", "tiny", "-d", str(made.data_dir), "-s", made.subset]
        ijbc_eval.main([*arguments, "--workers", "0", "--cache-dir", str(shared_cache), *map(str, options)])
        [path] = [result] if result else pathlib.Path("IJB_result").glob("*.npz")
        with np.load(path) as saved:
            return {key: saved[key] for key in saved.files}

    return call


@pytest.fixture
def cross(shared_models):
    return ["-m_old", str(shared_models["old_model"]), "-old_net", "tiny"]


def check_verification(plain_class, made, found, row, first, second):
    expected = plain_class.pair_scores(made, first, second)
    label = np.array([label for *_, label in made.pairs])
    np.testing.assert_allclose(found["scores"][row], expected, atol=2e-5)
    np.testing.assert_array_equal(found["label"], label == 1)
    # The rates are checked on the scores of the file: rounding may swap two that lie within 1e-6 of one another.
    scores = found["scores"][row]
    assert found["tprs"][row].tolist() == pytest.approx([plain_class.tpr_at(scores, label, fpr) for fpr in FPRS])
    wins = [(a > b) + (a == b) / 2 for a in scores[label == 1] for b in scores[label == 0]]
    assert found["auc"][row] == pytest.approx(np.mean(wins), abs=1e-9)


def check_identification(plain_class, made, found, row, gallery_features, probe_features):
    parts = [
        plain_class.search(gallery, made.probes, gallery_features, probe_features, TOP, FPIRS)
        for gallery in made.galleries.values()
    ]
    tops, tpirs = (np.array([part[kind] for part in parts]) for kind in range(2))
    np.testing.assert_allclose(found["top_rates"][row], np.vstack([tops, tops.mean(axis=0)]), atol=1e-9)
    np.testing.assert_allclose(found["tpirs"][row], np.vstack([tpirs, tpirs.mean(axis=0)]), atol=1e-9)
    assert found["galleries"].tolist() == list(made.galleries)
    # Rates of nine subjects are the same for many models; scores are not: each that is finite is its probe's highest.
    for gallery, scores in zip(made.galleries.values(), found["scores"][row]):
        highest = [max(probe_features[p] @ gallery_features[g] for g, _ in gallery) for p, _ in made.probes]
        np.testing.assert_allclose(scores, np.where(np.isfinite(scores), highest, -np.inf), atol=2e-5)


def test_self_test(run, plain_class, shared_set, shared_plain, capsys):
    features = shared_plain["new_model"].templates()
    found = run()
    check_verification(plain_class, shared_set, found, 0, features, features)
    assert found["names"].tolist() == ["new_model"]
    assert found["scores"].dtype == np.float32 and str(found["task"]) == "11"
    shown = capsys.readouterr().out
    assert "0.0001" in shown and "AUC" in shown and f"{found['auc'][0]:.6f}" in shown
    for name in ("new_model_IJBC_11.npz", "new_model_IJBC_11_roc.png", "new_model_IJBC_11_det.png"):
        assert (pathlib.Path("IJB_result") / name).stat().st_size > 1000


def test_without_networks_and_in_other_spellings(shared_models, shared_set, shared_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new, old = shared_models["new_model"], shared_models["old_model"]
    common = ["-d", str(shared_set.data_dir), "--workers", "0", "--cache-dir", str(shared_cache), "-R"]
    ijbc_eval.main([f"-m={new}", "-net=tiny", f"-m_old={old}", "-old_net=tiny", *common, "named.npz"])
    ijbc_eval.main([f"-m={new}", f"-m_old={old}", *common, "told.npz"])
    ijbc_eval.main([f"--model_file={new}", f"--model_file_old={old}", "--network_old=tiny", *common, "spelt.npz"])
    named, told, spelt = (np.load(f"{name}.npz") for name in ("named", "told", "spelt"))
    assert named["names"].tolist() == told["names"].tolist() == spelt["names"].tolist() == ["new_model_to_old_model"]
    np.testing.assert_array_equal(named["scores"], told["scores"])
    np.testing.assert_array_equal(named["scores"], spelt["scores"])


def test_without_d_the_data_is_under_the_repo_root(shared_models, tmp_path, monkeypatch):
    assert ijbc_eval.parse_arguments(["-m=a.pt", "-net=r50"]).data_path == ROOT / "dataset"
    monkeypatch.setattr(options, "REPO", tmp_path)
    where = tmp_path / "dataset" / "IJBC" / "meta"
    with pytest.raises(UserError, match=rf"^{where}: no such directory; set -d"):
        ijbc_eval.main([f"-m={shared_models['new_model']}", "-net=tiny"])
    with pytest.raises(UserError, match=rf"^{where}: no such directory"):
        compat_report.main(["--old", str(shared_models["old_model"]), "--new", f"N={shared_models['new_model']}"])


def test_self_test_one_to_n(run, plain_class, shared_set, shared_plain, capsys):
    features = shared_plain["new_model"].templates()
    check_identification(plain_class, shared_set, run("-N"), 0, features, features)
    assert "top-10" in capsys.readouterr().out
    assert pathlib.Path("IJB_result/new_model_IJBC_1N.npz").exists()
    assert pathlib.Path("IJB_result/new_model_IJBC_1N_tpir.png").stat().st_size > 1000


def test_cross_test(run, cross, plain_class, shared_set, shared_plain):
    old, new = shared_plain["old_model"].templates(), shared_plain["new_model"].templates()
    check_verification(plain_class, shared_set, run(*cross), 0, old, new)
    assert pathlib.Path("IJB_result/new_model_to_old_model_IJBC_11.npz").exists()


def test_cross_test_one_to_n(run, cross, plain_class, shared_set, shared_plain):
    old, new = shared_plain["old_model"].templates(), shared_plain["new_model"].templates()
    check_identification(plain_class, shared_set, run(*cross, "-N"), 0, old, new)


def test_results_of_models_of_one_name_lie_beside_each_other(
    shared_models, shared_set, shared_cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    a, b = (tmp_path / folder / "16backbone.pth" for folder in "ab")
    for path, model in ((a, "old_model"), (b, "new_model")):
        path.parent.mkdir()
        shutil.copy(shared_models[model], path)
    digests = {path: sha256_of([path]) for path in (a, b)}
    for new, old in [(a, b), (b, a)]:
        digests[new, old] = hashlib.sha256(f"{digests[new]} {digests[old]}".encode()).hexdigest()
    monkeypatch.setattr(ijbc_eval, "show", lambda *_: None)

    def evaluate(new, *old):
        options = ["-net", "tiny", "-d", str(shared_set.data_dir), "--workers", "0", "--cache-dir", str(shared_cache)]
        options += ["-m_old", str(old[0]), "-old_net", "tiny"] if old else []
        before = {path: path.read_bytes() for path in pathlib.Path("IJB_result").glob("*.npz")}
        ijbc_eval.main(["-m", str(new), *options])
        assert all(path.read_bytes() == content for path, content in before.items())  # the same figures, or kept
        path = re.search(r"result: (.*)", capsys.readouterr().out)[1]
        with np.load(path) as found:
            assert str(found["models"]) == digests[(new, *old) if old else new]
        return pathlib.Path(path).name

    for _ in range(2):
        assert evaluate(a) == "16backbone_IJBC_11.npz"
        assert evaluate(b) == f"16backbone_IJBC_11_{digests[b][:6]}.npz"
        assert evaluate(a, b) == "16backbone_to_16backbone_IJBC_11.npz"
        assert evaluate(b, a) == f"16backbone_to_16backbone_IJBC_11_{digests[b, a][:6]}.npz"
    for content in (b"", b"somebody's notes", None):
        path = pathlib.Path("IJB_result/16backbone_IJBC_11.npz")
        np.savez(path, scores=np.zeros(3)) if content is None else path.write_bytes(content)
        assert evaluate(a) == f"16backbone_IJBC_11_{digests[a][:6]}.npz"


@pytest.mark.parametrize("one_to_n", [False, True])
def test_bunch_has_all_eight_settings(run, cross, plain_class, shared_set, shared_plain, one_to_n):
    found = run(*cross, "-B", *(["-N"] if one_to_n else []))
    settings = list(itertools.product((False, True), repeat=3))
    assert found["names"].tolist() == [f"new_model_to_old_model N{n:d}D{d:d}F{f:d}" for n, d, f in settings]
    check = check_identification if one_to_n else check_verification
    for row, setting in enumerate(settings):
        old, new = (shared_plain[name].templates(*setting) for name in ("old_model", "new_model"))
        check(plain_class, shared_set, found, row, old, new)
    for one, other in itertools.combinations(found["scores"], 2):
        assert not np.array_equal(one, other)


def test_ijbb(run, tmp_path, make_ijb, plain_class, shared_models):
    made = make_ijb(tmp_path / "data", "IJBB", subjects=6, seed=5)
    features = plain_class(made, shared_models["new_model"]).templates()
    found = run(made=made, result="IJB_result/new_model_IJBB_11.npz")
    check_verification(plain_class, made, found, 0, features, features)
    found = run("-N", made=made, result="IJB_result/new_model_IJBB_1N.npz")
    check_identification(plain_class, made, found, 0, features, features)
    assert found["galleries"].tolist() == ["S1", "S2"]


def test_embeddings_and_labels_are_saved(run, cross, shared_set, shared_plain):
    found = run(*cross, "-E", "-L", "-R", "there/result.npz", result="there/result.npz")
    plain_new, plain_old = shared_plain["new_model"].embs, shared_plain["old_model"].embs
    names = [name for name, *_ in shared_set.faces]
    assert found["image_names"].tolist() == names
    for end, plain in (("", plain_new), ("_old", plain_old)):
        np.testing.assert_allclose(found[f"embs{end}"], [plain[name][0] for name in names], atol=1e-4)
        np.testing.assert_allclose(found[f"embs_f{end}"], [plain[name][1] for name in names], atol=1e-4)
    assert list(zip(found["first_template"], found["second_template"])) == [pair[:2] for pair in shared_set.pairs]
    found = run("-N", "-L", "-R", "there/1n.npz", result="there/1n.npz")
    assert list(zip(found["probe_template"], found["probe_subject"])) == shared_set.probes
    for name, gallery in shared_set.galleries.items():
        assert list(zip(found[f"gallery_{name}_template"], found[f"gallery_{name}_subject"])) == gallery
    assert "embs" not in found


PUBLISHED = ["--protocol", "published"]


def shown_rows(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]


def test_published_protocol(run, capsys):
    exact = run("-B")
    assert "no error is allowed, so those columns are equal" in capsys.readouterr().out
    published = run("-B", *PUBLISHED)
    shown = capsys.readouterr().out
    assert "columns are equal" not in shown and "1:1 TPR % at FPR, published" in shown
    np.testing.assert_array_equal(exact["scores"], published["scores"])
    for scores, found in zip(published["scores"], published["tprs"]):
        fprs, tprs, _ = roc_curve(published["label"], scores)
        assert found.tolist() == pytest.approx([tprs[::-1][np.argmin(np.abs(fprs[::-1] - fpr))] for fpr in FPRS])
    assert exact["tprs"].tolist() != published["tprs"].tolist()
    assert str(published["protocol"]) == "published" and str(exact["protocol"]) == "exact"


def test_published_protocol_one_to_n(run, cross, plain_class, shared_set, shared_plain, capsys):
    old, new = shared_plain["old_model"].templates(), shared_plain["new_model"].templates()
    exact = run(*cross, "-N")
    assert "mixed" not in capsys.readouterr().out
    published = run(*cross, "-N", *PUBLISHED)
    expected = plain_class.published(list(shared_set.galleries.values()), shared_set.probes, old, new, TOP, FPIRS)
    np.testing.assert_allclose(published["top_rates"][0], [top for top, _ in expected])
    np.testing.assert_allclose(published["tpirs"][0], [tpir for _, tpir in expected])
    for key in ("scores", "rank", "mixed_rank", "label"):
        np.testing.assert_array_equal(exact[key], published[key])
    assert exact["top_rates"].shape == (1, 3, 3) and published["top_rates"].shape == (1, 4, 3)
    assert exact["tpirs"][0, 2].tolist() != published["tpirs"][0, 2].tolist()
    shown = capsys.readouterr().out
    nowhere = sum((subject - 100) % 3 == 2 for _, subject in shared_set.probes)
    assert f"{nowhere} probes are of people in no gallery" in shown
    [*_, mixed] = [line for line in shown.splitlines() if line.startswith("|")]
    assert "below FPIR 0.1 no error" in shown  # 18 non-mated probes: two of them at FPIR 2 / 18
    cells = [cell.strip() for cell in mixed.strip("|").split("|")]
    assert cells[1:] == ["mixed", *(f"{100 * top:.2f}" for top in expected[3][0]), *["–"] * 5]


@pytest.mark.parametrize("saved_as", ["exact", "published"])
def test_saved_results_hold_what_either_protocol_needs(run, cross, capsys, saved_as):
    tables = {}  # of both tests; each test's differ between the protocols
    for protocol in ("exact", "published"):
        end = ["--protocol", protocol]
        run("-B", "-R", f"{protocol}_11.npz", *end, result=f"{protocol}_11.npz")
        tables[protocol] = [shown_rows(capsys)]
        run(*cross, "-N", "-B", "-R", f"{protocol}_1n.npz", *end, result=f"{protocol}_1n.npz")
        tables[protocol].append(shown_rows(capsys))
    assert all(one[1:] != other[1:] for one, other in zip(*tables.values()))  # figures, not only headers
    for protocol, expected in tables.items():
        ijbc_eval.main(["-P", f"{saved_as}_11.npz", f"{saved_as}_1n.npz", "--protocol", protocol])
        assert shown_rows(capsys) == sum(expected, [])


def test_input_scale(run, shared_models):
    default, scaled = (
        run("-E", "-R", f"{name}.npz", *options, result=f"{name}.npz")
        for name, options in (("a", []), ("b", ["--input-scale", "127.5"]))
    )
    assert (default["input_scale"], scaled["input_scale"]) == (128, 127.5)
    assert not np.array_equal(default["embs"], scaled["embs"])


def test_saved_results_are_tabulated_without_a_model(run, cross, capsys, monkeypatch):
    run("-R", "a.npz", result="a.npz")
    run(*cross, "-R", "b.npz", result="b.npz")
    run("-N", "-R", "c.npz", result="c.npz")
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    monkeypatch.setattr("tools.ijbc_eval.embed.load_model", None)
    ijbc_eval.main(["-P", "a.npz", "b.npz", "c.npz"])
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if line.startswith("|")] == tables
    for end in ("roc", "det", "tpir"):
        assert pathlib.Path(f"IJB_result/compared_{end}.png").stat().st_size > 1000


def test_saved_results_under_other_names(run, cross, capsys):
    run("-R", "a=1.npz", result="a=1.npz")
    run(*cross, "-B", "-R", "b.npz", result="b.npz")
    capsys.readouterr()
    ijbc_eval.main(["-P", "./a=1.npz", "first=a=1.npz", "mine=b.npz"])
    names = [row.split("|")[1].strip() for row in shown_rows(capsys)]
    settings = [f"N{n:d}D{d:d}F{f:d}" for n, d, f in itertools.product((False, True), repeat=3)]
    assert [name for name in names if "1:1" not in name] == ["new_model", "first", *(f"mine {one}" for one in settings)]


def test_other_tools_results_can_be_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("theirs.npz", scores=rng.normal(size=(2, 50)), names=np.array(["x", "y"]), label=np.arange(50) % 2)
    ijbc_eval.main(["-P", "theirs.npz"])
    assert capsys.readouterr().out.count("| ") >= 3


def test_as_a_script_from_another_directory(tmp_path, shared_set, shared_models, shared_cache):
    """With worker processes, and the error as one line."""
    command = [sys.executable, str(SCRIPT), "-net", "tiny", "-d", str(shared_set.data_dir), "--workers", "2", "-b", "7"]
    environment = {**os.environ, "DISPLAY": "", "OMP_NUM_THREADS": "1"}

    def start(*options):
        return subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)

    good = start("-m", str(shared_models["new_model"]), "-N")
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "IJB_result" / "new_model_IJBC_1N.npz").exists()
    bad = start("-m", "absent.pt", "--cache-dir", str(shared_cache))
    assert bad.returncode == 1
    assert "absent.pt" in bad.stderr and "Traceback" not in bad.stderr and len(bad.stderr.splitlines()) == 1


@pytest.mark.parametrize("folder", ["img/", "./", None])
def test_image_names_with_folders(
    run, plain_class, shared_models, tmp_path, make_ijb, rewrite_meta, monkeypatch, folder
):
    monkeypatch.setattr(ijbc_eval, "show", lambda *_: None)
    made = make_ijb(tmp_path / "data", subjects=4, seed=4)
    features = plain_class(made, shared_models["new_model"]).templates()
    crops = made.root / "loose_crop"
    if folder == "img/":
        crops.rename(made.root / "img")
        crops.mkdir()
        (made.root / "img").rename(crops / "img")
    made.faces = [(f"{folder or f'{crops}/'}{face[0]}", *face[1:]) for face in made.faces]
    rewrite_meta(made)
    check_verification(plain_class, made, run(made=made), 0, features, features)


def test_scores_do_not_depend_on_the_order_of_lines(run, tmp_path, make_ijb, rewrite_meta):
    made = make_ijb(tmp_path / "data", subjects=6, seed=4)
    straight = run("-R", "a.npz", made=made, result="a.npz"), run("-N", "-R", "b.npz", made=made, result="b.npz")
    rng = np.random.default_rng(0)
    pairs = rng.permutation(len(made.pairs))
    made.pairs = [made.pairs[row] for row in pairs]
    made.faces = [made.faces[row] for row in rng.permutation(len(made.faces))]
    probes = rng.permutation(len(made.probes))
    made.probes = [made.probes[row] for row in probes]
    rewrite_meta(made)
    lines = made.meta("name_5pts_score.txt").read_text().splitlines()
    made.meta("name_5pts_score.txt").write_text("\n".join(lines[::-1]) + "\n")  # the two face files in unlike order
    mixed = run("-R", "a.npz", made=made, result="a.npz"), run("-N", "-R", "b.npz", made=made, result="b.npz")
    np.testing.assert_allclose(mixed[0]["scores"][0], straight[0]["scores"][0][pairs], atol=1e-5)
    np.testing.assert_allclose(mixed[1]["scores"][0], straight[1]["scores"][0][:, probes], atol=1e-5)
    np.testing.assert_allclose(mixed[1]["top_rates"], straight[1]["top_rates"])
