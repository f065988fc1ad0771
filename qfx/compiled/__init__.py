"""What stands behind `torch.compile(model, backend="qfx")`: frames, templates, warm starts, records."""
