"""Settings of the data: which data set, and how it is divided."""

import dataclasses
import fractions
import numbers
import os

# How the names of data in folders begin, and the name of the embedded text.
FOLDER = 'folder:'
PAIRS = 'pairs:'
TEXT = 'text:'
TOPICS = 'topics'

_OF_IMAGES = (
    'holdout', 'normalization', 'image_size', 'channels', 'stream',
    'skip_damaged',
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Settings of the data; JSON-able. Each field's metadata has its help."""

  dataset: str = dataclasses.field(default='digits', metadata={'help': (
      'Data set: digits (embedded); dots, or dots:8-10@20x20 (generated: '
      'distances of two pixels, and size); mnist, fashion_mnist, svhn_cropped, '
      'cifar10, cifar100 or imagenet2012 (TFDS, as in the paper); any other '
      'image classification set of TFDS by its name, or name/config; '
      'folder:PATH, with one folder of images per class; voc/2012, with '
      'VOCdevkit in --data_dir; pairs:PATH, with images/NAME.* and '
      'masks/NAME.png of class indices (255 is void); for language models '
      'topics (embedded: the help texts of Python) or text:PATH, with '
      'train.txt, valid.txt and test.txt.'
  )})
  data_dir: str | None = dataclasses.field(default=None, metadata={'help': (
      'Directory of prepared TFDS data sets; by default the environment '
      'variable TFDS_DATA_DIR, else ~/tensorflow_datasets.'
  )})
  holdout: int | None = dataclasses.field(default=None, metadata={'help': (
      'Training images held out for decisions; the default depends on the '
      'data set.'
  )})
  # Text, so that it is exact.
  data_fraction: str = dataclasses.field(default='1', metadata={'help': (
      'Fraction of the training data to use, stratified and seeded: 0.25 or '
      '1/4. For the same seed, smaller parts lie within larger ones. Of text, '
      'the first part is used.'
  )})
  select_on: str = dataclasses.field(default='holdout', metadata={
      'help': (
          'Data for decisions: holdout, or test (as in the paper; every output '
          'then says so).'
      ),
      'choices': ('holdout', 'test'),
  })
  normalization: str = dataclasses.field(default='pixels', metadata={
      'help': (
          'Constants of normalisation: pixels (mean and std of the pixels) or '
          "paper (the paper's constants where they differ: the std of cifar10)."
      ),
      'choices': ('pixels', 'paper'),
  })
  image_size: int | None = dataclasses.field(default=None, metadata={'help': (
      'Height and width, in pixels, to which images are resized and cropped; '
      "by default 224 for imagenet2012, 513 for voc/2012, else the data set's "
      'size, which all its images must then have. Images with masks are only '
      'ever scaled down to it, and framed.'
  )})
  channels: int | None = dataclasses.field(default=None, metadata={
      'help': (
          'Channels, 1 (grey) or 3 (RGB), to which images of folder:PATH, '
          'pairs:PATH and other sets of TFDS are converted; by default those '
          'of the images.'
      ),
      'choices': (None, 1, 3),
  })
  stream: str = dataclasses.field(default='auto', metadata={
      'help': (
          'When images are decoded: always (while training goes on), never '
          '(all at the start, into memory), or auto (while training goes on if '
          'they would take more than 2 GiB).'
      ),
      'choices': ('auto', 'always', 'never'),
  })
  skip_damaged: bool = dataclasses.field(default=False, metadata={'help': (
      'Leave out images that cannot be read, and count them, instead of ending '
      'with an error that names the first.'
  )})
  digest: str | None = dataclasses.field(default=None, metadata={'help': (
      'Digest of the names and sizes of the files in a folder, or of the words '
      'of a text; other content is refused. By default any is accepted.'
  )})
  unroll: int = dataclasses.field(default=35, metadata={'help': (
      'Words in a training window of text, through which gradients go back.'
  )})

  def __post_init__(self):
    if self.data_dir is not None:  # JSON has no paths.
      object.__setattr__(self, 'data_dir', os.fspath(self.data_dir))
    for field in dataclasses.fields(self):
      name, value = field.name, getattr(self, field.name)
      choices = field.metadata.get('choices', (value,))
      if value not in choices:
        raise ValueError(f'{name} must be one of {choices}, got {value!r}.')
      if name in ('holdout', 'image_size', 'unroll') and value is not None:
        check_count(name, value)
      if self.is_text and name in _OF_IMAGES and value != field.default:
        raise ValueError(f'{name}={value} means nothing to text; leave it out.')
    if self.holdout is not None and self.select_on == 'test':
      raise ValueError(
          f"holdout={self.holdout} has no use with select_on='test', where "
          'nothing is held out; leave it out.'
      )
    if not 0 < self.fraction <= 1:
      raise ValueError(
          'data_fraction must be above 0 and at most 1, got '
          f'{self.data_fraction!r}.'
      )

  @property
  def is_text(self) -> bool:
    """True for data sets of text."""
    return self.dataset == TOPICS or self.dataset.startswith(TEXT)

  @property
  def fraction(self) -> fractions.Fraction:
    """`data_fraction`, exactly."""
    try:
      if isinstance(self.data_fraction, str):
        return fractions.Fraction(self.data_fraction)
    except (ValueError, ZeroDivisionError):
      pass
    raise ValueError(
        "data_fraction must be text such as '0.25' or '1/4', got "
        f'{self.data_fraction!r}.'
    )


def check_count(name: str, value: int) -> None:
  """Raises a ValueError unless a setting is a whole number of at least 1."""
  if not isinstance(value, numbers.Integral) or value < 1 or value is True:
    raise ValueError(f'{name} must be a whole number >= 1, got {value!r}.')
