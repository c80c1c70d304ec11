"""Structured continuous sparsification (Yuan, Savarese, Maire, ICLR 2021).

A network grows and shrinks within a full-size one. Every channel and every
block that may be missing has a mask variable s; it is there with probability
sigmoid(beta s), drawn anew now and then, and its weights count as much. The
loss trains s, and a penalty that knows the budget pushes all s up while the
network is too small and down while it is too large.

* `space`: which channels and blocks there are to choose.
* `masks`: their variables, temperatures and samples.
* `method`: `Sparsify`, the method.
* `pruning`: what the paper compares it with.

The paper's displayed equations are not known to us; the forms here satisfy what
its text says of them. Symbols: s mask variable, beta inverse temperature, q
sample, p = sigmoid(beta s), u sparsity (the part of the cost that is removed).
"""
