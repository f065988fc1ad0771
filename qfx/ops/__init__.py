"""Operators of qfx: their schemas, and what they mean, in plain torch."""
