"""Runs of hours made short: `make soak`."""
