from rechub_tests.fixtures import data_root, pool

__all__ = ["data_root", "pool"]
