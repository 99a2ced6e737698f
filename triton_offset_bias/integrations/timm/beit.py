"""BEiT's window is the whole image, and its class token has numbers of its own."""

from timm.models.beit import Attention as BeitAttention
from timm.models.beit import RelativePositionBias as BeitRelativePositionBias
from torch import Tensor

from triton_offset_bias.integrations.replacement import ReplacedAttention, Replacement
from triton_offset_bias.integrations.timm.projections import queries_keys_values
from triton_offset_bias.integrations.windows import WindowBias, attend_with_window_bias, window_bias
from triton_offset_bias.modules.window_positions import CLASS_TOKEN_COLUMNS


def _bias_of(numbers: Tensor, window_size: tuple[int, int]) -> WindowBias:
    """The bias of a window, of a parameter (offsets + 3, H) that ends with the numbers of the class token."""
    table = numbers.T
    return window_bias(table[:, :-CLASS_TOKEN_COLUMNS], window_size, table[:, -CLASS_TOKEN_COLUMNS:])


class OffsetBiasBeitRelativePositionBias(Replacement, BeitRelativePositionBias):
    """The bias that all layers share."""

    def forward(self) -> WindowBias:
        """The bias of the window."""
        return _bias_of(self.relative_position_bias_table, self.window_size)


class OffsetBiasBeitAttention(ReplacedAttention, BeitAttention):
    """BEiT's attention."""

    def forward(self, x: Tensor, shared_rel_pos_bias: WindowBias | None = None) -> Tensor:
        """Attends with the layer's own bias, with the shared one, or with their sum.

        Args:
            x: (B, tokens, dim), the class token first.
            shared_rel_pos_bias: the bias that all layers share, or None.

        Returns:
            (B, tokens, dim).
        """
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = _bias_of(self.relative_position_bias_table, self.window_size)
            bias = own if bias is None else own + bias
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = attend_with_window_bias(self, *queries_keys_values(self, x), bias, self.scale, dropout_p)
        return self.proj_drop(self.proj(out))


REPLACEMENTS: tuple[type[Replacement], ...] = (OffsetBiasBeitRelativePositionBias, OffsetBiasBeitAttention)
