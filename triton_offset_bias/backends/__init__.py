"""The backends: each says what it cannot serve, `unsupported_reasons(problem)`; none imports another."""
