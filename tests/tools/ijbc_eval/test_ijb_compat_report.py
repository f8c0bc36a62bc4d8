"""The compatibility report against plain loops, its order of backfill, and what a reader gets to see."""

import json

import cv2
import numpy as np
import pytest
from sklearn.metrics import roc_curve

from tools.ijbc_eval import compat_report, compat_text, plots
from tools.ijbc_eval.metrics import TOP

FPR, FPIR = 0.1, 0.3


@pytest.fixture(scope="module")
def make_report(tmp_path_factory, shared_set, shared_models, shared_cache):
    old, new, independent = (shared_models[name] for name in ("old_model", "new_model", "independent_model"))

    def make(*options):
        out = tmp_path_factory.mktemp("report")
        compat_report.main(
            [
                "--old",
                str(old),
                "--new",
                f"First={new}",
                "--new",
                f"Same={old}:tiny",  # networks told, and given
                "--independent",
                f"Free={independent}",
                "--new_net",
                "tiny",
                "-d",
                str(shared_set.data_dir),
                "--workers",
                "0",
                "--cache-dir",
                str(shared_cache),
                "--fpr",
                str(FPR),
                "--fpir",
                str(FPIR),
                "--out",
                str(out),
                *options,
            ]
        )
        return out

    return make


@pytest.fixture(scope="module")
def report_dir(make_report):
    return make_report()


@pytest.fixture(scope="module")
def report(report_dir):
    return json.loads((report_dir / "report.json").read_text())


def plain_figures(plain_class, made, gallery_features, probe_features):
    scores = plain_class.pair_scores(made, gallery_features, probe_features).astype(np.float32)
    label = np.array([label for *_, label in made.pairs])
    found = [
        plain_class.search(gallery, made.probes, gallery_features, probe_features, TOP, [FPIR])
        for gallery in made.galleries.values()
    ]
    return {
        "tpr": plain_class.tpr_at(scores, label, FPR),
        "tpir": np.mean([tpirs[0] for _, tpirs in found]),
        "top1": np.mean([tops[0] for tops, _ in found]),
        "top5": np.mean([tops[1] for tops, _ in found]),
    }


def check(found, expected):
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_self_and_cross_tests(report, plain_class, shared_set, shared_plain):
    old, new, free = (shared_plain[name].templates() for name in ("old_model", "new_model", "independent_model"))
    [first, same] = report["new"]
    check(report["old"]["self"], plain_figures(plain_class, shared_set, old, old))
    check(first["self"], plain_figures(plain_class, shared_set, new, new))
    check(first["cross"], plain_figures(plain_class, shared_set, old, new))
    check(report["independent"]["self"], plain_figures(plain_class, shared_set, free, free))
    check(report["independent"]["cross"], plain_figures(plain_class, shared_set, old, free))
    assert same["self"] == same["cross"] == report["old"]["self"]


def test_published_protocol(make_report, report, plain_class, shared_set, shared_plain, capsys):
    out = make_report("--protocol", "published")
    shown, text = capsys.readouterr().out, (out / "report.md").read_text()
    published = json.loads((out / "report.json").read_text())
    old, new = shared_plain["old_model"].templates(), shared_plain["new_model"].templates()
    label = np.array([label for *_, label in shared_set.pairs])
    cases = (("old", "self", old, old), ("new", "cross", old, new), ("new", "self", new, new))
    for role, test, enrolled, asked in cases:
        found = (published["old"] if role == "old" else published["new"][0])[test]
        fprs, tprs, _ = roc_curve(label, plain_class.pair_scores(shared_set, enrolled, asked).astype(np.float32))
        *_, (tops, tpirs), (mixed, _) = plain_class.published(
            list(shared_set.galleries.values()), shared_set.probes, enrolled, asked, TOP, [FPIR]
        )
        expected = {"tpr": tprs[::-1][np.argmin(np.abs(fprs[::-1] - FPR))], "tpir": tpirs[0]}
        expected |= {"top1": tops[0], "top5": tops[1], "mixed_top1": mixed[0], "mixed_top5": mixed[1]}
        check(found, expected)
        for place in (shown, text):
            assert all(f"{100 * found[key]:.2f}" in place for key in ("tpr", "tpir", "top1", "mixed_top1"))
    [first, _] = published["new"]
    for key in ("tpir", "top1"):
        assert (first["backfill"][key][0], first["backfill"][key][-1]) == (first["cross"][key], first["self"][key])
    exact = report["new"][0]
    assert any(first["cross"][key] != exact["cross"][key] for key in ("tpr", "tpir", "top1"))
    assert "mixed_top1" not in exact["cross"] and "mixed" not in compat_text.terminal(report)
    assert (report["data"]["protocol"], published["data"]["protocol"]) == ("exact", "published")
    for place in (shown, text):
        assert "mixed top-1 %" in place and "--protocol published" in place


def test_criterion_is_strict_and_gain_is_relative(report):
    [first, same] = report["new"]
    assert same["compatible"] is False and same["criterion"] == {"tpr": False, "tpir": False}
    base, ceiling = report["old"]["self"], report["independent"]["self"]
    for model in (first, same):
        assert model["criterion"] == {key: model["cross"][key] > base[key] for key in ("tpr", "tpir")}
        for key in ("tpr", "tpir"):
            if ceiling[key] > base[key]:
                expected = (model["cross"][key] - base[key]) / (ceiling[key] - base[key])
                assert model["update_gain"][key] == pytest.approx(expected)
            else:
                assert model["update_gain"][key] is None


def test_update_gain():
    assert compat_report.update_gain(0.7, 0.5, 0.9) == pytest.approx(0.5)
    assert compat_report.update_gain(0.4, 0.5, 0.9) == pytest.approx(-0.25)
    assert compat_report.update_gain(0.7, 0.5, None) is None
    assert compat_report.update_gain(0.7, 0.5, 0.5) is None


def test_backfill_equals_a_gallery_mixed_by_hand(report, plain_class, shared_set, shared_plain):
    old, new = shared_plain["old_model"].templates(), shared_plain["new_model"].templates()
    enrolled = np.sort([template for gallery in shared_set.galleries.values() for template, _ in gallery])
    order = np.random.default_rng(0).permutation(enrolled)
    curve = report["new"][0]["backfill"]
    assert curve["percent"] == list(range(0, 101, 10))
    for percent, tpir, top1 in zip(curve["percent"], curve["tpir"], curve["top1"]):
        done = set(order[: round(len(order) * percent / 100)].tolist())
        mixed = {template: (new if template in done else old)[template] for template in old}
        expected = plain_figures(plain_class, shared_set, mixed, new)
        assert (tpir, top1) == pytest.approx((expected["tpir"], expected["top1"]))


def test_backfill_order(tmp_path, shared_set, shared_cache):
    evaluation = compat_report.open_evaluation(
        compat_report.parse_arguments(
            ["--old", "x.pt", "--new", "y.pt", "-d", str(shared_set.data_dir), "--cache-dir", str(shared_cache)]
        )
    )
    ids = evaluation.faces.template_ids
    enrolled = sorted(template for gallery in shared_set.galleries.values() for template, _ in gallery)
    one, again, other = (compat_report.backfill_order(evaluation, seed) for seed in (0, 0, 1))
    assert one.tolist() == again.tolist() != other.tolist()
    assert sorted(ids[one]) == sorted(ids[other]) == enrolled
    path = tmp_path / "order.txt"
    path.write_text("\n".join(map(str, enrolled[::-1])) + "\n\n")
    assert ids[compat_report.backfill_order(evaluation, 0, path)].tolist() == enrolled[::-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MixBCT=work/a/model.pt:r50", ("MixBCT", "work/a/model.pt", "r50")),
        ("work/a/model.pt", ("a", "work/a/model.pt", "r18")),
        ("N=a.pt", ("N", "a.pt", "r18")),
        ("N=prefix,3", ("N", "prefix,3", "r18")),
        ("C:/a.pt", ("a", "C:/a.pt", "r18")),
        ("N=runs/lr=0.1/a.pt:r50", ("N", "runs/lr=0.1/a.pt", "r50")),
        ("runs/lr=0.1/a.pt", ("a", "runs/lr=0.1/a.pt", "r18")),
        ("=a.pt", ("a", "a.pt", "r18")),
    ],
)
def test_model_arguments(text, expected):
    name, model = compat_report.parse_model(text, "r18")
    assert (name, model.file, model.network) == expected


def test_two_models_of_one_name(shared_set):
    with pytest.raises(compat_report.EvalError, match="'N'"):
        compat_report.main(["--old", "o.pt", "--new", "N=a.pt", "--new", "N=b.pt", "-d", str(shared_set.data_dir)])


def test_what_the_reader_sees(report, report_dir, shared_set):
    text = (report_dir / "report.md").read_text()
    shown = compat_text.terminal(report)
    for model in [report["old"], *report["new"], report["independent"]]:
        for figure in (f"{100 * model['self'][key]:.2f}" for key in ("tpr", "tpir", "top1")):
            assert figure in text and figure in shown
    enrolled = [{subject for _, subject in rows} for rows in shared_set.galleries.values()]
    others = min(sum(subject not in gallery for _, subject in shared_set.probes) for gallery in enrolled)
    assert f"(at least {others} of them non-mated" in text
    assert "Same: NOT compatible" in text and "Same: NOT compatible" in shown
    assert "(models.png)" in text and "(backfill.png)" in text
    for name in ("models.png", "backfill.png"):
        image = cv2.imread(str(report_dir / name))
        assert image is not None and image.std() > 10


def test_verdicts(report):
    base = report["old"]["self"]
    better = {**base, "tpr": 0.99, "tpir": 0.99}
    criterion = {"tpr": True, "tpir": True}
    model = {"name": "Good", "self": better, "cross": better, "compatible": True, "criterion": criterion}
    [verdict] = compat_text.verdicts({**report, "new": [model]})
    assert verdict.startswith("Good: compatible")
    criterion = {"tpr": True, "tpir": False}
    half = {"name": "Half", "self": base, "cross": base, "compatible": False, "criterion": criterion}
    [short, worse] = compat_text.verdicts({**report, "new": [half]})
    assert short.startswith("Half: NOT compatible") and "TPIR" in short and "TPR" not in short
    assert "no better" in worse and "1:1 TPR" in worse


def test_caveats(report):
    data = {**report["data"], "fpr": 1e-6, "fpir": 1e-5}
    lines = compat_text.caveats({**report, "data": data, "bad_images": ["3.jpg"]})
    assert len(lines) == 3
    assert compat_text.caveats(report) == []
    [read, nowhere, fpr, *_] = compat_text.caveats({**report, "data": {**data, "protocol": "published"}})
    assert "--protocol published" in read and nowhere.startswith("9 probes are of people in no gallery")
    assert "not a single error" in lines[0] and "not a single error" not in fpr


def test_undefined_figures_become_null_and_can_be_drawn(report, tmp_path):
    nothing = compat_report.without_nan({"a": [float("nan"), 1.0, {"b": float("nan")}]})
    assert nothing == {"a": [None, 1.0, {"b": None}]}
    model = report["new"][0]
    model = {**model, "cross": {**model["cross"], "tpir": None}, "backfill": {**model["backfill"], "tpir": [None] * 11}}
    plots.plot_models({**report, "new": [model]}, tmp_path / "m.png")
    plots.plot_backfill({**report, "new": [model]}, tmp_path / "b.png")
    assert "–" in compat_text.markdown({**report, "new": [model]})
