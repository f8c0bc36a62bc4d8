"""Mistakes on the command line, in saved results and in a report: one error each, before anything takes long."""

import errno
import io
import pathlib
import zipfile

import numpy as np
import pytest

import core.files
import tools.ijbc_eval.files
from core.errors import UserError, report_errors
from tools.ijbc_eval import compat_report, embed, ijbc_eval
from tools.ijbc_eval.embed import EmbeddingStore


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def made(tmp_path, make_ijb):
    return make_ijb(tmp_path / "data", subjects=4, seed=3)


@pytest.fixture
def report_options(made, shared_models):
    old, new = shared_models["old_model"], shared_models["new_model"]
    return [
        "--old",
        str(old),
        "--old_net",
        "tiny",
        "--new",
        f"n={new}:tiny",
        "-d",
        str(made.data_dir),
        "--workers",
        "0",
    ]


@pytest.fixture
def nothing_is_embedded(monkeypatch):
    def refuse(store, model_file):
        raise AssertionError(f"{model_file} was embedded")

    monkeypatch.setattr(EmbeddingStore, "get", refuse)


@pytest.mark.parametrize("options", [["-b", "0"], ["-b", "-5"], ["-b", "x"], ["--workers", "-1"], ["--seed", "-1"]])
def test_numbers_out_of_range(capsys, options):
    commands = [(compat_report, ["--old", "o.pt", "--new", "n.pt"])]
    if options[0] != "--seed":
        commands.append((ijbc_eval, ["-m", "n.pt"]))
    for module, needed in commands:
        with pytest.raises(SystemExit):
            module.parse_arguments([*needed, "-d", "data", *options])
        error = capsys.readouterr().err
        assert options[0] in error and "at least" in error and options[1] in error


PLACES = {
    "R folder": ["-R", "there"],
    "R below a file": ["-R", "file/r.npz"],
    "R too long": ["-R", "r" * 250 + ".npz"],
    "cache file": ["--cache-dir", "file"],
    "cache below a file": ["--cache-dir", "file/cache"],
    "cache too long": ["--cache-dir", "c" * 300],
    "d file": ["-d", "file"],
    "d too long": ["-d", "d" * 300],
    "m folder": ["-m", "there.pt"],
    "m below a file": ["-m", "file/model.pt"],
    "m too long": ["-m", "m" * 300 + ".pt"],
    "old folder": ["-m_old", "there.onnx"],
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_options_that_are_given_the_wrong_kind_of_path(made, shared_models, monkeypatch, capsys, place):
    pathlib.Path("file").touch()
    for folder in ("there", "there.pt", "there.onnx"):
        pathlib.Path(folder).mkdir()
    before = set(pathlib.Path().iterdir())
    monkeypatch.setattr(embed, "image_batches", None)  # nothing is embedded
    options = ["-m", str(shared_models["new_model"]), "-net", "tiny", "-d", str(made.data_dir), "--workers", "0"]
    with pytest.raises(SystemExit, match="1"), report_errors():
        ijbc_eval.main([*options, *place])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and place[1][:200] in said
    assert set(pathlib.Path().iterdir()) <= before | {pathlib.Path("IJB_result")}


@pytest.mark.parametrize("out", ["file", "file/report"])
def test_a_report_is_not_embedded_for_a_place_where_it_cannot_be(report_options, nothing_is_embedded, out):
    pathlib.Path("file").touch()
    with pytest.raises(UserError, match=rf"^{out}/report\.json: cannot be written \(Not a directory\)"):
        compat_report.main([*report_options, "--out", out])


@pytest.mark.parametrize("where", ["IJB_result", "cache"])
def test_a_read_only_directory(made, shared_models, monkeypatch, capsys, where):
    def read_only(path, *rest, original=core.files.open_temporary):
        if path.parent.name == where or path.parent.parent.name == where:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return original(path, *rest)

    pathlib.Path("IJB_result").mkdir()
    monkeypatch.setattr(core.files, "open_temporary", read_only)
    monkeypatch.setattr(tools.ijbc_eval.files, "open_temporary", read_only)
    monkeypatch.setattr(embed, "image_batches", None)  # nothing is embedded
    options = ["-m", str(shared_models["new_model"]), "-net", "tiny", "-d", str(made.data_dir), "--workers", "0"]
    with pytest.raises(SystemExit, match="1"), report_errors():
        ijbc_eval.main([*options, "--cache-dir", "cache"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot be written (Read-only file system); make room or choose another" in said


@pytest.mark.parametrize("scale", ["0", "-128", "nan", "inf", "x"])
def test_an_input_scale_that_is_none(capsys, scale):
    with pytest.raises(SystemExit):
        ijbc_eval.parse_arguments(["-m", "n.pt", "-d", "data", "--input-scale", scale])
    assert f"--input-scale: must be a number above 0, not {scale}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("end", "options"), [("template_pair_label.txt", []), ("1N_probe_mixed.csv", ["-N"]), ("1N_gallery_G2.csv", ["-N"])]
)
def test_the_lists_are_read_before_anything_is_embedded(
    made, shared_models, report_options, nothing_is_embedded, end, options
):
    made.meta(end).write_text("nothing of the kind\n")
    new = shared_models["new_model"]
    with pytest.raises(UserError, match=end):
        ijbc_eval.main(["-m", str(new), "-net", "tiny", "-d", str(made.data_dir), "--workers", "0", *options])
    with pytest.raises(UserError, match=end):
        compat_report.main(report_options)


@pytest.mark.parametrize("call", ["verify", "identify"])
def test_both_tests_read_their_list_first(made, nothing_is_embedded, call):
    evaluation = ijbc_eval.open_evaluation(ijbc_eval.parse_arguments(["-m", "n.pt", "-d", str(made.data_dir)]))
    made.meta("template_pair_label.txt").write_text("1 2\n")
    made.meta("1N_probe_mixed.csv").write_text("TEMPLATE\n")
    with pytest.raises(UserError, match="template_pair_label" if call == "verify" else "probe_mixed"):
        getattr(evaluation, call)("gallery model", "probe model")


def test_the_independent_model_is_opened_before_anything_is_embedded(report_options, nothing_is_embedded):
    with pytest.raises(UserError, match="absent.pt"):
        compat_report.main([*report_options, "--independent", "absent.pt:tiny"])


@pytest.mark.parametrize(
    ("lines", "pattern"),
    [
        (["5"], "line 1: .* not a gallery template"),
        (["{0}", "{0}"], "line 2: .* listed twice"),
        (["{0}"], "lists 1 of"),
        (["{0}", "²"], "line 2: .* not a gallery template"),
        (["{0} 3", "{0}"], "line 2: .* listed twice"),
        (["9" * 5000], "line 1: .* not a gallery template"),
    ],
)
def test_a_wrong_backfill_order(made, report_options, lines, pattern):
    pathlib.Path("order.txt").write_text("\n".join(lines).format(made.galleries["G1"][0][0]), encoding="utf-8")
    with pytest.raises(UserError, match=pattern):
        compat_report.main([*report_options, "--order", "order.txt"])
    assert not pathlib.Path("compat_report").exists()


def test_wrong_cohorts_and_thresholds(report_options, nothing_is_embedded, capsys):
    pathlib.Path("groups.txt").write_text("100 a\n101\n")
    with pytest.raises(UserError, match=r"groups\.txt line 2: expected `subject group`"):
        compat_report.main([*report_options, "--cohorts", "groups.txt"])
    with pytest.raises(SystemExit):
        compat_report.main([*report_options, "--threshold", "42"])
    assert "--threshold must be a cosine" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compat_report.main(["--chain", "a.pt", "b.pt", "--threshold", "0"])
    assert "--chain takes two or more versions and goes without --threshold" in capsys.readouterr().err


def header_of_a_huge_array():
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**9)})
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [b"no npz", b"", bytes(999), b"PK\5\6", header_of_a_huge_array(), "huge", "folder", None]
)
def test_a_result_file_that_is_none(content):
    if content == "folder":
        pathlib.Path("a.npz").mkdir()
    elif content == "huge":
        with zipfile.ZipFile("a.npz", "w") as file:
            file.writestr("scores.npy", header_of_a_huge_array())
    elif content is not None:
        pathlib.Path("a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz"):
        ijbc_eval.main(["-P", "a.npz"])
    np.save("c.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"c\.npy: cannot be read as a result file"):
        ijbc_eval.main(["-P", "c.npy"])
    np.savez("b.npz", scores=np.zeros(3), label=np.zeros(3))
    with pytest.raises(UserError, match=r"b\.npz: has no array 'names'"):
        ijbc_eval.main(["-P", "b.npz"])


SCORES, LABEL = np.array([[0.6, 0.5, 0.3, 0.9]], np.float32), np.array([0, 1, 0, 1])
CUBE = np.stack([SCORES, SCORES], axis=1)  # one run, two galleries, four probes
SEARCH = {
    "scores": CUBE,
    "label": np.stack([LABEL, LABEL]),
    "rank": np.stack([[LABEL, LABEL]]),
    "galleries": ["G1", "G2"],
}


@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"label": np.ones(4)}, "label has pairs of one kind only"),
        ({"label": np.zeros(4, bool)}, "label has pairs of one kind only"),
        ({"label": 2 * LABEL - 1}, "label must be 1"),
        ({"label": LABEL.astype(str)}, "label must be 1"),
        ({"label": LABEL[:3]}, "do not fit together"),
        ({"names": ["x", "y"]}, "do not fit together"),
        ({"scores": np.zeros((0, 4)), "names": []}, "do not fit together"),
        ({"scores": np.zeros((1, 0)), "label": []}, "do not fit together"),
        ({"scores": np.where(SCORES > 0.8, np.nan, SCORES)}, "scores of run 0 contain NaN"),
        ({"scores": np.where(SCORES > 0.8, np.inf, SCORES)}, "scores of run 0 contain NaN or infinite"),
        ({"scores": np.where(SCORES > 0.8, -np.inf, SCORES)}, "scores of run 0 contain NaN or infinite"),
        ({"scores": SCORES.astype(str)}, "scores are of type <U"),
        ({"scores": SCORES.astype(complex)}, "of type complex"),
        ({**SEARCH, "galleries": None}, "no array 'galleries'"),
        ({**SEARCH, "rank": None}, "no array 'rank'"),
        ({**SEARCH, "galleries": ["G1"]}, "1 galleries do not fit"),
        ({**SEARCH, "rank": LABEL}, r"rank \(4,\)"),
        ({**SEARCH, "rank": CUBE}, r"\(float32\)"),
        ({**SEARCH, "scores": CUBE * np.nan}, "contain NaN"),
        ({**SEARCH, "scores": CUBE * np.inf}, "contain NaN or infinite"),
        ({**SEARCH, "scores": CUBE * -np.inf}, "contain NaN or infinite"),  # probes that are not mated have a score
        ({**SEARCH, "rank": 0 * SEARCH["rank"]}, "rank must be 1 or more for mated"),  # 0 would count as found
        ({**SEARCH, "rank": 1 - SEARCH["rank"]}, "rank must be 1 or more for mated"),
        ({**SEARCH, "rank": 1 + SEARCH["rank"]}, "0 for others"),
        ({**SEARCH, "label": LABEL}, "do not fit together"),
        ({**SEARCH, "mixed_rank": LABEL}, r"mixed_rank \(4,\)"),
        ({**SEARCH, "mixed_rank": SCORES}, r"\(float32\)"),
    ],
)
def test_arrays_that_are_no_result(changed, pattern):
    arrays = {"scores": SCORES, "label": LABEL, "names": ["x"], **changed}
    np.savez("theirs.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(UserError, match=rf"theirs\.npz: .*{pattern}"):
        ijbc_eval.main(["-P", "theirs.npz"])
    assert not pathlib.Path("IJB_result").exists()


def test_arrays_that_are_a_result(capsys):
    np.savez("a.npz", scores=SCORES[0], label=LABEL, names="x")
    np.savez("b.npz", **SEARCH, names=["x"])
    ijbc_eval.main(["-P", "a.npz", "b.npz"])
    assert "0.750000" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"b\.npz: has no array 'mixed_rank', .*ijbc_eval\.py -N -R"):
        ijbc_eval.main(["-P", "b.npz", "--protocol", "published"])
    np.savez("c.npz", **SEARCH, names=["x"], mixed_rank=LABEL[None])
    ijbc_eval.main(["-P", "c.npz", "--protocol", "published"])
    assert "mixed" in capsys.readouterr().out
