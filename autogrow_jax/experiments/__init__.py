"""The experiment binaries, which an installed package has in this folder.

In a clone they lie in the folder `experiments` at the top level.
"""

import pathlib

__path__ = [str(pathlib.Path(__file__).parents[2] / 'experiments')]
