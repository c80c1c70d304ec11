"""Text for language models: words as numbers, in windows.

The words are those of the training text, most frequent first, those of equal
frequency by the alphabet; the end of a line is a word, too. A training window
is followed by the next one (see `pipeline.epoch_in_order`). Held-out text is in
longer windows, and each of them begins without a past: unlike the paper, whose
evaluation reads it as one text, which is a little easier to predict.
"""

from collections.abc import Iterable, Mapping, Sequence
import collections
import dataclasses
import hashlib
import pathlib
import re

import numpy as np

from autogrow_jax.data import sources

# What the name of a folder with texts begins with, and the embedded text.
FOLDER = 'text:'
TOPICS = 'topics'

SPLITS = ('train', 'valid', 'test')

# Length of the windows of held-out text: long, so that few words have no past.
EVALUATION_STEPS = 512

_END, _UNKNOWN = '<eos>', '<unk>'

# Words of the embedded text that occur less often are unknown.
_RARE = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """A text in three parts.

  Attributes:
    vocabulary: the words; a word's place is its number.
    tokens: the numbers of each of `SPLITS`, int32.
    digest: of all words, by which another text is told apart.
  """

  vocabulary: tuple[str, ...]
  tokens: Mapping[str, np.ndarray]
  digest: str


def is_text(dataset: str) -> bool:
  """Whether a data set is one of these."""
  return dataset == TOPICS or dataset.startswith(FOLDER)


def read(dataset: str) -> Corpus:
  """Reads a text.

  Args:
    dataset: 'topics', or 'text:PATH' of a folder with train.txt, valid.txt and
      test.txt, or other names that have those words in them.

  Returns:
    The text.

  Raises:
    ValueError: a file is missing, empty, unreadable, or has a word that the
      training text has not.
  """
  if dataset == TOPICS:
    return _number(_topics(), dict.fromkeys(SPLITS, 'the embedded text'))
  files = _find(pathlib.Path(dataset.removeprefix(FOLDER)).expanduser())
  return _number({split: _words(path) for split, path in files.items()}, files)


def training_windows(tokens: np.ndarray, steps: int) -> sources.Split:
  """Windows that follow one another; the labels are the next words.

  Args:
    tokens: int32, (token,).
    steps: length of a window; what is left at the end is left out.

  Returns:
    (window, steps) inputs and labels.

  Raises:
    ValueError: there is not even one window.
  """
  count = (len(tokens) - 1) // steps
  if count < 1:
    raise ValueError(
        f'The training text has {len(tokens)} words, but a window of {steps} '
        f'steps needs {steps + 1}; take a longer text or a shorter --unroll.'
    )
  end = count * steps
  return sources.Split(
      tokens[:end].reshape(count, steps),
      tokens[1 : end + 1].reshape(count, steps),
  )


def evaluation_windows(tokens: np.ndarray) -> sources.Split:
  """Windows in which every word but the text's first is a label once.

  Returns:
    (window, `EVALUATION_STEPS`) inputs and labels; -1 fills up the last one.
  """
  steps = EVALUATION_STEPS
  count = -(-(len(tokens) - 1) // steps)
  images = np.zeros(count * steps, np.int32)
  labels = np.full(count * steps, -1, np.int32)
  images[: len(tokens) - 1], labels[: len(tokens) - 1] = tokens[:-1], tokens[1:]
  return sources.Split(images.reshape(-1, steps), labels.reshape(-1, steps))


def _find(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """The file of each split."""
  if not folder.is_dir():
    raise ValueError(
        f'{folder} is no folder; {FOLDER}PATH needs one with train.txt, '
        'valid.txt and test.txt.'
    )
  found = {}
  for split in SPLITS:
    paths = [folder / f'{split}.txt']
    if not paths[0].is_file():
      paths = sorted(folder.glob(f'*{split}*.txt'))
    if len(paths) != 1:
      there = ', '.join(path.name for path in paths) or 'none'
      raise ValueError(
          f'{folder} needs one file {split}.txt, or one with {split!r} in its '
          f'name; there is {there}.'
      )
    found[split] = paths[0]
  return found


def _words(path: pathlib.Path) -> list[str]:
  try:
    lines = path.read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f'{path} cannot be read as text: {error}.') from error
  return [word for line in lines for word in (*line.split(), _END)]


def _topics() -> dict[str, list[str]]:
  """The help texts that come with Python: words and punctuation.

  Whole topics are held out, up to a tenth of all words for each of test and
  validation. A paragraph that several topics have counts for the first of them
  only, so that no split has what another one has. Lines without any letter, as
  under headings and in tables, are left out.
  """
  from pydoc_data import topics  # pylint: disable=g-import-not-at-top

  digest = lambda name: hashlib.sha256(name.encode()).hexdigest()
  seen, parts = set(), []
  for name in sorted(topics.topics, key=digest):
    words = []
    for paragraph in re.split(r'\n\s*\n', topics.topics[name].lower()):
      lines = [line for line in paragraph.split('\n') if re.search(r'\w', line)]
      found = tuple(re.findall(r'\w+|[^\w\s]', ' '.join(lines)))
      if found and found not in seen:
        seen.add(found)
        words += [*found, _END]
    parts.append(words)
  share = sum(map(len, parts)) // 10
  texts: dict[str, list[str]] = {split: [] for split in SPLITS}
  for words in parts:
    room = [s for s in SPLITS[:0:-1] if len(texts[s]) + len(words) <= share]
    texts[(*room, 'train')[0]] += words
  counts = collections.Counter(texts['train'])
  return {
      split: [w if counts[w] >= _RARE else _UNKNOWN for w in words]
      for split, words in texts.items()
  }


def _number(
    texts: Mapping[str, Sequence[str]], names: Mapping[str, object]
) -> Corpus:
  """A corpus from the words of each split; `names` are for messages."""
  for split in SPLITS:
    if all(word == _END for word in texts[split]):
      raise ValueError(f'{names[split]} has no words.')
  counts = collections.Counter(texts['train'])
  vocabulary = sorted(counts, key=lambda word: (-counts[word], word))
  numbers = {word: number for number, word in enumerate(vocabulary)}
  if _UNKNOWN not in numbers:
    _check_known(texts, numbers, names)
  digest = hashlib.sha256()
  for split in SPLITS:
    digest.update('\n'.join([split, *texts[split], '']).encode())
  return Corpus(
      tuple(vocabulary),
      {
          split: np.array(
              [numbers.get(w, numbers.get(_UNKNOWN)) for w in texts[split]],
              np.int32,
          )
          for split in SPLITS
      },
      digest.hexdigest(),
  )


def _check_known(
    texts: Mapping[str, Iterable[str]],
    known: Mapping[str, int],
    names: Mapping[str, object],
) -> None:
  for split in SPLITS:
    if word := next((w for w in texts[split] if w not in known), None):
      raise ValueError(
          f'The word {word!r} of {names[split]} is not in {names["train"]}; '
          f'write {_UNKNOWN} for rare words in all files.'
      )
