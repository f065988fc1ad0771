"""The live model: quantized modules in the places of float ones, and how a plan is written into it."""
