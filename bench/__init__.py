"""The benchmark: ``python -m bench`` measures, ``python -m bench.report`` prints, ``python -m bench.plots`` draws."""
