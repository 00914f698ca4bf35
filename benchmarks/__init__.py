"""Ratios against limits and bare loops, each measured side by side in one run: `make bench`, or one by its name."""
