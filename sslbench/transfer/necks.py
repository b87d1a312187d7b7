"""From a ViT's maps of one stride to a pyramid: the simple one (ViTDet), and that of four taps (MIMDet, CAE, BEiT)."""

from __future__ import annotations

from typing import Any

from mmcv.cnn import build_norm_layer
from mmdet.models.necks import FPN
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

MODELS.register_module(name="LN2d", module=LayerNorm2d, force=True)


def norm_cfg(name: str, synchronised: bool) -> dict[str, Any]:
    """mmcv's words for a norm; SyncBN is plain BN where one process trains."""
    words: dict[str, dict[str, Any]] = {
        "LN": {"type": "LN2d", "eps": 1e-6},
        "GN": {"type": "GN", "num_groups": 32},
        "SyncBN": {"type": "SyncBN" if synchronised else "BN"},
    }
    return words[name]


def _norm(config: dict[str, Any], channels: int) -> nn.Module:
    return build_norm_layer(dict(config), channels)[1]


@MODELS.register_module(name="SslbenchSimplePyramid")
class SimplePyramid(nn.Module):
    """(B, D, H, W) of stride s -> five maps (B, out, ., .) of strides s/4, s/2, s, 2s, 4s (Li et al. 2022, ViTDet)."""

    def __init__(self, dim: int, norm: dict[str, Any], out: int = 256) -> None:
        super().__init__()

        def up(wide: int) -> nn.Module:
            return nn.ConvTranspose2d(wide, wide // 2, 2, stride=2)

        scales: list[tuple[int, list[nn.Module]]] = [
            (dim // 4, [up(dim), _norm(norm, dim // 2), nn.GELU(), up(dim // 2)]),
            (dim // 2, [up(dim)]),
            (dim, []),
            (dim, [nn.MaxPool2d(2, 2)]),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *layers,
                nn.Conv2d(width, out, 1, bias=False),
                _norm(norm, out),
                nn.Conv2d(out, out, 3, padding=1, bias=False),
                _norm(norm, out),
            )
            for width, layers in scales
        )

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        levels = [level(maps[-1]) for level in self.levels]
        return in_full([*levels, F.max_pool2d(levels[-1], 1, stride=2)])


@MODELS.register_module(name="SslbenchRescale")
class Rescale(nn.Module):
    """Four maps (B, D, H, W) of stride s -> the same of strides s/4, s/2, s, 2s."""

    def __init__(self, dim: int, norm: dict[str, Any]) -> None:
        super().__init__()

        def up() -> nn.Module:
            return nn.ConvTranspose2d(dim, dim, 2, stride=2)

        self.levels = nn.ModuleList(
            [nn.Sequential(up(), _norm(norm, dim), nn.GELU(), up()), up(), nn.Identity(), nn.MaxPool2d(2, 2)]
        )

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(level(x) for level, x in zip(self.levels, maps, strict=True))


@MODELS.register_module(name="SslbenchTapPyramid")
class TapPyramid(nn.Module):
    """Four taps -> `Rescale`, an FPN over them, and a fifth level by max pooling; strides as SimplePyramid's."""

    def __init__(self, dim: int, norm: dict[str, Any], fpn_norm: dict[str, Any] | None, out: int = 256) -> None:
        super().__init__()
        self.rescale = Rescale(dim, norm)
        self.fpn = FPN([dim] * 4, out, num_outs=5, norm_cfg=fpn_norm)

    def init_weights(self) -> None:
        self.fpn.init_weights()

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return in_full(self.fpn(self.rescale(maps)))


def in_full(maps: Any) -> tuple[Tensor, ...]:
    """float32 whatever the autocast: mmdet gives RoIs the maps' dtype, and in bfloat16 a box is up to 4 pixels off."""
    return tuple(x.float() for x in maps)
