"""The GPU kernels. `arguments` lists what they take; every other file holds kernels, or helpers that kernels share."""
