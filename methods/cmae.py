"""CMAE: contrastive masked autoencoders (Huang et al. 2022, 2024): MAE, whose features also tell images apart.

The online branch is MAE with a second, lighter decoder, whose mean over all patches is the image's feature, projected
and predicted. The target is the mean patch of a momentum encoder that sees the whole of a second view: the same crop,
moved by some pixels ("pixel shift") and changed in colour. The total is the reconstruction + lambda_c x InfoNCE.

Presets: `paper` has MAE's mask and the plain InfoNCE of the paper's equation; `official` is the released code. The
numbers that both share are the code's; what `paper` has was not compared with the paper's tables:
  mask           paper: .75 of the patches, as MAE; the code's configuration: .65 of squares of 2 x 2 patches.
  two_tau        the code multiplies the InfoNCE by 2 tau, a factor of .14.
As in the released code, and easily overlooked:
  shift          of the target alone, 0 to 31 pixels either way; the online view is the corner of the crop, which is one
                 pixel larger than that needs (256 for 224).
  encoder.norm   is the online branch's alone: the target reads the last block of the momentum encoder.
  momentum       stays the same.
  heads          have one BatchNorm, behind the first layer, whose epsilon is 1e-6; the last layer has no bias.
What differs from it, for a shared ViT and trainer: positions encode x first, as MAE's do (the code's y);
the initialisation of all is MAE's; the feature decoder ends as wide as the encoder (the code's as a patch has values,
which is the same in ViT-B/16); the first layer of a head has no bias, which the norm would take away.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from sslbench.decoder import Decoder
from sslbench.draws import rand
from sslbench.losses import gather, info_nce, normalise_patches, patch_mse
from sslbench.masking import n_kept, random_order
from sslbench.method import Method, MethodConfig
from sslbench.pictures import Canvas
from sslbench.recipe import Augment
from sslbench.siamese import BatchNorm, ema_, momentum_copy
from sslbench.views import Crop, Crops, TwoViews, distort, normalise, random_resized_crop
from sslbench.vit import VisionTransformer, initialise, patchify, take


class CMAEConfig(MethodConfig):
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    mask_unit: int = Field(1, gt=0)  # patches a side of what is masked together
    norm_pix_loss: bool = True
    decoder_dim: int = Field(512, gt=0, multiple_of=4)  # of both decoders
    decoder_depth: int = Field(8, gt=0)
    decoder_heads: int = Field(16, gt=0)
    feature_depth: int = Field(2, gt=0)  # of the feature decoder
    hidden_dim: int = Field(1536, gt=0)
    projector_dim: int = Field(256, gt=0)
    tau: float = Field(0.07, gt=0)
    two_tau: bool = False
    contrast_weight: float = Field(1.0, ge=0)  # lambda_c
    momentum: float = Field(0.996, ge=0, le=1)
    shift: int = Field(31, ge=0)  # pixels
    gather_negatives: bool = True
    target_view: TwoViews = TwoViews(jitter=(0.4, 0.4, 0.4, 0.1), blur_p=(0.5, 0.5), solarise_p=(0.0, 0.0))


class CMAE(Method):
    Config = CMAEConfig
    presets = {"paper": {}, "official": {"mask_ratio": 0.65, "mask_unit": 2, "two_tau": True}}
    crops = 1
    couples_batch = True
    compared = ("feature", "target_feature")
    pool = "mean"

    def __init__(self, config: CMAEConfig, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__(config, encoder, augment)
        unit, grid = config.mask_unit, encoder.grid
        if grid[0] % unit or grid[1] % unit:
            raise ValueError(f"mask_unit={unit} does not divide the grid of {grid[0]} x {grid[1]} patches")
        self.n_kept = n_kept(encoder.n_patches // unit**2, config.mask_ratio) * unit**2
        if not self.n_kept:
            raise ValueError(f"mask_ratio={config.mask_ratio} leaves none of {encoder.n_patches // unit**2} squares")
        width, heads = config.decoder_dim, config.decoder_heads
        self.decoder = Decoder(encoder, width, config.decoder_depth, heads)
        self.feature_decoder = Decoder(encoder, width, config.feature_depth, heads, out=encoder.arch.dim)
        hidden, out, everywhere = config.hidden_dim, config.projector_dim, config.gather_negatives
        self.projector = head(encoder.arch.dim, hidden, out, everywhere)
        self.predictor = head(out, hidden, out, everywhere)
        initialise(self)
        self.momentum_encoder, self.momentum_projector = momentum_copy(encoder), momentum_copy(self.projector)
        self.momentum_encoder.norm = nn.Identity()

    def crop_list(self) -> list[Crop]:
        return [Crop(self._side())]

    def _side(self) -> int:
        """Pixels a side of the crop that both views are cut from."""
        return self.encoder.image[0] + self.config.shift + 1

    def build_views(self, images: Tensor | Crops, generator: torch.Generator) -> dict[str, Tensor]:
        """The online view and the target's (B, 3, S, S), and the `order` (B, N) of the former's patches."""
        a, c, size = self.augment, self.config, self.encoder.image[0]
        law = (a.crop_scale, a.flip, generator)
        crops = random_resized_crop(images, self._side(), *law, interpolation=a.interpolation)
        offsets = (rand((len(images), 2), generator) * (c.shift + 1)).long().to(crops.device)
        target = distort(shifted(crops, offsets, size), c.target_view, 0, generator)
        order = square_order(len(images), self.encoder.grid, c.mask_unit, generator)
        return {
            "images": normalise(crops[..., :size, :size], a.mean, a.std),
            "target": normalise(target, a.mean, a.std),
            "order": order.to(images.device),
        }

    def embed(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prediction and target of the masked patches (B, N - K, P), and both branches' features (B, D)."""
        images, order = views["images"], views["order"]
        tokens = self.encoder(images, order[:, : self.n_kept])
        prediction = self.decoder(tokens, order)
        pixels = take(patchify(images, self.encoder.arch.patch), order[:, self.n_kept :])
        feature = self.feature_decoder(tokens, order, slice(1, None)).mean(1)
        with torch.no_grad():
            target = self.momentum_encoder(views["target"])[:, 1:].mean(1)
        return {"prediction": prediction, "pixels": pixels, "feature": feature, "target_feature": target}

    def compare(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        """q and, without gradient, k: (B, 256) each, not yet normalised."""
        outputs = {name: x for name, x in embedded.items() if name not in self.compared}
        outputs["q"] = self.predictor(self.projector(embedded["feature"]))
        with torch.no_grad():
            outputs["k"] = self.momentum_projector(embedded["target_feature"])
        return outputs

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """L_r + lambda_c x L_c, of these the terms whose outputs are given."""
        c, terms, total = self.config, {}, 0.0
        if "prediction" in outputs:
            pixels = normalise_patches(outputs["pixels"]) if c.norm_pix_loss else outputs["pixels"]
            total = terms["recon"] = patch_mse(outputs["prediction"], pixels)
        if "q" in outputs:
            keys, first = gather(outputs["k"]) if c.gather_negatives else (outputs["k"], 0)
            terms["nce"] = (2 * c.tau if c.two_tau else 1) * info_nce(outputs["q"], keys, c.tau, first)
            total = total + c.contrast_weight * terms["nce"]
        return {"loss": total, **terms}

    def after_step(self, progress: float) -> None:
        ema_(self.momentum_encoder, self.encoder, self.config.momentum)
        ema_(self.momentum_projector, self.projector, self.config.momentum)

    def tokens_per_image(self) -> int:
        return self.n_kept + 1 + self.encoder.n_patches + 1

    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        order, canvas = views["order"], Canvas(self, views["images"])
        hidden = order[:, self.n_kept :]
        prediction = self.embed(views)["prediction"]
        return {
            "visible": canvas.only(order[:, : self.n_kept]),
            "reconstruction": canvas.filled(prediction, hidden, self.config.norm_pix_loss),
            "view of the target": Canvas(self, views["target"]).whole(),
        }


def head(width: int, hidden: int, out: int, everywhere: bool) -> nn.Sequential:
    norm = BatchNorm(hidden, everywhere=everywhere, eps=1e-6)
    return nn.Sequential(nn.Linear(width, hidden, bias=False), norm, nn.ReLU(), nn.Linear(hidden, out, bias=False))


def shifted(crops: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Cut from each image of (B, C, H, W) the window of `size` pixels whose top and left are its offsets, (B, 2)."""
    rows, columns = (torch.arange(size, device=crops.device) + offsets.unbind(1)[i][:, None] for i in (0, 1))
    x = crops.gather(2, rows[:, None, :, None].expand(-1, crops.shape[1], -1, crops.shape[3]))
    return x.gather(3, columns[:, None, None, :].expand(-1, *x.shape[1:3], -1))


def square_order(batch: int, grid: tuple[int, int], unit: int, generator: torch.Generator) -> Tensor:
    """(batch, N): an order of the patches in which those of a square of `unit` x `unit` follow each other."""
    index = torch.arange(grid[0] * grid[1], device=generator.device).view(grid[0] // unit, unit, grid[1] // unit, unit)
    squares = index.transpose(1, 2).reshape(-1, unit * unit)
    return squares[random_order(batch, len(squares), generator)].flatten(1)
