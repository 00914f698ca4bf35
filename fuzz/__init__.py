"""Hostile frames against the code that reads them: a million random ones, and as many as coverage leads to."""
