"""Small models of timm with random weights."""

import timm
import torch
from timm.models.beit import Beit
from timm.models.levit import Levit
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

__all__ = ["BUILDERS", "SwinTransformer", "build", "images", "randomized", "timm"]

TABLES = ("relative_position_bias_table", "attention_biases", "mlp.fc2", "cpb_mlp.2")
_SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4}
_VIT = {"img_size": 20, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """The model in eval mode whose every weight matters: tables too, which many models start at 0."""
    generator = torch.Generator("cpu").manual_seed(1)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.dim() >= 2 and "logit_scale" not in name:
                spread = 1.0 if any(table in name for table in TABLES) else 0.2
                x.copy_(spread * torch.randn(x.shape, generator=generator, device="cpu"))
            elif x.dim() == 1:  # norms and biases; some norms start at 0, and would hide the attention before them
                start = 0.0 if name.endswith("bias") else 1.0
                x.copy_(start + 0.2 * torch.randn(x.shape, generator=generator, device="cpu"))
    return model.eval()


def _maxxvit(blocks: tuple, **transformer: object) -> MaxxVit:
    config = MaxxVitCfg(
        embed_dim=(8, 16),
        depths=(1, 2),
        block_type=blocks,
        stem_width=8,
        conv_cfg=MaxxVitConvCfg(),
        transformer_cfg=MaxxVitTransformerCfg(dim_head=4, window_size=(4, 4), grid_size=(4, 4), **transformer),
    )
    return MaxxVit(config, img_size=32, num_classes=5)


def _levit(**own: object) -> Levit:
    sizes = {"embed_dim": (16, 32), "key_dim": 8, "depth": (1, 1), "num_heads": (2, 4)}
    return Levit(img_size=64, num_classes=5, **sizes, **own)


BUILDERS = {
    "swin": lambda: SwinTransformer(**_SWIN, num_classes=5),
    "swin_v2": lambda: SwinTransformerV2(**_SWIN, num_classes=5),
    "beit": lambda: Beit(**_VIT, use_rel_pos_bias=True, init_values=0.5, num_classes=5),
    "beit, shared bias": lambda: Beit(**_VIT, use_shared_rel_pos_bias=True, qkv_bias=False, num_classes=5),
    "beit, both": lambda: Beit(**_VIT, use_rel_pos_bias=True, use_shared_rel_pos_bias=True, num_classes=5),
    "relpos": lambda: VisionTransformerRelPos(**_VIT, rel_pos_type="bias", num_classes=5),
    "relpos, class token": lambda: VisionTransformerRelPos(
        **_VIT, rel_pos_type="bias", class_token=True, global_pool="token", qk_norm=True, num_classes=5
    ),
    "relpos, network": lambda: VisionTransformerRelPos(
        **_VIT, rel_pos_type="mlp", class_token=True, global_pool="token", num_classes=5
    ),
    "relpos, shared": lambda: VisionTransformerRelPos(**_VIT, rel_pos_type="mlp", shared_rel_pos=True, num_classes=5),
    "maxvit": lambda: _maxxvit(("M", "M"), rel_pos_type="bias"),
    "maxvit, of TensorFlow": lambda: _maxxvit(("M", "M"), rel_pos_type="bias_tf", head_first=False),
    "maxvit, channels last": lambda: _maxxvit(("M", "M"), use_nchw_attn=False),
    "maxvit, parallel": lambda: _maxxvit(("PM", "PM")),
    "coatnet": lambda: _maxxvit(("C", "T"), rel_pos_type="bias"),
    "coatnet, network": lambda: _maxxvit(("C", "T"), rel_pos_type="mlp", rel_pos_dim=16),
    "levit": lambda: _levit(),
    "levit, convolutions": lambda: _levit(use_conv=True),
}


def build(name: str) -> torch.nn.Module:
    """The model of this name."""
    return randomized(BUILDERS[name]())


def images(model: torch.nn.Module, batch: int = 3) -> torch.Tensor:
    """Images (batch, 3, height, width) that the model takes."""
    side = 64 if isinstance(model, Levit) else 20 if isinstance(model, Beit | VisionTransformerRelPos) else 32
    return torch.randn(batch, 3, side, side)
