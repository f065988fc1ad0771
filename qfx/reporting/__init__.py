"""Rows of the report, from graphs and live models, and how they are shown."""
