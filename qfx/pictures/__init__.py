"""Pictures of an analysis and of a plan, as PNG files and one page. Needs matplotlib: pip install 'qfx[pictures]'."""
