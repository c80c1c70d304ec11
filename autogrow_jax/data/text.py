"""Text for language models: words as numbers, in windows.

The words are those of the training text, most frequent first, and by the
alphabet where they are equally frequent; the end of a line is a word, too. A
training window is followed by the next one (see `pipeline.epoch_in_order`).
Held-out text is in longer windows, and each of them begins without a past:
unlike the paper, whose evaluation reads it as one text, which is a little
easier to predict.
"""

import codecs
import collections
from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import re
from typing import Any

import numpy as np

from autogrow_jax.data import config as config_lib
from autogrow_jax.data import paths
from autogrow_jax.data import splits

SPLITS = ('train', 'valid', 'test')

EVALUATION_STEPS = 512  # Long windows, so that few words have no past.

_ENDINGS = 'txt|tokens|raw'  # Of files of text, as those of WikiText.
_UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE

_END, _UNKNOWN = '<eos>', '<unk>'
_RARE = 3  # Words of the embedded text that occur less often are unknown.


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """A text: numbers, int32, for each of `SPLITS`, and a digest of all words."""

  vocabulary: tuple[str, ...]  # A word's place is its number.
  tokens: Mapping[str, np.ndarray]
  digest: str


def read(dataset: str) -> Corpus:
  """Reads 'topics', or 'text:PATH', which is a folder.

  It has train.txt, valid.txt and test.txt, or other files with those words in
  their names, as ptb.train.txt or wiki.train.tokens. Lines end at newlines
  only.

  Raises:
    ValueError: a file is missing, empty, unreadable, or has a word that the
      training text has not.
  """
  if dataset == config_lib.TOPICS:
    return _number(_topics(), dict.fromkeys(SPLITS, 'the embedded text'))
  path = dataset.removeprefix(config_lib.TEXT)
  files = _find(paths.find(path))
  return _number({split: _words(path) for split, path in files.items()}, files)


def training_windows(tokens: np.ndarray, steps: int) -> splits.Split:
  """Windows that follow one another; the labels are the next words.

  The rest at the end, which does not fill a window, is left out.
  """
  if len(tokens) <= steps:
    raise ValueError(
        f'The training text has {len(tokens)} words, but a window of {steps} '
        f'steps needs {steps + 1}; take a longer text or a shorter '
        '--data.unroll.'
    )
  end = (len(tokens) - 1) // steps * steps
  inputs, labels = tokens[:end], tokens[1 : end + 1]
  return splits.Split(inputs.reshape(-1, steps), labels.reshape(-1, steps))


def evaluation_windows(tokens: np.ndarray) -> splits.Split:
  """Windows in which every word but the first is a label once; -1 is none."""
  steps, count = EVALUATION_STEPS, len(tokens) - 1
  images = np.zeros(-(-count // steps) * steps, np.int32)
  labels = np.full_like(images, -1)
  images[:count], labels[:count] = tokens[:-1], tokens[1:]
  return splits.Split(images.reshape(-1, steps), labels.reshape(-1, steps))


def _find(folder: Any) -> dict[str, Any]:
  """Finds the file of each split."""
  if not folder.is_dir():
    raise ValueError(f'There is no folder {folder}.')
  there, found = sorted(folder.iterdir()), {}
  for split in SPLITS:
    for pattern in (rf'{split}\.txt', rf'(?!\.).*{split}.*\.({_ENDINGS})'):
      if files := [x for x in there if re.fullmatch(pattern, x.name)]:
        break
    if len(files) != 1:
      names = ', '.join(path.name for path in files) or 'none'
      raise ValueError(
          f'{folder} needs one file {split}.txt, or one with {split!r} in its '
          f'name ({_ENDINGS.replace("|", ", ")}); there is {names}.'
      )
    found[split] = files[0]
  return found


def _words(path: Any) -> list[str]:
  encoded, start = b'', 0
  try:
    encoded = path.read_bytes()
    start = 3 * encoded.startswith(codecs.BOM_UTF8)
    text = encoded[start:].decode()
  except UnicodeDecodeError as error:
    place = start + error.start
    kind = 'UTF-16' if encoded[:2] in _UTF16 else 'another encoding'
    raise ValueError(
        f'{path} cannot be read as text: byte {place} '
        f'(0x{encoded[place]:02x}, in line {encoded.count(10, 0, place) + 1}) '
        f'is not UTF-8. It may be {kind}: iconv -t utf-8 converts it.'
    ) from error
  except OSError as error:
    raise ValueError(f'{path} cannot be read as text: {error}.') from error
  # Not `splitlines`, which also ends lines at form feeds and the like.
  lines = re.split('\r\n|\n|\r', text)
  lines = lines[:-1] if not lines[-1] else lines
  return [word for line in lines for word in (*line.split(), _END)]


def _topics() -> dict[str, list[str]]:
  """Words and punctuation of the help texts that come with Python.

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
  """Makes a corpus from the words of each split; `names` are for messages."""
  counts = collections.Counter(texts['train'])
  vocabulary = sorted(counts, key=lambda word: (-counts[word], word))
  numbers = {word: number for number, word in enumerate(vocabulary)}
  unknown, digest, tokens = numbers.get(_UNKNOWN), hashlib.sha256(), {}
  for split, name in ((split, names[split]) for split in SPLITS):
    words = texts[split]
    if all(word == _END for word in words):
      raise ValueError(f'{name} has no words.')
    found = [numbers.get(word, unknown) for word in words]
    if None in found:
      raise ValueError(
          f'The word {words[found.index(None)]!r} of {name} is not in '
          f'{names["train"]}; write {_UNKNOWN} for rare words in all files.'
      )
    tokens[split] = np.array(found, np.int32)
    digest.update('\n'.join([split, *words, '']).encode())
  return Corpus(tuple(vocabulary), tokens, digest.hexdigest())
