"""The benchmark: ``python -m bench`` measures, ``python -m bench.report`` tells, ``python -m bench.plots`` draws."""
