"""Benchmarks of the workbench and of baselines, measured in one run: `workbench bench`."""
