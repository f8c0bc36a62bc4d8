"""The README's flow, each command verbatim, on a copy of the tree with small data.

Only what sets the scale is changed: eight ranks become two, `BCT_OVERRIDES` makes the networks `tiny` and the runs
short, and where r18 and r50 are named for the evaluation, `tiny` is what was trained.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from core.config import load_config
from old_model.feature_set import FeatureSet
from tests.machines import copy_tree
from tests.ranks import run_session
from tools.ijbc_eval.align import misfit
from tools.make_dataset.landmarks import Landmarks

REPO = pathlib.Path(__file__).resolve().parents[1]
OVERRIDES = "--network tiny --num_epoch 1 --batch_size 16 --num_workers 1"
OLD, NEW = "f128_r18_softmax_class30", "OPclass_ms1mv3_r18_to_r50_MixBCT_softmax_to_arc_f128"


def flow_commands():
    """All commands of the section "The flow", in order."""
    section = (REPO / "README.md").read_text(encoding="utf-8").split("\n## The flow\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```\n(.*?)```", section, re.S)
    return [line for block in blocks if re.match(r"(python|cd|torchrun) ", block) for line in block.splitlines()]


def at_demo_scale(command):
    command = command.replace("--nproc_per_node=8", "--nproc_per_node=2")
    return re.sub(r"(?<=net )r18|(?<=net )r50|(?<=\.pt:)r50", "tiny", command)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what the flow needs, with demo data in the places that the README names."""
    root = tmp_path_factory.mktemp("readme") / "repo"
    copy_tree(root)
    draw = "tools/demo_data/draw_demo_data.py --root dataset --seed 5 --identities 12 --images 10 --eval-identities 8"
    subprocess.run([sys.executable, *draw.split()], cwd=root, check=True, capture_output=True)
    return root


def run_in_one_shell(commands, root):
    environment = {
        **os.environ,
        "BCT_OVERRIDES": OVERRIDES,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    script = "set -e\n" + "\n".join(map(at_demo_scale, commands))
    result = run_session(["bash", "-c", script], cwd=root, env=environment)
    assert result.returncode == 0, f"{script}\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
    return result.stdout


def test_the_flow(tree):
    commands = flow_commands()
    assert len(commands) >= 13, "the README's flow got lost"
    text = run_in_one_shell(commands, tree)
    for stem in ("train_part_30_class", "train_part_70_class", "train_part_30_data", "train_part_70_data"):
        assert (tree / f"dataset/ms1m-retinaface-t1/{stem}.rec").exists()

    features = np.load(tree / "feature_save/OPclass/f128_r18_softmax_class70_feature.npy", mmap_mode="r")
    credible = np.load(tree / "feature_save/OPclass/f128_r18_softmax_class70_credible_ratio_90_feature.npy")
    means = np.load(tree / "feature_save/OPclass/f128_r18_softmax_class70_avg_feature.npy")
    assert features.shape == (80, 128) and credible.shape == (80,) and credible.sum() == 72 and means.shape == (8, 128)

    for name in (OLD, NEW):
        log = (tree / "work_dirs" / name / "training.log").read_text()
        assert "2 ranks on" in log and "Global Step" in log
        assert (tree / "work_dirs" / name / "model.pt").exists()
    shards = [
        torch.load(tree / f"work_dirs/{NEW}/softmax_fc_gpu_{rank}.pt", weights_only=True)["weight"] for rank in (0, 1)
    ]
    assert [shard.shape for shard in shards] == [(4, 128), (4, 128)]
    for table in ("TPR", "TPIR"):
        assert table in text, f"no table of {table} in what the evaluation printed"
    results = sorted(path.name for path in (tree / "IJB_result").glob("*.npz"))
    assert results == [
        f"{NEW}_IJBC_11.npz",
        f"{NEW}_to_{OLD}_IJBC_11.npz",
        f"{NEW}_to_{OLD}_IJBC_1N.npz",
        f"{OLD}_IJBC_11.npz",
    ]
    report = json.loads((tree / "work_dirs/report/report.json").read_text())
    assert [new["name"] for new in report["new"]] == ["MixBCT"] and report["independent"]["name"] == "r50"
    self_test, cross_test = (np.load(tree / "IJB_result" / name)["scores"] for name in results[:2])
    assert self_test.shape == cross_test.shape and not np.allclose(self_test, cross_test)


def test_the_other_spelling_of_the_methods_folder(monkeypatch):
    """`cd BCT_Methods/MixBCT/ && python train.py …`, as commands in circulation have it."""
    folder, name = REPO / "BCT_Methods" / "MixBCT", f"configs/{NEW}.py"
    assert folder.samefile(REPO / "BCT_methods" / "MixBCT")  # a link, or a disk that ignores case
    monkeypatch.chdir(folder)
    assert load_config(name) == load_config(REPO / "BCT_methods" / "MixBCT" / name)
    command = [sys.executable, "train.py", "--help"]
    shown = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: train.py"), shown.stderr
    walked = {path for path in REPO.rglob("train.py") if ".venv" not in path.parts}
    assert len({path.resolve() for path in walked}) == len(walked), "the link is walked as well"


def test_methods_and_folders_are_all_in_the_readme():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    for folder in sorted(path.parent for path in REPO.glob("BCT_methods/*/train.py")):
        assert f"(BCT_methods/{folder.name})" in text, f"{folder.name} is not in the README's table of methods"
        assert (folder / "README.md").exists()


def test_links_of_the_documents_lead_somewhere():
    for document in [*REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("BCT_methods/*/README.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.relative_to(REPO)}: no {target}"


# --- your own model and images: tests/test_own_road.py runs the commands --------------------------------------


def own_commands():
    section = (REPO / "README.md").read_text(encoding="utf-8").split("\n## Your own model and images\n")[1]
    return re.search(r"```\n(.*?)```", section, re.S)[1].splitlines()


def code_blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (REPO / page).read_text(encoding="utf-8"), re.S)


def test_the_own_roads_config_is_one_of_the_method(tmp_path):
    (block,) = code_blocks("docs/own_data.md", "python")
    (tmp_path / "mine.py").write_text(block)
    cfg = load_config(tmp_path / "mine.py", (), REPO / "BCT_methods/MixBCT/train.py")
    assert cfg.rec == str(REPO / "dataset/mine") and cfg.output == str(REPO / "work_dirs/mine")
    assert (cfg.network, cfg.embedding_size, cfg.mix_ratio) == ("r50", 512, 0.3)
    (name,) = re.findall(r"get_feature.py .*--SD (\w+)", "\n".join(own_commands()))
    files = FeatureSet(name)
    assert [cfg.old_embedding, cfg.old_embedding_label] == [str(files.feature), str(files.label)]
    assert cfg.credible_old_feature == str(files.credible(0.9))


def test_the_line_of_landmarks_that_is_shown_is_read(tmp_path):
    (line,) = [block for block in code_blocks("docs/own_data.md", "") if ".jpg " in block]
    (tmp_path / "landmarks.txt").write_text(line)
    points = Landmarks(tmp_path / "landmarks.txt")[b"Ann Smith/0001.jpg"]
    assert misfit(points[None])[0] < 1


def test_the_papers_of_all_methods_are_cited():
    cited = set(re.findall(r"arxiv.org/abs/([\d.]+)", (REPO / "CITATION.cff").read_text(encoding="utf-8")))
    for readme in REPO.glob("BCT_methods/*/README.md"):
        assert re.search(r"arXiv:([\d.]+)", readme.read_text(encoding="utf-8"))[1] in cited, readme


def test_the_readme_is_one_page_for_each_subject():
    assert len((REPO / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
