"""Runs models of Hugging Face transformers (5.15 or newer) that have a relative position bias, in O(L) memory.

from triton_offset_bias.integrations.transformers import enable_offset_bias

enable_offset_bias(model)  # train, generate and save as before
"""

from triton_offset_bias.integrations.transformers import interface as interface  # registers itself
from triton_offset_bias.integrations.transformers.enabling import SERVED, disable_offset_bias, enable_offset_bias

__all__ = ["SERVED", "disable_offset_bias", "enable_offset_bias"]
