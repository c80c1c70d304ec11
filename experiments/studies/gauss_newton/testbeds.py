r"""Ranks ways of growing on two testbeds where width matters.

    python -m experiments.studies.gauss_newton.testbeds --testbeds=TE,FM \
        --strategies=gauss_newton,net2net --seeds=0,1,2 --data_dir=DIR

  TE  labels of a random ReLU network with layers of 20, 6 and 20 units
  FM  all of Fashion-MNIST, averaged to 14x14 pixels

Perceptrons with three hidden layers of 4 units and batch norm grow six times by
30 % of their parameters, once per epoch, and train for three epochs more.
Every finished cell is a line of experiments/studies/results/NAME.jsonl; the
same command again runs only the missing ones, then prints the table. The
strategy fixed trains the widths that gauss_newton found, from scratch, for as
many epochs as cost as much.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

from absl import app
from absl import flags
from flax import linen as nn
import numpy as np

from autogrow_jax import costs
from autogrow_jax import data
from autogrow_jax import layers
from autogrow_jax.methods import base as methods_base
from autogrow_jax.methods.gauss_newton import method as method_lib
from autogrow_jax.networks import base
from autogrow_jax.networks import mlp
from autogrow_jax.run import config as config_lib
from autogrow_jax.run import resolve
from autogrow_jax.run import settings
from autogrow_jax.run import train

from . import rivals

RESULTS = pathlib.Path(__file__).parents[1] / 'results'
GROWTHS, GROWTH, FINAL_EPOCHS, WIDTH = 6, 0.3, 3, 4
EXAMPLES = 30_720  # Training examples of TE: 120 steps of 256.

_TESTBEDS = flags.DEFINE_list('testbeds', ['TE', 'FM'], 'Testbeds to run.')
_STRATEGIES = flags.DEFINE_list(
    'strategies', ['gauss_newton'], 'Ways of growing, or fixed.'
)
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of the runs.')
_DATA_DIR = flags.DEFINE_string(
    'data_dir', None, 'Directory of the prepared Fashion-MNIST.'
)
_NAME = flags.DEFINE_string('name', 'testbeds', 'Name of the results.')
_SETTINGS = flags.DEFINE_list(
    'method', [], 'Settings of the method, as samples=4.'
)


class Block(base.Module):
  """relu(norm(dense(x)))."""

  features: int = WIDTH

  @nn.compact
  def __call__(self, x, *, train, gate=None):
    del gate
    x = layers.Dense(self.features, name='dense')(x)
    return nn.relu(layers.Norm(name='norm')(x, train=train))


class Perceptron(mlp.Perceptron):
  """Perceptrons whose layers have batch norm and widths of their own."""

  block = Block


PERCEPTRON = Perceptron(
    f'{__name__}:PERCEPTRON', 'Perceptron', (WIDTH,), depths=(3,)
)
# With a stage, and so a width to be given, for each layer.
FIXED = Perceptron(f'{__name__}:FIXED', 'Perceptron', (WIDTH,) * 3)


def teacher() -> data.Dataset:
  """Labels of a random network, whose layers are standardised."""
  rng = np.random.default_rng(7)
  sizes = 24, 20, 6, 20
  kernels = [
      rng.normal(size=pair) * np.sqrt(2 / pair[0])
      for pair in zip(sizes[:-1], sizes[1:])
  ]
  output = rng.normal(size=(sizes[-1], 10))
  biases = [rng.normal(size=size) * 0.3 for size in sizes[1:]]
  x = a = rng.normal(size=(110_000, sizes[0]))
  for kernel, bias in zip(kernels, biases, strict=True):
    a = a @ kernel + bias
    a = np.maximum((a - a.mean(0)) / a.std(0), 0)
  logits = a @ output
  labels = ((logits - logits.mean(0)) / logits.std(0)).argmax(1)
  images = np.clip(np.round(x * 32 + 128), 0, 255).astype(np.uint8)
  images = images[:, None, None]
  first = EXAMPLES + 2000
  return data.from_arrays(
      images[:first], labels[:first], images[100_000:], labels[100_000:],
      holdout=2000, seed=0, name='TE',
      preprocessing=data.Preprocessing((128 / 255,) * 24, (32 / 255,) * 24),
  )


def fashion(data_dir: str | None) -> data.Dataset:
  """Fashion-MNIST, averaged to 14x14 pixels."""
  config = data.DataConfig('fashion_mnist', data_dir, holdout=2000)
  dataset = data.load(config, seed=0)

  def halved(split):
    pixels = np.asarray(split.images[:], np.float32)
    pixels = pixels.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4))
    return dataclasses.replace(split, images=np.round(pixels).astype(np.uint8))

  test = halved(dataset.read_test())
  return dataclasses.replace(
      dataset,
      name='FM',
      train=halved(dataset.train),
      holdout=halved(dataset.holdout),
      read_test=lambda: test,
      preprocessing=data.Preprocessing(
          dataset.preprocessing.mean, dataset.preprocessing.std
      ),
  )


@dataclasses.dataclass(frozen=True)
class Paced(methods_base.Method):
  """A method with a budget for each growth, and the seconds of its proposals.

  Attributes:
    method: the method.
    start: parameters of the network before the first growth.
  """

  method: method_lib.GaussNewton
  start: int

  @property
  def execution(self):
    return self.method.execution

  def report(self, architecture, aux, memory):
    return self.method.report(architecture, aux, memory)

  def propose(self, decision, situation):
    started = time.perf_counter(), time.process_time()
    growths = situation.state.step // situation.batches_per_epoch
    limits = dataclasses.replace(
        self.method.limits,
        growth_cap=100.0,
        budget=int(self.start * (1 + GROWTH) ** growths),
    )
    method = dataclasses.replace(self.method, limits=limits)
    change = method.propose(decision, situation)
    if change is None:
      return None
    seconds = {
        'proposal_seconds': time.perf_counter() - started[0],
        'proposal_cpu_seconds': time.process_time() - started[1],
    }
    return dataclasses.replace(change, report={**change.report, **seconds})


def method_of(strategy: str) -> method_lib.GaussNewton:
  """The method of a strategy; learned splits come without prunes."""
  method = method_lib.GaussNewton(examples=2048)
  changes = {}
  if strategy == 'gauss_newton':
    changes['ranking.compensation'] = 'off'
  else:
    method = dataclasses.replace(method, ranking=rivals.RIVALS[strategy]())
  for text in _SETTINGS.value:
    path, value = text.split('=')
    items = {item.path: item for item in settings.list_all(method)}
    changes[path] = settings.parse(value, items[path].hint, path)
  return settings.replace(method, changes)


def grown(
    dataset: data.Dataset, strategy: str, seed: int, workdir: str
) -> dict[str, Any]:
  """Grows a network; returns its cell."""
  config = config_lib.RunConfig(
      workdir=workdir,
      network=config_lib.NetworkConfig(PERCEPTRON.name),
      policy=config_lib.PolicyConfig('every', 1, max_epochs=GROWTHS),
      schedule=config_lib.ScheduleConfig(0.1, 'cosine', FINAL_EPOCHS),
      batch_size=256,
      seed=seed,
  )
  architecture = resolve.seed_architecture(config, dataset)
  method = Paced(method_of(strategy), costs.params(architecture))
  return _cell(train.run(config, dataset=dataset, method=method), workdir)


def fixed(
    dataset: data.Dataset, like: Mapping[str, Any], seed: int, workdir: str
) -> dict[str, Any]:
  """Trains the widths of another cell from scratch, at its cost."""
  family = f'{__name__}:FIXED'
  network = config_lib.NetworkConfig(family, widths=tuple(like['widths']))
  config = config_lib.RunConfig(
      workdir=workdir,
      network=network,
      policy=config_lib.PolicyConfig('fixed'),
      method=methods_base.FixedArchitecture(),
      batch_size=256,
      seed=seed,
  )
  macs = costs.macs(resolve.seed_architecture(config, dataset))
  images = len(dataset.train.labels) // 256 * 256
  epoch = costs.Ledger().trained(macs, images).train_macs
  epochs = max(1, round(like['train_macs'] / epoch))
  schedule = config_lib.ScheduleConfig(0.1, finetune_epochs=epochs)
  config = dataclasses.replace(config, schedule=schedule)
  return _cell(train.run(config, dataset=dataset), workdir)


def _cell(result: Mapping[str, Any], workdir: str) -> dict[str, Any]:
  """Collects the numbers of a run."""
  lines = pathlib.Path(workdir, 'history.jsonl').read_text().splitlines()
  growths = [
      record.get('initializer', record)
      for record in map(json.loads, lines)
      if record['event'] in ('grow', 'skip')
  ]
  sizes = result['architecture']['sizes']
  total = lambda name: round(sum(one.get(name, 0) for one in growths), 2)
  return {
      'accuracy': result['test_accuracy'],
      'params': result['params'],
      'train_macs': result['train_macs'],
      'widths': [n for axis, n in sizes.items() if axis.endswith('.out')],
      'growth_seconds': total('proposal_seconds'),
      'growth_cpu_seconds': total('proposal_cpu_seconds'),
      'seconds': round(result['wall_seconds'], 1),
      'compilations': result['compile_count'],
      'attempts': [one.get('attempts', []) for one in growths],
  }


def table(cells: Sequence[Mapping[str, Any]]) -> str:
  """Shows means and standard deviations over seeds."""
  groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
  for cell in cells:
    groups.setdefault((cell['testbed'], cell['strategy']), []).append(cell)
  lines = []
  for (testbed, strategy), group in sorted(groups.items()):
    accuracies = [cell['accuracy'] for cell in group]
    spread = statistics.stdev(accuracies) if len(group) > 1 else 0.0
    mean = lambda name: statistics.fmean(cell[name] for cell in group)
    lines.append(
        f'| {testbed} | {strategy} | {len(group)} | '
        f'{statistics.fmean(accuracies):.2f} +- {spread:.2f} | '
        f'{mean("params"):.0f} | {mean("train_macs") / 1e9:.2f} | '
        f'{mean("growth_seconds"):.1f} |'
    )
  return '\n'.join([
      '| testbed | strategy | seeds | test % | parameters | training '
      'multiply-adds, G | growth seconds |',
      '|---|---|---|---|---|---|---|',
      *lines,
  ])


def main(unused_arguments: Sequence[str]) -> None:
  path = RESULTS / f'{_NAME.value}.jsonl'
  path.parent.mkdir(exist_ok=True)
  path.touch()
  read = lambda: list(map(json.loads, path.read_text().splitlines()))
  for testbed in _TESTBEDS.value:
    dataset = teacher() if testbed == 'TE' else fashion(_DATA_DIR.value)
    for seed in map(int, _SEEDS.value):
      for strategy in _STRATEGIES.value:
        name = {'testbed': testbed, 'strategy': strategy, 'seed': seed}
        if any(name.items() <= cell.items() for cell in read()):
          continue
        with tempfile.TemporaryDirectory() as workdir:
          if strategy == 'fixed':
            like = {**name, 'strategy': 'gauss_newton'}
            like = next(c for c in read() if like.items() <= c.items())
            cell = fixed(dataset, like, seed, workdir)
          else:
            cell = grown(dataset, strategy, seed, workdir)
        with path.open('a') as file:
          file.write(json.dumps({**name, **cell}) + '\n')
  print(table(read()))


if __name__ == '__main__':
  app.run(main)
