"""Studies of learned morphisms.

  rivals       other ways to choose splits, by the name of the flag
    by_gain    their protocol
    copies     copies with noise: random, net2net, uniform
    steepest   splitting steepest descent
    firefly    all splits at once on the true loss
    gradmax    new channels with large gradients
    common     shared pieces of the rivals
  testbeds     ways of growing on two tasks where width matters
  joint        learning splits beside the training of the weights
  subject      a trained network with examples to study
  estimates    estimated changes of the loss beside measured ones
  strategies   splits of one layer, found in several ways
  trials       the true loss after splits, and splits optimised on it
  answers      tables, numbers and figures of the studies
  calibration  agreement of estimates with measurements
  receipts     texts about growing widths
"""
