"""Studies: rows x budgets x seeds from one command, never twice, never lost, ranked by tests."""

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml
from PIL import Image
from transfer_data import ade20k_part, unpack

from sslbench import ledger
from sslbench.data import open_split
from sslbench.errors import UserError
from sslbench.recipe import compose
from sslbench.study.budget import parse_budget, steps_for

# Rows of two small blocks on 16 pixels: a run of 10 steps takes half a second.
STUDY = {
    "question": "Does the machinery work?",
    "answer": "All cells are done.",
    "metric": "knn_mean",
    "rows": {
        "mae": {"recipe": "mae_smoke", "science": {"method": {"decoder_dim": 32, "decoder_depth": 1}}},
        "ocl": {"recipe": "ocl_smoke"},
    },
    "science": {"arch": "vit_mini4", "batch_size": 64},
    "controls": ["mae"],
    "untrained": True,
    "budgets": ["320images", "1280images"],
    "seeds": 2,
    "evaluations": [{"protocol": "knn", "pool": ["cls", "mean"]}],
}


@pytest.fixture
def study(tmp_path):
    def write(name="small", **changes):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**STUDY, **changes}))
        return path

    return write


def answered(done):
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def numbers(home):
    return ledger.read(home / "results" / "ledger")


def test_a_miniature_study_runs_ranks_and_is_not_run_twice(invoke, study, few_images, tmp_path):
    path = study()
    planned = invoke("study", path, "--dry-run", columns=80)
    assert planned.exit_code == 0 and max(map(len, planned.stdout.splitlines())) <= 80, planned.output
    assert planned.stdout.count("320images") == 4 and "10 runs, 0 of them in the ledger" in planned.stdout
    assert not (tmp_path / "results").exists()
    done = invoke("study", path, "--json", columns=80)
    assert done.exit_code == 0, done.stderr
    assert max(map(len, done.stderr.splitlines())) <= 80
    found = answered(done)
    assert len(found["cells"]) == 2 * 2 * 2 + 2 and {c["status"] for c in found["cells"]} == {"done"}
    assert all("not enough seeds to rank" in s for s in found["sentences"])
    assert [e["budget"] for e in found["ranking"]] == ["1280images"] * 3 + ["320images"] * 3
    assert {e["row"] for e in found["ranking"]} == {"mae", "ocl", "untrained"}
    lines = len(numbers(tmp_path))
    page = [invoke("report").exit_code, (tmp_path / "results/report/report.html").read_text()]
    assert page[0] == 0 and page[1].index("Does the machinery work?") < page[1].index("At equal budgets")
    # The ledger alone is enough, on another machine too; and the same study gives the same page.
    (tmp_path / "runs").rename(tmp_path / "gone")
    again = invoke("study", path, "--json")
    assert again.exit_code == 0 and answered(again)["ranking"] == found["ranking"]
    assert len(numbers(tmp_path)) == lines and not list((tmp_path / "runs").glob("*_builtin_*"))
    assert invoke("report").exit_code == 0
    assert (tmp_path / "results/report/report.html").read_text() == page[1]


def test_one_row_of_a_study_is_run_and_the_others_are_left_for_later(invoke, study, few_images, tmp_path):
    path = study(budgets=["320images"], seeds=1, untrained=False, tune={"lr_factors": [1, 2]})
    found = answered(invoke("study", path, "--only", "ocl", "--json"))
    assert {(c["row"], c["status"]) for c in found["cells"]} == {("mae", "left out"), ("ocl", "done")}
    assert {r.method for r in numbers(tmp_path)} == {"ocl"}


def test_a_study_whose_file_changed_after_its_first_run_says_so(invoke, study, few_images, tmp_path):
    small = {"budgets": ["320images"], "seeds": 1, "untrained": False}
    assert invoke("study", study(**small)).exit_code == 0
    changed = invoke("study", study(**small, question="Another question?"))
    assert changed.exit_code == 0 and "changed after its first final run" in changed.output
    assert "Another question?" in json.dumps(json.loads((tmp_path / "results/studies/small_builtin.json").read_text()))


def test_tuning_gives_each_row_the_same_trials_and_does_not_read_val(invoke, study, few_images, tmp_path, monkeypatch):
    from sslbench.evaluate import evaluation

    features_of, extract = [], evaluation.extract
    monkeypatch.setattr(
        evaluation, "extract", lambda s, data, *a: features_of.append(data.split) or extract(s, data, *a)
    )
    path = study(budgets=["320images"], seeds=1, tune={"lr_factors": [0.5, 1, 4]})
    done = invoke("study", path, "--json")
    assert done.exit_code == 0, done.stderr
    found = answered(done)
    trials = [c for c in found["cells"] if "trial" in c]
    assert [(c["row"], c["trial"]) for c in trials] == [(r, f) for r in ("mae", "ocl") for f in (0.5, 1, 4)]
    assert {c["seed"] for c in trials} == {10**6}
    assert {c["seed"] for c in found["cells"] if "trial" not in c} == {0}
    assert features_of[:6] == ["train"] * 6 and "val" in features_of[6:]  # the trials come first
    selected = [r for r in numbers(tmp_path) if r.metric == "knn_held_out_top1"]
    assert len(selected) == 6 and {(r.n, r.seed) for r in selected} == {(50, 10**6)}
    for row in ("mae", "ocl"):
        best = max((r for r in selected if r.method == row), key=lambda r: r.value).value
        chosen = next(c for c in trials if c["row"] == row and c["trial"] == found["chosen"][row])
        assert chosen["numbers"]["knn_held_out_mean"] == best
    assert "Tuned: 3 trials a row" in done.stderr
    finals = [r for r in numbers(tmp_path) if r.metric == "knn_top1" and r.method != "untrained"]
    assert all(r.cost.tuning and r.cost.tuning["trials"] == 3 for r in finals)


def test_a_failing_row_stops_no_other_and_is_named_at_the_end(invoke, study, few_images, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    science = {"method": {"name": f"{tmp_path}/broken.py:Broken"}, "arch": "vit_mini4", "data": {"spec": "builtin"}}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump({"science": science}))
    rows = {"broken": {"method": f"{tmp_path}/broken.py:Broken", "recipe": f"{tmp_path}/broken.yaml"}, **STUDY["rows"]}
    done = invoke("study", study(rows=rows, budgets=["320images"], seeds=1), "--json")
    assert done.exit_code == 1, done.output
    assert "1 of 5 runs failed" in done.stderr and "out of luck" in done.stderr
    assert [c["status"] for c in answered(done)["cells"]] == ["failed"] + ["done"] * 4


@pytest.mark.slow
def test_training_from_scratch_has_the_flops_of_pretraining_and_finetuning(invoke, study, tmp_path):
    path = study(
        budgets=["100GFLOP"],
        seeds=1,
        untrained=False,
        scratch=True,
        metric="finetune_smoke_mean",
        rows={"mae": STUDY["rows"]["mae"]},
        evaluations=[
            {"protocol": "finetune", "recipe": "finetune_smoke", "pool": "mean", "set": ["science.epochs=0.2"]}
        ],
    )
    done = invoke("study", path, "--json")
    assert done.exit_code == 0, done.stderr
    assert [(c["row"], c["status"]) for c in answered(done)["cells"]] == [("mae", "done"), ("from scratch", "done")]
    cost = {r.method: r.cost.flops for r in numbers(tmp_path)}
    assert cost["untrained"] == pytest.approx(cost["mae"], rel=0.03) and cost["mae"] > 1e11


@pytest.mark.slow
def test_a_study_measures_segmentation_once(invoke, study, few_images, shared, tmp_path):
    for module in ("mmengine", "mmcv", "mmseg"):
        pytest.importorskip(module, reason="needs the extra `transfer`", exc_type=ImportError)
    data = ade20k_part(unpack(shared, "ade20k_real6", tmp_path), tmp_path / "ade3")
    by = {"protocol": "ade20k", "recipe": "ade20k_smoke", "data": str(data), "set": ["machine.pictures=0"]}
    path = study(budgets=["320images"], seeds=1, metric="ade20k_smoke", evaluations=[by])
    for _ in range(2):
        done = invoke("study", path, "--json")
        assert done.exit_code == 0, done.stderr
        cells = answered(done)["cells"]
        assert all(0 <= c["numbers"]["ade20k_smoke"] <= 100 for c in cells if c["row"] != "untrained")
        assert len([r for r in numbers(tmp_path) if r.metric == "miou"]) == 2
    assert "mIoU (ade20k_smoke)" in done.stderr
    nowhere = study("elsewhere", budgets=["320images"], seeds=1, evaluations=[{**by, "data": str(tmp_path / "no")}])
    refused = invoke("study", nowhere)
    assert refused.exit_code == 2 and "no ade20k data set" in refused.stderr
    assert invoke("study", nowhere, "--dry-run").exit_code == 0


def test_rows_of_own_methods_on_own_images_need_no_file_and_write_the_one_that_repeats_them(invoke, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    for split, each in (("train", 40), ("val", 10)):
        data = open_split("builtin", split)
        for label in (0, 1):
            folder = tmp_path / "photos" / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in [i for i, y in enumerate(data.labels) if y == label][:each]:
                Image.fromarray(data.images[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    flags = ["--data", "folder:photos", "--set", "science.arch=vit_micro4", "--budget", "160images"]
    done = invoke("study", "--rows", "mae,./mine.py:Mine", *flags, "--json")
    assert done.exit_code == 0, done.output
    found = answered(done)
    assert [(c["row"], c["status"]) for c in found["cells"]] == [(r, "done") for r in ("mae", "mine", "untrained")]
    assert {r.dataset for r in numbers(tmp_path)} == {"photos"}
    # The paper's batch is never taken for 80 images: the batch fits them.
    runs = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/run.json")]
    assert len(runs) == 2 and {r["batch_size"] for r in runs} == {8}
    again = invoke("study", tmp_path / "results" / "studies" / f"{found['study']}.yaml", "--json")
    assert again.exit_code == 0 and answered(again)["ranking"] == found["ranking"], again.output
    assert len(list((tmp_path / "runs").glob("*/run.json"))) == 2


OWN = """
from sslbench.method import Method
from sslbench.views import one_view
class Mine(Method):
    def build_views(self, images, generator):
        return {"x": one_view(images, self.encoder.image[0], self.augment, generator, 0)}
    def forward(self, views):
        return {"x": self.encoder(views["x"])[:, 0]}
    def loss(self, outputs):
        return {"loss": outputs["x"].var(0).add(1e-4).log().neg().mean()}
"""


BROKEN = """
from sslbench.method import Method
class Broken(Method):
    def build_views(self, images, generator):
        return {"x": images.float()}
    def forward(self, views):
        return {"x": self.encoder(views["x"])[:, 0]}
    def loss(self, outputs):
        if outputs["x"].device.type != "meta":
            raise RuntimeError("out of luck")
        return {"loss": outputs["x"].mean()}
"""


def started(path, home, environment, *flags):
    command = [sys.executable, "-m", "sslbench", "study", str(path), "--json", *flags]
    return subprocess.Popen(command, cwd=home, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--jobs", "2"]], ids=["one after the other", "two at once"])
def test_a_killed_study_goes_on_by_the_same_command(flags, study, environment, tmp_path):
    path = study(seeds=1, budgets=["1280images", "2560images"], untrained=False)
    flags = [*flags, "--set", "machine.save_every=5"]
    process = started(path, tmp_path, environment, *flags)
    while not list(tmp_path.glob("runs/*/checkpoints/*.sha256")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err, err
    before = {p: p.read_text() for p in tmp_path.glob("runs/*/run.json")}
    assert any('"interrupted"' in text for text in before.values())
    process = started(path, tmp_path, environment, *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    found = json.loads(out.splitlines()[-1])
    assert {c["status"] for c in found["cells"]} == {"done"} and len(found["cells"]) == 4
    runs = [json.loads(p.read_text()) for p in tmp_path.glob("runs/*/run.json")]
    assert len(runs) == 4 and sum(run["resumed"] for run in runs) >= 1
    assert len({r.id for r in numbers(tmp_path)}) == len(numbers(tmp_path))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--only", "mea"], "has no row 'mea'; did you mean 'mae'"),
        (["--budget", "0TFLOP"], "budget of nothing"),
        (["--budget", "1GFLOP"], "less than one step"),
        (["--scale", "paper"], "has no scales"),
        (["--rows", "mae"], "not both"),
        (["--set", "science.optim.lrr=1"], "did you mean 'lr'"),
    ],
)
def test_bad_flags_are_one_message_before_anything_runs(flags, says, invoke, study, tmp_path):
    done = invoke("study", study(), *flags)
    assert done.exit_code == 2 and says in done.stderr, done.output
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


def test_a_file_with_an_unknown_key_is_refused(invoke, study):
    done = invoke("study", study(rowz={}))
    assert done.exit_code == 2 and "unknown key 'rowz'; did you mean 'rows'" in done.stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seeds": [0, 0]}, "seeds [0, 0]: expected different numbers"),
        ({"seeds": {"320images": 2}}, "seeds names no number for 1280images"),
        ({"controls": ["mea"]}, "controls names no row 'mea'; did you mean 'mae'"),
        ({"budgets": ["1epochs", "1TFLOP"]}, "of several kinds"),
    ],
)
def test_a_file_that_cannot_be_meant_is_one_message_before_anything_runs(changes, says, invoke, study, tmp_path):
    done = invoke("study", study(**changes))
    assert done.exit_code == 2 and says in done.stderr, done.output
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


def test_a_method_that_counts_no_flops_has_no_budget_of_them():
    with pytest.raises(UserError, match="mae counts no FLOPs, so a budget of 1TFLOP has no length; give epochs"):
        steps_for(compose("mae", recipe="mae_smoke"), parse_budget("1TFLOP"), 0.0)
