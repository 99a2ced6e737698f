"""The backends: each gives `unsupported_reasons(problem)`, `forward` and, where it brings its own gradient, `backward`."""
