"""Runs models of timm that have a relative position bias, in O(tokens) memory.

from triton_offset_bias.integrations.timm import enable_offset_bias

enable_offset_bias(model)  # train, resize and save as before
"""

from triton_offset_bias.integrations.timm.enabling import disable_offset_bias, enable_offset_bias

__all__ = ["disable_offset_bias", "enable_offset_bias"]
