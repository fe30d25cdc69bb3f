"""Short functions for everyday questions: directions, probes, answers with intervals, the experts of a label.

They are `wb.direction`, `wb.probe`, `wb.answers`, `wb.accuracy` and `wb.top_experts`.
"""
