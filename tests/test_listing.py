"""Sets of many files are listed once; what changed since is noticed."""

import os
import pickle
import subprocess
import sys
import tarfile

import pytest
import torch
from PIL import Image

from sslbench.data import listing, open_split, shards, sources, subset
from sslbench.data.listing import Names

AGO = 10**9  # seconds since 1970: long enough ago for what was changed then to have settled


@pytest.fixture
def photos(tmp_path, monkeypatch, home):
    """Four classes of three images, whose folders have not changed for long; one name is no UTF-8."""
    monkeypatch.setattr(listing, "LEAST", 1)
    root = tmp_path / "photos"
    for word, names in {"train": ["a-b", "a", "été", "z"], "val": ["a-b", "a", "été", "z"]}.items():
        for name in names:
            (root / word / name / "below").mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(root / word / name / ("below" * (i == 2)) / f"{i}.png")
    os.rename(root / "train/z/0.png", os.fsencode(root / "train/z") + b"/\xff.png")
    settle(root)
    return root


def settle(root):
    for folder, _, _ in os.walk(root):
        os.utime(folder, (AGO, AGO))


def facts(images):
    return [*images.files], images.classes, images.labels.tolist(), images.fingerprint, images.root


@pytest.fixture
def unwalked(monkeypatch):
    """unwalked(): from now on nothing may be listed anew."""

    def forbid():
        def walk(*_, **__):
            raise AssertionError("listed again")

        monkeypatch.setattr(sources.os, "walk", walk)

    return forbid


def test_a_folder_is_listed_once_and_gives_the_same_set(photos, monkeypatch, unwalked):
    spec = f"folder:{photos}"
    with monkeypatch.context() as patch:
        patch.setattr(listing, "LEAST", 10**9)
        plain = open_split(spec, "train")
    assert isinstance(plain.files, list) and not listing.folder().exists()
    first = open_split(spec, "train")
    unwalked()
    again = open_split(spec, "train")
    assert isinstance(again.files, Names) and facts(plain) == facts(first) == facts(again)
    assert again.classes == ["a", "a-b", "z", "été"] and again.files[-1:] == plain.files[-1:]
    some = torch.tensor([7, 0, 3])
    for part in (subset(again, some), pickle.loads(pickle.dumps(subset(again, some)))):
        assert facts(part) == facts(subset(plain, some)) and part.read(1).size == (8, 8)
    assert [*again.part(some).part(some[1:2]).files] == [plain.files[7]]
    with pytest.raises(IndexError):
        again.files[len(again)]


CHANGES = {
    "an image is added": lambda root: Image.new("RGB", (8, 8)).save(root / "a/new.png"),
    "an image below is removed": lambda root: (root / "a/below/2.png").unlink(),
    "a class is added": lambda root: [(root / "new").mkdir(), Image.new("RGB", (8, 8)).save(root / "new/0.png")],
    "a class is renamed": lambda root: (root / "z").rename(root / "y"),
    "an image is written over in place": lambda root: Image.new("RGB", (64, 64)).save(root / "a/0.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_noticed(change, photos, monkeypatch):
    before = open_split(f"folder:{photos}", "train")
    assert isinstance(before.files, Names)
    CHANGES[change](photos / "train")
    after = open_split(f"folder:{photos}", "train")
    monkeypatch.setattr(listing, "LEAST", 10**9)
    listing.clean()
    assert facts(after) == facts(open_split(f"folder:{photos}", "train")) and after.fingerprint != before.fingerprint


def test_what_changed_just_now_is_not_kept(photos):
    (photos / "train/z/new").mkdir()
    assert isinstance(open_split(f"folder:{photos}", "train").files, list) and not listing.folder().exists()


def test_where_nothing_can_be_written_each_process_lists(photos, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSLBENCH_HOME", str(tmp_path / "file"))
    assert len(open_split(f"folder:{photos}", "train")) == 12


def test_a_damaged_listing_is_made_anew(photos):
    whole = facts(open_split(f"folder:{photos}", "train"))
    for name in ("letters.npy", "facts.json"):
        (path,) = listing.folder().glob(f"*/{name}")
        path.write_bytes(path.read_bytes()[:20])
        assert facts(open_split(f"folder:{photos}", "train")) == whole


PROCESS = """
import sys
from sslbench.data import listing, open_split, sources
listing.LEAST, walk, walked = 1, sources._walk, []
sources._walk = lambda *a: walked.append(a) or walk(*a)
data = open_split(sys.argv[1], "train")
print(len(data), data.fingerprint, len(walked))
"""


def test_processes_that_start_together_list_once(photos, environment, home):
    command = [sys.executable, "-c", PROCESS, f"folder:{photos}"]
    env = environment(home, {"SSLBENCH_HOME": str(home), "OMP_NUM_THREADS": "1"})
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=200)[0].split() for process in started]
    assert [length for length, *_ in said] == ["12"] * 3 and len({its for _, its, _ in said}) == 1
    assert sum(int(walked) for *_, walked in said) == 1


def test_shards_are_read_once(tmp_path, photos, monkeypatch):
    def pack(name, count):
        with tarfile.open(tmp_path / "shards" / name, "w") as tar:
            for i, path in enumerate(sorted((photos / "val").rglob("*.png"))[:count]):
                tar.add(path, f"{i}.png")
                (tmp_path / "cls").write_text(str(i % 3))
                tar.add(tmp_path / "cls", f"{i}.cls")
        os.utime(tmp_path / "shards" / name, (AGO, AGO))
        settle(tmp_path / "shards")

    monkeypatch.setattr(shards, "LEAST", 1)
    (tmp_path / "shards").mkdir()
    pack("train-0.tar", 6)
    first = open_split(f"wds:{tmp_path / 'shards'}", "train")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_read", None)
        again = open_split(f"wds:{tmp_path / 'shards'}", "train")
    assert again.fingerprint == first.fingerprint and len(again) == 6 and again.labels.tolist() == [0, 1, 2] * 2
    assert again.read(5).size == (8, 8) and again.classes == first.classes
    pack("train-1.tar", 4)
    assert len(open_split(f"wds:{tmp_path / 'shards'}", "train")) == 10


def test_clean_removes_listings(photos, invoke, monkeypatch, home):
    open_split(f"folder:{photos}", "train")
    monkeypatch.setenv("SSLBENCH_HOME", str(home))
    done = invoke("clean")
    assert done.exit_code == 0 and "removed 5 files" in done.stdout and not listing.folder().exists()
