"""Measurements of ours beside others', in one run: `workbench bench`."""
