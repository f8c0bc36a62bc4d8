"""docs/deploy.md: its code runs, in order, and new queries find their people in a gallery of old features."""

import pathlib
import re

import cv2
import numpy as np
import pytest
import torch

import backbones
from dataset import to_input
from tests.conftest import draw_image
from tests.tools.export.test_export_onnx import trained
from tools.export.export_onnx import export

PAGE = pathlib.Path(__file__).resolve().parents[3] / "docs/deploy.md"
OLD, NEW, PEOPLE = 24, 40, 6


def widened(state, width, seed=1):
    """A state dict of a wider network whose first coordinates are the given network's embedding: compatible."""
    torch.manual_seed(seed)
    wide = backbones.get_model("tiny", width).state_dict()
    for key, value in wide.items():
        part = value if value.shape == state[key].shape else value[: len(state[key])]
        part.copy_(state[key])
    return wide


@pytest.mark.parametrize("width", [NEW, OLD])
def test_the_page_runs_and_finds_everyone(width, tmp_path, monkeypatch, capsys):
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    old = trained(tmp_path / "old.pt", width=OLD)
    new = widened(old.state_dict(), width) if width > OLD else old.state_dict()
    torch.save(new, "new.pt")
    export(tmp_path / "new.pt", tmp_path / "new.onnx", "tiny")
    pictures = [draw_image(np.random.default_rng(person)) for person in range(PEOPLE)]
    with torch.no_grad():
        images = torch.from_numpy(np.stack(pictures)[..., ::-1].copy())
        np.save("old_gallery.npy", 3 * old(to_input(images)).numpy())  # not normalised
    for folder in ("query", "gallery"):
        (tmp_path / folder).mkdir()
        for person, picture in enumerate(pictures):
            cv2.imwrite(f"{folder}/{person}.jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 98])
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert capsys.readouterr().out.split("\n")[-2].startswith(f"tiny {width} RGB")
    assert names["people"][:, 0].tolist() == [1, 2] and names["scores"][:, 0].min() > 0.99
    assert names["index"].d == OLD and names["index"].ntotal == PEOPLE
    scores, people = names["index"].search(names["to_old_width"](names["embed"](["query/0.jpg"]), OLD), 1)
    assert people[0, 0] == 0 and scores[0, 0] > 0.9999  # the refreshed entry is the query's own feature
    narrow = names["to_old_width"](np.eye(3, 16, dtype=np.float32), OLD)
    assert narrow.shape == (3, OLD) and not narrow[:, 16:].any()
    assert (tmp_path / "gallery.faiss").is_file()
