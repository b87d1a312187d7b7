"""Small methods on real images, for tests."""

import torch

from sslbench.data import open_split
from sslbench.method import methods
from sslbench.recipe import Augment
from sslbench.vit import Arch, VisionTransformer

METHODS = methods()
TINY = Arch(patch=8, dim=48, depth=2, heads=3, image=32)  # 16 patches
REFERENCE = Arch(patch=16, dim=48, depth=3, heads=3, image=64)  # the goldens'
SMALL = {  # what keeps a method's heads and decoder small here; all else is its default
    "asl": {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 4},
    "ccmim": {"decoder_dim": 32, "decoder_heads": 4},
    "cmae": {
        "decoder_dim": 32,
        "decoder_depth": 2,
        "decoder_heads": 4,
        "feature_depth": 1,
        "hidden_dim": 64,
        "projector_dim": 16,
        "shift": 5,
    },
    "crossmae": {"prediction_ratio": 0.25, "decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 4},
    "dino": {"prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16, "frozen_prototypes": 0, "small_crops": 2,
             "small_size": 16},
    "ibot": {"prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16, "frozen_prototypes": 0, "small_crops": 2,
             "small_size": 16},
    "ijepa": {"predictor_dim": 24, "predictor_depth": 2},
    "lejepa": {"embedding_dim": 32, "hidden_dim": 64, "projector_dim": 16, "slices": 64, "small_crops": 2,
               "small_size": 16},
    "mae": {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 4},
    "macrl": {"bank_size": 64, "proj_hidden": 32, "proj_dim": 16, "decoder_dim": 32},
    "mocov3": {"hidden_dim": 64, "projector_dim": 16},
    "siameseim": {"decoder_dim": 32, "decoder_heads": 4, "projector_depth": 1, "decoder_depth": 2,
                  "smallest_block": 2},
    "simmim": {"mask_size": 16},
}  # fmt: skip


def make(name, arch=TINY, seed=0, **config):
    torch.manual_seed(seed)
    cls = METHODS[name]
    return cls(cls.Config(**{**SMALL.get(name, {}), **config}), VisionTransformer(arch), Augment())


def thousandths(method, seed=3):
    """The method with weights that are drawn alike on any machine."""
    dice = generator(seed)
    drawn = {
        key: torch.randint(-200, 201, x.shape, generator=dice).float() / 1000
        for key, x in method.state_dict().items()
        if x.is_floating_point() and x.unique().numel() > 1 and "pos_embed" not in key
    }
    method.load_state_dict(drawn, strict=False)
    return dice


def images(n=8):
    """Evenly spaced: the built-in set is sorted by class."""
    data = open_split("builtin", "train").images
    return data[torch.linspace(0, len(data) - 1, n).long()]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def step(method, seed=0, n=8):
    with torch.no_grad():
        views = method.build_views(images(n), generator(seed))
    dtype = method.encoder.cls_token.dtype
    views = {k: v.to(dtype) if v.is_floating_point() else v for k, v in views.items()}
    return method.loss(method(views))


def gradient_norm(method):
    return torch.nn.utils.get_total_norm([p.grad for p in method.parameters() if p.grad is not None]).item()


def gradients(method, loss):
    """{name: gradient} of what is trained, and nothing left behind."""
    method.zero_grad()
    loss.backward()
    found = {k: p.grad.clone() for k, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    return found


def reference_images():
    return torch.randn(8, 3, 64, 64, generator=generator(1))
