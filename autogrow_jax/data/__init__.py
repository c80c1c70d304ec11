"""Data sets, and the way from raw pixels to batches.

`load(config, seed=...)` reads a data set and divides it, `from_arrays` takes
arrays; `epoch_permutation` and `batch_indices` give the examples in the batch
of a step; `augment_examples` and `preprocess` turn raw pixels into network
inputs on the device, inside jit.

`config` has the settings; `sources` knows the data sets, with `prepared` for
those of TFDS and `folders` for files of images and `masks`, and `text` those of
words; `images` decodes; `splits` divides; `streams` decodes what does not fit
in memory while a run goes on; `pipeline` is all that runs on the device.
"""

from autogrow_jax.data.config import DataConfig as DataConfig
from autogrow_jax.data.datasets import Dataset as Dataset
from autogrow_jax.data.datasets import from_arrays as from_arrays
from autogrow_jax.data.datasets import load as load
from autogrow_jax.data.datasets import stand_in as stand_in
from autogrow_jax.data.images import Damaged as Damaged
from autogrow_jax.data.images import Records as Records
from autogrow_jax.data.pipeline import augment_examples as augment_examples
from autogrow_jax.data.pipeline import batch_indices as batch_indices
from autogrow_jax.data.pipeline import epoch_in_order as epoch_in_order
from autogrow_jax.data.pipeline import epoch_permutation as epoch_permutation
from autogrow_jax.data.pipeline import preprocess as preprocess
from autogrow_jax.data.pipeline import Preprocessing as Preprocessing
from autogrow_jax.data.pipeline import steps_per_epoch as steps_per_epoch
from autogrow_jax.data.sources import SOURCES as SOURCES
from autogrow_jax.data.splits import Split as Split
from autogrow_jax.data.streams import Stream as Stream
