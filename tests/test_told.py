"""Public weights as rows: what they are is told or known, recorded, and stands beside what a paper prints."""

import json
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console
from test_papers import at_paper_scale, cell_of, protocol
from test_published import IMAGES, a_vit, beit, close, forward, small  # noqa: F401 - `small` is a fixture
from test_report import fields, pretrain, records

from sslbench import ledger
from sslbench.errors import UserError
from sslbench.evaluate.attentive import Attentive, AttentiveProbe
from sslbench.evaluate.evaluation import eval_recipe, evaluate
from sslbench.evaluate.features import open_subject
from sslbench.evaluate.finetune import Classifier, Finetune, load_classifier, resized
from sslbench.evaluate.told import TIMM, Told, both, of_timm, tell
from sslbench.recipe import Augment
from sslbench.report.compare import compare
from sslbench.report.page import write_page
from sslbench.report.paper_figures import paper_figures
from sslbench.report.papers import reported_beside_measured
from sslbench.report.tables import tables
from sslbench.train.optim import layer_groups
from sslbench.transfer.protocol import Encoder, check_encoder
from sslbench.vit import ARCHS, Arch, Parts, VisionTransformer, rebuilt_positions, sincos_positions
from sslbench.weights import write_weights

MAE = ["--as", "mae", "--pretrained-on", "imagenet", "--epochs", "1600"]
KNN = ["--data", "builtin", "--set", "science.k=[5]", "--set", "science.main_k=5"]


def a_file(tmp_path, tree=None, name="w.pth"):
    torch.save(a_vit() if tree is None else tree, tmp_path / name)
    return str(tmp_path / name)


def answer(done):
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# -------------------------------------------------------------------------------------------------------- what they are


def test_what_is_told_is_in_the_record_and_in_the_ledger(invoke, few_images, tmp_path):
    record = answer(invoke("eval", "knn", a_file(tmp_path), *KNN, *MAE, "--json"))
    assert (record["method"], record["pretrain"]["data"], record["pretrain"]["epochs"]) == ("mae", "imagenet", 1600)
    assert record["condition"]["weights"] == "public" and record["pretrain"]["run"] is None
    (line,) = (tmp_path / "results/ledger/mae.jsonl").read_text().splitlines()
    assert json.loads(line) == record
    (kept,) = ledger.read(tmp_path / "results" / "ledger")
    assert kept.public and kept.pretrain.recipe_hash is None


def test_without_a_word_they_are_public_all_the_same(invoke, few_images, tmp_path):
    done = invoke("eval", "knn", a_file(tmp_path), *KNN, "--json")
    assert answer(done)["condition"]["weights"] == "public" and answer(done)["method"] == "w"
    assert "--as METHOD --pretrained-on DATA --epochs N says what they are" in done.stderr


def test_a_methods_name_in_any_case_is_that_method_and_its_feature_is_read(tmp_path):
    file = a_file(tmp_path)
    subject = open_subject(file, told=tell("ccMIM", "imagenet", 300))
    assert (subject.method, subject.pool) == ("ccmim", "mean")
    assert open_subject(file, told=tell("BEiT", None, None)).method == "BEiT"
    assert open_subject(file, told=tell("mae", None, None)).pool == "cls"


@pytest.mark.parametrize("run", ["untrained:vit_mini4@8", "ours.safetensors"])
@pytest.mark.parametrize("command", [["eval", "knn"], ["eval", "linprobe"], ["eval", "finetune"], ["inspect"]])
def test_flags_on_what_is_not_public_are_an_error(command, run, invoke, tmp_path):
    encoder = VisionTransformer(ARCHS["vit_mini4"], 8)
    metadata = {"arch": "vit_mini4", "image_size": "8", "mean": "[0.5, 0.5, 0.5]", "std": "[0.5, 0.5, 0.5]"}
    write_weights(tmp_path / "ours.safetensors", encoder.state_dict(), metadata)
    done = invoke(*command, run, "--data", "builtin", *MAE)
    assert done.exit_code == 2 and "leave out --as, --pretrained-on and --epochs" in done.stderr


def test_a_fine_tuned_model_takes_no_flags_nor_does_as_take_any_word(invoke):
    done = invoke("eval", "robustness", "x", "--data", "folder:x", *MAE)
    assert done.exit_code == 2 and "a fine-tuned model knows what it was made of" in done.stderr
    done = invoke("eval", "knn", "x", "--as", "../mae")
    assert done.exit_code == 2 and "--as ../mae: expected a method's name" in done.stderr


def test_where_no_data_is_given_it_is_asked_for(invoke, tmp_path):
    done = invoke("eval", "knn", a_file(tmp_path), *MAE)
    assert done.exit_code == 2 and "is public weights: give the data to evaluate them on, --data SPEC" in done.stderr


def test_timms_names_say_themselves_what_they_are_and_are_not_contradicted():
    assert of_timm("vit_base_patch16_224.mae", {}) == Told("mae", "imagenet", 1600)
    old = {"architecture": "vit_base_patch16_224", "tag": "dino"}
    assert of_timm("vit_base_patch16_224_dino", old) == Told("DINO", "imagenet", 400)
    assert not of_timm("vit_base_patch16_224", {"tag": "augreg2_in21k_ft_in1k"})
    assert TIMM.keys() <= {*timm.list_models(pretrained=True)}
    assert both(TIMM["vit_base_patch16_224.mae"], Told("MAE", None, 1600.0), "x") == Told("mae", "imagenet", 1600)
    assert both(Told("DINOv2", "lvd142m"), Told(epochs=3), "x") == Told("DINOv2", "lvd142m", 3)
    with pytest.raises(UserError, match="is known to be mae, imagenet, 1600 epochs: leave out what says otherwise"):
        both(TIMM["vit_base_patch16_224.mae"], Told("dino"), "timm:x")


# ----------------------------------------------------------------------------------------------------- beside a paper's


def of_public(value=67.9, method="mae", epochs=1600, **over):
    pretrained = pretrain(data="imagenet", epochs=epochs, recipe_hash=None, run=None)
    condition = {"weights": "public", "pool": "cls"}
    return at_paper_scale(
        value, epochs=epochs, pretrain=pretrained, condition=condition, preset=None, **over
    ) | {"method": method}  # fmt: skip


def test_public_weights_stand_beside_the_printed_number_and_are_marked(home, tmp_path):
    measured = records(of_public())
    shown = "68.0 | 67.9 ± 0.2 (-0.1, public weights)"
    assert cell_of("ocl_t6", ["mae", "vit_b16"], measured) == [shown, "83.6"]
    write_page(measured, tmp_path, "html", papers=True)
    page = (tmp_path / "report.html").read_text()
    assert "67.9 ± 0.2 (-0.1, public weights)</a>" in page
    own = records(at_paper_scale(67.5))
    assert cell_of("ocl_t6", ["mae", "vit_b16"], measured + own)[0] == "68.0 | 67.5 ± 0.2 (-0.5)"  # a run comes first


def test_a_method_that_this_suite_has_not_has_its_row_too(home):
    measured = records(of_public(77.0, "dino", 400, protocol=protocol("linprobe_ccmim", "mean")))
    table = reported_beside_measured("ccmim_t1", measured)
    (row,) = [row for row in table.rows if any("public weights" in cell for cell in row)]
    assert row[0] == "DINO" and "77.3 | 77.0 ± 0.2 (-0.3, public weights)" in row


@pytest.mark.parametrize(
    "other",
    [
        {"epochs": 800},
        {"arch": "vit_l16"},
        {"method": "mocov3"},
        {"protocol": protocol("linprobe_mae", "mean")},
        {"metric": "knn_top1"},
    ],
)
def test_other_epochs_arch_method_feature_or_metric_are_not_that_row(other, home):
    assert cell_of("ocl_t6", ["mae", "vit_b16"], records(of_public(**other)))[0] == "68.0"


def test_in_the_ledgers_tables_their_row_says_so_and_is_no_seed_of_ours(home):
    ours = fields(40, "mae")
    theirs = fields(50, "mae", preset=None, condition={"weights": "public"},
                    pretrain=pretrain(recipe_hash=None, run=None))  # fmt: skip
    (table,) = tables(records(ours, theirs, fields(30, "ocl")))
    assert [row.label for row in table.rows] == ["mae", "mae (public weights)", "ocl"]
    found = compare("mae (public weights)", "ocl", ledger.read(), Console(quiet=True))
    assert found["rows"][0]["difference"] == 20
    assert compare("mae", "ocl", ledger.read(), Console(quiet=True))["rows"][0]["difference"] == 10


def test_inspect_is_what_asls_figure_1_takes(invoke, few_images, tmp_path, monkeypatch):
    """Linear accuracy from `eval`, token similarity from `inspect`, of the same file."""
    file = a_file(tmp_path, beit())
    evaluated = ["--set", "science.epochs=1", "--set", "science.lr=[1.0]", "--data", "builtin"]
    told = ["--as", "BEiT", "--pretrained-on", "imagenet", "--epochs", "800"]
    answer(invoke("eval", "linprobe", file, *evaluated, *told, "--json"))
    seen = answer(invoke("inspect", file, "--images", "1", *told, "--json"))
    assert seen["method"] == "BEiT" and {"attention", "relevance"} <= {*seen["columns"]}
    assert "public weights, BEiT, imagenet, 800 epochs" in Path(seen["page"]).read_text()
    monkeypatch.setenv("SSLBENCH_HOME", str(tmp_path))
    figure = next(f for f in paper_figures(tables(ledger.read())) if f.name == "asl_fig1")
    (line,) = figure.figure.axes[1].lines
    assert line.get_xdata()[0] == pytest.approx(seen["token_similarity"]) and not figure.missing


def test_inspect_leaves_out_what_an_encoder_has_not(invoke, few_images, tmp_path):
    ijepa = {"target_encoder": a_vit(cls=False, positions=16)}
    seen = answer(invoke("inspect", a_file(tmp_path, ijepa), "--images", "1", "--json"))
    assert seen["columns"] == ["input", "relevance", "similarity to the centre"] and 0 < seen["token_similarity"] <= 1
    seen = answer(invoke("inspect", a_file(tmp_path, a_vit(norm="fc_norm"), "f.pth"), "--images", "1", "--json"))
    assert seen["columns"] == ["input", "attention", "similarity to the centre"]
    assert "which no norm follows in this model" in Path(seen["page"]).read_text()


# ------------------------------------------------------------------------------------------------ features and training


def test_a_feature_that_an_encoder_has_not_is_refused(few_images, home, tmp_path):
    file = a_file(tmp_path, {"target_encoder": a_vit(cls=False, positions=16)})
    for kind in ("knn", "linprobe"):
        with pytest.raises(UserError, match="'w' has no feature 'cls', only mean: it has no CLS; give --set"):
            evaluate(eval_recipe(kind, sets=["science.pool=cls"]), file, "builtin")
    with pytest.raises(UserError, match="has no feature 'cls', only mean"):
        evaluate(eval_recipe("finetune", sets=["science.pool=cls"]), file, "builtin")
    record = evaluate(eval_recipe("knn", sets=["science.main_k=5", "science.k=[5]"]), file, "builtin")[0]
    assert record.condition["pool"] == "mean" and record.protocol.name == "knn_mean"


PUBLISHED = {
    "BEiT": (beit, Parts(relative=True, absolute=False)),
    "I-JEPA": (lambda: a_vit(cls=False, positions=16), Parts(cls=False)),
    "registers": (lambda: {**a_vit(), "register_tokens": torch.ones(1, 2, 48)}, Parts(registers=2)),
    "fc_norm": (lambda: a_vit(norm="fc_norm"), Parts(pooled_norm=True)),
}


def a_classifier(encoder):
    torch.manual_seed(0)
    return Classifier(Finetune(protocol="finetune", drop_path=0), resized(encoder, encoder.image[0]), Augment(), 5)


@pytest.mark.parametrize("family", PUBLISHED)
def test_fine_tuning_trains_what_is_there_and_its_file_is_read_back(family, tmp_path):
    make, parts = PUBLISHED[family]
    encoder = open_subject(a_file(tmp_path, make())).encoder
    model = a_classifier(encoder)
    pooled = encoder(IMAGES)[:, 1:].mean(1) if family == "fc_norm" else None
    if pooled is not None:  # it starts from the norm that it was published with
        close(model.fc_norm(pooled), encoder.feature(encoder(IMAGES), "mean"))
    model.logits(IMAGES).square().sum().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert ("encoder.pos_embed" in trained) == parts.absolute  # BEiT has none, and gets none
    assert ("encoder.registers" in trained) == bool(parts.registers) and ("encoder.cls_token" in trained) == parts.cls
    assert ("encoder.blocks.0.relative.table" in trained) == parts.relative
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if n in trained)
    scales = [{id(p): g["lr_scale"] for p in g["params"]} for g in layer_groups(model, 2, 0.05, 0.5)]
    layer = {n: s[id(p)] for n, p in model.named_parameters() for s in scales if id(p) in s}
    assert {layer[n] for n in trained if "registers" in n or "patch_embed" in n} == {0.125}
    assert {layer[n] for n in trained if "blocks.0." in n} == {0.25}
    state = {k.removeprefix("encoder."): v for k, v in model.state_dict().items()}
    metadata = {"kind": "classifier", "arch": "small", "image_size": "32", "science": model.science.model_dump_json(),
                "classes": '["a", "b", "c", "d", "e"]', "mean": "[0, 0, 0]", "std": "[1, 1, 1]"}  # fmt: skip
    write_weights(tmp_path / "c.safetensors", state, metadata)
    close(load_classifier(tmp_path / "c.safetensors")[0].logits(IMAGES), model.eval().logits(IMAGES))


def test_an_attentive_probe_reads_the_patches_of_an_encoder_without_cls(tmp_path):
    encoder = open_subject(a_file(tmp_path, PUBLISHED["I-JEPA"][0]())).encoder
    torch.manual_seed(0)
    model = AttentiveProbe(Attentive(protocol="attentive", queries=4, lr=[0.1]), encoder, Augment(), 5)
    logits = model.logits(IMAGES)
    assert logits.isfinite().all()
    close(logits, model.read(forward(a_vit(cls=False, positions=16))))


def test_relative_positions_are_of_one_size_and_others_are_resampled(tmp_path):
    with pytest.raises(UserError, match="relative positions are for images of 32 pixels, not 40"):
        resized(open_subject(a_file(tmp_path, beit())).encoder, 40)
    for family in ("I-JEPA", "registers"):
        encoder = open_subject(a_file(tmp_path, PUBLISHED[family][0]())).encoder
        assert resized(encoder, 40)(torch.zeros(1, 3, 40, 40)).shape == (1, 26, 48)


def test_a_finished_fine_tuning_of_weights_that_are_now_told_is_scored_as_what_they_are(few_images, home, tmp_path):
    recipe = eval_recipe("finetune", "finetune_smoke", ["science.auto_augment=null", "science.batch_size=500"])
    file = a_file(tmp_path)
    first = evaluate(recipe, file, "builtin")[0]
    again = evaluate(recipe, file, "builtin")[0]
    told = evaluate(recipe, file, "builtin", told=tell("mae", "imagenet", 1600))[0]
    assert first == again and (told.method, told.value) == ("mae", first.value) and told.id != first.id
    assert told.head_sha256 == first.head_sha256 and len(ledger.read()) == 2


# --------------------------------------------------------------------------------------------------------- the backbone


def plain(table):
    encoder = VisionTransformer(Arch(8, 48, 2, 3, 32))
    encoder.pos_embed.data.copy_(table)
    return encoder


def rebuilds(encoder):
    check_encoder(encoder, Encoder(rebuild_positions=True, position_grid=(6, 6)))


def test_positions_are_rebuilt_in_the_layout_that_they_have_and_learned_ones_are_refused():
    maes = sincos_positions(48, (4, 4))
    mocov3s = maes.roll(24, -1)
    assert rebuilt_positions(maes, (4, 4), (6, 5)).equal(sincos_positions(48, (6, 5)))
    assert rebuilt_positions(maes.half().float(), (4, 4), (6, 5)).equal(sincos_positions(48, (6, 5)))
    other = rebuilt_positions(mocov3s, (4, 4), (6, 6))
    # Rows and columns change places: what was at (a, b) is at (b, a).
    swapped = sincos_positions(48, (6, 6))[0, 1:].unflatten(0, (6, 6)).transpose(0, 1).flatten(0, 1)
    close(other[0, 1:], swapped)
    rebuilds(plain(maes))
    rebuilds(plain(mocov3s))
    for learned in (torch.randn(1, 17, 48), torch.zeros(1, 17, 48), maes + 0.01 * torch.randn(1, 17, 48)):
        with pytest.raises(
            UserError, match="positions cannot be rebuilt at another size: the encoder's are not sin-cos"
        ):
            rebuilds(plain(learned))


def test_transfer_takes_no_parts_that_its_backbone_has_no_place_for(tmp_path):
    for family, says in (("BEiT", "it|this one has relative positions"), ("registers", "2 token")):
        with pytest.raises(UserError, match=says):
            check_encoder(open_subject(a_file(tmp_path, PUBLISHED[family][0]())).encoder, Encoder())
    ijepa = open_subject(a_file(tmp_path, PUBLISHED["I-JEPA"][0]())).encoder
    check_encoder(ijepa, Encoder())
    with pytest.raises(UserError, match="no CLS to keep"):
        check_encoder(ijepa, Encoder(keep_cls=True))


def test_the_backbone_of_an_encoder_without_cls_is_its_blocks(tmp_path):
    pytest.importorskip("mmengine", exc_type=ImportError)
    from sslbench.transfer.backbone import Backbone

    t = a_vit(cls=False, positions=16, norm=None)
    encoder = open_subject(a_file(tmp_path, {**t, "norm.weight": torch.ones(48), "norm.bias": torch.zeros(48)})).encoder
    (found,) = Backbone(encoder, Encoder(taps=[11]), (4, 4)).eval()(IMAGES)
    close(found.flatten(2).mT, forward(t))
