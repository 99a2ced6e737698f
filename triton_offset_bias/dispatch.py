"""Chooses the backend. A named backend either serves the call or raises with its reasons; it never falls back."""

from triton_offset_bias.backends.contract import BACKENDS
from triton_offset_bias.problem import Problem


def select_backend(problem: Problem, name: str) -> str:
    """The backend that serves `problem`: the named one, or for "auto" the first that can.

    Raises:
        ValueError: `name` is no backend.
        NotImplementedError: the named backend, or every backend, has reasons not to serve the problem.
    """
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        known = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"`backend` must be one of {known}, got {name!r}")
    candidates = list(BACKENDS) if name == "auto" else [name]
    refusals = []
    for candidate in candidates:
        reasons = BACKENDS[candidate].unsupported_reasons(problem)
        if not reasons:
            return candidate
        refusals.append(f"{candidate}: {'; '.join(reasons)}")
    wanted = "no backend supports this call" if name == "auto" else f"backend {name!r} does not support this call"
    raise NotImplementedError("\n  ".join([f"{wanted}:", *refusals]))
