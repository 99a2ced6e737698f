"""The report of a GPU: is the package right there, and how fast is it? ``python -m bench.gpu_report`` makes it."""
