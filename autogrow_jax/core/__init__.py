"""The core: grows any pytree of arrays, with the state of its optimizer.

It knows axes, index maps and optimizer states; it knows no network, no run and
no file.
"""
