"""A recipe's method as a module, and what a training step of it costs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..errors import UserError
from ..files import digest
from ..method import Method, get_method
from ..recipe import Recipe
from ..vit import VisionTransformer, get_arch

CPU_ATTENTION = {  # which torch's counter knows on GPUs only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}

_counted: dict[str, float] = {}  # FLOPs of an image, by what they depend on


def build(recipe: Recipe) -> Method:
    """The method with its encoder, weights drawn from torch's global generator."""
    science = recipe.science
    cls = get_method(recipe.method)
    config = cls.Config(**{k: v for k, v in science.method.items() if k not in ("name", "preset")})
    encoder = VisionTransformer(get_arch(science.arch), science.data.image_size)
    try:
        return cls(config, encoder, science.augment)
    except ValueError as e:
        raise UserError(f"recipe {recipe.name}: science.method: {e}") from None


def flops_per_image(recipe: Recipe) -> float:
    """Return multiply-adds x 2 of one image's training step, forward and backward, counted once a process.

    That takes a ViT-B seconds, and a study asks for each row, a report for each line.
    """
    science = recipe.science
    key = digest([science.method, science.arch, science.data.image_size])
    if key not in _counted:
        _counted[key] = step_on_shapes(recipe)
    return _counted[key]


def step_on_shapes(recipe: Recipe) -> float:
    """Do a training step of two images on shapes alone, and return its FLOPs an image: it computes nothing."""
    with torch.device("meta"):
        method = build(recipe)
    n, side = 2, recipe.science.data.image_size or 0
    images = torch.zeros(n, 3, side, side, dtype=torch.uint8)
    views = method.build_views(images, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        loss = method.loss(method({k: v.to("meta") for k, v in views.items()}))["loss"]
        loss.backward()
    return counter.get_total_flops() / n
