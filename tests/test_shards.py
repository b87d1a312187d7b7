"""WebDataset's shards and Hugging Face's data sets: read where they lie, in any order."""

import io
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import batches

from sslbench.data import data_name, open_split, subset
from sslbench.data.check import check
from sslbench.errors import UserError


def shard(path, images, labels, extra=()):
    """As webdataset's TarWriter: 000.cls, 000.png, 001.cls, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(png, "png")
            members = {f"{i:03d}.png": png.getvalue(), f"{i:03d}.json": b"{}", **dict(extra)}
            members |= {f"{i:03d}.cls": str(label).encode()} if label is not None else {}
            for name, blob in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(blob)
                tar.addfile(info, io.BytesIO(blob))


def test_webdatasets_shards_are_read_in_any_order_with_their_labels(tmp_path):
    x = open_split("builtin", "train")
    shard(tmp_path / "set/a-train-000.tar", x.images[:7], x.labels[:7].tolist())
    shard(tmp_path / "set/a-train-001.tar", x.images[7:12], x.labels[7:12].tolist())
    shard(tmp_path / "set/a-val-000.tar", x.images[20:23], [0, 1, 9])
    data = open_split(f"wds:{tmp_path}/set", "train")
    assert (len(data), data.name, data.labels.tolist()) == (12, "set", x.labels[:12].tolist())
    for i in (11, 0, 7):
        assert np.array_equal(np.asarray(data.read(i)), x.images[i].permute(1, 2, 0).numpy())
    part = subset(data, torch.tensor([8, 2]))
    assert part.read(0).tobytes() == data.read(8).tobytes() and part.fingerprint != data.fingerprint
    assert data_name(f"wds:{tmp_path}/set") == "set" and len(open_split(f"wds:{tmp_path}/set", "val").classes) == 10
    (_, alone), (_, helped) = batches(data, micro=4), batches(data, micro=4, workers=2)
    assert all(a.equal(b) for a, b in zip(alone, helped, strict=True)) and len(alone) == 8
    assert check(f"wds:{tmp_path}/set")["ok"]


def test_shards_that_are_none_are_named(tmp_path):
    x = open_split("builtin", "train").images
    with pytest.raises(UserError, match=r"no train split; expected tar files named .*\*train\*\.tar"):
        open_split(f"wds:{tmp_path}", "train")
    shard(tmp_path / "some/train.tar", x[:3], [0, None, 1])
    assert open_split(f"wds:{tmp_path}/some", "train").labels is None
    shard(tmp_path / "words/train.tar", x[:2], ["cat", "dog"])
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk/train.tar").write_text("no tar" * 200)
    for name in ("words", "junk"):
        with pytest.raises(UserError, match=rf"{name}/train.tar is not a shard of WebDataset"):
            open_split(f"wds:{tmp_path}/{name}", "train")


def test_without_the_extra_a_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'sslbench\[hf\]'"):
        open_split("hfds:cifar10", "train")


def test_a_hugging_face_data_set_is_read_by_its_columns(tmp_path):
    hf = pytest.importorskip("datasets", reason="needs the extra `hf`")
    x = open_split("builtin", "train")
    pictures = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in x.images[:12]]
    columns = {"image": hf.Image(), "label": hf.ClassLabel(names=x.classes)}
    whole = hf.Dataset.from_dict({"image": pictures, "label": x.labels[:12].tolist()}, features=hf.Features(columns))
    parts = hf.DatasetDict({"train": whole.select(range(9)), "validation": whole.select(range(9, 12))})
    parts.save_to_disk(tmp_path / "set")
    data, val = (open_split(f"hfds:{tmp_path}/set", split) for split in ("train", "val"))
    assert (len(data), len(val), data.name, data.classes) == (9, 3, "set", x.classes)
    assert data.labels.equal(x.labels[:9]) and data_name(f"hfds:{tmp_path}/set") == "set"
    assert np.array_equal(np.asarray(data.read(8)), x.images[8].permute(1, 2, 0).numpy())
    part = subset(data, torch.tensor([7, 2]))
    assert part.read(0).tobytes() == data.read(7).tobytes() and part.fingerprint != data.fingerprint
    (_, alone), (_, helped) = batches(data, micro=4), batches(data, micro=4, workers=2)
    assert all(a.equal(b) for a, b in zip(alone, helped, strict=True))
    whole.save_to_disk(tmp_path / "one")
    parts.remove_columns("image").save_to_disk(tmp_path / "blind")
    for name, says in {"one": "found one set without splits", "blind": "expected one column of images, found none",
                       "nowhere": "cannot be loaded"}.items():  # fmt: skip
        with pytest.raises(UserError, match=says):
            open_split(f"hfds:{tmp_path}/{name}", "train")
