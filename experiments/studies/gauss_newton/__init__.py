"""Studies of learned morphisms.

  rivals       other ways to choose splits, by the name of the flag
    at_random  random splits, and copies of random channels (net2net)
    steepest   splitting steepest descent
    firefly    all splits at once on the true loss
    gradmax    new channels with large gradients
    common     shared pieces of the rivals
  joint        learning splits beside the training of the weights
  subject      a trained network with examples to study
  estimates    estimated changes of the loss beside measured ones
  strategies   splits of one layer, found in several ways
  trials       the true loss after splits, and splits optimised on it
  calibration  agreement of estimates with measurements
  costs        seconds and bytes of learning splits
"""
