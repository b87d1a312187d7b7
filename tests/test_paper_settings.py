"""What the papers say of settings, sentence by sentence, against the recipes that ship."""

import sys

import pytest
from tiny import METHODS

from sslbench.evaluate.evaluation import eval_recipe
from sslbench.paths import recipe_files
from sslbench.recipe import compose, read_tree, resolve
from sslbench.study.printed import paper_tables, protocol_of, read_paper
from sslbench.train.build import flops_per_image
from sslbench.vit import get_arch

MACRL = ["macrl12_cifar10", "macrl12_cifar100", "macrl12_p8_tiny-imagenet", "macrl4_imagenette", "macrl4_imagewoof"]
ONE_LAYER = {"method.decoder_dim": 256, "method.decoder_depth": 1, "method.decoder_heads": 1}

PRETRAIN = [
    # OCL section 3: "800 epochs for pre-training and 40 epochs for warm-up. ViT-B/16 applies the overall masked ratio
    # of 0.3, while ViT-L/16 is set to 0.4. The initial base learning rate is 1.5e-4 [...] 9,600 for ViT-B/16 and 2,048
    # for ViT-L/16 [...] kappa is set to 64"; B.2: "beta = (0.9, 0.95) [...] weight decay to 0.05".
    ("ocl/vit_b16_imagenet", {"epochs": 800, "optim.warmup_epochs": 40, "method.mask_ratio": 0.3, "optim.lr": 1.5e-4,
     "batch_size": 9600, "method.kappa": 64, "optim.betas": [0.9, 0.95], "optim.weight_decay": 0.05}),
    ("ocl/vit_l16_imagenet", {"epochs": 800, "optim.warmup_epochs": 40, "method.mask_ratio": 0.4, "optim.lr": 1.5e-4,
     "batch_size": 2048, "method.kappa": 64, "optim.betas": [0.9, 0.95], "optim.weight_decay": 0.05}),
    # OCL 2.1: "remains fixed throughout pre-training"; 2.3: "a trainable tempature parameter tau", Eq. 3 "x tau"; 2.4:
    # "without the incorporation of additional auxiliary modules"; Algorithm 1: a B x B cross-entropy.
    ("ocl/vit_b16_imagenet", {"method.freeze_patch_embed": True, "method.tau": "learnable", "method.mlp_head": "none",
     "method.kappa_form": "multiply", "method.denominator": "algorithm1"}),
    # ASL 4.3: "800 epochs and 4000 epochs", "a fixed batch size of 4096"; 3.3: AEE "is our default", "does not employ
    # contrastive loss or cosine similarity loss but rather L1 loss", "does not include the alignment of [cls]".
    *[(f"asl/vit_b16_{data}", {"epochs": epochs, "batch_size": 4096, "method.augmentation": "aee", "method.align": True,
       "method.align_loss": "l1", "method.cls_align": "none"})
      for data, epochs in (("coco", 800), ("imagenet100+coco", 800), ("imagenet", 1600))],
    # ccMIM C: "AdamW [...] base learning rate 1.5e-4 and weight decay 0.05 [...] lambda = 0.2 and use L_NCE in Eq. 7
    # [...] batch size as 1024 [...] cosine lr scheduler and only use the random resized crop for augmentation"; 4.1:
    # "two-layer MHSA blocks"; Table 5's best: importance sampling.
    *[(f"ccmim/{arch}_imagenet", {"epochs": epochs, "optim.lr": 1.5e-4, "optim.weight_decay": 0.05, "batch_size": 1024,
       "augment.flip": False, "method.contrast_weight": 0.2, "method.contrast": "nce", "method.decoder_depth": 2,
       "method.divide": "importance_sampling"})
      for arch, epochs in (("vit_b16", 800), ("vit_s16", 300))],
    # MACRL 4: "batch size of 2,048 by default", "2,000 epochs with 50 warm-up epochs. The learning rate is 1.5e-4 with
    # 0.01 weight decay" (4.1, 4.2: all three methods), "a single attention layer (1 head) decoder"; 3: 256 wide.
    *[(f"{method}/{name}", {"epochs": 2000, "optim.warmup_epochs": 50, "optim.lr": 1.5e-4, "optim.weight_decay": 0.01,
       "batch_size": 2048, **({} if method == "mocov3" else ONE_LAYER)})
      for name in MACRL for method in ("macrl", "mae", "mocov3")],
    # MACRL 3: "the projected dimension is 512", "Layer Normalization instead of Batch Normalization", "the memory bank
    # size as 65,536", "only measure the distance for the visible tokens", "L1", "did not freeze the patch embedding";
    # 4: "mask ratio is, by default set to 0.75", "the weaker augmented view has everything except solarization".
    *[(f"macrl/{name}", {"method.proj_dim": 512, "method.proj_norm": "ln", "method.memory_bank": True,
       "method.bank_size": 65536, "method.recon_on": "visible", "method.recon_loss": "l1",
       "method.freeze_patch_embed": False, "method.mask_ratio": 0.75, "augment.flip": True,
       "method.views.solarise_p": [0.0, 0.2]})
      for name in MACRL],
    # SiameseIM's released script, configs/pretrain/dist_sim_base_1600ep.sh, and the defaults of main_pretrain.py.
    ("siameseim/vit_b16_imagenet", {"epochs": 1600, "optim.warmup_epochs": 40, "optim.lr": 6.25e-5,
     "optim.betas": [0.9, 0.95], "optim.weight_decay": 0.05, "optim.clip_grad": 1.0, "batch_size": 4096,
     "augment.crop_scale": [0.08, 1.0], "augment.flip": True, "method.mask_ratio": 0.6, "method.decoder_dim": 768,
     "method.projector_depth": 2, "method.decoder_depth": 4, "method.negative_weight": 0.02, "method.momentum": 0.995,
     "method.freeze_patch_embed": True, "method.views.blur_p": [1.0, 0.1], "method.views.solarise_p": [0.0, 0.2]}),
    # CMAE's released configuration, configs/pre-training/cmae/cmae_vit-base-p16_32xb128-coslr-1600e_in1k.py.
    ("cmae/vit_b16_imagenet", {"epochs": 1600, "optim.warmup_epochs": 40, "optim.lr": 1.5e-4,
     "optim.betas": [0.9, 0.95], "optim.weight_decay": 0.05, "batch_size": 4096, "augment.crop_scale": [0.2, 1.0],
     "augment.flip": True, "method.mask_ratio": 0.65, "method.mask_unit": 2, "method.decoder_dim": 512,
     "method.decoder_depth": 8, "method.feature_depth": 2, "method.hidden_dim": 1536, "method.projector_dim": 256,
     "method.tau": 0.07, "method.two_tau": True, "method.contrast_weight": 1.0, "method.momentum": 0.996,
     "method.shift": 31, "method.target_view.jitter": [0.4, 0.4, 0.4, 0.1], "method.target_view.blur_p": [0.5, 0.5]}),
    # I-JEPA, Appendix A: four targets, scale .15 to .2 and aspect .75 to 1.5, a context of .85 to 1; batches of 2,048,
    # a rate of 1e-3 after 15 epochs and 1e-6 at the end, weight decay .04 to .4, momentum .996 to 1; a predictor of
    # width 384 with the encoder's heads, 6 blocks for ViT-B/16 and 12 for ViT-L/16; Table 1: 600 epochs. Of ViT-H/14,
    # the released code's configs/in1k_vith14_ep300.yaml.
    *[(f"ijepa/{arch}_imagenet", {"epochs": epochs, "batch_size": 2048, "peak": 1e-3, "optim.betas": [0.9, 0.999],
       "optim.warmup_epochs": warmup, "optim.min_lr": 1e-6, "optim.weight_decay": 0.04, "optim.weight_decay_end": 0.4,
       "augment.crop_scale": [0.3, 1.0], "augment.flip": False, "method.targets": 4, "method.momentum": 0.996,
       "method.target_scale": [0.15, 0.2], "method.target_aspect": [0.75, 1.5], "method.context_scale": [0.85, 1.0],
       "method.predictor_dim": 384, "method.predictor_depth": depth, "method.predictor_heads": None,
       "method.loss": loss})
      for arch, epochs, warmup, depth, loss in (("vit_b16", 600, 15, 6, "l2"), ("vit_l16", 600, 15, 12, "l2"),
                                                ("vit_h14", 300, 40, 12, "smooth_l1"))],
    # SimMIM, section 3: units of 32 pixels, 60 % masked. The released code's configs/vit_base__800ep and config.py,
    # whose rates are for 512 images, and the crops of its data_simmim.py.
    ("simmim/vit_b16_imagenet", {"epochs": 800, "batch_size": 2048, "peak": 4e-4, "optim.betas": [0.9, 0.999],
     "optim.warmup_epochs": 10, "optim.weight_decay": 0.05, "optim.clip_grad": 5.0, "augment.crop_scale": [0.67, 1.0],
     "augment.flip": True, "method.mask_size": 32, "method.mask_ratio": 0.6}),
    # CrossMAE, Table 10: 800 epochs after 40 of warm-up, batches of 4,096, a base rate of 1.5e-4, decay .05, betas of
    # .9 and .95; A.6: the rate times prediction ratio / mask ratio, 12 decoder blocks as wide as MAE's; section 3.4:
    # all encoder blocks and their input are summed, with weights from N(0, 1 / n).
    *[(f"crossmae/{name}", {"epochs": 800, "optim.warmup_epochs": 40, "batch_size": 4096, "optim.lr": lr,
       "optim.weight_decay": 0.05, "optim.betas": [0.9, 0.95], "optim.min_lr": 0.0, "augment.crop_scale": [0.2, 1.0],
       "augment.flip": True, "method.mask_ratio": 0.75, "method.prediction_ratio": ratio, "method.norm_pix_loss": True,
       "method.decoder_dim": width, "method.decoder_depth": 12, "method.decoder_heads": width // 32,
       "method.maps": "all", "method.map_init": "normal"})
      for name, lr, ratio, width in (("vit_b16_imagenet", 1.5e-4, 0.75, 512), ("vit_b16_imagenet_25", 5e-5, 0.25, 512),
                                     ("vit_l16_imagenet", 1.5e-4, 0.75, 512), ("vit_s16_imagenet", 1.5e-4, 0.75, 256))],
    # LeJEPA, section 6.1: "We thus recommend to use 17 integration points, an integration domain of [-5, 5], and 1024
    # slices", lambda .05, "eight views (V = 8) containing two global views (V_g = 2)"; Table 1: ViT-L/14, 100 epochs.
    # The released code's README: crops of (.3, 1) and (.05, .3) of the image, small ones of 98 pixels, colours, a rate
    # of 5e-4 that falls to a thousandth, decay .05; its scripts/launch_epps_ablation.md: batches of 512, a projector of
    # width 512.
    ("lejepa/vit_l14_imagenet", {"epochs": 100, "batch_size": 512, "peak": 5e-4, "optim.min_lr": 5e-7,
     "optim.weight_decay": 0.05, "optim.betas": [0.9, 0.999], "augment.crop_scale": [0.3, 1.0], "augment.flip": True,
     "method.weight": 0.05, "method.slices": 1024, "method.t_max": 5.0, "method.knots": 9, "method.projector_dim": 512,
     "method.large_views": 2, "method.small_crops": 6, "method.small_size": 98, "method.small_scale": [0.05, 0.3],
     "method.views.jitter": [0.4, 0.4, 0.2, 0.1], "method.views.jitter_p": 0.8, "method.views.gray_p": 0.2,
     "method.views.blur_p": [0.5, 0.5], "method.views.solarise_p": [0.2, 0.2]}),
    # The released code's MINIMAL.md: its code, and the command that it prints.
    ("lejepa/vit_s8_imagenette", {"arch": "vit_s8", "data.image_size": 128, "epochs": 800, "batch_size": 256,
     "peak": 2e-3, "optim.min_lr": 1e-3, "optim.weight_decay": 0.05, "optim.warmup_epochs": 1,
     "augment.crop_scale": [0.08, 1.0], "augment.flip": True, "method.weight": 0.02, "method.slices": 256,
     "method.t_max": 3.0, "method.knots": 17, "method.embedding_dim": 512, "method.hidden_dim": 2048,
     "method.projector_dim": 16, "method.large_views": 4, "method.small_crops": 0,
     "method.views.jitter": [0.8, 0.8, 0.8, 0.2], "method.views.jitter_p": 0.8, "method.views.gray_p": 0.2,
     "method.views.blur_p": [0.5, 0.5], "method.views.solarise_p": [0.2, 0.2]}),
]  # fmt: skip

EVAL = [
    # OCL Tables 10 and 11.
    ("finetune_ocl_b", {"epochs": 100, "optim.warmup_epochs": 5, "optim.lr": 5e-4, "optim.betas": [0.9, 0.95],
     "optim.weight_decay": 0.05, "batch_size": 1024}),
    ("finetune_ocl_l", {"epochs": 50, "optim.warmup_epochs": 5, "optim.lr": 1e-3, "optim.betas": [0.9, 0.95],
     "optim.weight_decay": 0.05, "batch_size": 1024}),
    ("linprobe_mae", {"epochs": 90, "warmup_epochs": 10, "optimizer": "lars", "lr": [0.1], "weight_decay": 0,
     "batch_size": 16384}),
    ("linprobe_ocl_l", {"epochs": 50, "warmup_epochs": 10, "optimizer": "lars", "lr": [0.1], "weight_decay": 0,
     "batch_size": 1024}),
    # ccMIM 4.1: "the same hyper-parameter with MAE, i.e., 100 epochs with learning rate 1e-3 and 1024 batch size", "the
    # average embedding of patches is used for finetuning and linear probing"; 4.2: "360 epochs with the learning rate
    # 3e-4".
    ("finetune_ccmim", {"epochs": 100, "optim.lr": 1e-3, "batch_size": 1024, "pool": "mean"}),
    ("linprobe_ccmim", {"pool": "mean", "epochs": 90, "lr": [0.1]}),
    ("finetune_ccmim_inat", {"epochs": 360, "peak": 3e-4}),
    # MACRL 4: "As for fine-tuning, we apply random resize crop, AutoAugment, and CutOut. For linear probing, we simply
    # use random resize crop and random horizontal clip"; "the learning rate is 1.5e-3 with 0.01 weight decay"; "we set
    # the learning rate as 0.1. The weight decay is set to zero"; "AdamW is the default optimizer"; 4.1: 200 epochs of
    # each; 4.2: 400 and 1,000.
    *[(f"finetune_macrl_{what}", {"epochs": epochs, "flip": False, "auto_augment": policy, "erase_mode": "cutout",
       "erase_p": 1, "mixup": 0, "cutmix": 0, "label_smoothing": 0, "drop_path": 0, "optim.layer_decay": 1,
       "peak": 1.5e-3, "optim.weight_decay": 0.01, "batch_size": 2048})
      for what, epochs, policy in (("cifar", 200, "cifar10"), ("subsets", 400, "original"))],
    *[(f"linprobe_macrl_{what}", {"epochs": epochs, "flip": True, "optimizer": "adamw", "lr": [0.1], "scale_lr": False,
       "weight_decay": 0})
      for what, epochs in (("cifar", 200), ("subsets", 1000))],
]  # fmt: skip


def value_of(science, key):
    if key == "peak":  # the lr that the warm-up reaches
        return round(science["optim"]["lr"] * science["batch_size"] / 256, 9)
    for part in key.split("."):
        science = science[part]
    return science


def shipped(name):
    return resolve(read_tree(recipe_files()[name]), name)


@pytest.mark.parametrize(("name", "said"), PRETRAIN, ids=lambda x: x if isinstance(x, str) else "")
def test_a_pre_training_recipe_has_the_papers_settings(name, said):
    science = shipped(name).science.model_dump(mode="json")
    assert {key: value_of(science, key) for key in said} == said


@pytest.mark.parametrize(("name", "said"), EVAL, ids=lambda x: x if isinstance(x, str) else "")
def test_an_evaluation_recipe_has_the_papers_settings(name, said):
    kind = read_tree(recipe_files("eval")[name], "eval")["science"]["protocol"].removesuffix("_augmented")
    science = eval_recipe(kind, name).science.model_dump(mode="json")
    assert {key: value_of(science, key) for key in said} == said


def test_macrls_encoders_are_those_of_its_sections_4_1_and_4_2():
    """(patch, width, blocks, heads, image): "12-Layer (4 heads)", patch 4; 8 for Tiny-ImageNet; "4-layer"."""
    got = {name: (a.patch, a.dim, a.depth, a.heads, a.image) for name in ("macrl12", "macrl12_p8", "macrl4")
           if (a := get_arch(name))}  # fmt: skip
    assert got == {"macrl12": (4, 512, 12, 4, 32), "macrl12_p8": (8, 512, 12, 4, 64), "macrl4": (16, 512, 4, 4, 224)}


@pytest.mark.parametrize("scale", ["vit_mini4_cifar10", "vit_s4_cifar10", "vit_ti4_cifar10"])
def test_the_suites_own_comparisons_train_every_method_on_the_same_images(scale):
    """At vit_s4 and vit_ti4 for as long, in batches as large and at the same rate; vit_mini4's budgets are the methods'
    own."""
    recipes = {method: shipped(f"{method}/{scale}").science for method in METHODS}
    assert len({(s.data.spec, s.data.image_size, s.augment.flip, s.augment.mean, s.augment.std)
                for s in recipes.values()}) == 1  # fmt: skip
    if scale != "vit_mini4_cifar10":
        budgets = {m: (s.epochs, s.batch_size, s.optim.lr, s.optim.warmup_epochs) for m, s in recipes.items()}
        assert set(budgets.values()) == {(200, 512, 1e-3, 10)}, budgets


def test_asl_t6_trains_asl_and_mae_alike():
    """ASL 4.5: "With the same training settings for all experiments"."""
    for data in ("cifar10", "cifar100"):
        asl, mae = (shipped(f"{m}/asl_t6_{data}").science.model_dump() for m in ("asl", "mae"))
        decoder = ("decoder_dim", "decoder_depth", "decoder_heads", "mask_ratio", "norm_pix_loss")
        assert [asl["method"].pop(k) for k in decoder] == [mae["method"].pop(k) for k in decoder]
        assert (asl.pop("method")["name"], mae.pop("method")["name"]) == ("asl", "mae") and asl == mae


def test_ccmim_in_asls_tables_1_and_2_is_the_released_code_trained_as_the_other_rows():
    """ASL 4.2: "a fair comparison with other methods under the same experimental settings". Table 1 prints ~3.3x MAE's
    FLOPs: training costs 2.0x by counting in the code's form and 1.6x in the text's, the other end from 3.3."""
    for table, data in (("t1", "coco"), ("t2", "imagenet100+coco")):
        recipe, asl = shipped(f"ccmim/asl_{table}_{data}"), shipped(f"asl/vit_b16_{data}").science
        s = recipe.science
        assert recipe.preset == "official" and s.contrastive_batch == 1024
        assert s.method["decoder_depth"] == asl.method["decoder_depth"] == 8 and s.augment == asl.augment
        assert (s.batch_size, s.epochs, s.optim) == (asl.batch_size, asl.epochs, asl.optim)
    mae = flops_per_image(shipped("mae/vit_b16_coco"))
    of = {p: flops_per_image(compose("ccmim", recipe="ccmim/asl_t1_coco", preset=p)) for p in ("paper", "official")}
    ratio = {preset: flops / mae for preset, flops in of.items()}
    assert ratio == pytest.approx({"paper": 1.59, "official": 2.00}, abs=0.01)


def test_asls_probes_on_small_sets_take_about_as_many_steps_as_maes_on_imagenet():
    """A batch of 16,384 is 3 steps an epoch of CIFAR's 50,000 images: 270 steps, where ImageNet's takes 7,020."""
    probes = {data: eval_recipe("linprobe", name).science for data, name in _asls_probes().items()}
    images = {"cifar10": 50_000, "cifar100": 50_000, "imagenet100": 126_689, "imagenet": 1_281_167}
    steps = {data: probes[data].epochs * (n // probes[data].batch_size) for data, n in images.items()}
    assert steps == {"cifar10": 8_730, "cifar100": 8_730, "imagenet100": 22_230, "imagenet": 7_020}
    assert {probe.lr[0] * probe.batch_size / 256 for probe in probes.values()} == {6.4}  # a step of LARS is as long


def _asls_probes():
    tables = [read_paper(name) for name in paper_tables() if name.startswith("asl_t")]
    return {line["dataset"]: protocol_of(line)[1] for table in tables for _, line in table.iterrows()
            if line["metric"] == "linprobe_top1"}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("ocl", ["CLS", "last BatchNorm", "pool", "flip", "2,400", "Table 11"]),
        ("asl", ["norm_pix_loss", "mask_ratio", "crop", "decoder"]),
        ("ccmim", ["tau", "norm_pix_loss", "Eq. 9", "flip", "warm-up", "predictor", "projector"]),
        ("macrl", ["1.5e-4", "1.5e-3", "0.1", "norm_pix_loss", "projector", "bank_keys", "CutOut", "betas"]),
        ("ijepa", ["smooth L1", "one draw", "off-by-one", "dropped", "LayerNorm", "CLS", "cosine", "momentum copy"]),
        ("simmim", ["relative positions", "LayerScale", "drop path", "bias of keys", "1e-5", "epoch 700"]),
        ("crossmae", ["N(0, 1 / maps)", "Xavier", "last norm", "Table 3d", "A.6", "softmax"]),
        ("lejepa", ["[0, 3]", "slices", "lambda", "8 small", "colours", "BatchNorm", "SWA", "drop path", "two blocks"]),
    ],
)
def test_the_head_of_a_methods_file_says_what_its_paper_leaves_open(method, words):
    head = sys.modules[METHODS[method].__module__].__doc__
    assert [w for w in words if w not in head] == []
