"""Part 6: kernels that are behind a switch, against those that ship."""

import itertools

from bench.cases import GPU_CLAMP
from bench.gpu_report.part import DEVICE, case_of
from bench.gpu_report.speed import HEAD_DIMS, LENGTHS, measure, wrong_providers
from bench.providers import EXPERIMENTAL
from bench.rows import RowMaker


def main() -> None:
    """Checks them, and measures those that are right beside "ours", at the same moment."""
    if not EXPERIMENTAL:
        print("no kernel is behind a switch")
        return
    maker = RowMaker(DEVICE)
    wrong = wrong_providers(EXPERIMENTAL)
    right = [name for name in EXPERIMENTAL if name not in wrong]
    for length, dim in itertools.product(LENGTHS[:2], HEAD_DIMS):
        measure(case_of(length, dim, GPU_CLAMP, True), ["ours", *right], maker, "experiments.csv")


if __name__ == "__main__":
    main()
