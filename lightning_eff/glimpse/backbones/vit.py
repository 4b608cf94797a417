"""A vision transformer for patches of any place and size, ElasticViT; arXiv 2309.13353, 2404.03482.

Letters: B images, n patches seen, D width of tokens, C channels, H x W scene, p patch side, L blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_eff.glimpse.backbones.base import Encoded, GlimpseBackbone, Seen
from lightning_eff.glimpse.backbones.heads import ClassHead, TokenHead, TokenShape
from lightning_eff.glimpse.backbones.transformer import NORM_EPS, Block, LayerScale, initialise
from lightning_eff.glimpse.config import ViTSize
from lightning_eff.glimpse.position import box_codes
from lightning_eff.glimpse.rollout import attention_rollout

Importance = Literal["rollout", "rollout_softmax", "cls", "none"]

SIZES = {"small": ViTSize(384, 12, 6), "base": ViTSize(768, 12, 12), "large": ViTSize(1024, 24, 16)}


class ElasticViT(GlimpseBackbone):
    """A vision transformer whose patches may lie anywhere and be of any size, since a code of the box tells it.

    Before the first glimpse it sees its class token alone. Every glimpse is encoded together with all before it.

    Args:
        head: What is predicted: a number of classes, or a head such as
            :class:`~lightning_eff.glimpse.backbones.heads.ImageDecoder`.
        image_size: Of scenes in pixels: a side, or (height, width).
        size: ``"small"`` (384 wide, 12 blocks, 6 heads), ``"base"`` (768, 12, 12), ``"large"`` (1024, 24, 16), or
            another one.
        patch_size: p in pixels, >= 1.
        channels: C, >= 1.
        importance: Of patches to the class token: ``"rollout"`` of the attention of all blocks; the same after a
            softmax, nearly constant, as the paper's code has it; ``"cls"``, attention of the last block; or none.
        discard_ratio: Share of the smallest attention weights that rollout drops, in [0, 1).
        position_unit: Pixels that count as 1 in codes of boxes, > 0; None takes p.
        position_temperature: Of those codes, > 0.
        layer_scale: Start of the factors of the blocks' branches, > 0.

    Raises:
        ValueError: An argument lies outside its range.
    """

    def __init__(
        self,
        head: int | TokenHead,
        image_size: int | tuple[int, int],
        size: Literal["small", "base", "large"] | ViTSize = "base",
        patch_size: int = 16,
        channels: int = 3,
        importance: Importance = "rollout",
        discard_ratio: float = 0.5,
        position_unit: float | None = None,
        position_temperature: float = 10_000.0,
        layer_scale: float = 1e-4,
    ) -> None:
        super().__init__()
        if importance not in get_args(Importance):
            raise ValueError(f"importance must be one of {', '.join(get_args(Importance))}, got {importance!r}")
        if isinstance(size, str) and size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, or a ViTSize, got {size!r}")
        if patch_size < 1 or channels < 1:
            raise ValueError(f"patch_size and channels must be >= 1, got {patch_size} and {channels}")
        if not 0 <= discard_ratio < 1:
            raise ValueError(f"discard_ratio must lie in [0, 1), got {discard_ratio}")
        self.position_unit = float(patch_size if position_unit is None else position_unit)
        self.position_temperature = position_temperature
        if min(self.position_unit, position_temperature, layer_scale) <= 0:
            raise ValueError(
                "position_unit, position_temperature and layer_scale must be > 0, got "
                f"{position_unit}, {position_temperature} and {layer_scale}"
            )
        self.size = SIZES[size] if isinstance(size, str) else size
        self.scene = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.patch_size, self.channels, self.latent_dim = patch_size, channels, self.size.dim
        self.importance, self.discard_ratio, self.has_importance = importance, discard_ratio, importance != "none"

        dim = self.size.dim
        self.patch_embed = nn.Conv2d(channels, dim, patch_size)
        self.cls_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, self.size.heads, layer_scale) for _ in range(self.size.depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.apply(initialise)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        self.head: TokenHead = ClassHead(head) if isinstance(head, int) else head
        self.head.attach(TokenShape(dim, self.scene, patch_size, channels))

    def begin(self, images: Tensor, patch_size: int) -> Seen:
        """Return what has been seen before the first glimpse: nothing.

        Raises:
            ValueError: Images or patches are not of the size that the backbone was made for.
        """
        expected = [self.channels, *self.scene, self.patch_size]
        got = [*images.shape[1:], patch_size]
        if got != expected:
            raise ValueError(f"ElasticViT was made for [C, H, W, patch_size] = {expected}, got {got}")
        return super().begin(images, patch_size)

    def encode(self, seen: Seen, importance: bool = False) -> Encoded:
        """Encode all patches together: ``pooled`` is the class token [B, D]."""
        batch, count = seen.boxes.shape[:2]
        codes = box_codes(seen.boxes, self.latent_dim, self.position_unit, self.position_temperature)
        embedded = self.patch_embed(seen.patches.flatten(0, 1)).view(batch, count, self.latent_dim)
        tokens = torch.cat([self.cls_token.expand(batch, 1, -1).to(embedded.dtype), embedded + codes], dim=1)
        attention = []
        wanted = self._attentive_blocks if importance else range(0)
        for number, block in enumerate(self.blocks):
            if number in wanted:
                assert isinstance(block, Block)
                with torch.no_grad():
                    attention.append(block.attention(tokens))
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return Encoded(tokens[:, 0], tokens[:, 1:], self._importance(attention) if attention else None)

    def predict(self, encoded: Encoded, seen: Seen) -> Tensor:
        """Return what the head makes of the tokens."""
        assert encoded.latents is not None
        return self.head(encoded.pooled, encoded.latents, seen.boxes)  # type: ignore[no-any-return]

    def load_vit_weights(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Take the weights of a plain vision transformer of the same size, named as in timm or torchvision.

        Its positions are not taken, since places of patches are coded by their boxes here; that of the class token
        is added to it. Classes are taken if there are as many. A network without factors of branches sets them to 1.

        Args:
            weights: Its ``state_dict()``.

        Returns:
            Names that found no place.

        Raises:
            ValueError: It lacks weights of the encoder, or they are of another size.
        """
        named = {_timm_name(name): tensor for name, tensor in weights.items()}
        own = self.state_dict()
        if "cls_token" in named:
            positions = named.get("pos_embed")
            cells = positions.shape[-2] if positions is not None else 0
            # with one position more than the square of cells, the first is the class token's
            first = positions[0, 0] if positions is not None and round((cells - 1) ** 0.5) ** 2 == cells - 1 else 0.0
            named["cls_token"] = named["cls_token"].flatten() + first
        encoder = [name for name in own if not name.startswith("head.") and not name.endswith(".gamma")]
        wrong = [name for name in encoder if name not in named or named[name].shape != own[name].shape]
        if wrong:
            got = list(named[wrong[0]].shape) if wrong[0] in named else "nothing"
            raise ValueError(
                f"expected {wrong[0]} of shape {list(own[wrong[0]].shape)}, got {got} ({len(wrong)} of {len(encoder)} "
                f"names do not fit): the network must have patches of {self.patch_size} px, {self.channels} channels "
                f"and {self.size}"
            )
        fitting = {name for name in named if name in own and named[name].shape == own[name].shape}
        self.load_state_dict({name: named[name] for name in fitting}, strict=False)
        if not any(name.endswith(".gamma") for name in fitting):
            for module in self.modules():
                if isinstance(module, LayerScale):
                    nn.init.ones_(module.gamma)
        return [name for name in weights if _timm_name(name) not in fitting]

    @property
    def _attentive_blocks(self) -> range:
        first = {"none": len(self.blocks), "cls": len(self.blocks) - 1}.get(self.importance, 0)
        return range(first, len(self.blocks))

    def _importance(self, attention: list[Tensor]) -> Tensor:
        if self.importance == "cls":
            row = attention[-1][:, 0, 1:]
        else:
            row = attention_rollout(attention, self.discard_ratio)[:, 1:]
        if self.importance == "rollout_softmax":
            return row.softmax(1).unsqueeze(2)
        # all patches may have been dropped
        return (row / row.sum(1, keepdim=True).clamp(min=torch.finfo(row.dtype).tiny)).unsqueeze(2)


_TORCHVISION = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^heads\.head\.", "head.head."),
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^head\.(weight|bias)$", r"head.head.\1"),
)


def _timm_name(name: str) -> str:
    for pattern, new in _TORCHVISION:
        name = re.sub(pattern, new, name)
    return name
