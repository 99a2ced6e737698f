"""The GPU kernels. `arguments` says what they take; every other file is one kernel, or what kernels share."""
