"""Pictures of a run: the maps are what they say, and the command draws them for every method."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional as F
from typer.testing import CliRunner

from sslbench import attention
from sslbench.cli import app
from sslbench.commands.inspect import trained_method
from sslbench.data import open_split
from sslbench.data.loader import evaluation_sample
from sslbench.evaluate.features import open_subject
from sslbench.evaluate.start import pretrain
from sslbench.method import Method, methods
from sslbench.recipe import compose
from sslbench.train.state import newest_checkpoint
from sslbench.views import normalise
from sslbench.vit import Arch, VisionTransformer, initialise, patchify, pool_tokens, unpatchify

QUIET = Console(quiet=True)
ENCODER = ["input", "attention", "relevance", "similarity to the centre"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These matrices are so small that threads wait for one another more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def an_encoder(depth=3, dim=16, image=8, seed=0):
    """Random weights and biases everywhere, and three random images."""
    torch.manual_seed(seed)
    encoder = VisionTransformer(Arch(4, dim, depth, 2, image)).eval()
    initialise(encoder)
    generator = torch.Generator().manual_seed(seed)
    for p in encoder.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return encoder, torch.randn(3, 3, image, image, generator=generator)


# ------------------------------------------------------------------------------------------------------------ the maps


def test_attention_is_the_softmax_of_the_last_block():
    encoder, images = an_encoder()
    tokens = encoder.tokens(images)
    for block in encoder.blocks[:-1]:
        tokens = block(tokens)
    last = encoder.blocks[-1]
    q, k, _ = last.attn.qkv(last.norm1(tokens)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    expected = ((q @ k.mT) / 8**0.5).softmax(-1)[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(attention.last_block_attention(encoder, images), expected)
    seen, out = attention.watch(encoder, images)
    torch.testing.assert_close(seen[-1].attention[:, :, 0, 1:].mean(1), expected)
    torch.testing.assert_close(out, encoder(images))


def test_token_similarity_is_the_mean_over_pairs():
    tokens = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    pairs = [[F.cosine_similarity(x[i], x[j], dim=0) for i in range(5) for j in range(5) if i != j] for x in tokens]
    torch.testing.assert_close(attention.token_similarity(tokens), torch.tensor(pairs).mean(1))
    alike = tokens[:, :1] * torch.rand(2, 5, 1)
    torch.testing.assert_close(attention.token_similarity(alike), torch.ones(2))


def test_relevance_is_conserved_by_every_block():
    encoder, images = an_encoder(depth=4, dim=32, image=16)
    encoder = encoder.double()
    seen, tokens = attention.watch(encoder, images.double())
    r = torch.rand_like(tokens)
    r = r / r.sum((1, 2), keepdim=True)
    for block, s in zip(reversed(encoder.blocks), reversed(seen), strict=True):
        r, of_attention = attention.through_block(block, s, r)
        torch.testing.assert_close(r.sum((1, 2)), torch.ones(3).double())
        assert 0 < of_attention.sum() < 3  # of three images, with relevance 1 each


def test_relevance_of_a_sum_and_of_a_product():
    a, b = torch.tensor([[[3.0, -1.0]]]), torch.tensor([[[1.0, 2.0]]])
    of_a, of_b = attention.through_sum(a, b, torch.tensor([[[0.4, 0.6]]]))
    # Gradient x input: a gets .3 - .6 = -.3, b .1 + 1.2 = 1.3; as positive shares of 1 that is .3 / 1.6 and 1.3 / 1.6.
    assert of_a.sum().item() == pytest.approx(0.3 / 1.6) and of_b.sum().item() == pytest.approx(1.3 / 1.6)
    torch.testing.assert_close(of_a, torch.tensor([[[-0.3, 0.6]]]) / 1.6)
    x, y, r = torch.rand(1, 3, 4), torch.rand(1, 4, 2), torch.rand(1, 3, 2)
    of_x, of_y = attention.through_product(x, y, r)
    assert of_x.sum() == pytest.approx(r.sum() / 2) and of_y.sum() == pytest.approx(r.sum() / 2)


def test_relevance_is_that_of_the_authors_code():
    """Numbers from github.com/hila-chefer/Transformer-Explainability (ViT_LRP.py, transformer_attribution, alpha 1).

    In float64, one image at a time, with these weights and f - mean as the weight of its linear head.
    """
    encoder, images = an_encoder()
    f = encoder(images)[:, 0].detach()
    expected = [
        [0.06530401567773524, 0.005659451306991926, 0.013124261673281588, 0.10095608217592308],
        [0.37789723619567483, 0.15155082482921006, 0.030435643692992478, 0.34844907846847134],
        [0.15819881113786538, 0.06396817522272663, 0.06983194558412718, 0.028652584110286615],
    ]
    found = attention.relevance(encoder, images, "cls", f.mean(0))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean", "mean_all"])
def test_relevance_lies_where_the_image_differs(pool):
    """A block that hands every token's value on to all: only the one patch that is not blank has something to say."""
    encoder, _ = an_encoder(depth=1, dim=16, image=16)
    block, d = encoder.blocks[0], 16
    for p in encoder.parameters():
        p.data.zero_()
    torch.nn.init.normal_(encoder.patch_embed.proj.weight, generator=torch.Generator().manual_seed(1))
    for norm in (block.norm1, block.norm2, encoder.norm):
        norm.weight.data.fill_(1)
    block.attn.qkv.weight.data[2 * d :] = torch.eye(d)
    block.attn.proj.weight.data = torch.eye(d)
    patches = torch.zeros(16, 16, 48)
    patches[torch.arange(16), torch.arange(16)] = 1.0  # image i differs from blank at patch i
    images = unpatchify(patches, 4, (4, 4))
    assert patchify(images, 4).equal(patches)
    mean = pool_tokens(encoder(torch.zeros(1, 3, 16, 16)), pool)[0].detach()
    found = attention.relevance(encoder, images, pool, mean)
    assert (found >= 0).all() and found.isfinite().all() and found.shape == (16, 16)
    torch.testing.assert_close(found.diagonal() / found.sum(1), torch.ones(16))


def test_relevance_leaves_the_encoder_and_works_without_grad():
    encoder, images = an_encoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with torch.no_grad():
        found = attention.relevance(encoder.requires_grad_(False), images, "mean", torch.zeros(16))
    assert found.shape == (3, 4) and found.dtype == torch.float32 and (found >= 0).all() and found.isfinite().all()
    assert all(v.equal(before[k]) and v.dtype == before[k].dtype for k, v in encoder.state_dict().items())
    # A set of one image: nothing sets it apart from the mean.
    assert attention.relevance(encoder.double(), images[:1], "cls", encoder(images[:1].double())[0, 0]).sum() < 1e-6


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """a_run(method, epochs): its finished folder, made once."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def make(name, epochs=0.0):
        if (name, epochs) not in made:
            sets = ["machine.tensorboard=false", "science.optim.warmup_epochs=0"]
            recipe = compose(name, recipe=f"{name}_smoke", sets=sets, science={"epochs": epochs})
            folder = made[name, epochs] = root / f"{name}_{epochs:g}"
            pretrain(recipe, folder, QUIET, progress=False)
        return made[name, epochs]

    return make


def inspect(*args):
    done = CliRunner().invoke(app, ["inspect", *map(str, args), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.strip().splitlines()[-1]), done


@pytest.mark.parametrize("name", methods())
def test_every_method_has_its_page(a_run, name):
    folder = a_run(name)
    found, _ = inspect(folder, "--images", 3)
    assert found["method"] == name and found["run"] == str(folder) and found["split"] == "val"
    page, picture = folder / "inspect" / "inspect.html", folder / "inspect" / "inspect.png"
    assert (found["page"], found["picture"]) == (str(page), str(picture))
    assert found["columns"][0] == "input" and len(found["columns"]) > 4
    assert found["columns"][-3:] == ENCODER[1:]
    text, run = page.read_text(), json.loads((folder / "run.json").read_text())
    assert "<html" in text and run["recipe_hash"] in text and str(folder.parent) not in text
    assert all(title in text for title in found["columns"]) and "from the method<" not in text
    assert "http" not in text and "<script" not in text  # nothing from outside
    with Image.open(picture) as image:
        assert image.width > image.height > 500


def test_token_similarity_on_the_page_is_that_of_the_encoder(a_run):
    folder = a_run("mae", 0.2)
    found, _ = inspect(folder)
    subject = open_subject(str(folder))
    images = open_split("builtin", "val")
    with torch.no_grad():
        tokens = subject.encoder(normalise(evaluation_sample(images, 256, 16), subject.mean, subject.std))
    similar = attention.token_similarity(tokens[:, 1:])
    assert found["n"] == 256 and found["token_similarity"] == pytest.approx(similar.mean().item(), abs=1e-5)
    assert found["token_similarity_std"] == pytest.approx(similar.std(correction=0).item(), abs=1e-5)
    assert f"{found['token_similarity']:.3f}" in (folder / "inspect" / "inspect.html").read_text()


def test_pictures_show_the_trained_decoder_and_are_the_same_again(a_run, tmp_path):
    folder = a_run("mae", 0.2)
    method = trained_method(open_subject(str(folder)), QUIET)
    _, state = newest_checkpoint(folder / "checkpoints")
    assert all(v.equal(state["method"][k]) for k, v in method.state_dict().items())
    pictures = [Path(inspect(folder, "--out", tmp_path / out)[0]["picture"]).read_bytes() for out in "ab"]
    assert pictures[0] == pictures[1]


def test_a_run_without_its_checkpoint_shows_its_encoder_alone(a_run, tmp_path):
    folder = shutil.copytree(a_run("mae", 0.2), tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    found, done = inspect(folder)
    assert found["columns"] == ENCODER
    assert "no checkpoint" in done.stderr


def test_a_method_that_draws_nothing_shows_its_encoder(a_run, monkeypatch, tmp_path):
    monkeypatch.setattr(methods()["ocl"], "pictures", Method.pictures)
    found, _ = inspect(a_run("ocl"), "--out", tmp_path)
    assert found["columns"] == ENCODER and "no pictures of its own" in (tmp_path / "inspect.html").read_text()


def test_weights_alone_and_an_untrained_encoder(a_run, tmp_path, home):
    weights = shutil.copy(a_run("ocl") / "weights.safetensors", tmp_path / "some.safetensors")
    found, done = inspect(weights, "--images", 2)
    assert found["columns"] == ENCODER
    assert found["data"] == "builtin" and "does not say what data" in done.stderr
    assert found["page"] == str(tmp_path / "inspect" / "inspect.html")
    found, _ = inspect("untrained:vit_mini4", "--images", 2, "--data", "builtin")
    assert found["page"] == str(home / "results" / "inspect" / "inspect.html") and -1 < found["token_similarity"] < 1


def test_the_newest_run_is_found_and_named(a_run, home):
    shutil.copytree(a_run("mae"), home / "runs" / "some")
    found, done = inspect()
    assert found["run"] == str(home / "runs" / "some") and found["run"] in done.stderr


def test_images_of_a_folder_without_val(a_run, image_folder, tmp_path):
    shutil.rmtree(image_folder / "val")
    found, _ = inspect(a_run("mae"), "--data", f"folder:{image_folder}", "--out", tmp_path / "out", "--images", 50)
    assert found["split"] == "train" and found["n"] == 40


def test_bad_input_exits_2(a_run, tmp_path, home):
    def fails(*args):
        done = CliRunner().invoke(app, ["inspect", *map(str, args)])
        assert done.exit_code == 2 and "Traceback" not in done.output
        return done.stderr

    assert "no finished pre-training run" in fails()
    assert "no run folder and no weights file" in fails(tmp_path / "nothing")
    assert "no such folder" in fails(a_run("ocl"), "--data", f"folder:{tmp_path / 'nothing'}")
    fails(a_run("ocl"), "--images", 0)
    unfit = shutil.copytree(a_run("mae", 0.2), tmp_path / "unfit")
    recipe = (unfit / "recipe.yaml").read_text()
    (unfit / "recipe.yaml").write_text(recipe.replace("decoder_depth: 2", "decoder_depth: 3"))
    assert (unfit / "recipe.yaml").read_text() != recipe
    assert "does not fit" in fails(unfit)
