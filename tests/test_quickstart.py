"""Quickstart, short, for its shape; and, longer, that OCL at its settings really learns."""

import json

import pytest
from rich.console import Console

from sslbench.evaluate.run import eval_recipe, evaluate
from sslbench.method import methods
from sslbench.pretrain import compose
from sslbench.quickstart import SIZE
from sslbench.train.loop import pretrain


@pytest.mark.slow
def test_quickstart_measures_every_method_beside_the_untrained_vit(invoke, few_images, tmp_path):
    done = invoke("quickstart", "--minutes", "0.2", "--json")
    assert done.exit_code == 0, done.stderr
    assert "Mixed Precision" not in done.stderr  # what lightning has to say, twice for each method
    answer = json.loads(done.stdout.splitlines()[-1])
    page = (tmp_path / answer["report"]).read_text()
    for name in (*methods(), "untrained ViT"):
        assert f">{name}</td>" in page
    assert page.count("<svg") == 2 and "not as a ranking" in page
    assert {p.suffix for p in map(tmp_path.joinpath, answer["files"])} == {".html", ".md", ".csv", ".svg", ".png"}
    assert answer["numbers"] == 4 * (1 + len(methods()))
    seen = [json.loads(p.read_text())["cost"]["wall_s"] for p in (tmp_path / "runs").glob("*/run.json")]
    assert len(seen) == len(methods())


@pytest.mark.slow
def test_ocl_gains_three_points_of_knn_over_the_untrained_vit(home):
    """At the settings of quickstart, for 4 of its recipe's 12 epochs."""
    recipe = compose("ocl", science={"data": {"spec": "builtin", "image_size": SIZE}, "epochs": 4})
    pretrain(recipe, home / "run", Console(quiet=True), progress=False)
    trained, untrained = (
        evaluate(eval_recipe("knn"), run, "builtin", 0)[0].value
        for run in (str(home / "run"), f"untrained:vit_mini4@{SIZE}")
    )
    print(f"k-NN {untrained:.1f} % -> {trained:.1f} %")
    assert trained - untrained >= 3  # 4.2 in float32, 3.9 in bf16
