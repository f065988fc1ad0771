"""What each part of a model loses in fewer bits: units, scores, head types. See `qfx.analyze`."""
