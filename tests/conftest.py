"""Its place makes `tests/cluster.py` importable from every folder of tests."""
