"""Learned morphisms with a Gauss-Newton approximation of the loss.

Lawton, Galstyan and Ver Steeg 2024, "Learning Morphisms with Gauss-Newton
Approximation for Growing Networks" (arXiv 2411.05855), grows a small seed
network by splitting and pruning channels. A Gauss-Newton approximation of the
loss is used both to learn the parameters of these morphisms and to rank them by
an estimated trade-off of loss and resource. That much is known to us, and that
channels are split and pruned in the same step, between two epochs. The paper's
equations, algorithm, settings and tables are not: all formulas here are our own
derivation, all defaults our own choice, and no number is the paper's.

  sites        which axes of a network are channels that can be split
  signals      what one batch says: activations and two gradients per example
  splits       learning how to split every channel, on frozen weights
  matrix_free  how, where units have too many weights for a matrix of each
  joint        learning that while the weights are trained
  estimates    what each split will gain, alone and beside others
  prunes       what removing each channel would cost
  selection    which of them to apply together
  surgery      chosen splits and prunes as one `growth.Growth`
  norms        statistics of norms before, and norms that fit them after it
  method       all of it as a `Method`
  rivals       other ways to choose splits, to compare with
  trials       the true loss after splits, by running the network with them
  calibration  how good estimates were

Streams of residual stages, with several writers and readers, are covered, and
depthwise layers. Shortcuts without parameters are not; `sites.survey` names
each such axis with its reason.

For one channel, with incoming weights w, outgoing weights v, normalised
pre-activation h, and T the channel-wise map from h to what the next layer
reads:

  w, v      ->  (w + u, v/2 + e) and (w - u, v/2 - e)              the split
  r          =  a (u * x), a the norm's factor                      its response
  dz         =  v * ((T(h+r) + T(h-r)) / 2 - T(h)) + e * (T(h+r) - T(h-r))

is the exact change of the next layer's output z, with no Taylor expansion, and
zero at u = 0 whatever e is. Per example n, s_n = <d loss_n / dz, dz> is its
slope and Q_n its curvature; the loss changes by about mean(s) + mean(Q) / 2.

A channel of a stream is split everywhere at once: each writer i has its own u_i
and r_i, each reader j its own T_j of all h_i, v_j, e_j and dz_j, and s_n is the
sum over readers. That leaves out, beyond the first order, that one reader's dz
changes what later writers write.
"""
