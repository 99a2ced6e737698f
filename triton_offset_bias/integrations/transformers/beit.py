"""The window of BEiT and of Data2Vec for images is the whole image, and its class token has numbers of its own."""

from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.models.beit.modeling_beit import BeitAttention, BeitRelativePositionBias
from transformers.models.data2vec.configuration_data2vec_vision import Data2VecVisionConfig
from transformers.models.data2vec.modeling_data2vec_vision import (
    Data2VecVisionRelativePositionBias,
    Data2VecVisionSdpaSelfAttention,
    Data2VecVisionSelfAttention,
)

from triton_offset_bias.integrations.replacement import ReplacedAttention, Replacement
from triton_offset_bias.integrations.transformers.attention import refuse_attentions
from triton_offset_bias.integrations.windows import WindowBias, attend_with_window_bias, window_bias
from triton_offset_bias.modules.window_positions import CLASS_TOKEN_COLUMNS


def unserved_reason(config: PretrainedConfig) -> str | None:
    """The reason why a model of this configuration is not served; None if it is served."""
    if config.use_relative_position_bias or config.use_shared_relative_position_bias:
        return None
    return "use_relative_position_bias=False and use_shared_relative_position_bias=False: it has no bias"


class _RelativePositionBias(Replacement):
    """A bias whose table ends with the three numbers of the class token."""

    relative_position_bias_table: nn.Parameter
    window_size: tuple[int, int]

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
        patches, extra = table[:, :-CLASS_TOKEN_COLUMNS], table[:, -CLASS_TOKEN_COLUMNS:]
        # BEiT has width before height here. Its interpolation depends on this order.
        rows, columns = (2 * size - 1 for size in reversed(self.window_size))
        patches = patches.unflatten(1, (rows, columns)).unsqueeze(0)
        patches = functional.interpolate(patches, size=(2 * height - 1, 2 * width - 1), mode="bilinear")
        return window_bias(patches.squeeze(0).flatten(1), (height, width), extra)


class OffsetBiasBeitRelativePositionBias(_RelativePositionBias, BeitRelativePositionBias):
    """BEiT's bias."""


class OffsetBiasData2VecVisionRelativePositionBias(_RelativePositionBias, Data2VecVisionRelativePositionBias):
    """Data2Vec's bias."""


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
        dropout_p = self.attention_dropout if self.training else 0.0
        out = attend_with_window_bias(self, query, key, value, attention_mask, self.scaling, dropout_p)
        return self.o_proj(out), None


class _Data2VecVisionSelfAttention(ReplacedAttention):
    """Data2Vec's attention for images. A layer adds its own bias to the one that all layers share."""

    config: Data2VecVisionConfig
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    num_attention_heads: int
    attention_head_size: int
    has_relative_position_bias: bool
    relative_position_bias: Data2VecVisionRelativePositionBias
    dropout: nn.Dropout
    training: bool

    def forward(
        self,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: WindowBias | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] = (0, 0),
    ) -> tuple[Tensor]:
        """Attends with the bias of an image.

        Args:
            hidden_states: (B, tokens, hidden_size).
            output_attentions: must be False.
            relative_position_bias: the bias that all layers share, or None.
            interpolate_pos_encoding: whether the bias of all pairs is interpolated.
            resolution: height and width of the image in pixels.

        Returns:
            (B, tokens, hidden_size), alone in a tuple.
        """
        refuse_attentions(output_attentions)
        bias = relative_position_bias
        if self.has_relative_position_bias:
            patches = resolution[0] // self.config.patch_size, resolution[1] // self.config.patch_size
            own = self.relative_position_bias(patches, interpolate_pos_encoding, hidden_states.shape[1])
            bias = own if bias is None else own + bias
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        dropout_p = self.dropout.p if self.training else 0.0
        return (attend_with_window_bias(self, query, key, value, bias, self.attention_head_size**-0.5, dropout_p),)


class OffsetBiasData2VecVisionSelfAttention(_Data2VecVisionSelfAttention, Data2VecVisionSelfAttention):
    """The attention of models that were built with eager attention."""


class OffsetBiasData2VecVisionSdpaSelfAttention(_Data2VecVisionSelfAttention, Data2VecVisionSdpaSelfAttention):
    """The attention of models that were built with SDPA."""


REPLACEMENTS: tuple[type[Replacement], ...] = (
    OffsetBiasBeitRelativePositionBias,
    OffsetBiasBeitAttention,
    OffsetBiasData2VecVisionRelativePositionBias,
    OffsetBiasData2VecVisionSelfAttention,
    OffsetBiasData2VecVisionSdpaSelfAttention,
)
