"""Means and ranges over reports, against figures worked out by hand, and reports that do not belong together."""

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


def report(old, new, cross, free, **data):
    def figures(pair):
        return {"tpr": pair[0] / 100, "tpir": pair[1] / 100}

    gain = {key: (cross[i] - old[i]) / (free[i] - old[i]) for i, key in enumerate(("tpr", "tpir"))}
    return {
        "data": {"subset": "IJBC", "fpr": 1e-3, "fpir": 0.1, **data},
        "old": {"name": "f128_tiny", "self": figures(old)},
        "new": [
            {
                "name": "MixBCT",
                "self": figures(new),
                "cross": figures(cross),
                "update_gain": gain,
                "compatible": all(mine > base for mine, base in zip(cross, old)),
            }
        ],
        "independent": {"name": "free", "self": figures(free), "cross": figures((0, 0.05))},
    }


@pytest.fixture
def paths(tmp_path):
    for name, figures in SEEDS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report(*figures)))
    return [str(tmp_path / f"{name}.json") for name in SEEDS]


def table_of(path):
    """Header and rows, the cells stripped."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_mean_and_range(paths, tmp_path, capsys):
    out = tmp_path / "new_folder" / "comparison.md"
    compat_over_seeds.main([*paths, "--out", str(out)])
    header, old, mix, free = table_of(out)
    assert header == compat_over_seeds.HEADER
    gains = [[(cross[i] - base[i]) / (top[i] - base[i]) for base, _, cross, top in SEEDS.values()] for i in (0, 1)]
    assert old == ["old model", "72.0 (70.0 to 74.0)", "61.0 (60.0 to 62.0)", "", "", "", "", ""]
    assert mix == [
        "MixBCT",
        "91.0 (90.0 to 92.0)",
        "87.0 (86.0 to 88.0)",
        "78.0 (71.0 to 83.0)",
        "72.0 (70.0 to 75.0)",
        "2 of 3",
        *(f"{statistics.mean(gain):.2f} ({min(gain):.2f} to {max(gain):.2f})" for gain in gains),
    ]
    assert free[:5] == ["free", "95.0 (94.0 to 96.0)", "91.0 (90.0 to 92.0)", "0.0 (0.0 to 0.0)", "0.1 (0.1 to 0.1)"]
    text = out.read_text(encoding="utf-8")
    assert "FPR 0.001" in text and "FPIR 0.1" in text and "3 seeds" in text
    assert text in capsys.readouterr().out


def test_one_report_keeps_its_own_figures(paths, tmp_path):
    compat_over_seeds.main([paths[1], "--out", str(tmp_path / "one.md")])
    _, old, mix, _ = table_of(tmp_path / "one.md")
    assert old[:3] == ["old model", "72.0", "61.0"]
    assert mix == ["MixBCT", "92.0", "87.0", "71.0", "71.0", "0 of 1", "-0.05", "0.33"]
    assert "seeds;" not in (tmp_path / "one.md").read_text()


def test_undefined_figures_and_no_independent_model(tmp_path):
    both = [report(*figures) for figures in list(SEEDS.values())[:2]]
    for one in both:
        del one["independent"]
    both[0]["new"][0]["update_gain"] = {"tpr": None, "tpir": None}
    table = compat_over_seeds.rows(both)
    assert [row[0] for row in table] == ["old model", "MixBCT"]
    assert table[1][-2:] == ["–", "–"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one["new"].append({**one["new"][0], "name": "L2"}), "MixBCT, L2, free, .*a.json.*same models"),
        (lambda one: one["data"].update(fpr=1e-4), "FPR 0.0001 .*FPR 0.001"),
        (lambda one: one.pop("old"), "KeyError: 'old'"),
    ],
)
def test_reports_that_do_not_belong_together(paths, tmp_path, change, message):
    other = report(*SEEDS["b"])
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
