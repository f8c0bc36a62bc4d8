"""The compatibility report against plain loops, and what a reader gets to see."""

import csv
import json

import cv2
import numpy as np
import pytest
from sklearn.metrics import roc_curve

from core.errors import UserError
from core.manifest import digest
from tests.tools.ijbc_eval.conftest import FPIR, FPR
from tools.adapters.adapter import Adapter
from tools.ijbc_eval import comparison, compat_report, compat_text
from tools.ijbc_eval.metrics import TOP


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
    assert set(first["self"]["interval"]) == {"tpr", "tpir"}


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
        curve = first["refresh"][0]
        assert (curve[key][0], curve[key][-1]) == (first["cross"][key], first["self"][key])
    assert first["criterion"] == {
        key: "yes" if first["cross"][key] > published["old"]["self"][key] else "no" for key in ("tpr", "tpir")
    }
    assert "interval" not in first["self"] and "without intervals (--protocol published)" in text
    exact = report["new"][0]
    assert any(first["cross"][key] != exact["cross"][key] for key in ("tpr", "tpir", "top1"))
    assert "mixed_top1" not in exact["cross"] and "mixed" not in compat_text.terminal(report)
    assert (report["data"]["protocol"], published["data"]["protocol"]) == ("exact", "published")
    for place in (shown, text):
        assert "mixed top-1" in place and "--protocol published" in place


def test_criterion_is_strict_and_gain_is_relative(report):
    [first, same] = report["new"]
    assert same["compatible"] == "no" and same["criterion"] == {"tpr": "no", "tpir": "no"}
    assert same["difference"] == {"tpr": 0, "tpir": 0, "interval": {"tpr": [0, 0], "tpir": [0, 0]}}
    base, ceiling = report["old"]["self"], report["independent"]["self"]
    for model in (first, same):
        for key in ("tpr", "tpir"):
            assert model["difference"][key] == model["cross"][key] - base[key]
            low, high = model["difference"]["interval"][key]
            assert model["criterion"][key] == ("yes" if low > 0 else "no" if high <= 0 else "undecided")
            if ceiling[key] > base[key]:
                expected = (model["cross"][key] - base[key]) / (ceiling[key] - base[key])
                assert model["update_gain"][key] == pytest.approx(expected)
            else:
                assert model["update_gain"][key] is None


def test_update_gain():
    assert comparison.update_gain(0.7, 0.5, 0.9) == pytest.approx(0.5)
    assert comparison.update_gain(0.4, 0.5, 0.9) == pytest.approx(-0.25)
    assert comparison.update_gain(0.7, 0.5, None) is None
    assert comparison.update_gain(0.7, 0.5, 0.5) is None


@pytest.mark.parametrize(
    ("cross", "criterion", "compatible"),
    [
        ((0.9, 0.8), ("yes", "yes"), "yes"),
        ((0.9, 0.51), ("yes", "undecided"), "undecided"),
        ((0.1, 0.51), ("no", "undecided"), "no"),
        ((0.9, 0.1), ("yes", "no"), "no"),
    ],
)
def test_both_tests_must_hold(cross, criterion, compatible):
    """Resampled figures scatter by 0.02 to either side of the figures; the old self-test is 0.5 in both."""
    scatter = np.linspace(-0.02, 0.02, 100)

    def test(figures):
        figures = dict(zip(("tpr", "tpir"), figures))
        enough = {"people": 20, "errors": 1}
        resampled = {key: value + scatter for key, value in figures.items()}
        return comparison.Test(None, None, figures, resampled, {key: enough for key in figures})

    base = test((0.5, 0.5))
    base.resampled = {key: np.full(100, 0.5) for key in base.resampled}
    found = comparison.criterion(test(cross), base, None)
    assert found["criterion"] == dict(zip(("tpr", "tpir"), criterion)) and found["compatible"] == compatible


def test_a_plain_refresh_equals_a_gallery_mixed_by_hand(report, plain_class, shared_set, shared_plain):
    old, new = shared_plain["old_model"].templates(), shared_plain["new_model"].templates()
    enrolled = np.sort([template for gallery in shared_set.galleries.values() for template, _ in gallery])
    order = np.random.default_rng(0).permutation(enrolled)
    curves = {(curve["order"], curve["way"]): curve for curve in report["new"][0]["refresh"]}
    assert report["data"]["percent"] == list(range(0, 101, 10))
    for percent, tpir, top1 in zip(report["data"]["percent"], *map(curves["random", "plain"].get, ("tpir", "top1"))):
        done = set(order[: round(len(order) * percent / 100)].tolist())
        mixed = {template: (new if template in done else old)[template] for template in old}
        expected = plain_figures(plain_class, shared_set, mixed, new)
        assert (tpir, top1) == pytest.approx((expected["tpir"], expected["top1"]))
    cross, own = (report["new"][0][test]["tpir"] for test in ("cross", "self"))
    assert curves["dispersion", "plain"]["tpir"][:: len(report["data"]["percent"]) - 1] == [cross, own]


def test_thresholds_and_cohorts(make_report, report, plain_class, shared_set, shared_plain, tmp_path):
    old, new = shared_plain["old_model"].templates(), shared_plain["new_model"].templates()
    label = np.array([label for *_, label in shared_set.pairs])
    scores = {
        "old": plain_class.pair_scores(shared_set, old, old),
        "cross": plain_class.pair_scores(shared_set, old, new),
    }
    allowed = int(FPR * (label == 0).sum())
    threshold = np.sort(scores["old"][label == 0])[-1 - allowed]
    assert report["data"]["threshold"] == pytest.approx(threshold, abs=1e-5)
    rates = report["new"][0]["thresholds"]["cross"]
    assert rates["fmr"] == pytest.approx(np.mean(scores["cross"][label == 0] > threshold))
    assert rates["fnmr"] == pytest.approx(np.mean(scores["cross"][label == 1] <= threshold))

    cohorts, lost = tmp_path / "cohorts.txt", tmp_path / "lost.csv"
    cohorts.write_text("".join(f"{100 + person} {'even' if person % 2 == 0 else 'odd'}\n" for person in range(8)))
    out = make_report("--threshold", "0.9", "--cohorts", str(cohorts), "--flips", str(lost), "--bootstrap", "0")
    given, text = json.loads((out / "report.json").read_text()), (out / "report.md").read_text()
    assert given["data"]["threshold"] == 0.9 and "1 of 9 subjects are in no cohort" in text
    subject = dict([*shared_set.probes, *(entry for gallery in shared_set.galleries.values() for entry in gallery)])
    of_pair = [(subject[first] - 100, subject[second] - 100) for first, second, _ in shared_set.pairs]
    for rest, name in ((0, "even"), (1, "odd")):
        inside = np.array([a % 2 == b % 2 == rest and max(a, b) < 8 for a, b in of_pair])
        found = given["new"][0]["thresholds"]["cross"]["cohorts"][name]
        assert found["fmr"] == pytest.approx(np.mean(scores["cross"][inside & (label == 0)] > 0.9))
        assert found["fnmr"] == pytest.approx(np.mean(scores["cross"][inside & (label == 1)] <= 0.9))
        assert f"| {name} | First | new/old | all |" in text

    for model, before in zip(given["new"], report["new"]):  # without a bootstrap, the figures decide
        above = {key: model["cross"][key] > given["old"]["self"][key] for key in ("tpr", "tpir")}
        assert model["criterion"] == {key: "yes" if it else "no" for key, it in above.items()}
        assert "interval" not in model["cross"] and model["cross"]["tpr"] == before["cross"]["tpr"]
        assert model["thresholds"]["cross"]["interval"] == {"fmr": None, "fnmr": None}

    lines = list(csv.DictReader(lost.open()))
    flips = given["new"][0]["flips"]
    for test, at, key in (("cross-test", "rank 1", "rank1"), ("self-test", f"FPIR {FPIR:g}", "fpir")):
        mine = [line for line in lines if (line["model"], line["test"], line["at"]) == ("First", test, at)]
        assert len(mine) == flips[test.removesuffix("-test")][key]["flips"]
    assert lines and not [line for line in lines if line["model"] == "Same"]
    images = {name for name, template, *_ in shared_set.faces if template == int(lines[0]["template"])}
    assert (
        set(lines[0]["images"].split()) == images
        and (int(lines[0]["template"]), int(lines[0]["subject"])) in shared_set.probes
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MixBCT=work/a/model.pt:r50", ("MixBCT", "work/a/model.pt", "r50")),
        ("work/a/model.pt", ("a", "work/a/model.pt", "r18")),
        ("N=a.pt", ("N", "a.pt", "r18")),
        ("N=prefix,3", ("N", "prefix,3", None)),  # MXNet's file has its network
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
    low, high = report["new"][0]["difference"]["interval"]["tpr"]
    assert f"[{100 * low:+.2f}, {100 * high:+.2f}]" in shown and "95 % intervals, 9 people" in shown
    enrolled = [{subject for _, subject in rows} for rows in shared_set.galleries.values()]
    others = min(sum(subject not in gallery for _, subject in shared_set.probes) for gallery in enrolled)
    assert f"(at least {others} of them non-mated" in text
    assert "Same: NOT compatible" in text and "Same: NOT compatible" in shown
    for name in ("models", "thresholds", "backfill"):
        assert f"({name}.png)" in text and (report_dir / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        image = cv2.imread(str(report_dir / f"{name}.png"))
        assert image.std() > 10 and image.shape[1] <= 1600


def test_the_csv_has_the_figures(report, report_dir):
    lines = {tuple(line[:3]): line[3:] for line in csv.reader((report_dir / "report.csv").open())}
    first = report["new"][0]
    value, low, high = lines["First", "cross-test", "tpr"]
    assert float(value) == pytest.approx(first["cross"]["tpr"])
    assert [float(low), float(high)] == pytest.approx(first["cross"]["interval"]["tpr"])
    assert lines["First", "cross-test", "tpr better than old"][0] == first["criterion"]["tpr"]
    assert lines["Free", "self-test", "auc"] == [f"{report['independent']['self']['auc']:.7g}", "", ""]
    area = first["refresh"][0]["area"]
    assert float(lines["First", "refresh, random, plain", "area"][0]) == pytest.approx(area, rel=1e-6)
    assert float(lines["First", "new/old, all pairs", "fnmr"][0]) == pytest.approx(first["thresholds"]["cross"]["fnmr"])
    rate = first["flips"]["self"]["rank1"]["rate"]
    assert float(lines["First", "self-test", "negative flips at rank 1"][0]) == pytest.approx(rate, rel=1e-6)


def test_adapters(tmp_path, make_report, report, plain_class, shared_set, shared_plain, shared_models):
    """A map's two rows by loops over templates: the mapped query, and the point half way to the old one."""
    random, new_file, old_file = np.random.default_rng(4), shared_models["new_model"], shared_models["old_model"]
    matrix = random.normal(size=(16, 16))
    fitted = {"rows": 9, "held_out_cosine": 0.5, "strength": None, "kind": "procrustes"}
    sides = {side: f"{side}_feature.npy" for side in ("new", "old")}
    models = {"new_model": digest(new_file), "old_model": digest(old_file), "new_width": 16, "old_width": 16}
    Adapter(matrix, fitted | sides | models, tmp_path / "turn.npz").save()
    out = make_report("--adapter", f"Turn={tmp_path / 'turn.npz'}@First", "--bootstrap", "0", "--order", "random")
    *_, turned, both = json.loads((out / "report.json").read_text())["new"]
    assert (turned["name"], both["name"]) == ("Turn", "Turn, both models")
    old, new = (shared_plain[name].templates() for name in ("old_model", "new_model"))
    mapped = {template: feature @ matrix for template, feature in new.items()}
    mapped = {template: feature / np.linalg.norm(feature) for template, feature in mapped.items()}
    middle = {template: mapped[template] + old[template] for template in old}  # at alpha = 0.5, but for its length
    middle = {template: feature / np.linalg.norm(feature) for template, feature in middle.items()}
    check(turned["cross"], plain_figures(plain_class, shared_set, old, mapped))
    check(both["cross"], plain_figures(plain_class, shared_set, old, middle))
    for row in (turned, both):  # a re-embedded gallery is the new model's own
        assert row["self"]["tpir"] == report["new"][0]["self"]["tpir"] == row["refresh"][0]["tpir"][-1]
        assert row["refresh"][0]["tpir"][0] == row["cross"]["tpir"]


def test_an_adapter_of_other_models_is_refused(tmp_path, make_report, shared_models):
    fitted = {"rows": 9, "held_out_cosine": 0.5, "strength": None, "kind": "procrustes", "new": "n.npy", "old": "o.npy"}

    def save(width, **models):
        statement = fitted | {"new_model": None, "old_model": None, "new_width": width, "old_width": 16} | models
        Adapter(np.ones((width, 16)), statement, tmp_path / "map.npz").save()
        return f"{tmp_path / 'map.npz'}"

    with pytest.raises(UserError, match=r"map\.npz: fitted to o\.npy, which is not of"):
        make_report("--adapter", f"{save(16, old_model='sha256:0')}@First")
    with pytest.raises(UserError, match=r"map\.npz: maps width 8 to 16, but .* have 16 and 16; fit a map"):
        make_report("--adapter", f"{save(8)}@Free")
    with pytest.raises(
        UserError, match=r"--adapter .*: give \[NAME=\]MAP@MODEL with a MODEL of this report: First, Same, Free"
    ):
        make_report("--adapter", f"{save(16)}@Fist")
    with pytest.raises(UserError, match="two models are named 'Same'"):
        make_report("--adapter", f"Same={save(16)}@First")
