"""Every figure we claim comes from a command here: `python -m benchmarks.<name>`, results under `results/`."""
