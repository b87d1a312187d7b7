"""The papers' tables: every printed number once, measured beside reported, what they disagree on, what is missing."""

import io
import re
from ast import literal_eval

import pytest
from rich.console import Console
from test_report import ALL_TABLES, METHODS, fields, pretrain, records

from sslbench.data import known_size
from sslbench.evaluate.evaluation import eval_recipe
from sslbench.files import digest
from sslbench.ledger import scale_of
from sslbench.paths import recipe_files
from sslbench.recipe import compose
from sslbench.report.missing import missing
from sslbench.report.page import report, write_page
from sslbench.report.papers import deviations, disagreements, reported_beside_measured
from sslbench.study.cells import rows_of
from sslbench.study.measure import measures_of
from sslbench.study.printed import PAPERS, protocol_of, read_paper
from sslbench.study.spec import read_study
from sslbench.study.tables import paper_rows
from sslbench.transfer.protocol import transfer_recipe
from sslbench.views import VIEW


def protocol(recipe="linprobe_mae", pool="cls", *sets):
    """As `sslbench eval` writes it for a ViT of 224 pixels."""
    science = eval_recipe(recipe.split("_")[0], recipe, list(sets)).science.model_dump(mode="json")
    seen = {"pool": pool, "image_size": [224, 224], "view": VIEW}
    return {"name": f"{recipe}_{pool}", "hash": digest({**science, **seen})}


def at_paper_scale(value, metric="linprobe_top1", epochs=1600, method="mae", sets=(), **over):
    """Of a run by `sslbench pretrain METHOD --arch ARCH --data imagenet --epochs N`, with `sets` as its --set."""
    science = {"arch": over.get("arch", "vit_b16"), "data": {"spec": "imagenet"}, "epochs": epochs}
    hash = compose(method, science=science, sets=[*sets]).hash()
    base = {"scale": "paper", "arch": "vit_b16", "dataset": "imagenet", "metric": metric, "stderr": 0.1,
            "protocol": protocol(), "pretrain": pretrain(data="imagenet", epochs=epochs, recipe_hash=hash)}  # fmt: skip
    return fields(value, method, **{**base, **over})


def cell_of(name, row_words, measured):
    """The cells of the one row that has all these words in its key columns."""
    table = reported_beside_measured(name, measured)
    (row,) = [row for row in table.rows if set(row_words) <= set(row[: table.keys])]
    return row[table.keys :]


@pytest.mark.parametrize("name", ALL_TABLES)
def test_every_reported_number_is_shown_as_often_as_the_paper_prints_it(home, name):
    table, frame = reported_beside_measured(name, []), read_paper(name)
    shown = [cell for row in table.rows for cell in row[table.keys :] if cell]
    assert sorted(re.sub(r" \[\d+\]$", "", cell).split(" ")[0] for cell in shown) == sorted(
        (value or "-").split(" ")[0] for value in frame["value"]
    )
    assert all(len(row) == len(table.header) for row in table.rows)


@pytest.mark.parametrize("name", ALL_TABLES)
def test_notes_are_numbered_and_each_number_points_at_its_note(home, name):
    table, frame = reported_beside_measured(name, []), read_paper(name)
    assert [note.split("] ", 1)[1] for note in table.notes] == list(dict.fromkeys(n for n in frame["note"] if n))
    assert [int(note[1:].split("]")[0]) for note in table.notes] == list(range(1, len(table.notes) + 1))
    marks = [int(m) for row in table.rows for cell in row[table.keys :] for m in re.findall(r"\[(\d+)\]$", cell)]
    wanted = [table.notes.index(f"[{i}] {n}") + 1 for n in frame["note"] if n for i in [_number(table.notes, n)]]
    assert sorted(marks) == sorted(wanted)


def _number(notes, text):
    return next(i for i, note in enumerate(notes, 1) if note == f"[{i}] {text}")


def test_what_a_paper_prints_twice_under_one_name_takes_two_lines(home, tmp_path, monkeypatch):
    head = "paper,table,row,method,arch,pretrain_data,epochs,condition,metric,dataset,value,unit,note\n"
    line = "x,t1,1,ocl,vit_b16,imagenet,800,,linprobe_top1,imagenet,{},%,\n"
    (tmp_path / "x_t1.csv").write_text(head + line.format(74.2) + line.format(74.3))
    monkeypatch.setattr("sslbench.study.printed.bundled", lambda _: tmp_path)
    table = reported_beside_measured("x_t1", records(at_paper_scale(74, epochs=800, method="ocl")))
    assert table.rows == [["ocl", "74.2 | 74.0 ± 0.2 (-0.2)"], ["ocl", "74.3 | 74.0 ± 0.2 (-0.3)"]]
    assert table.common == "vit_b16, pre-trained on imagenet, 800 epochs"


@pytest.mark.parametrize(("name", "columns"), [*((name, 80) for name in ALL_TABLES), ("ocl_t2", 60), ("ocl_t6", 200)])
def test_a_table_in_the_terminal_keeps_its_width_and_every_word(home, name, columns):
    out = io.StringIO()
    report([name], None, "md", Console(file=out, width=columns, soft_wrap=True))
    text, table = out.getvalue(), reported_beside_measured(name, [])
    assert max(map(len, text.splitlines())) <= columns and "…" not in text
    for words in [table.header, *table.rows]:
        assert all(word in text for cell in words for word in cell.split())
    for note in table.notes:
        assert " ".join(note.split()) in " ".join(text.split())


def test_a_condition_that_a_column_repeats_is_not_said_twice_and_methods_across_are_columns(home):
    assert "condition" not in reported_beside_measured("ocl_t2", []).header  # mask_ratio and batch_size are printed
    assert [row[1] for row in reported_beside_measured("ocl_t4", []).rows][2:] == [
        f"mlp head={n}-layer" for n in (2, 3)
    ]
    table = reported_beside_measured("ccmim_t4", [])
    assert [row[0] for row in table.rows] == [f"finetune top1 {x}" for x in ("inat18", "inat19", "flowers102")]
    assert table.header[-2:] == ["mae vit_b16 imagenet 1600 ep", "ccmim vit_b16 imagenet 800 ep"]


def test_measured_stands_beside_reported_for_the_rows_own_recipe_alone(home):
    other = [at_paper_scale(60, epochs=400), at_paper_scale(61, sets=["science.method.mask_ratio=0.6"]),
             at_paper_scale(62, sets=["science.batch_size=2048"])]  # fmt: skip
    measured = records(at_paper_scale(67.5), *other)
    assert cell_of("ocl_t6", ["mae", "vit_b16"], measured) == ["68.0 | 67.5 ± 0.2 (-0.5)", "83.6"]
    assert cell_of("ocl_t6", ["mae", "vit_b16"], records(*other, fields())[:3]) == ["68.0", "83.6"]
    assert cell_of("ocl_t6", ["mae", "vit_l16"], measured) == ["76.0", "85.9"]


def test_an_ablations_row_is_in_no_headline_cell_but_where_it_is_that_very_recipe(home):
    """Five values of kappa: 64 is the method's own."""
    under = {"method": "ocl", "arch": "vit_l16", "protocol": protocol("finetune_ocl_l", "mean")}
    hashes = {int(i): recipe.hash() for i, recipe in paper_rows("ocl_t5").items()}
    runs = {i: pretrain(data="imagenet", epochs=800, recipe_hash=hash) for i, hash in hashes.items()}
    measured = records(*(at_paper_scale(80 + i, "finetune_top1", pretrain=run, **under) for i, run in runs.items()))
    own = "85.8 [4] | 84.0 ± 0.2 (-1.8, 800 ep)"
    assert cell_of("ocl_t6", ["ocl", "vit_l16"], measured)[1] == own
    assert [row[2].partition(" | ")[2][:4] for row in reported_beside_measured("ocl_t5", measured).rows] == [
        "81.0", "82.0", "83.0", "84.0", "85.0"]  # fmt: skip


def test_a_measured_number_in_a_papers_table_opens_its_provenance(home, tmp_path):
    (record,) = measured = records(at_paper_scale(67.5))
    write_page(measured, tmp_path, "html", papers=True)
    page = (tmp_path / "report.html").read_text()
    assert f'68.0 | <a href="#{record.id}">67.5 ± 0.2 (-0.5)</a>' in page and f'<details id="{record.id}">' in page


def test_a_number_under_another_protocol_is_not_the_rows(home):
    """The same recipe's name with one value changed, another recipe, and the cached probe."""
    for other in (protocol("linprobe_mae", "cls", "science.epochs=89"), protocol("linprobe_ccmim", "mean"),
                  {"name": "linprobe_cls", "hash": "p" * 12}):  # fmt: skip
        measured = records(at_paper_scale(67.5, protocol=other, weights_sha256=other["hash"]))
        assert cell_of("ocl_t6", ["mae", "vit_b16"], measured)[0] == "68.0"


def test_small_sets_tables_take_numbers_of_their_own_epochs_alone(home):
    """MACRL's Table 2 has rows of 100 and of 200 epochs of probing after 2,000 of pre-training."""

    def shown(epochs, probe):
        science = eval_recipe("linprobe", "linprobe_macrl_cifar", [f"science.epochs={probe}"]).science
        hash = digest({**science.model_dump(mode="json"), "pool": "mean_all", "image_size": [32, 32]})
        run = compose("macrl", science={"arch": "macrl12", "data": {"spec": "cifar10"}, "epochs": epochs})
        measured = at_paper_scale(85.0, method="macrl", arch="macrl12", dataset="cifar10", scale="cifar",
                                  protocol={"name": "linprobe_macrl_cifar_mean_all", "hash": hash},
                                  pretrain=pretrain(data="cifar10", epochs=epochs, recipe_hash=run.hash()))  # fmt: skip
        table = reported_beside_measured("macrl_t2", records(measured))
        return [row[1] for row in table.rows if "| 85.0" in row[2]]

    assert shown(2000, 200) == ["linprobe epochs=200"] and shown(2000, 100) == ["linprobe epochs=100"]
    assert shown(100, 200) == shown(2000, 7) == []


def test_seeds_are_one_number_and_another_feature_is_another_protocol(home):
    """The mean of patches is MAE's where somebody sets it: its recipe leaves that to the method, which says CLS."""
    measured = records(*(at_paper_scale(v, seed=s) for s, v in enumerate((67, 68))))
    measured += records(at_paper_scale(66, protocol=protocol(pool="mean"), weights_sha256="w"))
    assert cell_of("ocl_t6", ["mae", "vit_b16"], measured)[0] == "68.0 | 67.5 ± 6.4 (-0.5)"  # t(.975, 1) 0.5


def test_what_was_run_otherwise_than_printed_is_said(home):
    """OCL's Table 6 prints 1,600 epochs where all else says 800; MiCL is run as OCL, and MACRL's MoCo as MoCo v3."""
    measured = records(at_paper_scale(74.0, epochs=800, method="ocl"))
    assert cell_of("ocl_t6", ["ocl", "vit_b16"], measured)[0] == "74.2 [4] | 74.0 ± 0.2 (-0.2, 800 ep)"
    assert cell_of("micl_t6", ["micl", "vit_b16", "800"], measured)[0] == "74.2 | 74.0 ± 0.2 (-0.2, ocl)"
    science = eval_recipe("linprobe", "linprobe_macrl_cifar", ["science.epochs=1000"]).science.model_dump(mode="json")
    hash = digest({**science, "image_size": [32, 32]})
    run = compose("mocov3", science={"arch": "macrl12", "data": {"spec": "cifar10"}, "epochs": 2000})
    moco = at_paper_scale(80.0, method="mocov3", arch="macrl12", dataset="cifar10", scale="cifar",
                          protocol={"name": "linprobe_macrl_cifar_mean_all", "hash": hash},
                          pretrain=pretrain(data="cifar10", epochs=2000, recipe_hash=run.hash()))  # fmt: skip
    table = reported_beside_measured("macrl_t2", records(moco))
    (note,) = [i for i, note in enumerate(table.notes, 1) if "MoCo v1 (He et al. 2020)" in note]
    assert [row[2] for row in table.rows if row[0] == "MoCo"] == [f"86.16 [{note}] | 80.0 ± 0.2 (-6.2, mocov3)"]


def test_a_transfer_or_a_robustness_is_the_rows_by_the_hash_of_its_protocol_never_by_its_name(home):
    box = {"metric": "bbox_ap", "dataset": "coco", "epochs": 400}
    for shipped, shown in ((transfer_recipe("coco", "coco_ocl"), "50.6 | 50.0 ± 0.2 (-0.6)"),
                           (transfer_recipe("coco", "coco_ocl", ["science.iterations=100"]), "50.6"),
                           (transfer_recipe("coco", "coco_ocl_smoke"), "50.6")):  # fmt: skip
        at = at_paper_scale(50.0, protocol={"name": "coco_ocl", "hash": shipped.protocol_hash()}, **box)
        assert cell_of("ocl_t7", ["mae", "vit_b16", "400"], records(at))[0] == shown
    for tuned, shown in (("finetune", "35.9 | 35.0 ± 0.2 (-0.9)"), ("finetune_smoke", "35.9")):
        hash = digest([{"protocol": "robustness", "restrict": True}, protocol(tuned, "mean")["hash"], 224, VIEW])
        at = at_paper_scale(35.0, "top1", dataset="imagenet-a", protocol={"name": "robustness", "hash": hash})
        assert cell_of("ocl_t8", ["mae", "1600"], records(at))[0] == shown


# ------------------------------------------------------------------- what the papers disagree on; what is missing

COUNTS = {  # numbers and dashes that each table prints; two people counted, apart
    "micl": [12, 30, 25, 16, 5, 42], "asl": [18, 15, 70, 18, 10, 16, 15], "ccmim": [80, 119, 50, 27, 16],
    "macrl": [8, 8, 12, 12], "ocl": [12, 30, 20, 16, 5, 44, 66, 21, 16, 16, 14],
}  # fmt: skip


def test_every_table_of_every_paper_is_there_with_every_cell():
    for paper, counts in COUNTS.items():
        assert [len(read_paper(f"{paper}_t{i}")) for i in range(1, len(counts) + 1)] == counts
        assert f"{paper}_t{len(counts) + 1}" not in ALL_TABLES and f"{paper}_text" in ALL_TABLES
    assert len(read_paper("asl_loss")) == 4


SHORT = {"linprobe", "finetune"}


def gains():
    """(claim, what its paper's tables give) of every gain over a baseline that the texts claim and the tables have."""
    for paper in COUNTS:
        cells = [line for name in ALL_TABLES if name.startswith(f"{paper}_t") and "text" not in name
                 for _, line in read_paper(name).iterrows()]  # fmt: skip
        for _, claim in read_paper(f"{paper}_text").iterrows():
            over = dict(part.split("=") for part in claim["condition"].split(";") if "=" in part)
            if not claim["metric"].endswith("_gain") or "over" not in over or "+" in claim["dataset"]:
                continue

            def find(claim=claim, cells=cells, **wanted):
                what = claim["metric"].removesuffix("_gain")
                wanted |= {"dataset": claim["dataset"], "metric": f"{what}_top1" if what in SHORT else what}
                return {float(x["value"]) for x in cells if x["value"] and all(x[k] == v for k, v in wanted.items())}

            base = {"arch": claim["arch"], "method": claim["method"]}
            if over["over"].startswith("vit_"):
                given, baseline = find(**base), find(**{**base, "arch": over["over"]})
            elif "divide" in over:
                condition = {**base, "epochs": claim["epochs"]}
                given = find(**condition, condition=f"divide={over['divide']}")
                baseline = find(**condition, condition=f"divide={over['over']}")
            else:
                given = find(**base, **({"epochs": claim["epochs"]} if claim["epochs"] else {}))
                epochs = {"epochs": over["over_epochs"]} if "over_epochs" in over else {}
                baseline = find(arch=claim["arch"], method=over["over"], **epochs)
            yield claim, {round(a - b, 1) for a in given for b in baseline}


def test_gains_claimed_in_the_texts_follow_from_the_tables_but_for_those_known():
    found = list(gains())
    assert len(found) > 25 and all(given for _, given in found), [dict(c) for c, g in found if not g]
    wrong = {(c["paper"], c["row"], c["metric"], c["value"]) for c, given in found if float(c["value"]) not in given}
    assert wrong == {
        ("ccmim", "4.2", "linprobe_gain", "2.1"),
        ("ccmim", "4.2", "bbox_ap_gain", "2.5"),
        ("ccmim", "4.2", "miou_gain", "1.7"),
        ("ccmim", "4.3", "linprobe_gain", "4.3"),
        ("micl", "4.1", "linprobe_gain", "4"),  # "nearly 4 %": 3.7
        ("ocl", "3.1", "linprobe_gain", "4"),
    }
    listed = {(d.table, d.printed.split(" ")[0]) for d in disagreements()}
    assert {(f"{paper}_text", value) for paper, _, _, value in wrong} <= listed


def restated():
    """(claim, as a number of the tables' unit, what the tables print) of other numbers that a text says again."""
    same = ("method", "arch", "epochs")
    for paper in COUNTS:
        names = [name for name in ALL_TABLES if name.startswith(f"{paper}_")]
        cells = [line for name in names if "text" not in name for line in read_paper(name).to_dict("records")]
        for claim in read_paper(f"{paper}_text").to_dict("records"):
            at = [x for x in cells if (x["metric"], x["dataset"]) == (claim["metric"], claim["dataset"])
                  and all("" in (x[k], claim[k]) or x[k] == claim[k] for k in same)]  # fmt: skip
            printed = {x["value"].lstrip("~") for x in at if x["value"]}
            if printed and not claim["metric"].endswith("_gain"):
                value, gpus = claim["value"].lstrip("~"), re.search(r"gpus=(\d+)", claim["condition"])
                if gpus:  # hours of several
                    value = f"{float(value) * int(gpus[1]):g}"
                elif claim["metric"] == "mask_ratio" and claim["unit"] == "%":
                    value = f"{float(value) / 100:g}"
                yield claim, value, printed


def test_numbers_that_the_texts_say_again_are_those_of_the_tables_but_for_those_known():
    found = list(restated())
    assert len(found) > 50
    wrong = {(c["paper"], c["metric"], value, *sorted(printed)) for c, value, printed in found if value not in printed}
    hours = ("533", "559", "586", "600", "611", "613")
    assert wrong == {
        ("ocl", "params_m", "307", "304"),
        ("ocl", "pretrain_hours", "532", *hours),
        ("micl", "pretrain_hours", "532", *hours),
    }
    listed = {(d.table, d.printed.split(" ")[0].rstrip(",")) for d in disagreements()}
    assert {("ocl_text", "307"), ("ocl_text", "133"), ("micl_text", "133")} <= listed


def test_what_agrees_is_no_disagreement_and_each_names_its_place():
    found = disagreements()
    assert len(found) > 60 and not any("agree" in d.against for d in found)
    assert {d.table.partition("_")[0] for d in found} == {*PAPERS}
    hours = next(d for d in found if d.table == "ocl_t3" and "133 hours" in d.against)
    assert (hours.where, hours.printed) == ("ocl, vit_l16: pretrain hours", "533 h")


def test_deviations_are_those_of_the_presets():
    ocl = next(d for d in deviations() if d.method == "ocl")
    assert ocl.presets == ["paper", "official"] and ["tau", "learnable", "fixed"] in ocl.settings
    assert {d.method for d in deviations()} >= {*METHODS}


def test_missing_lists_what_to_run_and_shrinks_with_what_was_run(home):
    console = Console(file=io.StringIO())
    (mae,) = [x for x in missing(["ocl_t6"], [], console) if "pretrain mae --arch vit_b16" in x["pretrain"]]
    assert mae["pretrain"] == "sslbench pretrain mae --arch vit_b16 --data imagenet --epochs 1600"
    probe, tune = mae["eval"]
    assert re.fullmatch(
        r"sslbench eval linprobe runs/mae_vit_b16_imagenet_\w{8} --recipe linprobe_mae --data imagenet", probe
    )
    assert 200 < mae["device_hours"] < 400
    left = missing(["ocl_t6"], records(at_paper_scale(67.5)), console)
    assert next(x for x in left if "mae --arch vit_b16" in x["pretrain"])["eval"] == [tune]
    assert missing(["ocl_t5"], [], console)[0]["pretrain"] == "sslbench ablate ocl_t5 --scale paper"


def test_missing_asks_for_nothing_that_the_paper_leaves_blank_or_contradicts(home):
    """OCL has a row of ccMIM's ViT-L, and one of MoCo v3's, without a number."""
    console = Console(file=io.StringIO())
    asked = [x["pretrain"] for x in missing(["ocl_t6", "ocl_t7"], [], console)]
    assert not any("ccmim --arch vit_l16" in c for c in asked)
    assert [c for c in asked if "mocov3 --arch vit_l16" in c] == [
        "sslbench pretrain mocov3 --arch vit_l16 --data imagenet --epochs 600"
    ]
    assert {c for c in asked if "pretrain ocl" in c and "1600" in c} == set()
    runs = [c for c in asked if "pretrain ocl --arch vit_b16" in c]
    assert len(runs) == 2 and len({_recipe(c).hash() for c in runs}) == 1  # one run fills both tables


def test_missing_commands_train_a_tables_rows_alike_and_say_where_the_paper_contradicts_itself(home):
    """ASL trains MAE with its own settings (section 4.5); OCL's Table 6 prints 1,600 epochs, all else says 800."""
    console = Console(file=io.StringIO(), width=300)
    commands = {x["pretrain"].partition(" --epochs")[0] for x in missing(["asl_t6"], [], console)}
    for data in ("cifar10", "cifar100"):
        assert commands >= {f"sslbench pretrain {m} --recipe {m}/asl_t6_{data} --data {data}" for m in ("mae", "asl")}
        mae, asl = (compose(m, recipe=f"{m}/asl_t6_{data}").science for m in ("mae", "asl"))
        assert mae.model_dump(exclude={"method"}) == asl.model_dump(exclude={"method"})
    missing(["ocl_t6"], [], console)
    assert "Tables 7 to 9 say 800" in console.file.getvalue()
    for table in ("asl_t1", "asl_t2"):
        recipes = [_recipe(x["pretrain"]) for x in missing([table], [], console)]
        alike = [r for r in recipes if r.method != "ibot"]  # whose batch there nobody says: its own
        assert len(alike) > 1 and {r.science.batch_size for r in alike} == {4096}, table


def _recipe(command):
    words = command.split()
    given = dict(zip(words[3::2], words[4::2], strict=True))
    science = {"arch": given.get("--arch"), "data": {"spec": given["--data"]}}
    return compose(words[2], recipe=given.get("--recipe"), science=science)


def test_an_ablations_row_is_measured_as_its_paper_measured_it(home):
    """Transfer too; the quick probes stand in at the small scales alone, also where the paper has no table of it."""

    def by(table, number, scale="paper", data=None):
        study = read_study(table)
        row = rows_of(study, scale, data, [])[number - 1]
        found = measures_of(row.evaluations, row.recipe, study.at(scale).eval_data, None)
        return [(m.recipe.science.protocol, m.recipe.name, m.data) for m in found]

    assert by("ocl_t5", 2) == [("finetune", "finetune_ocl_l", "imagenet")]
    assert by("micl_t2", 6) == by("ocl_t2", 6) == [("linprobe_augmented", "linprobe_mae", "imagenet"),
                                                   ("finetune", "finetune_ocl_b", "imagenet")]  # fmt: skip
    assert by("asl_t7", 3) == [("linprobe_augmented", "linprobe_mae", "imagenet"), ("coco", "coco_asl", None)]
    assert by("asl_t7", 3, data="coco:/x")[1] == ("coco", "coco_asl", "coco:/x")
    assert by("ccmim_f2", 7) == [("linprobe_augmented", "linprobe_ccmim", "imagenet")]
    assert [e[1] for e in by("macrl_s3", 1)] == ["linprobe_macrl_cifar", "finetune_macrl_cifar"]
    for table in ("ocl_t2", "ccmim_f2", "macrl_s3"):
        assert [e[1] for e in by(table, 1, "tiny")] == [e[1] for e in by(table, 1, "cifar")] == ["knn", "linprobe"]


def test_the_papers_sets_at_full_size_are_the_papers_scale():
    shipped = [compose(name.split("/")[0], recipe=name).science.data for name in recipe_files()]
    papers = {(d.spec, d.image_size) for d in shipped if d.image_size >= 224 and d.spec != "builtin"}
    assert {"imagenet", "imagenet100+coco", "coco", "imagenette", "imagewoof"} <= {spec for spec, _ in papers}
    assert {scale_of(spec, size) for spec, size in papers} == {"paper"}
    assert scale_of("imagenet100-256px+coco-256px", 224) == "paper" and scale_of("tiny-imagenet", 64) == "cifar"
    assert {scale_of("builtin", 224), scale_of("builtin", 32), scale_of("photographs", 224)} == {"tiny"}


def test_asls_epochs_that_were_computed_are_those_of_its_iterations():
    """Batches of 4,096, the last part of an epoch dropped: 312 of ImageNet-1K, 59 of ImageNet-100 with COCO."""
    found = {}
    for table in ("asl_t3", "asl_t4"):
        for line in read_paper(table).itertuples():
            if line.epochs and line.metric == "pretrain_iterations":
                images = known_size(line.pretrain_data)
                assert int(line.epochs) * (images // 4096) // 1000 == int(line.value.strip("~k"))
                found[line.method, line.value] = line.epochs
                assert "epochs" in line.note
    assert found["mocov3", "~187k"] == "600" and found["asl", "~236k"] == "4000" and len(found) == 6


# ------------------------------------------------------------------------------ the hyper-parameter tables of OCL

KEY_OF = {"base_lr": "lr"}  # the paper's word -> the recipe's, where they differ
DIFFER = {  # (table, arch, setting): what the recipe has instead of what is printed
    ("ocl_t9", "vit_l16", "batch_size"): 2048,  # section 3, Tables 2 to 4 and the released code's notes say 2,048
}


def recipe_of(table, arch):
    if table == "ocl_t9":
        return compose("ocl", science={"arch": arch, "data": {"spec": "imagenet"}}).science
    kind = "finetune" if table == "ocl_t10" else "linprobe"
    _, name = protocol_of(
        {"paper": "ocl", "method": "ocl", "metric": f"{kind}_top1", "arch": arch, "dataset": "imagenet"}
    )
    return eval_recipe(kind, name).science


def test_the_recipes_have_the_settings_that_ocl_prints_but_for_those_known():
    """lr_decay is in no recipe: every schedule of the suite is a cosine."""
    differ, unstated = {}, set()
    for table in ("ocl_t9", "ocl_t10", "ocl_t11"):
        for _, line in read_paper(table).iterrows():
            settings = recipe_of(table, line["arch"]).model_dump()
            settings |= settings.pop("optim", {})
            key = KEY_OF.get(line["metric"], line["metric"])
            if key not in settings:
                unstated.add((table, key))
                continue
            has, printed = settings[key], line["value"].lower()
            alike = has == printed if isinstance(has, str) else has in (value := literal_eval(printed), [value])
            if not alike:
                differ[table, line["arch"], key] = has
    assert differ == DIFFER
    assert unstated == {(t, "lr_decay") for t in ("ocl_t9", "ocl_t10", "ocl_t11")} | {
        (t, "optimizer")
        for t in ("ocl_t9", "ocl_t10")  # always AdamW
    }
