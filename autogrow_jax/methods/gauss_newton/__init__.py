"""Learned morphisms with a Gauss-Newton approximation of the loss.

Lawton, Galstyan and Ver Steeg 2024, "Learning Morphisms with Gauss-Newton
Approximation for Growing Networks" (arXiv 2411.05855), grows a small seed
network by splitting and pruning channels. A Gauss-Newton approximation of the
loss is used both to learn the parameters of these morphisms and to rank them by
an estimated trade-off of loss and resource. That much is known to us, and that
channels are split and pruned in the same step, between two epochs. The paper's
equations, algorithm, settings and tables are not: all formulas here are our own
derivation, all defaults our own choice, and no number is the paper's.

  sites      which axes of a network are channels that can be split
  signals    what one batch says: activations and two gradients per example
  splits     learning how to split every channel, and what each split will gain
  surgery    chosen splits as one `growth.Growth`
  selection  which of them to apply together
  prunes     what removing each channel would cost
  method     all of it as a `Method`

Splits are learned on frozen weights. Streams with several writers or readers,
depthwise layers, and for alternating least squares units with more than
`splits.LARGEST_SOLVE` weights on one side, are not covered; `sites.survey` and
`method.coverage` name each with its reason.

For one channel, with incoming weights w, outgoing weights v, normalised
pre-activation h, and T the channel-wise map from h to what the next layer
reads:

  w, v      ->  (w + u, v/2 + e) and (w - u, v/2 - e)              the split
  r          =  a (u * x), a the norm's factor                      its response
  dz         =  v * ((T(h+r) + T(h-r)) / 2 - T(h)) + e * (T(h+r) - T(h-r))

is the exact change of the next layer's output z, with no Taylor expansion, and
zero at u = 0 whatever e is. Per example n, s_n = <d loss_n / dz, dz> is its
slope and Q_n its curvature; the loss changes by about mean(s) + mean(Q) / 2.
"""
