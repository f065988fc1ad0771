"""Which format each unit of a model gets under a budget: costs, solver, refinement. See `qfx.plan`."""
