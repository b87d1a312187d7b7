"""The linear probe with augmentation: LARS by hand, heads side by side, selection without a look at val."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sslbench.data import open_split, subset
from sslbench.errors import UserError
from sslbench.evaluate.evaluation import eval_recipe, evaluate
from sslbench.evaluate.features import open_subject
from sslbench.evaluate.probe import AugmentedProbe, Probe, ProbeJob
from sslbench.recipe import Augment
from sslbench.train.guard import FiniteGuard
from sslbench.train.optim import Lars

RUN = "untrained:vit_mini4@16"
QUICK = ["science.epochs=1", "science.batch_size=250", "science.warmup_epochs=0", "machine.micro_batch=250",
         "machine.workers=0", "machine.tensorboard=false"]  # fmt: skip


def test_lars_is_the_hand_calculation():
    w, b = torch.nn.Parameter(torch.tensor([[3.0, 4.0]])), torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = Lars([w, b], lr=2.0, momentum=0.9, weight_decay=0.1, trust=0.001)
    w.grad, b.grad = torch.tensor([[0.3, -0.4]]), torch.tensor([0.5])
    optimizer.step()
    # w: update (.3 + .3, -.4 + .4) = (.6, 0), norm .6, |w| = 5, so a factor .005 / .6; step 2 x .005 along (1, 0).
    torch.testing.assert_close(w.data, torch.tensor([[3.0 - 0.01, 4.0]]))
    torch.testing.assert_close(b.data, torch.tensor([0.0]))  # plain: 1 - 2 x .5
    w.grad, b.grad = torch.zeros(1, 2) - 0.1 * w.data, torch.tensor([0.0])  # cancels the decay: momentum alone
    optimizer.step()
    torch.testing.assert_close(w.data, torch.tensor([[2.99 - 2 * 0.9 * 0.005, 4.0]]))
    torch.testing.assert_close(b.data, torch.tensor([-2 * 0.9 * 0.5]))


def test_lars_moves_nothing_after_a_gradient_that_is_not_finite():
    w = torch.nn.Parameter(torch.ones(2, 2))
    optimizer, guard = Lars([w], lr=1.0, momentum=0.9, weight_decay=0.0), FiniteGuard(torch.device("cpu"))
    guard.arm(optimizer)
    w.grad = torch.full((2, 2), float("nan"))
    guard.check(w.grad.norm())
    optimizer.step()
    assert w.data.equal(torch.ones(2, 2)) and guard.tripped()


def test_heads_side_by_side_learn_as_each_would_alone(few_images, home):
    both = [f"science.lr={[0.05, 0.4]}", *QUICK]
    record = evaluate(eval_recipe("linprobe", "linprobe_mae", both), RUN, "builtin")[0]
    assert record.condition["lr"] in (0.05, 0.4) and record.metric == "linprobe_top1" and record.n == 125
    together = load_file(home / "runs" / record.condition["eval_run"] / "weights.safetensors")
    assert not any(k.startswith("encoder.") for k in together)
    assert not together["heads.0.weight"].equal(together["heads.1.weight"])
    swapped = [f"science.lr={[0.4, 0.05]}", *QUICK]
    other = evaluate(eval_recipe("linprobe", "linprobe_mae", swapped), RUN, "builtin")[0]
    crossed = load_file(home / "runs" / other.condition["eval_run"] / "weights.safetensors")
    for a, b in ((0, 1), (1, 0)):
        torch.testing.assert_close(together[f"heads.{a}.weight"], crossed[f"heads.{b}.weight"], rtol=1e-4, atol=1e-6)
    assert other.value == pytest.approx(record.value, abs=0.81) and other.condition["lr"] == record.condition["lr"]


def test_batchnorm_sees_what_the_recipe_says_on_any_machine(few_images, home):
    """The encoder's passes are a matter of memory; what is normalised together is the protocol's."""
    found = {}
    for name, sets in {"whole": ["machine.micro_batch=250"], "parts": ["machine.micro_batch=50"],
                       "other": ["science.norm_batch=50"]}.items():  # fmt: skip
        record = evaluate(eval_recipe("linprobe", "linprobe_mae", [*QUICK, *sets]), RUN, "builtin")[0]
        run = home / "runs" / record.condition["eval_run"]
        found[name] = record, load_file(run / "weights.safetensors")
        shutil.rmtree(run)
    (whole, x), (parts, y), (other, z) = found.values()
    assert whole.protocol == parts.protocol != other.protocol and whole.value == pytest.approx(parts.value, abs=0.81)
    for key in x:
        torch.testing.assert_close(x[key], y[key], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(x["norm.running_mean"], z["norm.running_mean"], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="BatchNorm takes 100 images together"):
        evaluate(eval_recipe("linprobe", "linprobe_mae", [*QUICK, "science.norm_batch=100"]), RUN, "builtin")


def test_a_probe_on_other_images_is_another_run():
    subject, data = open_subject(RUN), open_split("builtin", "train")
    first, second = (
        ProbeJob(eval_recipe("linprobe", "linprobe_mae"), subject, "builtin", part, "cls", 0)
        for part in (data, subset(data, torch.arange(500)))
    )
    assert first.folder_name != second.folder_name and first.identity != second.identity


@pytest.mark.parametrize("recipe", ["linprobe_mocov3", pytest.param("linprobe_macrl_cifar", marks=pytest.mark.slow)])
def test_the_other_optimisers_run_from_the_command(invoke, recipe):
    sets = [x for pair in zip(["--set"] * len(QUICK), QUICK, strict=True) for x in pair]
    done = invoke("eval", "linprobe", RUN, "--data", "builtin", "--recipe", recipe, *sets, "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["value"] > 15 and answer["protocol"]["name"].startswith(recipe)


def test_the_encoder_stays_as_it_was_and_in_evaluation_mode():
    subject = open_subject(RUN)
    before = {k: v.clone() for k, v in subject.encoder.state_dict().items()}
    model = Probe(AugmentedProbe(protocol="linprobe_augmented"), subject.encoder, Augment(), 10, "cls").train()
    assert model.training and not model.encoder.training
    data = open_split("builtin", "train")
    views = model.build_views(data.images[:8], torch.Generator().manual_seed(0), data.labels[:8])
    model.loss(model(views))["loss"].backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(before[k].equal(v) for k, v in model.encoder.state_dict().items())


def test_a_subset_keeps_images_with_their_labels(image_folder):
    for data in (open_split("builtin", "val"), open_split(f"folder:{image_folder}", "train")):
        part = subset(data, torch.tensor([7, 3]))
        assert len(part) == 2 and part.labels.tolist() == data.labels[[7, 3]].tolist()
        assert part.read(0).tobytes() == data.read(7).tobytes() and part.fingerprint != data.fingerprint
