"""Exact rewrites of a recipe: found on the graph, applied to it, recorded in the plan."""
