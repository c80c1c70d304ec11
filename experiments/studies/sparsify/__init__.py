"""Rivals of `Sparsify`, and what its mask variables do by themselves.

* `random_masks`: `RandomMasks`, samples of one probability.
* `pruning`: `Pruned`, dense training, one prune, more training.
* `dynamics`: penalty, temperatures and samples without a network.
"""
