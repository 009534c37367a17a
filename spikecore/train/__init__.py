"""Recipes and training (extra: ``pip install "spikecore[train]"``)."""
