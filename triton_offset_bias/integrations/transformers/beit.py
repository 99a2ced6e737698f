"""BEiT's window is the whole image, and its class token has numbers of its own."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.models.beit.modeling_beit import BeitAttention, BeitRelativePositionBias

from triton_offset_bias.integrations.replacement import ReplacedAttention, Replacement
from triton_offset_bias.integrations.transformers.attention import refuse_attentions
from triton_offset_bias.integrations.transformers.windows import places_of


def unserved_reason(config: PretrainedConfig) -> str | None:
    """The reason why a model of this configuration is not served; None if it is served."""
    if config.use_relative_position_bias or config.use_shared_relative_position_bias:
        return None
    return "use_relative_position_bias=False and use_shared_relative_position_bias=False: it has no bias"


class WindowBias(NamedTuple):
    """A table and the positions of all tokens, the class token first. It takes the place of BEiT's dense bias.

    It is a tuple, so that code which moves or collects tensors finds the tensors in it.

    Attributes:
        table: (H, offsets).
        origin: column of offset 0.
        query_positions, key_positions: (tokens,).
    """

    table: Tensor
    origin: int
    query_positions: Tensor
    key_positions: Tensor

    def __add__(self, other: object) -> "WindowBias":  # type: ignore[override]
        """The sum of two biases, such as a shared bias and a layer's own.

        Raises:
            NotImplementedError: `other` is a mask.
        """
        if not isinstance(other, WindowBias):
            raise NotImplementedError("`attention_mask` must be None for BEiT's offset-bias attention, got a mask")
        return WindowBias(self.table + other.table, self.origin, self.query_positions, self.key_positions)


class OffsetBiasBeitRelativePositionBias(Replacement, BeitRelativePositionBias):
    """BEiT's bias.

    BEiT's table ends with three numbers: class token to patch, patch to class token, and class token to itself. The
    class token's position gives them the table's lowest, highest and second highest offset. Under "clamp" the ends of
    the table stand for all offsets beyond them.
    """

    def forward(
        self, window_size: tuple[int, int], interpolate_pos_encoding: bool = False, dim_size: int | None = None
    ) -> WindowBias:
        """The bias of an image of this many patches.

        Args:
            window_size: numbers of rows and columns of patches. If they are not the configuration's, the table is
                interpolated as BEiT does it.
            interpolate_pos_encoding: whether the bias of all pairs is interpolated to `dim_size` tokens.
            dim_size: number of tokens.

        Raises:
            NotImplementedError: the bias of all pairs would have to be interpolated to another number of tokens.
        """
        height, width = window_size
        if interpolate_pos_encoding and dim_size != height * width + 1:
            raise NotImplementedError(
                f"`interpolate_pos_encoding` must be False for {height} x {width} patches and {dim_size} tokens: "
                "a bias that is interpolated for each pair is not served"
            )
        table = self.relative_position_bias_table.T
        patches, (from_class, to_class, within_class) = table[:, :-3], table[:, -3:].split(1, dim=1)
        # BEiT has width before height here. Its interpolation depends on this order.
        rows, columns = (2 * size - 1 for size in reversed(self.window_size))
        patches = patches.unflatten(1, (rows, columns)).unsqueeze(0)
        patches = functional.interpolate(patches, size=(2 * height - 1, 2 * width - 1), mode="bilinear")
        patches = patches.squeeze(0).flatten(1)
        reach = patches.shape[1] // 2
        places = places_of(height, width, table.device)
        return WindowBias(
            torch.cat([from_class, patches, within_class, to_class], dim=1),
            reach + 1,
            functional.pad(places, (1, 0), value=-(reach + 1)),
            functional.pad(places, (1, 0), value=-2 * (reach + 1)),
        )


class OffsetBiasBeitAttention(ReplacedAttention, BeitAttention):
    """BEiT's attention."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: WindowBias | None = None,
        output_attentions: bool | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attends with the bias of an image.

        Args:
            hidden_states: (B, tokens, hidden_size).
            attention_mask: the bias.
            output_attentions: must be False.

        Returns:
            (B, tokens, hidden_size), and None for the weights.

        Raises:
            TypeError: `attention_mask` is a mask.
        """
        refuse_attentions(output_attentions)
        if not isinstance(attention_mask, WindowBias):
            raise TypeError(f"`attention_mask` must be a WindowBias, got {type(attention_mask).__name__}")
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.attention(
            query,
            key,
            value,
            attention_mask.table,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scaling,
            bias_origin=attention_mask.origin,
            query_positions=attention_mask.query_positions,
            key_positions=attention_mask.key_positions,
        )
        return self.o_proj(out), None


REPLACEMENTS: tuple[type[Replacement], ...] = (OffsetBiasBeitRelativePositionBias, OffsetBiasBeitAttention)
