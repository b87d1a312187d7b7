"""`sslbench transfer` as a user types it, on real images at small size."""

import json
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file
from transfer_data import ade20k_part, coco_part, unpack

for module in ("mmengine", "mmcv", "mmdet", "mmseg"):
    pytest.importorskip(module, reason="needs the extra `transfer`", exc_type=ImportError)

SUBJECT = "untrained:vit_ti16"
BOX_AND_MASK = [f"{kind}_{name}" for kind in ("bbox", "mask") for name in ("ap", "ap50", "ap75")]
METRICS = {"coco": BOX_AND_MASK, "ade20k": ["miou", "aacc", "macc"]}


@pytest.fixture(scope="session")
def parts(shared, tmp_path_factory):
    """{kind: a few images}; `same` scores the images that were trained on."""
    root = tmp_path_factory.mktemp("data")
    coco, ade, proxy = (unpack(shared, n, root) for n in ("coco_mini", "ade20k_real6", "ade20k_proxy"))
    return {
        "coco": coco_part(coco, root / "coco4"),
        "ade20k": ade20k_part(ade, root / "ade3"),
        "coco_same": coco_part(coco, root / "coco_same", same=True),
        "ade20k_same": ade20k_part(proxy, root / "ade_same", same=True),
    }


def sets(**values):
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def last_json(done):
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(
    "recipe",
    [
        "coco_smoke",
        "coco_ocl_smoke",
        "coco_asl_smoke",
        "coco_ccmim_smoke",
        "ade20k_smoke",
        "ade20k_ocl_smoke",
        "ade20k_ccmim_smoke",
    ],
)
def test_every_protocol_trains_two_iterations_and_is_scored(recipe, parts, invoke, tmp_path):
    from mmengine.logging import MMLogger

    for handler in MMLogger.get_current_instance().handlers:  # an earlier run's: torch.compile closes them all
        handler.close()
    kind = recipe.split("_")[0]
    command = [
        "transfer",
        kind,
        SUBJECT,
        "--recipe",
        recipe,
        "--data",
        parts[kind],
        "--json",
        *sets(machine__pictures=1),
    ]
    done = invoke(*command)
    assert done.exit_code == 0, done.stderr
    record = last_json(done)
    assert len(done.stdout.strip().splitlines()) == 1
    assert record["metric"] == METRICS[kind][0] and 0 <= record["value"] <= 100 and record["scale"] == "tiny"
    assert record["protocol"]["name"] == recipe and record["condition"]["iterations"] == 2
    lines = [json.loads(x) for x in (tmp_path / "results/ledger/untrained.jsonl").read_text().splitlines()]
    assert [r["metric"] for r in lines] == METRICS[kind]
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{kind}_untrained-vit_ti16_")
    names = {p.name for p in folder.iterdir()}
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", "pictures", "weights.safetensors"} <= names
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished" and run["cost"]["wall_s"] > 0 and run["data_fingerprint"]
    assert run["cost"]["flops"] == record["cost"]["flops"] > 1e9
    assert len(list((folder / "pictures").glob("*.png"))) == 1
    assert {"step", "loss", "lr", "images_per_s", "data_wait"} <= set(
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    )
    if recipe.endswith(f"{kind}_smoke"):
        again = invoke(*command)
        assert last_json(again) == record and "is finished" in again.stderr


@pytest.mark.parametrize("kind", ["coco", "ade20k"])
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(kind, parts, invoke, tmp_path):
    command = ["transfer", kind, SUBJECT, "--recipe", f"{kind}_smoke", "--data", parts[kind], "--json",
               *sets(machine__pictures=0, machine__save_every=1, machine__log_every=1),
               *sets(science__iterations=3)]  # fmt: skip
    assert invoke(*command).exit_code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    first = load_file(folder / "weights.safetensors")
    for path in ((folder / "weights.safetensors"), *folder.glob("checkpoints/step_000000003.*")):
        path.unlink()
    info = json.loads((folder / "run.json").read_text())
    value, flops = info.pop("records")[0]["value"], info["cost"]["flops"]
    (folder / "run.json").write_text(json.dumps({**info, "status": "running"}))
    done = invoke(*command)
    assert done.exit_code == 0, done.stderr
    assert json.loads((folder / "run.json").read_text())["resumed"] == 1 and last_json(done)["value"] == value
    assert last_json(done)["cost"]["flops"] == flops
    second = load_file(folder / "weights.safetensors")
    assert first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)
    assert [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_two_processes_train_as_the_recipe_says_and_batch_norm_is_spoken_of(parts, run_sslbench, tmp_path):
    command = ["transfer", "ade20k", SUBJECT, "--recipe", "ade20k_smoke", "--data", parts["ade20k_same"], "--json",
               *sets(machine__devices=2, machine__pictures=0, science__batch_size=4)]  # fmt: skip
    done = run_sslbench(*command, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1 and done.stderr.count("%  ade-same") == 3  # one process talks
    assert "BatchNorm in the heads sees 2 image(s) at a time, not the batch of 4" in done.stderr
    record = last_json(done)
    assert record["hardware"]["devices"] == 2 and record["condition"]["iterations"] == 2 and record["cost"]["flops"] > 0


def test_one_image_a_device_is_refused_where_batch_norm_would_see_one_pixel(parts, invoke):
    done = invoke("transfer", "ade20k", SUBJECT, "--recipe", "ade20k_smoke", "--data", parts["ade20k"],
                  *sets(machine__micro_batch=1))  # fmt: skip
    assert done.exit_code == 2 and "needs two images or more a device" in done.stderr, done.stderr


def test_bf16_on_a_cpu_follows_float32(parts, invoke, tmp_path):
    def losses(precision):
        done = invoke("transfer", "coco", SUBJECT, "--recipe", "coco_smoke", "--data", parts["coco"],
                      *sets(machine__pictures=0, machine__log_every=1, machine__precision=precision))  # fmt: skip
        assert done.exit_code == 0, done.stderr
        (path,) = tmp_path.glob("runs/*/metrics.jsonl")
        found = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        shutil.rmtree(tmp_path / "runs")
        return found

    a, b = losses("32"), losses("bf16")
    assert len(a) == 2 and a != b and b == pytest.approx(a, rel=0.05)


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_move(parts, invoke, tmp_path):
    too_much = sets(science__iterations=3, science__optim__lr=1e25, science__optim__warmup=0)
    done = invoke("transfer", "ade20k", SUBJECT, "--recipe", "ade20k_smoke", "--data", parts["ade20k"], *too_much)
    assert done.exit_code == 1 and "gradient is not finite" in done.stderr, done.stderr
    assert not list(tmp_path.glob("runs/*/weights.safetensors"))


def broken_coco(root, how):
    file = root / "annotations" / "instances_val2017.json"
    if how == "no annotations":
        file.unlink()
    elif how == "no images":
        shutil.rmtree(root / "train2017")
    elif how == "an image":
        next((root / "val2017").iterdir()).unlink()
    else:
        tree = json.loads(file.read_text())
        if how == "a category":
            tree["categories"][0]["name"] = "unicorn"
        else:
            del tree["annotations"]
        file.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no annotations", ["expected", "annotations/instances_val2017.json", "found", "train2017/"]),
        ("no images", ["expected", "train2017/*.jpg", "found", "val2017/"]),
        ("an image", ["1 of the 3 images"]),
        ("a category", ["categories that", "instances_train2017.json does not list (unicorn)"]),
        ("a key", ["is not a COCO instance file", "'annotations'"]),
    ],
)
def test_a_wrong_coco_layout_is_status_2_with_what_was_expected_and_found(how, says, parts, invoke, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(parts["coco"], root)
    broken_coco(root, how)
    done = invoke("transfer", "coco", SUBJECT, "--recipe", "coco_smoke", "--data", root)
    assert done.exit_code == 2 and all(word in done.stderr for word in says), done.stderr


@pytest.mark.parametrize("how", ["no folder", "no label map", "a category"])
def test_a_wrong_ade20k_layout_is_status_2_with_what_was_expected_and_found(how, parts, invoke, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(parts["ade20k"], root)
    path = next((root / "annotations" / "validation").iterdir())
    if how == "no folder":
        shutil.rmtree(root / "images" / "training")
        says = "images/training"
    elif how == "no label map":
        path.unlink()
        says = "1 of 2 images have no label map"
    else:
        Image.new("L", (8, 8), 200).save(path)
        says = "found category 200"
    done = invoke("transfer", "ade20k", SUBJECT, "--recipe", "ade20k_smoke", "--data", root)
    assert done.exit_code == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["coco", SUBJECT], "SSLBENCH_DATA is not set"),
        (["coco", SUBJECT, "--data", "nowhere"], "annotations/instances_{train,val}2017.json"),
        (["coco", SUBJECT, "--recipe", "ade20k_mae"], "is of protocol ade20k, not coco"),
        (["ade20k", SUBJECT, "--recipe", "ade20k_smokey"], "did you mean 'ade20k_smoke'"),
    ],
)
def test_bad_input_is_one_message_and_status_2(args, says, invoke):
    done = invoke("transfer", *args)
    assert done.exit_code == 2 and says in done.stderr, done.stderr


def test_doctor_says_whose_operators_are_in_use(invoke):
    found = last_json(invoke("doctor", "--json"))
    assert found["transfer_extra"] is True and found["transfer_operators"] in ("mmcv", "torchvision")


OVERFIT = {
    "science__batch_size": 4,
    "science__optim__lr": 1e-3,
    "science__optim__warmup": 20,
    "science__optim__layer_decay": 1,
    "science__encoder__drop_path": 0,
    "machine__pictures": 0,
    "machine__save_every": 1000,
}


@pytest.mark.slow
def test_mask_rcnn_learns_four_images(parts, invoke, tmp_path):
    more = {"science__iterations": 100, "science__input__scale": "[1,1]", "science__width": 64, "machine__pictures": 2}
    done = invoke("transfer", "coco", SUBJECT, "--recipe", "coco_smoke", "--data", parts["coco_same"],
                  *sets(**{**OVERFIT, **more}))  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = {r["metric"]: r["value"] for r in map(json.loads, (tmp_path / "results/ledger/untrained.jsonl").open())}
    assert len(list((tmp_path / "runs").glob("*/pictures/*.png"))) == 2  # with boxes and masks to draw
    assert found["bbox_ap50"] > 50 and found["mask_ap50"] > 30, found


@pytest.mark.slow
def test_upernet_learns_four_images(parts, invoke):
    """At 8 x 8 tokens an image; all losses are on 32 x 32 pixels, which is what makes it quick."""
    more = {"science__iterations": 80, "science__crop": 32, "science__stride": 32, "science__optim__lr": 2e-3}
    done = invoke("transfer", "ade20k", "untrained:vit_mini4", "--recipe", "ade20k_smoke", "--json",
                  "--data", parts["ade20k_same"], *sets(**{**OVERFIT, **more}))  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert last_json(done)["value"] > 30  # 43
