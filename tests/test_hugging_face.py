"""`export --format hf`: transformers loads our function of an image, and the card says what the ledger knows."""

import importlib.util
import json
import re
import shutil
import sys
import warnings

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from sslbench.data import open_split
from sslbench.evaluate import hugging_face
from sslbench.evaluate.features import Subject, open_subject
from sslbench.ledger import read
from sslbench.views import normalise, resize_centre
from sslbench.vit import ARCHS, Arch, VisionTransformer, initialise

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers, which the suite does not install"
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, run_here):
    """The folder of a run that k-NN has measured, exported, in a home of its own."""
    home = tmp_path_factory.mktemp("home")
    quick = [
        "--recipe",
        "ocl_smoke",
        "--arch",
        "vit_micro4",
        "--epochs",
        "0.1",
        "--set",
        "machine.watch=false",
        "--set",
        "machine.tensorboard=false",
    ]
    for words in (["pretrain", "ocl", *quick, "--out", "run"], ["eval", "knn", "run"]):
        assert (done := run_here(*words, home=home)).returncode == 0, done.stderr
    done = run_here("export", "run", "--format", "hf", "--out", "mine", "--json", home=home)
    assert done.returncode == 0, done.stderr
    return home / json.loads(done.stdout)["folder"]


@pytest.fixture(scope="module")
def subject(exported):
    return open_subject(str(exported.parent / "run"))


@pytest.fixture(scope="module")
def images(subject):
    """(N, 3, H, W) uint8 of the built-in val split, and their views, normalised."""
    raw = open_split("builtin", "val").images[::200]
    return raw, normalise(resize_centre(raw, subject.encoder.image[0]), subject.mean, subject.std)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_file_has_transformers_layout_and_reads_back_as_the_same_encoder(exported, subject, images):
    state, config = load_file(exported / "model.safetensors"), json.loads((exported / "config.json").read_text())
    arch = subject.encoder.arch
    shapes = {k: tuple(x.shape) for k, x in state.items()}
    assert shapes["embeddings.position_embeddings"] == (1, 1 + subject.encoder.n_patches, arch.dim)
    assert shapes["encoder.layer.0.attention.attention.query.weight"] == (arch.dim, arch.dim)
    assert len(shapes) == 8 + 16 * arch.depth  # of the layout: embeddings 4, layernorm 2, pooler 2, a layer 16
    said = {k: config[k] for k in ("layer_norm_eps", "hidden_act", "qkv_bias", "num_attention_heads", "image_size")}
    assert said == {"layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True, "num_attention_heads": arch.heads,
                    "image_size": subject.encoder.image[0]}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that it does not say its mean and deviation
        again = open_subject(str(exported / "model.safetensors"))
    assert (again.arch, again.mean, again.std) == (subject.arch, tuple(subject.mean), tuple(subject.std))
    close(again.encoder(images[1]), subject.encoder(images[1]))


@needs_transformers
@torch.no_grad()
def test_transformers_gives_our_features(exported, subject, images):
    import transformers

    wanted = subject.encoder.eval()(images[1])
    for cls in (transformers.ViTModel, transformers.AutoModel):
        model, info = cls.from_pretrained(exported, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        out = model.eval()(images[1])
        close(out.last_hidden_state, wanted)
        close(out.pooler_output, wanted[:, 0])


@needs_transformers
def test_transformers_own_file_has_the_same_names_and_shapes(exported, tmp_path):
    import transformers

    model = transformers.ViTModel(transformers.ViTConfig.from_pretrained(exported))
    model.save_pretrained(tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (exported, tmp_path))
    assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in theirs.items()}


@needs_transformers
def test_transformers_processor_makes_the_view_that_we_evaluate(exported, images):
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(exported)
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images[0]]
    made = processor(pictures, return_tensors="pt").pixel_values
    assert made.shape == images[1].shape
    assert (made - images[1]).abs().mean() < 0.02  # its bicubic and PIL's round otherwise; a grey value is 0.017


@pytest.mark.parametrize(("pixels", "image", "short"), [(32, 32, 32), (24, 32, 27), (224, 500, 256), (384, 500, 384)])
def test_the_processor_resizes_as_the_evaluation_does(pixels, image, short, subject, monkeypatch):
    monkeypatch.setattr(hugging_face, "look", lambda spec: (1000, image))
    monkeypatch.setattr(subject, "encoder", VisionTransformer(Arch(8, 48, 1, 3, pixels)))
    said = hugging_face.processor(subject)
    assert said["size"] == {"shortest_edge": short} and said["crop_size"] == {"height": pixels, "width": pixels}


def test_the_number_of_heads_which_no_tensor_shows_is_read_back(tmp_path, monkeypatch):
    """MoCo v3's ViT-S is the same tensors as everybody's with twice as many heads."""
    for name, heads in (("small", 3), ("small_h12", 12)):
        monkeypatch.setitem(ARCHS, name, Arch(8, 48, 2, heads, 32))
        encoder = VisionTransformer(ARCHS[name])
        initialise(encoder)
        subject = Subject(encoder, "", name, "cls", (0.5,) * 3, (0.5,) * 3, {}, None)
        hugging_face.write_folder(subject, tmp_path / name)
    for name in ("small", "small_h12"):
        assert open_subject(str(tmp_path / name / "model.safetensors")).arch == name


def test_the_card_says_what_the_ledger_knows(exported, subject, monkeypatch):
    monkeypatch.setenv("SSLBENCH_HOME", str(exported.parent))
    text = (exported / "README.md").read_text()
    front = re.match(r"---\n(.*?)---\n", text, re.S)[1]
    assert "library_name: transformers" in front and "license" not in front
    cost = subject.run["cost"]
    for words in ("# ocl vit_micro4", "pre-trained on builtin for 0.1 epochs", subject.run["recipe_hash"],
                  subject.run["code"]["commit"] or "not known", f"{cost['flops']:.3g} FLOP", subject.sha256,
                  'AutoModel.from_pretrained("mine")', "tokens[:, 0]", "Apache-2.0"):  # fmt: skip
        assert words in text, words
    r = next(r for r in read() if r.metric == "knn_top1")
    line = f"| knn_top1 | builtin | {r.value:.1f} ± {1.96 * r.stderr:.1f} % | 1,000 | knn_cls {r.protocol.hash} | 0 |"
    assert line in text
    assert str(exported.parent) not in text  # no path of whoever exported it


def test_of_weights_that_nobody_measured_the_card_says_so_and_guesses_nothing(invoke, tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict(), tmp_path / "theirs.pth")
    done = invoke("export", "theirs.pth", "--format", "hf")
    assert done.exit_code == 0, done.stderr
    text = (tmp_path / "theirs_hf/README.md").read_text()
    assert "Nothing yet." in text and text.count("not known") == 6 and "so is their licence" in text


def test_what_vit_model_cannot_express_is_refused_and_nothing_is_written(invoke, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, reg_tokens=4, no_embed_class=True)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    done = invoke("export", "theirs.pth", "--format", "hf", "--out", "mine")
    assert (
        done.exit_code == 2 and "4 token(s) beside CLS and patches, which transformers' ViTModel has not" in done.stderr
    )
    assert not (tmp_path / "mine").exists()


def test_a_folder_with_other_files_is_left_alone(exported, run_here, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    words = ["export", exported.parent / "run", "--format", "hf", "--out", tmp_path / "mine"]
    done = run_here(*words, home=exported.parent)
    assert done.returncode == 2 and "holds other files (thesis.tex)" in done.stderr
    assert len(list((tmp_path / "mine").iterdir())) == 1


class Hub:
    """Stands for huggingface_hub.HfApi, which would upload."""

    calls: list = []
    error = None

    def create_repo(self, repo, exist_ok):
        if self.error:
            raise self.error
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        self.calls.append((repo_id, sorted(p.name for p in folder_path.iterdir()), sorted(allow_patterns)))


FILES = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]


def test_push_uploads_the_folder_whose_card_names_the_repository(exported, run_here, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface-hub, of the extra hf")
    monkeypatch.setattr(hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    words = ["export", exported.parent / "run", "--format", "hf", "--out", tmp_path / "mine", "--push", "me/mine"]
    done = run_here(*words, "--json", home=exported.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"] == "https://huggingface.co/me/mine"
    assert Hub.calls == [("me/mine", FILES, FILES)]
    assert 'AutoModel.from_pretrained("me/mine")' in (tmp_path / "mine/README.md").read_text()
    monkeypatch.setattr(Hub, "error", OSError("401 Client Error"))
    done = run_here(*words, home=exported.parent)
    assert done.returncode == 2 and "401 Client Error" in done.stderr and "hf auth login" in done.stderr
    shutil.rmtree(tmp_path / "mine")
    done = run_here(*words[:-1], "not a name", home=exported.parent)
    assert done.returncode == 2 and "expected NAME/MODEL" in done.stderr and not (tmp_path / "mine").exists()


def test_push_without_its_library_or_of_another_format_says_what_to_do(invoke, monkeypatch):
    done = invoke("export", "x", "--push", "me/mine")
    assert done.exit_code == 2 and "give --format hf" in done.stderr
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    done = invoke("export", "x", "--format", "hf", "--push", "me/mine")
    assert done.exit_code == 2 and "pip install 'sslbench[hf]'" in done.stderr
