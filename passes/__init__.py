"""Passes: one graph edit per file; each takes a GraphModule in normal form and says whether it changed it."""
