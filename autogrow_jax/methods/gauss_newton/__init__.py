"""Learned morphisms with a Gauss-Newton approximation of the loss.

A package because every split and prune is learned, estimated and compensated by
linear algebra of its own. Lawton, Galstyan and Ver Steeg 2024, "Learning
Morphisms with Gauss-Newton Approximation for Growing Networks" (arXiv
2411.05855), grow a small seed network by splitting and pruning channels in the
same step, between two epochs. A Gauss-Newton approximation of the loss serves
to learn the parameters of these morphisms and to rank them by an estimated
trade-off of loss and resource. Only that much of the paper is known to us: all
formulas here are our own derivation, all defaults our own choice, and no number
is the paper's.

  method      `GaussNewton`: measures, halves, refuses or takes a step
  ranking     ways to choose a step; the method's own is `LearnedSplits`
  steps       a step before it is taken, and the examples it is chosen by
  padding     widths rounded up, so that growth hardly compiles
  sites       axes whose channels can be split
  taps        inputs and outputs of layers, recorded or replaced
  signals     activations and two gradients per example of one batch
  splits      splits: their effect on the readers, and learning them
  estimates   the joint model of the gain of all splits and prunes
  selection   the choice of splits and prunes
  surgery     chosen splits and prunes as one `growth.Growth`

Streams of residual stages, with several writers and readers, are covered, and
depthwise layers. Shortcuts without parameters are not; `sites.survey` lists
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
