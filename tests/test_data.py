"""Images: where they come from, in which order, and what happens when one cannot be read."""

import hashlib
import io
import json
import os
import pickle
import re
import signal
import tarfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.transforms import functional as tv
from torchvision.transforms.functional import InterpolationMode

from sslbench.data import data_name, known_size, open_both, open_split
from sslbench.data.check import check
from sslbench.data.images import FolderImages, MemoryImages, PackedImages, subset
from sslbench.data.loader import MicroBatches, decoded_crops, decoders, evaluation_batches, plain_crops
from sslbench.errors import RunFailed, UserError
from sslbench.ledger import scale_of
from sslbench.provenance import cores
from sslbench.recipe import choose


def batches(data, first=0, last=4, **over):
    settings = {"seed": 0, "micro": 5, "world": 1, "accumulation": 2, "rank": 0, "device": torch.device("cpu"),
                "crops": 2, "image_size": 16, "crop_scale": (0.2, 1.0), "workers": 0, **over}  # fmt: skip
    loader = MicroBatches(data, **settings)
    return loader, list(loader(first, last))


def test_builtin_is_balanced_and_has_ten_classes():
    for split, n in (("train", 4000), ("val", 1000)):
        data = open_split("builtin", split)
        assert data.images.shape == (n, 3, 32, 32) and data.images.dtype == torch.uint8 and len(data.classes) == 10
        assert torch.bincount(data.labels).tolist() == [n // 10] * 10
        assert len(torch.unique(data.labels[:100])) == 10  # any part of it is mixed


def test_builtin_is_part_of_cifar10_in_its_official_splits(shared):
    for split, file in (("train", "train"), ("val", "test")):
        z = np.load(shared / "data" / f"cifar10_{file}.npz")
        known = {}
        for i, label in enumerate(z["strip_label"]):
            strip = np.asarray(Image.open(io.BytesIO(z["strips"][z["offsets"][i] : z["offsets"][i + 1]].tobytes())))
            known |= {hashlib.md5(x.tobytes()).digest(): int(label) for x in strip.reshape(-1, 32, 32, 3)}
        data = open_split("builtin", split)
        found = [known.get(hashlib.md5(x.permute(1, 2, 0).numpy().tobytes()).digest()) for x in data.images]
        assert found == data.labels.tolist()


def test_an_archive_is_found_by_its_train_file_or_by_what_both_names_begin_with(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine_train.npz", images=x, labels=np.arange(6) % 2)
    np.savez(tmp_path / "mine_test.npz", images=x[:2], labels=[0, 1])
    for spec in (f"npz:{tmp_path}/mine_train.npz", f"npz:{tmp_path}/mine"):
        assert len(open_split(spec, "train")) == 6 and len(open_split(spec, "val")) == 2
    np.savez(tmp_path / "odd_train.npz", images=x.astype(float))
    with pytest.raises(UserError, match="must be uint8"):
        open_split(f"npz:{tmp_path}/odd_train.npz", "train")
    with pytest.raises(UserError, match="no val split"):
        open_split(f"npz:{tmp_path}/odd_train.npz", "val")


def test_folders_are_checked_before_they_are_trusted(image_folder, tmp_path, monkeypatch):
    data = open_split(f"folder:{image_folder}", "train")
    assert len(data) == 40 and len(data.classes) == 4 and data.labels.tolist() == sorted(data.labels.tolist())
    monkeypatch.setenv("SSLBENCH_DATA", str(image_folder.parent))
    assert open_split("images", "val").fingerprint == open_split(f"folder:{image_folder}", "val").fingerprint
    for spec, split, message in (
        (f"imagenet:{image_folder}", "train", "4 class folders"),
        (f"folder:{tmp_path}/none", "train", "no such folder"),
        ("imagenet", "train", "quickstart"),
        ("folder:", "train", "say where"),
        ("npy:x", "train", "did you mean 'npz'"),
    ):
        with pytest.raises(UserError, match=message):
            open_split(spec, split)


def test_order_is_a_function_of_seed_and_step_whatever_the_devices():
    data = open_split("builtin", "train")
    _, whole = batches(data, 0, 3, micro=20, accumulation=1)
    _, parts = batches(data, 0, 3, micro=5, accumulation=4)
    ranks = [batches(data, 0, 3, micro=5, world=2, accumulation=2, rank=r)[1] for r in (0, 1)]
    together = [x for pair in zip(*ranks, strict=True) for x in pair]
    for i in range(3):
        assert whole[i].equal(torch.cat(parts[4 * i : 4 * i + 4])) and whole[i].equal(torch.cat(together[4 * i :][:4]))
    loader, late = batches(data, 399, 402, micro=5)  # across the end of an epoch
    assert loader.steps_per_epoch == 400
    _, all_of_it = batches(data, 398, 402, micro=5)
    assert all(a.equal(b) for a, b in zip(late, all_of_it[2:], strict=True))
    assert not batches(data, 0, 1, seed=1)[1][0].equal(batches(data, 0, 1)[1][0])


def test_no_more_processes_decode_than_there_are_cores():
    asked = [decoders(n, torch.device("cpu")) for n in (0, 1, 1000)]
    assert [a["num_workers"] for a in asked] == [0, 1, cores()] and asked[0]["multiprocessing_context"] is None


def test_crops_of_a_folder_are_the_same_with_and_without_workers(image_folder):
    data = open_split(f"folder:{image_folder}", "train")
    _, alone = batches(data)
    _, helped = batches(data, workers=2)
    assert alone[0].shape == (5, 2, 3, 16, 16) and alone[0].dtype == torch.uint8
    assert all(a.equal(b) for a, b in zip(alone, helped, strict=True))
    assert not alone[0][:, 0].equal(alone[0][:, 1])  # two crops of each image


def test_a_corrupt_image_is_listed_substituted_counted_and_not_tolerated_in_numbers(image_folder, monkeypatch):
    spec = f"folder:{image_folder}"
    data = open_split(spec, "train")
    bad = image_folder / "train" / data.files[3]
    bad.write_bytes(bad.read_bytes()[:200])  # cut short
    found = check(spec)
    assert not found["ok"] and found["splits"]["train"]["corrupt"] == [str(bad)]
    with pytest.raises(RunFailed, match=r"1 of 40 images cannot be read, more than 0\.1%"):
        batches(data)
    monkeypatch.setattr("sslbench.data.loader.CORRUPT_LIMIT", 0.1)  # as if it were one in many
    (loader, a), (_, b) = batches(data), batches(data)
    assert loader.corrupt == {3} and all(x.equal(y) for x, y in zip(a, b, strict=True))
    with pytest.warns(UserWarning, match="1 of 40 images of .* taken as black, such as .*" + bad.name):
        views = torch.cat(list(evaluation_batches(data, 16, 7, torch.device("cpu"), 0)))
    assert views.shape == (40, 3, 16, 16) and not views[3].any() and all(v.any() for v in (*views[:3], *views[4:]))


def save(folder, images):
    folder.mkdir(parents=True)
    for i, x in enumerate(images):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / f"{i:012d}.png")


def test_sets_joined_by_plus_are_read_one_after_the_other_without_labels(tmp_path):
    x = open_split("builtin", "train").images
    save(tmp_path / "coco/train2017", x[:6])
    save(tmp_path / "set/train/a", x[10:14])
    joined = open_split(f"folder:{tmp_path}/set+coco:{tmp_path}/coco", "train")
    assert len(joined) == 10 and joined.labels is None and joined.name == "set+coco"
    for i, expected in enumerate([*x[10:14], *x[:6]]):
        assert (np.asarray(joined.read(i)) == expected.permute(1, 2, 0).numpy()).all()
    assert "coco" in joined.where(4) and joined.fingerprint != open_split(f"coco:{tmp_path}/coco", "train").fingerprint
    loader, got = batches(joined, first=0, last=1, workers=1)
    assert len(got) == 2 and got[0].shape == (5, 2, 3, 16, 16) and not loader.corrupt
    with_memory = open_split(f"builtin+coco:{tmp_path}/coco", "train")
    assert len(with_memory) == 4006 and (np.asarray(with_memory.read(3999)) == x[3999].permute(1, 2, 0).numpy()).all()
    with pytest.raises(UserError, match="no labels"):
        open_both("builtin+builtin")


def test_sets_of_one_size_in_memory_stay_there_when_joined():
    twice = open_split("builtin+builtin", "train")
    assert len(twice) == 8000 and twice.images[4000:].equal(open_split("builtin", "train").images)


def test_coco_photographs_come_without_labels_and_a_wrong_layout_says_what_was_expected(tmp_path, shared):
    with tarfile.open(shared / "data/coco_mini.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    data = open_split(f"coco:{tmp_path}/coco_mini", "train")
    assert len(data) == 266 and data.labels is None and data.read(0).mode == "RGB"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected .*train2017/\*\.jpg, found an empty folder"):
        open_split(f"coco:{tmp_path}/empty", "train")


def test_ade20ks_photographs_come_without_labels_too(tmp_path, monkeypatch):
    x = open_split("builtin", "train").images
    save(tmp_path / "ade20k/images/training", x[:5])
    save(tmp_path / "ade20k/images/validation", x[:2])
    monkeypatch.setenv("SSLBENCH_DATA", str(tmp_path))
    for spec in (f"ade20k:{tmp_path}/ade20k", "ade20k"):
        sets = [open_split(spec, split) for split in ("train", "val")]
        assert [len(s) for s in sets] == [5, 2] and sets[0].labels is None and sets[0].name == "ade20k"
    with pytest.raises(UserError, match=r"ade20k:.*expected .*images/training"):
        open_split(f"ade20k:{tmp_path}", "train")


def test_a_plan_knows_the_size_of_joined_sets_that_are_not_here():
    assert known_size("imagenet100+coco") == 126_689 + 118_287  # 59 full batches of 4,096: ASL's 47k iterations
    assert (known_size("imagenet100+coco") // 4096 * 800, known_size("builtin+folder:x")) == (47_200, None)


def test_of_a_folder_that_is_here_and_of_a_list_only_a_look_tells_the_size(tmp_path):
    assert known_size("imagenet:nowhere") == 1_281_167
    assert known_size(f"imagenet:{tmp_path}") is None and known_size("imagenet:nowhere@imagenet100.txt") is None


def test_a_class_list_makes_a_subset_with_its_own_name(image_folder, tmp_path):
    names = open_split(f"folder:{image_folder}", "train").classes
    listed = tmp_path / "imagenet100.txt"
    listed.write_text(f"{names[2]} its words\n\n{names[0]}\n")
    for kind in ("folder", "imagenet"):
        spec = f"{kind}:{image_folder}@{listed}"
        train, val = open_split(spec, "train"), open_split(spec, "val")
        assert train.classes == val.classes == sorted([names[0], names[2]])
        assert (len(train), len(val)) == (20, 10) and train.labels.bincount().tolist() == [10, 10]
        assert data_name(spec) == "imagenet100"
    listed.write_text("unicorn\n")
    with pytest.raises(UserError, match="lacks 1 of the classes listed: unicorn"):
        open_split(f"folder:{image_folder}@{listed}", "train")
    with pytest.raises(UserError, match="no class list"):
        open_split(f"folder:{image_folder}@{tmp_path / 'none.txt'}", "train")


def test_tiny_imagenet_as_it_is_published(image_folder, tmp_path):
    """train/CLASS/images/*, val/images/* and val/val_annotations.txt, against the same images as ImageFolder."""
    plain = {split: open_split(f"folder:{image_folder}", split) for split in ("train", "val")}
    root, lines = tmp_path / "tiny-imagenet-200", []
    for i, f in enumerate(plain["train"].files):
        target = root / "train" / Path(f).parent / "images" / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((image_folder / "train" / f).read_bytes())
    (root / "val" / "images").mkdir(parents=True)
    for i, f in enumerate(plain["val"].files):
        (root / "val" / "images" / f"val_{i:03}.png").write_bytes((image_folder / "val" / f).read_bytes())
        lines.append(f"val_{i:03}.png\t{Path(f).parent}\t0\t0\t32\t32\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    for split in ("train", "val"):
        tiny = open_split(f"folder:{root}", split)
        assert tiny.classes == plain[split].classes and tiny.labels.tolist() == plain[split].labels.tolist()
    assert open_split(f"folder:{root}", "val").read(7).tobytes() == plain["val"].read(7).tobytes()


def pictures(n):
    data = open_split("builtin", "train")
    return [data.read(400 * (i % 10) + i // 10) for i in range(n)]


def test_flowers_102_as_it_is_published(tmp_path):
    root = tmp_path / "flowers102"
    (root / "jpg").mkdir(parents=True)
    for i, picture in enumerate(pictures(12), 1):
        picture.save(root / "jpg" / f"image_{i:05}.jpg")
    labels = [3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2]
    savemat(root / "imagelabels.mat", {"labels": [labels]})
    savemat(root / "setid.mat", {"trnid": [[5, 1]], "valid": [[2]], "tstid": [[3, 4, 6, 7, 8, 9, 10, 11, 12]]})
    train, val = (open_split(f"folder:{root}", split) for split in ("train", "val"))
    assert train.files == [f"jpg/image_{i:05}.jpg" for i in (1, 2, 5)] and len(val) == 9
    assert train.labels.tolist() == [2, 0, 0] and train.classes == val.classes == ["1", "2", "3"]
    found = check(f"folder:{root}")
    assert found["ok"] and found["splits"]["val"]["images"] == 9 and found["splits"]["train"]["classes"] == 3
    (root / "jpg" / "image_00005.jpg").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 3 images of its train list: jpg/image_00005.jpg"):
        open_split(f"folder:{root}", "train")
    (root / "imagelabels.mat").write_bytes(b"no")
    with pytest.raises(UserError, match="is not Flowers-102"):
        open_split(f"folder:{root}", "val")


@pytest.mark.parametrize("year", [2018, 2019])
def test_inaturalist_as_it_is_published(tmp_path, monkeypatch, year):
    root = tmp_path / "inat"
    files = [f"train_val{year}/Aves/{c}/{i}.jpg" for i, c in enumerate([7, 2, 7, 2, 5, 5])]
    for f, picture in zip(files, pictures(6), strict=True):
        (root / f).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / f)
    categories = [{"id": c, "name": f"bird {c}", "supercategory": "Aves"} for c in (7, 5, 2)]
    for split, part in (("train", [0, 3, 4, 5]), ("val", [1, 2])):
        images = [{"id": 100 + i, "file_name": files[i], "width": 32, "height": 32} for i in part]
        annotations = [{"id": i, "image_id": 100 + i, "category_id": int(files[i].split("/")[2])} for i in part]
        tree = {"images": images, "annotations": annotations[::-1], "categories": categories}
        (root / f"{split}{year}.json").write_text(json.dumps(tree))
    monkeypatch.setenv("SSLBENCH_DATA", str(tmp_path))
    train, val = open_split("inat", "train"), open_split(f"folder:{root}", "val")
    assert train.classes == val.classes == ["bird 2", "bird 5", "bird 7"]
    at = {f: label for d in (train, val) for f, label in zip(d.files, d.labels.tolist(), strict=True)}
    assert at == {f: {"2": 0, "5": 1, "7": 2}[f.split("/")[2]] for f in files} and len(val) == 2
    (root / f"val{year}.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="is not an iNaturalist list"):
        open_split(f"folder:{root}", "val")


def expected_views(data, short, size):
    """torchvision's Resize and CenterCrop of each image."""
    resized = [tv.resize(data.read(i), short, InterpolationMode.BICUBIC) for i in range(len(data))]
    return torch.stack([tv.pil_to_tensor(tv.center_crop(x, [size])) for x in resized]).float()


@pytest.mark.parametrize(("size", "short"), [(24, [27]), (32, [32]), (40, [45])])
def test_evaluation_views_of_small_images_are_torchvisions_pixel_for_pixel(image_folder, size, short):
    """Those of the view's size are seen as they are. In memory as in files."""
    data = open_split(f"folder:{image_folder}", "val")
    got = torch.cat(list(evaluation_batches(data, size, 7, torch.device("cpu"), 0)))
    assert got.equal(expected_views(data, short, size))
    memory = torch.stack([tv.pil_to_tensor(data.read(i)) for i in range(len(data))])
    memory = MemoryImages("memory", "val", memory, data.labels, data.classes)
    same = torch.cat(list(evaluation_batches(memory, size, 7, torch.device("cpu"), 0)))
    assert same.equal(got)


@pytest.fixture(scope="module")
def photographs(shared, tmp_path_factory):
    """24 photographs of COCO's, of several sizes, in train/ and in val/."""
    root = tmp_path_factory.mktemp("photographs")
    with tarfile.open(shared / "data" / "coco_mini.tar") as tar:
        for i, member in enumerate([m for m in tar.getmembers() if m.name.endswith(".jpg")][:24]):
            for split in ("train", "val"):
                (root / split).mkdir(exist_ok=True)
                (root / split / f"{i:02}.jpg").write_bytes(tar.extractfile(member).read())
    return f"folder:{root}"


def test_evaluation_views_of_photographs_are_torchvisions_pixel_for_pixel(photographs):
    data = open_split(photographs, "val")
    assert len({data.read(i).size for i in range(len(data))}) > 3
    for size, short in ((224, 256), (96, 109)):
        got = torch.cat(list(evaluation_batches(data, size, 8, torch.device("cpu"), 2)))
        assert got.equal(expected_views(data, [short], size))


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [200, 64, 24])  # decoded whole, at a half, at up to a quarter
def test_crops_for_training_are_pils_within_a_tolerance(photographs, size, kernel):
    data, differ = open_split(photographs, "train"), []
    for i in range(len(data)):
        width, height = data.read(i).size
        for box in ((0, 0, height, width), (3, 5, 140, 151), (40, 10, 129, 170)):
            quick, plain = (
                data.use(i, lambda x, f=f, box=box: f(x, [box], [size], kernel)[0])
                for f in (decoded_crops, plain_crops)
            )
            differ.append((quick.int() - plain.int()).abs().float())
    mean, worst = torch.stack(differ).mean(), torch.stack(differ).flatten().quantile(0.999)
    assert mean < (0.05 if size == 200 else 2.5) and worst <= (2 if size == 200 else 40)


def test_a_pack_that_keeps_every_pixel_is_the_same_set(image_folder, tmp_path, invoke):
    spec = f"folder:{image_folder}"
    done = invoke("data", "pack", spec, "--out", "p", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["data"] == "packed:p" and told["splits"]["val"] | {"images": 20, "shrunk": 0} == told["splits"]["val"]
    for split in ("train", "val"):
        packed, plain = open_split("packed:p", split), open_split(spec, split)
        assert isinstance(packed, PackedImages) and packed.fingerprint == plain.fingerprint
        assert packed.labels.equal(plain.labels) and packed.classes == plain.classes
        assert packed.read(7).tobytes() == plain.read(7).tobytes()
    assert data_name("packed:p") == data_name(spec) == "images"  # and so one recipe hash
    train, plain = open_split("packed:p", "train"), open_split(spec, "train")
    (_, expected), (_, alone), (_, helped) = batches(plain), batches(train), batches(train, workers=2)
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(expected, alone, helped, strict=True))
    assert len(pickle.dumps(train)) < 40 * 32 * 32 * 3 / 10  # a worker maps the file: no pixel is sent to it
    index = torch.tensor([30, 2])
    part = subset(train, index)
    assert part.read(1).tobytes() == plain.read(2).tobytes() and part.labels.equal(plain.labels[index])
    assert part.fingerprint != train.fingerprint and len(open_split("packed:p+builtin", "train")) == 4040


def test_a_set_that_lives_in_memory_does_so_when_it_is_packed(invoke):
    assert invoke("data", "pack", "builtin").exit_code == 0
    packed, plain = open_split("packed:builtin", "train"), open_split("builtin", "train")
    assert isinstance(packed, MemoryImages) and packed.images.equal(plain.images) and packed.labels.equal(plain.labels)
    assert packed.fingerprint == plain.fingerprint and data_name("packed:builtin") == "builtin"
    done = invoke("data", "pack", "packed:builtin", "--size", "16", "--out", "small")
    assert done.exit_code == 0 and data_name("packed:small") == "builtin-16px", done.stderr
    small = open_split("packed:small", "val")
    assert small.fingerprint != open_split("builtin", "val").fingerprint and small.read(3).size == (16, 16)


def test_a_shrunk_set_takes_its_originals_recipe_under_its_own_name(tmp_path):
    (tmp_path / "pack.json").write_text('{"name": "imagenet-256px"}')
    spec = f"packed:{tmp_path}"
    assert choose("mae", None, spec) == choose("mae", None, "imagenet:x") != choose("mae", None, "folder:x")
    assert data_name(spec) == "imagenet-256px" and scale_of("imagenet-256px", 224) == "paper"


def test_evaluation_sees_the_same_pixels_of_a_pack_as_of_the_files(photographs, invoke):
    done = invoke("data", "pack", photographs, "--size", "109", "--out", "p")
    assert done.exit_code == 0, done.stderr
    data, packed = open_split(photographs, "val"), open_split("packed:p", "val")
    assert {min(packed.read(i).size) for i in range(len(packed))} == {109}
    views = [torch.cat(list(evaluation_batches(x, 96, 8, torch.device("cpu"), 0))) for x in (data, packed)]
    assert views[0].equal(views[1]) and data.fingerprint != packed.fingerprint
    assert data_name("packed:p").endswith("-109px") and packed.labels is None


def test_a_pack_is_whole_or_absent(image_folder, tmp_path, invoke, monkeypatch):
    def refused(*args, code=2):
        done = invoke("data", "pack", f"folder:{image_folder}", "--out", "p/q", *args)
        assert done.exit_code == code and not (tmp_path / "p/q").exists()
        assert not list((tmp_path / "p").iterdir() if (tmp_path / "p").exists() else [])
        return done.stderr

    with monkeypatch.context() as m:
        m.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "free")(100_000))
        assert "needs about 0.000194 GB" in refused() and not (tmp_path / "p").exists()
    read = FolderImages.read
    with monkeypatch.context() as m:

        def interrupted(data, index):
            if (tmp_path / "p/.q.part/train.images").exists() and index == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return read(data, index)

        m.setattr(FolderImages, "read", interrupted)
        assert "SIGTERM while packing; nothing is kept" in refused(code=130)
    bad = sorted((image_folder / "val").rglob("*.png"))[2:4]
    whole = [f.read_bytes() for f in bad]
    for f in bad:
        f.write_bytes(f.read_bytes()[:200])
    said = refused()
    assert "2 of 20 images of images cannot be read" in said and all(str(f) in said for f in bad)
    for f, data in zip(bad, whole, strict=True):
        f.write_bytes(data)
    (tmp_path / "p/.q.part").mkdir()
    (tmp_path / "p/.q.part/train.images").write_bytes(b"of a process that was killed")
    for code, word in ((0, "every pixel kept"), (2, "p/q exists; remove it")):
        done = invoke("data", "pack", f"folder:{image_folder}", "--out", "p/q")
        assert done.exit_code == code and word in done.stdout + done.stderr
    assert [f.name for f in (tmp_path / "p").iterdir()] == ["q"]


def test_a_damaged_pack_is_found_out(image_folder, tmp_path, invoke):
    assert invoke("data", "pack", f"folder:{image_folder}", "--out", "p").exit_code == 0
    done = invoke("data", "check", "packed:p")
    assert done.exit_code == 0 and "train: 40 images, 4 classes, median size 32 x 32" in done.stdout, done.stdout
    pixels = bytearray((tmp_path / "p/val.images").read_bytes())
    pixels[3 * 32 * 32 * 3 + 1] ^= 1
    (tmp_path / "p/val.images").write_bytes(pixels)
    done = invoke("data", "check", "packed:p")
    assert done.exit_code == 2 and "cannot be read: p/val.images image 3" in done.stdout
    (tmp_path / "p/val.images").write_bytes(pixels[:-1])
    for data, why in (("p", "val.images has 61439 bytes, not 61440"), ("none", "No such file")):
        with pytest.raises(UserError, match=f"'packed:{data}' is not what `sslbench data pack SPEC .* writes.*{why}"):
            open_split(f"packed:{data}", "val")


def test_every_log_line_says_what_share_of_the_time_was_spent_waiting_for_data(image_folder, tmp_path, invoke):
    quick = ["machine.log_every=1", "machine.workers=1", "machine.tensorboard=false", "science.data.image_size=16"]
    for spec, waits in ((f"folder:{image_folder}", True), ("builtin", False)):
        done = invoke(
            "pretrain", "mae", "--arch", "vit_mini4", "--data", spec, "--epochs", 5 / (5 if waits else 500),
            "--batch-size", 8, "--out", spec[:7], *[x for setting in quick for x in ("--set", setting)],
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / spec[:7] / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
        assert all(0 < line["data_wait"] < 1 if waits else line["data_wait"] == 0 for line in lines), lines
        shown = re.search(r"loss [\d.]+ [\d.]+ img/s wait ([\d.]+)%", done.stderr)
        assert shown and shown[1] == f"{100 * lines[-1]['data_wait']:.1f}"
        if waits:  # a process of its own has to start before the first batch is there
            assert lines[0]["data_wait"] > 0.5
