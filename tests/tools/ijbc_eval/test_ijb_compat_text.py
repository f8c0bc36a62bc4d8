"""The report as text and pictures: what fits, and what is said of figures that decide nothing."""

import json
import re
import types

import cv2
import numpy as np

from tools.ijbc_eval import comparison, compat_plots, compat_report, compat_text
from tools.ijbc_eval.metrics import Search


def test_long_names_and_many_models_fit(report, tmp_path):
    """The terminal's 100 columns and a printable picture; widest where differences and published figures are."""
    long = [
        {**model, "name": f"OPclass_ms1mv3_r18_to_r50_{number}_softmax_to_arc_f512_{'x' * 40}"}
        for number in range(2)
        for model in report["new"]
    ]
    wide = json.loads(json.dumps({**report, "new": long}))
    for model in wide["new"]:
        model["difference"] = {"tpr": -1, "tpir": -1, "interval": {"tpr": [-1, -0.99], "tpir": [-1, -0.99]}}
    shown = compat_text.terminal(wide)
    assert max(map(len, shown.splitlines())) <= 100
    assert "-100.00 [-100.00, -99.00]" in shown and re.sub(r"\W", "", long[0]["name"]) in re.sub(r"\W", "", shown)
    compat_plots.plot_all(wide, tmp_path)
    for name in ("models", "thresholds", "backfill"):
        assert cv2.imread(str(tmp_path / f"{name}.png")).shape[1] <= 1600


def test_verdicts(report):
    base = report["old"]["self"]
    better = {**base, "tpr": 0.99, "tpir": 0.99}
    model = {"name": "Good", "self": better, "cross": better, "compatible": "yes"}
    [verdict] = compat_text.verdicts({**report, "new": [{**model, "criterion": {"tpr": "yes", "tpir": "yes"}}]})
    assert verdict.startswith("Good: compatible")
    half = {"name": "Half", "self": base, "cross": base, "compatible": "no", "criterion": {"tpr": "yes", "tpir": "no"}}
    [short, worse] = compat_text.verdicts({**report, "new": [half]})
    assert short.startswith("Half: NOT compatible") and "TPIR" in short and "TPR" not in short
    assert "no better" in worse and "1:1 TPR" in worse
    open_one = {**model, "name": "Open", "compatible": "undecided", "criterion": {"tpr": "undecided", "tpir": "yes"}}
    [said] = compat_text.verdicts({**report, "new": [open_one]})
    assert said.startswith("Open: undecided") and "1:1 TPR" in said and "TPIR" not in said


def test_caveats(report):
    few = {key: {"people": 5, "errors": 1} for key in ("tpr", "tpir")}
    said = compat_text.caveats({**report, "data": {**report["data"], "rests_on": few, "protocol": "published"}})
    for who in ("genuine pairs", "mated probes"):
        assert f"5 people with {who} are too few for a yes or no, which needs 6." in said
    assert [line for line in compat_text.caveats(report) if "No score map" not in line] == []
    data = {**report["data"], "fpr": 1e-6, "fpir": 1e-5, "threshold_claimed": True}
    lines = compat_text.caveats({**report, "data": data, "bad_images": ["3.jpg"]})
    assert len(lines) == 3
    [read, nowhere, _, fpr, *_] = compat_text.caveats({**report, "data": {**data, "protocol": "published"}})
    assert "--protocol published" in read and nowhere.startswith("9 probes are of people in no gallery")
    assert "not a single error" in lines[0] and "not a single error" not in fpr
    said = compat_text.caveats({**report, "data": {**data, "bootstrap": 0, "threshold_claimed": False}})
    assert "--bootstrap 0" in said[0] and "No score map at the deployed" in said[-1]


def test_a_published_fpir_that_nobody_may_pass(report):
    """One stranger fewer passes than the rate says, so 19 of them do not resolve 0.1 and 20 do."""
    for count in (19, 20):
        data = {**report["data"], "fpir": 0.1, "protocol": "published", "non_mated_probes": count}
        strangers = Search(np.zeros(count, bool), None, np.arange(count))
        nobody = not (strangers.score > strangers.threshold_at(0.1, "published")).any()
        said = any("to resolve FPIR 0.1: not a single error" in line for line in compat_text.too_few(data))
        assert said == nobody == (count == 19)


def test_curves_beyond_the_map_are_starred(report):
    """Ten strangers' best scores 0 ... 9: one may pass, so the threshold is 8."""
    reading = types.SimpleNamespace(fpir=0.1, protocol="exact")
    steps = [[Search(np.zeros(10, bool), None, np.arange(10) - lower)] for lower in (3, 0)]
    for last, expected in ((8, False), (7.9, True)):
        assert comparison.Comparison._beyond(types.SimpleNamespace(reading=reading), steps, last) == expected
    model = json.loads(json.dumps(report["new"][0]))
    assert not any(curve["beyond_map"] for curve in model["refresh"] if curve["way"] == "plain")
    for curve in model["refresh"]:
        curve["beyond_map"] = curve["order"] == "dispersion"
    text = compat_text.markdown({**report, "new": [model], "independent": {**report["independent"], "refresh": []}})
    assert "| First | dispersion | plain* |" in text and "| First | random | plain |" in text and " *: the thr" in text


def test_undefined_figures_become_null_and_can_be_drawn(report, tmp_path):
    nothing = compat_report.without_nan({"a": [float("nan"), 1.0, {"b": float("nan")}]})
    assert nothing == {"a": [None, 1.0, {"b": None}]}
    model = json.loads(json.dumps(report["new"][0]))
    model["cross"]["tpir"] = None
    for curve in model["refresh"]:
        curve |= {"tpir": [None] * 11, "area": None}
    compat_plots.plot_all({**report, "new": [model]}, tmp_path)
    assert "–" in compat_text.markdown({**report, "new": [model]})
