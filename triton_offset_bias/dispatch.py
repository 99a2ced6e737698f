"""Chooses the backend. A named backend either serves the call or raises with its reasons; it never falls back."""

import warnings

import torch

from triton_offset_bias.backends.contract import BACKENDS, FUSED_BACKENDS
from triton_offset_bias.problem import Problem


class DenseFallbackWarning(UserWarning):
    """The backend "auto" took the reference, which stores a score for every pair of query and key."""


# The texts of the warnings that were shown. Each cause is shown once, wherever the calls are.
_shown: set[str] = set()


def select_backend(problem: Problem, name: str) -> str:
    """The backend that serves `problem`: the named one, or for "auto" the first that can.

    Where "auto" takes the reference, it shows a `DenseFallbackWarning` once for each cause.

    Raises:
        ValueError: `name` is no backend.
        NotImplementedError: the named backend, or every backend, has reasons not to serve the problem.
    """
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        known = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"`backend` must be one of {known}, got {name!r}")
    candidates = list(BACKENDS) if name == "auto" else [name]
    refusals: list[str] = []
    for candidate in candidates:
        reasons = BACKENDS[candidate].unsupported_reasons(problem)
        if not reasons:
            if name == "auto" and candidate not in FUSED_BACKENDS:
                _warn_of_fallback(problem.query.device.type, tuple(refusals))
            return candidate
        refusals.append(f"{candidate}: {'; '.join(reasons)}")
    wanted = "no backend supports this call" if name == "auto" else f"backend {name!r} does not support this call"
    raise NotImplementedError("\n  ".join([f"{wanted}:", *refusals]))


@torch.compiler.assume_constant_result  # compiled code warns while it is traced
def _warn_of_fallback(device: str, refusals: tuple[str, ...]) -> None:
    """Shows why no fused backend serves tensors on a device, unless this was shown before.

    Backends that are made for other devices are not blamed. Tensors on the meta device have no memory to save.
    """
    if device == "meta":
        return
    made_for_it = [name for name, backend in FUSED_BACKENDS.items() if device in backend.DEVICES]
    causes = [line for line in refusals if line.partition(":")[0] in made_for_it]
    text = "\n  ".join(
        [
            'backend="auto" takes the reference, which stores a score for every pair of query and key, because',
            *(causes or [f"no fused backend is made for {device} tensors"]),
        ]
    )
    if text not in _shown:
        warnings.warn(
            f'{text}\nChange this to save memory and time, or pass backend="reference" to choose the reference.',
            DenseFallbackWarning,
            stacklevel=4,  # the call of the public function
        )
        _shown.add(text)
