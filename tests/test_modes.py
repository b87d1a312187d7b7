"""Images that are not 8-bit RGB: scaled as they should be, or refused by file and mode; rows without an image."""

import numpy as np
import pytest
import torch
from PIL import Image

from sslbench.data import open_split
from sslbench.data.check import check
from sslbench.data.images import FolderImages
from sslbench.data.loader import MicroBatches, evaluation_batches
from sslbench.errors import UserError

CPU = torch.device("cpu")
RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
GREY = np.rint(RAMP / 257).astype(np.uint8)  # what each of the images below shows
PICTURE = Image.fromarray(GREY)


def tiff12(path):
    """A grey TIFF of 12 bits a pixel: two pixels in three bytes."""
    x = np.rint(RAMP / 65535 * 4095).astype(int).reshape(-1, 2)
    packed = np.stack([x[:, 0] >> 4, (x[:, 0] & 15) << 4 | x[:, 1] >> 8, x[:, 1] & 255], 1).astype(np.uint8).tobytes()
    entries = [(256, 32), (257, 32), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 32), (279, len(packed))]
    head = b"II*\0" + (8 + len(packed)).to_bytes(4, "little")
    table = b"".join(k.to_bytes(2, "little") + b"\4\0\1\0\0\0" + v.to_bytes(4, "little") for k, v in entries)
    path.write_bytes(head + packed + len(entries).to_bytes(2, "little") + table + bytes(4))


def cmyk(path):
    Image.merge("CMYK", [Image.new("L", (32, 32))] * 3 + [Image.fromarray(255 - GREY)]).save(path)


SHOWN = {
    "16-bit grey.png": lambda p: Image.fromarray(RAMP.astype(np.uint16)).save(p),
    "16-bit grey.tif": lambda p: Image.fromarray(RAMP.astype(np.uint16)).save(p),
    "16-bit big-endian.tif": lambda p: Image.frombytes("I;16B", (32, 32), RAMP.astype(">u2").tobytes()).save(p),
    "16-bit grey.ppm": lambda p: p.write_bytes(b"P5 32 32 65535\n" + RAMP.astype(">u2").tobytes()),
    "12-bit grey.tif": tiff12,
    "a palette.png": lambda p: PICTURE.convert("P").save(p),
    "a palette with a transparent colour.png": lambda p: PICTURE.convert("P").save(p, transparency=7),
    "cmyk.tif": cmyk,
    "alpha.png": lambda p: Image.merge("RGBA", [PICTURE] * 3 + [Image.new("L", (32, 32), 9)]).save(p),
    "grey and alpha.png": lambda p: Image.merge("LA", [PICTURE, Image.new("L", (32, 32), 9)]).save(p),
}
REFUSED = {
    "floats.tif": ("F", lambda p: Image.fromarray((RAMP / 65535).astype(np.float32)).save(p)),
    "32 bits.tif": ("I", lambda p: Image.fromarray(RAMP.astype(np.int32) * 9).save(p)),
    "lab.tif": ("LAB", lambda p: Image.merge("LAB", [PICTURE] * 3).save(p)),
}


def only(root, name, write, n=3):
    for split in ("train", "val"):
        for i in range(n):
            file = root / split / "one" / f"{i} {name}"
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file)
    return f"folder:{root}"


def crops(data, workers=0):
    return MicroBatches(
        data, seed=0, micro=3, world=1, accumulation=1, rank=0, device=CPU, crops=1, image_size=32,
        crop_scale=(1.0, 1.0), workers=workers,
    )(0, 1)  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_an_image_of_any_known_scale_keeps_its_levels(tmp_path, name):
    """In training, in evaluation, and packed, within a level of 255."""
    data = open_split(only(tmp_path, name, SHOWN[name]), "val")
    expected = torch.from_numpy(GREY).float().expand(3, 32, 32)
    (seen,) = evaluation_batches(data, 32, 3, CPU, 0)
    (trained,) = crops(data)
    for x in (seen[0], trained[0, 0].float(), torch.from_numpy(np.array(data.read(0))).permute(2, 0, 1).float()):
        assert (x - expected).abs().max() <= 1


def test_an_image_of_one_bit_is_black_and_white(tmp_path):
    spec = only(tmp_path, "x.png", lambda p: Image.fromarray(RAMP > 30000).save(p))
    assert sorted(set(np.asarray(open_split(spec, "train").read(0)).flatten())) == [0, 255]


@pytest.mark.parametrize("name", REFUSED)
def test_an_image_of_unknown_scale_is_refused_by_file_and_mode(tmp_path, name):
    mode, write = REFUSED[name]
    spec = only(tmp_path, name, write)
    says = rf"val/one/0 {name} is an image of mode {mode}, of which black and white are not known"
    data = open_split(spec, "val")
    with pytest.raises(UserError, match=says):
        list(evaluation_batches(data, 32, 3, CPU, 0))
    with pytest.raises(UserError, match=f"{name} is an image of mode {mode},"):
        list(crops(data))
    found = check(spec)
    assert not found["ok"] and says.split(" is")[0] in found["splits"]["val"]["corrupt"][0]
    assert isinstance(data, FolderImages) and len(found["splits"]["val"]["corrupt"]) == 3


def test_what_a_loaders_process_refuses_is_one_message(tmp_path, run_here):
    spec = only(tmp_path / "d", "floats.tif", REFUSED["floats.tif"][1])
    for command in (["eval", "knn", "untrained:vit_mini4", "--data", spec],
                    ["pretrain", "mae", "--recipe", "mae_smoke", "--data", spec, "--batch-size", "2"],
                    ["data", "pack", spec, "--out", "p"], ["data", "check", spec]):  # fmt: skip
        done = run_here(*command, home=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr, (command, done.stderr)
        said = done.stderr + done.stdout
        assert "floats.tif is an image of mode F" in said.replace("\n", " "), (command, said)


def test_a_null_image_of_a_hub_set_names_its_row(tmp_path, run_here):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    part = datasets.Dataset.from_dict({"image": [PICTURE, None, PICTURE], "label": [0, 0, 0]}, features=features)
    datasets.DatasetDict(train=part, validation=part).save_to_disk(tmp_path / "h")
    spec = f"hfds:{tmp_path}/h"
    assert check(spec)["splits"]["train"]["corrupt"] == ["h train, row 1"]
    with pytest.raises(UserError, match=r"1 of 3 images cannot be read.* h train, row 1 \(null\)"):
        list(crops(open_split(spec, "train")))
    done = run_here("eval", "knn", "untrained:vit_mini4", "--data", spec, home=tmp_path)
    assert done.returncode == 2 and "row 1 (null)" in done.stderr and "Traceback" not in done.stderr
