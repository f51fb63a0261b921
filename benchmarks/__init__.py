"""What the figures of the documentation come from; each prints a ratio against another way."""
