"""Means and ranges over reports, against figures worked out by hand, and reports that do not belong together."""

import csv
import json
import statistics

import pytest

from tools.ijbc_eval import compat_over_seeds
from tools.ijbc_eval.files import EvalError

SEEDS = {  # old self, new self, new cross, independent self: (1:1, 1:N) in %
    "a": [(70, 60), (90, 88), (80, 70), (95, 90)],
    "b": [(72, 61), (92, 87), (71, 71), (94, 91)],
    "c": [(74, 62), (91, 86), (83, 75), (96, 92)],
}
SAID = {"a": "yes", "b": "undecided", "c": "yes"}


def report(name, **data):
    old, new, cross, free = SEEDS[name]

    def figures(pair):
        return {"tpr": pair[0] / 100, "tpir": pair[1] / 100}

    def flips(rate):
        return {"rank1": {"rate": rate}, "fpir": {"rate": 0.9}}

    gain = {key: (cross[i] - old[i]) / (free[i] - old[i]) for i, key in enumerate(("tpr", "tpir"))}
    number = list(SEEDS).index(name)
    ways = [
        {"order": "random", "way": way, "area": area / 100} for way, area in (("plain", 70), ("merged", 80 + number))
    ]
    return {
        "data": {"subset": "IJBC", "fpr": 1e-3, "fpir": 0.1, **data},
        "old": {
            "name": "f128_tiny",
            "self": figures(old),
            "thresholds": {"self": {"fmr": 0.001}, "self_held_out": {"fmr": 0.002}},
        },
        "new": [
            {
                "name": "MixBCT",
                "self": figures(new),
                "cross": figures(cross),
                "update_gain": gain,
                "compatible": SAID[name],
                "refresh": [*ways, {"order": "dispersion", "way": "plain", "area": 0.1}],
                "thresholds": {
                    "cross": {"fmr": 0.004 + number / 1000},
                    "cross_mapped": {"fmr": 0.003},
                    "self_mapped": None,
                },
                "flips": {"cross": flips(0.05), "self": flips(0.01 * number)},
            }
        ],
        "independent": {
            "name": "free",
            "self": figures(free),
            "refresh": ways[1:],
            "thresholds": {"self": {"fmr": 0}, "self_mapped": None},
            "flips": {"self": flips(0.02)},
        },
    }


@pytest.fixture
def paths(tmp_path):
    for name in SEEDS:
        (tmp_path / f"{name}.json").write_text(json.dumps(report(name)))
    return [str(tmp_path / f"{name}.json") for name in SEEDS]


def tables_of(path):
    """{column: {model: cell}} over all tables."""
    found = {}
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("| ")]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        for row in rows[1:]:
            for column, cell in zip(rows[0][1:], row[1:]):
                found.setdefault(column, {})[row[0]] = cell
    return found


def test_mean_and_range(paths, tmp_path, capsys):
    out = tmp_path / "new_folder" / "comparison.md"
    compat_over_seeds.main([*paths, "--out", str(out)])
    found = tables_of(out)
    gains = [[(cross[i] - base[i]) / (top[i] - base[i]) for base, _, cross, top in SEEDS.values()] for i in (0, 1)]
    assert found["self 1:1"] == {
        "old model": "72.0 (70.0–74.0)",
        "MixBCT": "91.0 (90.0–92.0)",
        "free": "95.0 (94.0–96.0)",
    }
    assert found["self 1:N"]["MixBCT"] == "87.0 (86.0–88.0)"
    assert found["cross 1:1"] == {"old model": "", "MixBCT": "78.0 (71.0–83.0)", "free": ""}
    assert found["cross 1:N"]["MixBCT"] == "72.0 (70.0–75.0)"
    assert found["compatible"] == {"MixBCT": "2 yes, 1 undecided"}
    for column, gain in zip(("update gain 1:1", "update gain 1:N"), gains):
        dash = " to " if min(gain) < 0 else "–"
        expected = f"{statistics.mean(gain):.2f} ({min(gain):.2f}{dash}{max(gain):.2f})"
        assert found[column] == {"MixBCT": expected}
    assert min(gains[0]) < 0 < min(gains[1])
    assert found["new/old"] == {"MixBCT": "5.00 (4.00–6.00)", "free": ""}  # times the 0.001 of old/old
    assert found["new/old mapped"]["MixBCT"] == "1.50 (1.50–1.50)"  # times the 0.002 of the people held out
    assert found["new/new mapped"] == {"MixBCT": "–", "free": "–"} and found["new/new"]["free"] == "0.00 (0.00–0.00)"
    assert found["plain"] == {"MixBCT": "70.0 (70.0–70.0)", "free": ""}
    assert found["merged"] == {"MixBCT": "81.0 (80.0–82.0)", "free": "81.0 (80.0–82.0)"}
    assert found["flips new/old"]["MixBCT"] == "5.0 (5.0–5.0)" and found["flips new/new"]["MixBCT"] == "1.0 (0.0–2.0)"
    text = out.read_text(encoding="utf-8")
    assert "FPR 0.001" in text and "FPIR 0.1" in text and "3 seeds" in text and "order random" in text
    assert text in capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    lines = {(line["model"], line["figure"]): line for line in csv.DictReader(out.with_suffix(".csv").open())}
    found = lines["MixBCT", "self 1:1"]
    assert [float(found[key]) for key in ("mean", "low", "high")] == pytest.approx([91, 90, 92])
    assert lines["MixBCT", "compatible"]["mean"] == "2 yes, 1 undecided"


def test_one_report_keeps_its_own_figures(paths, tmp_path):
    compat_over_seeds.main([paths[1], "--out", str(tmp_path / "one.md")])
    found = tables_of(tmp_path / "one.md")
    assert [found[column]["MixBCT"] for column in ("self 1:1", "cross 1:N", "compatible")] == [
        "92.0",
        "71.0",
        "1 undecided",
    ]
    assert [found[f"update gain {name}"]["MixBCT"] for name in ("1:1", "1:N")] == ["-0.05", "0.33"]
    assert "seeds;" not in (tmp_path / "one.md").read_text()


def test_undefined_figures_and_no_independent_model(tmp_path):
    both = [report("a"), report("b")]
    for number, one in enumerate(both):
        del one["independent"]
        if number:
            one["new"][0]["update_gain"] = {"tpr": None, "tpir": None}
        (tmp_path / f"{number}.json").write_text(json.dumps(one))
    compat_over_seeds.main([str(tmp_path / "0.json"), str(tmp_path / "1.json"), "--out", str(tmp_path / "two.md")])
    found = tables_of(tmp_path / "two.md")
    assert list(found["self 1:1"]) == ["old model", "MixBCT"]
    assert found["update gain 1:1"]["MixBCT"] == found["update gain 1:N"]["MixBCT"] == "–"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one["new"].append({**one["new"][0], "name": "L2"}), "MixBCT, L2, free, .*a.json.*same models"),
        (lambda one: one["data"].update(fpr=1e-4), "FPR 0.0001 .*FPR 0.001"),
        (lambda one: one.pop("old"), "KeyError: 'old'"),
        (lambda one: one["new"][0].update(compatible=True), "compatible = True.*run that again"),  # as once
        (lambda one: one["new"][0].update(refresh=[]), "order none"),
    ],
)
def test_reports_that_do_not_belong_together(paths, tmp_path, change, message):
    other = report("b")
    change(other)
    (tmp_path / "b.json").write_text(json.dumps(other))
    with pytest.raises(EvalError, match=rf"b\.json: .*{message}"):
        compat_over_seeds.read(paths)


def test_files_that_are_no_reports(paths, tmp_path):
    with pytest.raises(EvalError, match=r"d\.json: no such file; run compat_report"):
        compat_over_seeds.read([*paths, str(tmp_path / "d.json")])
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(EvalError, match=r"b\.json: not a report"):
        compat_over_seeds.read(paths)
