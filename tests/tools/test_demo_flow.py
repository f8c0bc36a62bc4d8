"""What tools/demo.sh runs again and what it keeps: a stand-in for `python` notes each command and makes its files."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]
ALL = ["draw", "split", "old", "feature", "avg", "credible", "MixBCT", "BCT"]
ALL += ["independent", "feature", "map", "map", "report"]
COMMANDS = {  # a pattern of the command line -> its short name
    "draw_demo_data": "draw",
    "split_dataset": "split",
    "train_old_softmax": "old",
    "get_feature.py": "feature",
    "get_avg": "avg",
    "denoise": "credible",
    "MixBCT/train": "MixBCT",
    "/BCT/train": "BCT",
    "train_old_arc": "independent",
    "fit_adapter": "map",
    "compat_report": "report",
}
PYTHON = """#!/usr/bin/env bash
echo "$*" >> calls
root=demo/seed0
new=$root/work_dirs/OPclass_tiny_to_tiny_x2
for file in $root/dataset/IJBC/meta/ijbc_1N_probe_mixed.csv $root/dataset/ms1m-retinaface-t1/train_part_70_class.idx \\
    $root/work_dirs/{f128_tiny_softmax_class30,f{128,256}_tiny_x2_arc_class70}/model.pt \\
    ${new}_{MixBCT,BCT}_softmax_to_arc_f{128,256}/model.pt \\
    $root/feature_save/OPclass/{{procrustes,ridge}{,_f256}.npz,f{128,256}_tiny_x2_arc_class70_feature.npy} \\
    $root/feature_save/OPclass/f128_tiny_softmax_class70_{,avg_,credible_ratio_90_}feature.npy; do
    mkdir -p "$(dirname "$file")" && touch "$file"
done
if [ -n "$FAIL" ] && [[ $* == *$FAIL* ]]; then kill -KILL $$; fi
if [ -n "$STOP" ] && [[ $* == *$STOP* ]]; then echo "stopped by SIGTERM at step 3; resume with: ..."; fi
"""


@pytest.fixture
def demo(tmp_path):
    """A function that runs demo.sh in a copy of the tree and returns `(exit status, [command], output)`."""
    shutil.copytree(REPO / "configs", tmp_path / "configs")
    for method in ("MixBCT", "BCT"):
        shutil.copytree(REPO / f"BCT_methods/{method}", tmp_path / f"BCT_methods/{method}")
    (tmp_path / "core").mkdir()
    (tmp_path / "tools/ijbc_eval").mkdir(parents=True)
    for path in ("core/files.py", "train_old_arc.py", "tools/ijbc_eval/embed.py"):
        (tmp_path / path).write_text("first = 1\n")
    shutil.copy(REPO / "tools/demo.sh", tmp_path / "tools")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(PYTHON)
    (tmp_path / "bin/python").chmod(0o755)

    def run(*methods, fail="", stop="", overrides="", width=""):
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        environment |= {"FAIL": fail, "STOP": stop, "BCT_OVERRIDES": overrides, "WIDTH": width}
        (tmp_path / "calls").write_text("")
        command = ["bash", "tools/demo.sh", "0", *(methods or ["MixBCT", "BCT", "independent"])]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, (tmp_path / "calls").read_text().splitlines(), done.stdout + done.stderr

    return run


def names(calls):
    return [next(name for pattern, name in COMMANDS.items() if pattern in call) for call in calls]


def test_what_is_there_is_kept(demo):
    status, calls, _ = demo()
    assert (status, names(calls)) == (0, ALL)
    assert names(demo()[1]) == ["report"]
    assert "--new MixBCT=" in calls[-1] and "--new BCT=" in calls[-1] and "--independent independent=" in calls[-1]
    for kind in ("procrustes", "ridge"):
        assert f"--adapter {kind}=demo/seed0/feature_save/OPclass/{kind}.npz@independent" in calls[-1]


def test_changed_code_is_run_again(demo, tmp_path):
    demo()
    configs = "BCT_methods/BCT/configs/demo/OPclass_tiny_to_tiny_x2"
    for path, again in [
        ("core/files.py", ALL),
        ("configs/base.py", ALL),
        ("BCT_methods/BCT/loss.py", ["BCT", "report"]),
        (f"{configs}_BCT_softmax_to_arc_f128.py", ["BCT", "report"]),
        (f"{configs}_BCTscale16_softmax_to_arc_f128.py", ["report"]),
        ("tools/ijbc_eval/embed.py", ["report"]),
    ]:
        with open(tmp_path / path, "a") as file:
            file.write("# changed\n")
        assert names(demo()[1]) == again, path


def test_a_lost_result_is_made_again_and_what_follows_it_even_after_a_kill(demo, tmp_path):
    demo()
    (tmp_path / "demo/seed0/work_dirs/f128_tiny_softmax_class30/model.pt").unlink()
    status, calls, _ = demo(fail="get_avg")
    assert status == 1 and names(calls) == ["old", "feature", "avg"]
    assert names(demo()[1]) == ALL[ALL.index("avg") :]


def test_overrides_are_part_of_a_run(demo):
    demo()
    assert names(demo(overrides="--num_epoch 1")[1]) == ALL


def test_another_width_stands_beside(demo):
    demo()
    status, calls, _ = demo(width="256")
    assert (status, names(calls)) == (0, ALL[ALL.index("MixBCT") :])  # the old model's files are those that are there
    for call, name in zip(calls, names(calls)):
        assert "f256" in call, call
        if name in ("MixBCT", "BCT", "independent", "feature"):
            assert re.search(r"--embedding_size 256 --output work_dirs/\S+256\S*( |$)", call), call
    assert "--new MixBCT=demo/seed0/work_dirs/OPclass_tiny_to_tiny_x2_MixBCT_softmax_to_arc_f256/model.pt" in calls[-1]
    assert "--out demo/seed0/comparison_f256 " in calls[-1] and "/procrustes_f256.npz@independent" in calls[-1]
    assert names(demo()[1]) == names(demo(width="256")[1]) == ["report"]


@pytest.mark.parametrize("how", ["fail", "stop"])
def test_a_run_that_was_cut_short_is_resumed(demo, tmp_path, how):
    status, calls, output = demo(**{how: "BCT_methods/BCT/train"})
    assert status == 1 and names(calls)[-1] == "BCT" and "not finished" in output
    checkpoint = tmp_path / "demo/seed0/work_dirs/OPclass_tiny_to_tiny_x2_BCT_softmax_to_arc_f128/checkpoint.pt"
    checkpoint.touch()
    status, calls, _ = demo()
    assert (status, names(calls)) == (0, ["BCT", *ALL[ALL.index("independent") :]])
    assert calls[0].endswith("--resume True") and checkpoint.exists()
    assert names(demo()[1]) == ["report"]


def test_changed_code_does_not_go_on_from_old_checkpoints(demo, tmp_path):
    demo(fail="BCT_methods/BCT/train")
    checkpoint = tmp_path / "demo/seed0/work_dirs/OPclass_tiny_to_tiny_x2_BCT_softmax_to_arc_f128/checkpoint.pt"
    checkpoint.touch()
    (tmp_path / "BCT_methods/BCT/loss.py").write_text("changed = 1\n")
    calls = demo()[1]
    assert names(calls)[0] == "BCT" and "--resume" not in calls[0] and not checkpoint.exists()


def test_an_unknown_method_shows_before_anything_runs(demo):
    status, calls, output = demo("MixBCT", "MixBTC")
    assert status == 1 and not calls and "MixBTC_softmax_to_arc_f128.py: no such config" in output


def methods():
    return re.search(r"^METHODS := (.*)$", (REPO / "Makefile").read_text(), re.M)[1].split()


def test_every_compared_method_has_a_config():
    for method in methods():
        name = f"OPclass_tiny_to_tiny_x2_{method}_softmax_to_arc_f128.py"
        assert len(list(REPO.glob(f"BCT_methods/*/configs/demo/{name}"))) == 1, f"no {name}"


def test_the_results_page_has_a_row_a_model():
    text = (REPO / "docs/results.md").read_text(encoding="utf-8")
    table = text.split("demo/comparison.md begins -->")[1].split("<!-- demo/comparison.md ends")[0]
    rows = re.findall(r"^\| (.+?) *\|", table, re.M)
    whole = ["model", "old model", *methods(), "independent"]
    found = [row for row in rows if row in whole]  # the report's maps are rows too
    assert found[: len(whole)] == whole  # the first table; others may leave some out
