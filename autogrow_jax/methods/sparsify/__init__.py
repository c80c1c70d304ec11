"""Structured continuous sparsification (Yuan, Savarese, Maire, ICLR 2021).

A network grows and shrinks within a full-size one. Every channel and every
block that may be missing has a mask variable s. It is there with probability
sigmoid(beta s), drawn anew now and then, and its weights count as much. The
loss trains s. A penalty that knows the budget pushes all s up while the network
is too small, and down while it is too large.

* `space`: the channels and blocks that may be missing.
* `masks`: mask variables, temperatures and samples.
* `execution`: `Masked`, the network under gates.
* `compact`: the part of it whose masks are on.
* `growths`: a new sample, and the last prune.
* `method`: `Sparsify`, the method.

The paper's displayed equations are not known to us; the forms here satisfy what
its text says about them. Symbols: s mask variable, beta inverse temperature, q
sample, p = sigmoid(beta s), u sparsity (the part of the cost that is removed).
"""
