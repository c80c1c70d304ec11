"""Flags that the training binaries share, and how they become a `RunConfig`.

A flag that is given overrides its field of the preset; one that is not leaves
the preset alone. Defaults in `--help` are those of the preset 'digits'.
`--paper_compat` sets several fields, and refuses flags that contradict it.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
import re
import signal
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging

from autogrow_jax.run import config
from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax.run import train
from autogrow_jax.methods.gauss_newton import compensation
from autogrow_jax.methods.gauss_newton import signals
from experiments import presets

flags.disclaim_key_flags()  # They belong to the binary that defines them.

FLAGS = flags.FLAGS
USER_ERROR = 2  # Exit status.

# Flag -> (field of RunConfig, kind, help); the kinds are below.
RUN_FLAGS = {
    'dataset': (
        'data.dataset',
        'text',
        'Data set: digits (embedded); mnist, fashion_mnist, svhn_cropped, '
        'cifar10, cifar100 or imagenet2012 (TFDS, as in the paper); any other '
        'image classification set of TFDS by its name; folder:PATH, with one '
        'folder of images per class; voc/2012, with VOCdevkit in --data_dir; '
        'pairs:PATH, with images/NAME.* and masks/NAME.png of class indices '
        '(255 is void); for language models topics (embedded: the help texts '
        'of Python) or text:PATH, with train.txt, valid.txt and test.txt.',
    ),
    'data_dir': (
        'data.data_dir',
        'text',
        "Directory of prepared TFDS data sets; TFDS's own by default.",
    ),
    'data_fraction': (
        'data.data_fraction',
        'text',
        'Fraction of the training data to use, stratified and seeded: 0.25. '
        'For the same seed smaller parts lie within larger ones.',
    ),
    'unroll': (
        'data.unroll',
        'int',
        'Of text: words in a training window, over which gradients go back.',
    ),
    'image_size': (
        'data.image_size',
        'int',
        'Size in pixels to which images are resized and cropped; by default '
        "224 for imagenet2012, 513 for voc/2012, else the data set's own, "
        'which all its images must then have. Images with masks are only ever '
        'scaled down to it, and framed.',
    ),
    'channels': (
        'data.channels',
        'int',
        'Of folder:PATH and of other sets of TFDS: 1 (grey) or 3 (RGB), to '
        'which images are converted; their own by default.',
    ),
    'normalization': (
        'data.normalization',
        'text',
        "pixels (mean and std of the pixels) or paper (the paper's constants "
        'where they differ: the std of cifar10).',
    ),
    'stream': (
        'data.stream',
        'text',
        'Whether to decode images while training goes on: always, never (all '
        'in memory at the start), or auto (if they are too large for memory).',
    ),
    'skip_damaged': (
        'data.skip_damaged',
        'bool',
        'Leave out images that cannot be read, and count them, in place of '
        'ending with an error that names them.',
    ),
    'holdout': (
        'data.holdout',
        'int',
        "Hold-out for decisions, images; the data set's own by default.",
    ),
    'select_on': (
        'data.select_on',
        'text',
        'What decides: holdout, or test (as in the paper; every output then '
        'says so).',
    ),
    'paper_compat': (
        'paper_compat',
        'bool',
        "The paper's own protocol as a whole: decisions on the test set, best "
        'test accuracy of any epoch reported, its normalisation, batch norm '
        'scales of small-image networks uniform in [0, 1]. Every output says '
        'so.',
    ),
    'network': (
        'network.name',
        'text',
        f"{', '.join(networks.FAMILIES)}, or 'package.module:attribute'.",
    ),
    'stem': (
        'network.stem',
        'text',
        'small or imagenet; small up to 64 pixels by default.',
    ),
    'shortcut': (
        'network.shortcut',
        'text',
        'Where a residual block changes shape: B (1x1 convolution) or A (no '
        'parameters); B by default.',
    ),
    'bn_scale_init': (
        'network.bn_scale_init',
        'text',
        'Start of batch norm scales: ones or uniform01; ones by default, with '
        '--paper_compat as the paper had it.',
    ),
    'widths': (
        'network.widths',
        'depths',
        "Base channels per stage, e.g. 16-32-64; the network's by default.",
    ),
    'embedding': (
        'network.embedding',
        'int',
        "Of a language model: length of a word's vector; by default the width "
        'of the first layer.',
    ),
    'keep_probability': (
        'network.keep',
        'float',
        'Of a language model: probability with which a unit is not dropped in '
        'training; 1 by default.',
    ),
    'init_bound': (
        'network.init_bound',
        'float',
        'Of a language model: parameters start uniform within +-0.04 by '
        'default.',
    ),
    'finetune_epochs': (
        'schedule.finetune_epochs',
        'int',
        'N, epochs of the final phase, with tenfold drops at 1/2 and 3/4.',
    ),
    'learning_rate': (
        'schedule.learning_rate',
        'float',
        "Top learning rate; the network's (0.1, plain nets 0.01) by default.",
    ),
    'weight_decay': (
        'optimizer.weight_decay',
        'float',
        'L2 coefficient on all parameters.',
    ),
    'momentum': ('optimizer.momentum', 'float', 'Of SGD.'),
    'clip_norm': (
        'optimizer.clip_norm',
        'float',
        'Largest global gradient norm; 0 for none.',
    ),
    'accumulate': (
        'optimizer.accumulate',
        'int',
        'Batches over which gradients are averaged before an update.',
    ),
    'batch_size': ('batch_size', 'int', 'Images per step, over all devices.'),
    'precision': (
        'devices.precision',
        'text',
        'Of activations: float32 or bfloat16; parameters stay float32.',
    ),
    'parallel': (
        'devices.parallel',
        'text',
        'auto, pmap (batch norm per device) or jit (over the whole batch).',
    ),
    'num_devices': (
        'devices.num_devices',
        'int',
        'Devices; all accelerators, or one CPU, by default.',
    ),
    'decode_workers': (
        'devices.decode_workers',
        'int',
        'Processes that decode streamed images; 0 for threads.',
    ),
    'depth_buckets': (
        'devices.depth_buckets',
        'text',
        'Depths that growing networks are compiled for: exact, or powers of 2.',
    ),
    'compile_ahead': (
        'devices.compile_ahead',
        'bool',
        'Compile for the next growth, in a thread, while the network trains.',
    ),
    'remat': (
        'devices.remat',
        'text',
        'Stages whose blocks are computed again in the backward pass, for less '
        'memory and more time: none, all, or their numbers from 0, as 0,1. A '
        'run may be continued with another value.',
    ),
    'steps_per_call': (
        'devices.steps_per_call',
        'int',
        'Training steps between two looks of the host, where steps are so '
        'short that devices wait for it; signals, checkpoints and progress '
        'wait for them. If more than 1, an evaluation of images in memory is '
        'one call, too. At most an epoch; 1 of streamed images. Slower on CPUs '
        'where convolutions have strides. A run may be continued with another '
        'value.',
    ),
    'checkpoint_every': (
        'checkpoints.every',
        'text',
        'Epochs (2) or minutes (10m) between checkpoints.',
    ),
    'keep': ('checkpoints.keep', 'int', 'Checkpoints to keep.'),
    'init_from': (
        'init_from',
        'text',
        'Work directory of a run whose network to start from.',
    ),
    'reinitialize': (
        'reinitialize',
        'bool',
        'Of that network take the shape alone, and draw its weights afresh.',
    ),
    'seed': ('seed', 'int', 'Of everything random.'),
}

# Of binaries in which depths don't grow.
DEPTHS = (
    'network.depths',
    'depths',
    "Blocks per stage, e.g. 3-3-3; by default the network's, mostly one each.",
)

GROWING_FLAGS = {
    'seed_depths': (
        'network.depths',
        'depths',
        "Blocks per stage to start from, e.g. 1-1-1; by default the network's, "
        'mostly one each.',
    ),
    'policy': (
        'policy.name',
        'text',
        'periodic, convergent, sequential (stops when an exact paired test '
        'finds no improvement) or oneshot (all stages at once).',
    ),
    'grow_interval': (
        'policy.interval',
        'int',
        'K, epochs between checks. Where a preset leaves it open it is that of '
        "the paper's dataset-size study: 3 / data_fraction, rounded.",
    ),
    'stop_window': (
        'policy.window',
        'int',
        'J, epochs over which a stage must have helped; at least K.',
    ),
    'error_rate': (
        'policy.error_rate',
        'text',
        "alpha of sequential's test: how often it may find an improvement "
        'where there is none.',
    ),
    'target_depths': (
        'policy.target',
        'depths',
        'Blocks per stage that oneshot grows to, e.g. 5-5-5.',
    ),
    'threshold': (
        'policy.threshold',
        'text',
        'tau, percentage points that count as help.',
    ),
    'max_depths': (
        'policy.max_depths',
        'depths',
        'Deepest stages, e.g. 9-9-9, or one number; 200 each by default.',
    ),
    'max_growing_epochs': (
        'policy.max_epochs',
        'int',
        'Growing epochs after which growing ends; no limit by default.',
    ),
    'initializer': (
        'method.initializer',
        'text',
        "Of a residual block's last norm: gauss, zero, uniform or adam.",
    ),
    'growing_schedule': (
        'schedule.growing',
        'text',
        'Learning rate while growing: constant, staircase or cosine.',
    ),
}

# Settings of learning, for the binaries that learn or study morphisms.
LEARNING_FLAGS = {
    'sweeps': (
        'method.ranking.learn.sweeps',
        'int',
        'Sweeps of alternating least squares over all splits.',
    ),
    'damping': (
        'method.ranking.learn.damping',
        'float',
        'Damping of its solves, in units of the mean eigenvalue.',
    ),
    'curvature': (
        'method.ranking.learn.curvature',
        'text',
        f'Curvature of the model: {", ".join(signals.CURVATURES)}; a step as a '
        'whole is always confirmed by mc.',
    ),
    'examples': (
        'method.examples',
        'int',
        'Examples to learn splits from, and as many to judge by; up to 4096 by '
        'default, at most half an epoch each.',
    ),
    'compensation': (
        'method.ranking.compensation',
        'text',
        'Compensation of pruned channels: '
        f'{", ".join(compensation.COMPENSATIONS)}.',
    ),
}

# Flag -> the policies that it means something to.
POLICY_FLAGS = {
    'stop_window': ('periodic', 'sequential'),
    'error_rate': ('sequential',),
    'target_depths': ('oneshot',),
    'threshold': ('periodic', 'convergent'),
}


def define(
    fields: dict[str, tuple[str, str, str]],
    base: Callable[[config.RunConfig], config.RunConfig] = lambda x: x,
) -> None:
  """Defines flags for fields, and those that every training binary has.

  Args:
    fields: flag -> (field of RunConfig, kind, help).
    base: changes the preset before the flags do.
  """
  flags.DEFINE_string(
      'preset',
      'digits',
      f'Configuration: {", ".join(presets.PRESETS)}; a row of the paper, such '
      'as table4/basic3resnet-cifar10 (python -m experiments.describe '
      '--presets lists all); or the config.json of a run.',
  )
  flags.DEFINE_string(
      'workdir',
      None,
      'Directory of all results; by default runs/NETWORK-DATASET-SEED, for a '
      'row of the paper runs/ROW-SEED. The same command continues a run that '
      'was stopped.',
  )
  define_cache()
  define_fields(fields, base(presets.get('digits')))


def define_cache() -> None:
  """Defines the flag that `use_compilation_cache` reads."""
  flags.DEFINE_string(
      'compilation_cache',
      os.path.join('~', '.cache', 'autogrow_jax'),
      "Directory of compiled programs, for the next start; '' for none.",
  )


def define_fields(
    fields: dict[str, tuple[str, str, str]], defaults: config.RunConfig
) -> None:
  """Defines flags for fields, with the values of a configuration."""
  for name, (field, kind, text) in fields.items():
    default = _get(defaults, field)
    if kind == 'int':
      flags.DEFINE_integer(name, default, text)
    elif kind == 'float':
      flags.DEFINE_float(name, default, text)
    elif kind == 'bool':
      flags.DEFINE_bool(name, default, text)
    else:
      if kind == 'depths' and default is not None:
        default = policies.format_depths(default)
      flags.DEFINE_string(name, default, text)


def make_config(
    fields: dict[str, tuple[str, str, str]],
    base: Callable[[config.RunConfig], config.RunConfig] = lambda x: x,
) -> config.RunConfig:
  """The configuration that preset and flags ask for.

  Args:
    fields: as given to `define`.
    base: changes the preset before the flags do.

  Returns:
    The configuration.

  Raises:
    ValueError: if flags contradict one another or the preset.
  """
  changes = _given(fields)
  preset = base(presets.get(FLAGS.preset))
  if changes.get('paper_compat'):
    _refuse_contradictions(changes)
    preset = config.in_paper_protocol(preset)
  elif preset.paper_compat and 'paper_compat' in changes:
    raise ValueError(
        f"{FLAGS.preset} is of the paper's own protocol as a whole, which "
        '--nopaper_compat cannot take out of it; begin with another --preset.'
    )
  if 'data.dataset' in changes:  # Whose files are its own.
    changes['data.digest'] = None
  if 'network.name' in changes:  # Whose learning rate is its own.
    changes.setdefault('schedule.learning_rate', None)
  caps = changes.get('policy.max_depths')
  if caps is not None and len(caps) == 1:  # One number for all stages.
    network = networks.get(changes.get('network.name', preset.network.name))
    changes['policy.max_depths'] = caps * len(network.widths)
  result = _replace(preset, changes)
  if 'policy' in fields:
    refuse_unused(POLICY_FLAGS, 'policy', result.policy.name)
  workdir = FLAGS.workdir
  if workdir is None:
    name = run_name(FLAGS.preset, result)
    workdir = os.path.join('runs', f'{name}-{result.seed}')
  return dataclasses.replace(result, workdir=workdir)


def overridden(
    run_config: config.RunConfig, fields: dict[str, tuple[str, str, str]]
) -> config.RunConfig:
  """A configuration with the fields whose flags are given."""
  return _replace(run_config, _given(fields))


def refuse_unused(
    users: Mapping[str, Sequence[str]], choice: str, value: str
) -> None:
  """Refuses flags that are given but mean nothing to what another one says.

  Args:
    users: flag -> the values of the other one that it means something to.
    choice: the other one.
    value: of it.

  Raises:
    ValueError: there is such a flag.
  """
  for name, known in users.items():
    if FLAGS[name].present and value not in known:
      raise ValueError(
          f'--{name} means nothing to --{choice}={value}, only to '
          f'{" and ".join(known)}; leave it out, or choose another --{choice}.'
      )


def parse_depths(flag: str, text: str) -> tuple[int, ...]:
  """Reads '3-2-2'."""
  try:
    return policies.parse_depths(text)
  except ValueError as error:
    raise ValueError(f'--{flag}: {error}') from error


def use_compilation_cache() -> None:
  """Turns the cache of compiled programs on, unless told not to."""
  if FLAGS.compilation_cache:
    train.cache_compilations(os.path.expanduser(FLAGS.compilation_cache))


def run_main(main: Callable[[], None]) -> None:
  """Runs a binary: one line and status 2 for what a user did wrong.

  Args:
    main: called after flags are parsed.
  """

  def checked(argv: Sequence[str]) -> int | None:
    if not FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)
    try:
      if len(argv) > 1:
        raise ValueError(
            f'Unknown argument {argv[1]!r}; flags begin with --, see --help.'
        )
      return main()
    except train.Interrupted as error:
      print(error, file=sys.stderr)
      return 128 + error.signum
    except KeyboardInterrupt:  # Before training, or pressed twice.
      print('interrupted; the same command continues.', file=sys.stderr)
      return 128 + signal.SIGINT
    # OSError: a full disk and such; ImportError: a missing extra.
    except (ValueError, OSError, ImportError) as error:
      logging.debug('%s', error, exc_info=True)  # Seen with --verbosity=1.
      message = ' '.join(str(error).split())
      print(f'error: {message}', file=sys.stderr)
      return USER_ERROR

  app.run(checked)


def _refuse_contradictions(changes: dict[str, Any]) -> None:
  """Raises if flags were given that --paper_compat excludes."""
  allowed = {
      'data.select_on': 'test',
      'data.holdout': None,
      'data.normalization': 'paper',
  }
  contradictions = [
      f'--{field.rpartition(".")[2]}={changes[field]}'
      for field, value in allowed.items()
      if field in changes and changes[field] != value
  ]
  if contradictions:
    raise ValueError(
        "--paper_compat is the paper's own protocol as a whole; it excludes "
        f'{", ".join(contradictions)}. Leave out the one or the other.'
    )


def run_name(preset: str, run_config: config.RunConfig) -> str:
  """What the directory of a run is called, before its seed.

  Args:
    preset: what --preset was.
    run_config: what came of it and of the other flags.

  Returns:
    The preset's own name if it is a row of the paper, so that rows of the same
    network and data do not meet in one directory.
  """
  if '/' in preset and not preset.endswith('.json'):
    return preset
  name = f'{run_config.network.name}-{run_config.data.dataset}'
  return re.sub(r'[^\w.:-]+', '_', name)  # Of folder:PATH and others.


def _given(fields: dict[str, tuple[str, str, str]]) -> dict[str, Any]:
  """Field -> value, for the flags that are given."""
  changes = {}
  for name, (field, kind, _) in fields.items():
    if FLAGS[name].present:
      value = FLAGS[name].value
      if kind == 'depths' and value is not None:
        value = parse_depths(name, value)
      changes[field] = value
  return changes


def _get(value: Any, field: str) -> Any:
  for name in field.split('.'):
    value = getattr(value, name)
  return value


def _replace(value: Any, changes: dict[str, Any]) -> Any:
  """Replaces several fields at once, so that they are checked together."""
  direct, nested = {}, {}
  for field, item in changes.items():
    first, _, rest = field.partition('.')
    if rest:
      nested.setdefault(first, {})[rest] = item
    else:
      direct[first] = item
  for first, items in nested.items():
    direct[first] = _replace(getattr(value, first), items)
  return dataclasses.replace(value, **direct)
