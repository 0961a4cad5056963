"""rechub_dist: Torch-RecHub's recommender models, trained at large scale."""

__version__ = "0.1.0"
