"""Kernels for Hopper alone, of warps that load tiles and warps that multiply them."""
