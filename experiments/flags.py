"""Flags of the binaries, made from the settings of a configuration.

    --seed=1               a plain flag, for what everybody sets
    --policy.interval=3    any other setting, by its path

A flag that is given overrides the preset. Which paths there are follows from
the preset and from the kinds that flags choose, such as --optimizer=adamw.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import difflib
import os
import re
import signal
import sys
import textwrap

from absl import app
from absl import flags
from absl import logging

from autogrow_jax import networks
from autogrow_jax import policies
from autogrow_jax.data import paths
from autogrow_jax.run import config as config_lib
from autogrow_jax.run import settings
from autogrow_jax.run import train

from . import presets

FLAGS = flags.FLAGS
USER_ERROR = 2  # Exit status.

# Plain flags of all training binaries, and the paths that they set.
PLAIN = {
    'dataset': 'data.dataset',
    'data_dir': 'data.data_dir',
    'network': 'network.name',
    'seed': 'seed',
    'batch_size': 'batch_size',
    'learning_rate': 'schedule.learning_rate',
    'finetune_epochs': 'schedule.finetune_epochs',
    'parallel': 'devices.parallel',
    'num_devices': 'devices.num_devices',
    'init_from': 'init_from',
}
# Plain flags only of binaries that grow depths.
GROWING = {
    'seed_depths': 'network.depths',
    'policy': 'policy.name',
    'grow_interval': 'policy.interval',
    'stop_window': 'policy.window',
    'threshold': 'policy.threshold',
    'max_growing_epochs': 'policy.max_epochs',
}
# Plain flags only of binaries with constant depths.
DEPTHS = {'depths': 'network.depths'}

Change = Callable[[config_lib.RunConfig], config_lib.RunConfig]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Flags for the settings of a training binary.

  Attributes:
    plain: plain flags, and the paths that they set.
    base: changes the preset before the flags do.
    hidden: paths, or their beginnings, that the binary sets itself.
    kinds: flags of the binary that choose a kind: the path, and the
      'module:Class' of each value.
    help: plain flags, and what to say of them in place of the setting's help.
  """

  plain: Mapping[str, str]
  base: Change = lambda config: config
  hidden: tuple[str, ...] = ()
  kinds: Mapping[str, tuple[str, Mapping[str, str]]] = dataclasses.field(
      default_factory=dict
  )
  help: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def define(self, arguments: Sequence[str]) -> None:
    """Defines the flags, for the kinds that the arguments choose."""
    flags.DEFINE_string(
        'preset',
        'digits',
        f'Configuration: {", ".join(presets.PRESETS)}; a row of the paper, '
        'such as table4/basic3resnet-cifar10; or the config.json of a run.',
    )
    flags.DEFINE_string(
        'workdir',
        None,
        'Directory of all results; by default runs/NETWORK-DATASET-SEED. The '
        'same command continues a run that was stopped.',
    )
    define_cache()
    preset = self.base(presets.get(_early(arguments, 'preset') or 'digits'))
    known = self._known(self._with_kinds(preset, arguments), arguments)
    for name, path in self.plain.items():
      item = known.get(path)
      help_text = self.help.get(name) or (item.help if item else _help_of(path))
      flags.DEFINE_string(name, None, _with_value(help_text, item))
    skipped = ('workdir', 'own', 'data.digest', *self.hidden)
    skipped += tuple(path for path, _ in self.kinds.values())
    for path, item in known.items():
      is_own = any(path == s or path.startswith(f'{s}.') for s in self.hidden)
      if not is_own and path not in {*skipped, *self.plain.values(), *FLAGS}:
        define = flags.DEFINE_bool if item.hint is bool else flags.DEFINE_string
        define(path, None, _with_value(item.help, item), module_name='settings')

  def config(self) -> config_lib.RunConfig:
    """The configuration that preset and flags ask for.

    Raises:
      ValueError: flags contradict one another or the preset.
    """
    preset = self._with_kinds(
        self.base(presets.get(FLAGS.preset)), sys.argv[1:]
    )
    known = self._known(preset, sys.argv[1:])
    changes = {}
    for flag, path in {**{path: path for path in known}, **self.plain}.items():
      if flag not in FLAGS or not FLAGS[flag].present:
        continue
      item = known.get(path)
      if item is None:
        _unused(flag, path)
      elif item.kinds is None:
        text = str(FLAGS[flag].value)
        changes[path] = settings.parse(text, item.hint, f'--{flag}')
    if changes.get('paper_compat'):
      preset = config_lib.in_paper_protocol(preset)
    if 'data.dataset' in changes:  # Whose files are its own.
      changes.setdefault('data.digest', None)
    if name := changes.get('network.name'):  # Whose learning rate is its own.
      changes.setdefault('schedule.learning_rate', None)
      old, new = networks.get(preset.network.name), networks.get(name)
      if len(old.widths) != len(new.widths):  # And other stages.
        for path in ('depths', 'widths'):
          changes.setdefault(f'network.{path}', None)
    result = settings.replace(preset, changes)
    name = run_name(FLAGS.preset, result)
    workdir = FLAGS.workdir or os.path.join('runs', f'{name}-{result.seed}')
    return dataclasses.replace(result, workdir=workdir)

  def _with_kinds(
      self, config: config_lib.RunConfig, arguments: Sequence[str]
  ) -> config_lib.RunConfig:
    """The configuration with the kinds that the arguments choose."""
    for flag, (path, table) in self.kinds.items():
      if (kind := table.get(_early(arguments, flag) or '')) is not None:
        config = settings.with_kind(config, path, kind)
    for item in list(settings.list_all(config)):
      if item.kinds is None or item.path in self.kinds:
        continue
      if kind := _early(arguments, item.path):
        config = settings.with_kind(config, item.path, kind)
    return config

  def _known(
      self, config: config_lib.RunConfig, arguments: Sequence[str]
  ) -> dict[str, settings.Setting]:
    """All settings that there are, for the policy that the arguments choose."""
    items = {item.path: item for item in settings.list_all(config)}
    if 'policy' in self.plain and (name := _early(arguments, 'policy')):
      policy = dataclasses.replace(config.policy, name=name)
      items = {p: i for p, i in items.items() if not p.startswith('policy.')}
      for item in settings.list_all(policy, 'policy.'):
        items[item.path] = item
    return items


def define_cache() -> None:
  """Defines the flag that `use_compilation_cache` reads."""
  flags.DEFINE_string(
      'compilation_cache',
      os.path.join('~', '.cache', 'autogrow_jax'),
      "Directory of compiled programs, for the next start; '' for none.",
  )


def use_compilation_cache() -> None:
  """Turns the cache of compiled programs on, unless the flag is empty."""
  if FLAGS.compilation_cache:
    train.cache_compilations(
        paths.local(FLAGS.compilation_cache, '--compilation_cache')
    )


def run(
    main: Callable[[], int | None],
    doc: str,
    define: Callable[[Sequence[str]], None] | None = None,
) -> None:
  """Runs a binary: one line and status 2 for what a user did wrong.

  Args:
    main: called after flags are parsed.
    doc: what the binary does, for --help.
    define: defines its flags, given the arguments; None if its module does.
  """
  arguments = sys.argv[1:]
  foreign = set(FLAGS)
  if define is None:
    foreign -= {flag.name for flag in FLAGS.get_flags_for_module(sys.argv[0])}
  try:
    if define is not None:
      define(arguments)
  except ValueError as error:
    sys.exit(_report(error))
  if {'-h', '-help', '--help', '--helpfull', '--helpshort'} & set(arguments):
    if status := _quietly(
        lambda: print(help_text(doc, set(FLAGS) - foreign))
    ):
      sys.exit(status)
    return

  def parse(argv: Sequence[str]) -> Sequence[str]:
    try:
      rest = FLAGS(argv)
      if len(rest) > 1:
        raise ValueError(
            f'Unknown argument {rest[1]!r}; flags begin with --, see --help.'
        )
    except (flags.Error, ValueError) as error:
      sys.exit(_report(error))
    return rest

  def checked(argv: Sequence[str]) -> int | None:
    del argv
    if not FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)
    try:
      return _quietly(main)
    except train.Interrupted as error:
      print(error, file=sys.stderr)
      return 128 + error.signum
    except KeyboardInterrupt:  # Before training, or pressed twice.
      print('interrupted; the same command continues.', file=sys.stderr)
      return 128 + signal.SIGINT
    # OSError: a full disk and such; ImportError: a missing extra.
    except (ValueError, OSError, ImportError) as error:
      logging.debug('%s', error, exc_info=True)  # Seen with --verbosity=1.
      return _report(error)

  app.run(checked, flags_parser=parse)


def _quietly(main: Callable[[], int | None]) -> int | None:
  """Calls a function; ends without a word if nobody reads its output."""
  try:
    status = main()
    sys.stdout.flush()
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
  return status


def help_text(doc: str, names: Collection[str]) -> str:
  """Help of a binary: its text, its flags, and settings in groups."""
  groups: dict[str, list[flags.Flag]] = {}
  for module, defined in FLAGS.flags_by_module_dict().items():
    for flag in defined:
      if flag.name in names:
        group, dot, _ = flag.name.rpartition('.')
        group = group if dot else 'settings' * (module == 'settings')
        groups.setdefault(group, []).append(flag)
  lines = [doc.strip()]
  for group, own in sorted(groups.items()):
    lines += ['', f'{group or "flags"}:']
    for flag in own:
      default = flag.default
      if isinstance(default, list):
        default = ','.join(default) or None
      default = '' if default is None else f' [{default}]'
      lines += textwrap.wrap(
          f'--{flag.name}: {flag.help}{default}',
          width=80, initial_indent='  ', subsequent_indent='      ',
      )
  return '\n'.join(lines)


def run_name(preset: str, run_config: config_lib.RunConfig) -> str:
  """Name of the directory of a run, before its seed.

  Args:
    preset: value of --preset.
    run_config: configuration that came of it and of the other flags.

  Returns:
    The preset's own name if it is a row of the paper, so that rows of the same
    network and data do not meet in one directory.
  """
  if '/' in preset and not preset.endswith('.json'):
    return preset
  name = f'{run_config.network.name}-{run_config.data.dataset}'
  return re.sub(r'[^\w.:-]+', '_', name)  # Of folder:PATH and others.


def parse_depths(flag: str, text: str) -> tuple[int, ...]:
  """Reads '3-2-2'."""
  try:
    return policies.parse_depths(text)
  except ValueError as error:
    raise ValueError(f'--{flag}: {error}') from error


def _report(error: BaseException) -> int:
  """Prints an error as one line, with a suggestion for a misspelt flag."""
  message = ' '.join(str(error).split())
  if match := re.match(r"Unknown command line flag '(.*?)'", message):
    names = [n for n in FLAGS if not n.startswith('no')]
    tails = {n.rpartition('.')[2]: n for n in names}
    close = difflib.get_close_matches(match[1], [*names, *tails], 1, 0.7)
    message = f'Unknown flag --{match[1]}'
    if close:
      message += f'; did you mean --{tails.get(close[0], close[0])}?'
    message += ' See --help.' if close else '; see --help.'
  print(f'error: {message}', file=sys.stderr)
  return USER_ERROR


def _unused(flag: str, path: str) -> None:
  """Says that a flag means nothing here, or refuses it."""
  if not path.startswith('policy.'):
    raise ValueError(f'--{flag} means nothing to this preset; leave it out.')
  print(
      f'ignored: --{flag} means nothing to the policy that is chosen',
      file=sys.stderr,
  )


def _early(arguments: Sequence[str], name: str) -> str | None:
  """Value of a flag before flags are parsed; None if it is not given."""
  value = None
  for index, argument in enumerate(arguments):
    match = re.fullmatch(rf'--?{re.escape(name)}(?:=(.*))?', argument)
    if match and match[1] is not None:
      value = match[1]
    elif match and index + 1 < len(arguments):
      value = arguments[index + 1]
  return value


def _help_of(path: str) -> str:
  """Help of a policy's setting that the chosen policy does not use."""
  fields = dataclasses.fields(config_lib.PolicyConfig)
  return next(
      field.metadata['help']
      for field in fields
      if field.name == path.partition('.')[2]
  )


def _with_value(text: str, item: settings.Setting | None) -> str:
  """Help with the preset's value."""
  if item is None or item.value is None or item.value == '':
    return text
  value = item.value
  if isinstance(value, tuple):
    value = '-'.join(map(str, value))
  return f'{text} [{value}]'
