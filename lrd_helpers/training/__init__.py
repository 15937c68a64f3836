"""One script a shipped model; each is `python -m lrd_helpers.training.NAME --help`."""
