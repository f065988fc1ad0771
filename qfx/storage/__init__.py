"""Models on disk: whole files, saved folders, weights that stay there while they are not used."""
