"""Shows a network without building it: layers, parameters, multiply-adds.

    python -m experiments.describe --network=basic4resnet --depths=2-3-4-1 \\
        --input_shape=32x32x3 --classes=100

or lists all configurations that --preset of the other binaries takes:

    python -m experiments.describe --presets
"""

from collections.abc import Sequence
import dataclasses
import json

from absl import flags as absl_flags

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax import networks
from autogrow_jax.run import config
from autogrow_jax.run import console
from autogrow_jax.run import settings

from . import flags
from . import presets


def main() -> None:
  flags.run(_main, __doc__, _define)


def _define(arguments: Sequence[str]) -> None:
  del arguments
  absl_flags.DEFINE_bool(
      'presets', False, 'List all presets in place of a network.'
  )
  absl_flags.DEFINE_string(
      'input_shape', '32x32x3', 'Height x width x channels; ignored for text.'
  )
  absl_flags.DEFINE_integer(
      'classes', 10, 'Number of classes, or of words of a language model.'
  )
  absl_flags.DEFINE_enum(
      'format', 'table', ['table', 'json'], 'For people or for programs.'
  )
  for item in settings.list_all(config.NetworkConfig()):
    absl_flags.DEFINE_string(_flag(item.path), None, item.help)


def _main() -> None:
  if flags.FLAGS.presets:
    print(presets.listing())
    return
  architecture = make_architecture()
  table = costs.table(architecture)
  totals = {
      'params': costs.params(architecture),
      'macs': costs.macs(architecture),
      'layers': costs.layers_of(architecture),
      'activation_bytes': costs.activation_bytes(architecture),
  }
  if flags.FLAGS.format == 'json':
    described = {
        'network': str(architecture),
        **totals,
        'table': [dataclasses.asdict(layer) for layer in table],
        'architecture': architecture.to_json(),
    }
    print(json.dumps(described, indent=2))
    return
  is_text = networks.get(architecture.family).inputs == 'tokens'
  print(f'{architecture}  (per {"word" if is_text else "image"})')
  print(f'{"layer":24}{"kind":8}{"output":>16}{"params":>14}{"macs":>16}')
  for layer in table:
    shape = 'x'.join(map(str, layer.output_shape))
    print(
        f'{layer.name:24}{layer.kind:8}{shape:>16}{layer.params:>14,}'
        f'{layer.macs:>16,}'
    )
  print(
      f'{totals["params"]:,} parameters, {totals["macs"]:,} multiply-adds, '
      f'{totals["layers"]} layers (projections not counted), '
      f'{console.format_count(totals["activation_bytes"])}B of activations'
  )


def _flag(name: str) -> str:
  """Flag of a setting of networks, as in the other binaries."""
  plain = {**flags.PLAIN, **flags.DEPTHS}
  path = f'network.{name}'
  return next((flag for flag in plain if plain[flag] == path), path)


def make_architecture() -> architecture_lib.Architecture:
  """Returns the architecture that the flags ask for."""
  options = {}
  for item in settings.list_all(config.NetworkConfig()):
    flag = _flag(item.path)
    text = flags.FLAGS[flag].value
    value = item.value
    if text is not None:
      value = settings.parse(text, item.hint, f'--{flag}')
    options[item.path] = value
  network, depths = networks.get(options.pop('name')), options.pop('depths')
  shape, classes = flags.FLAGS.input_shape, flags.FLAGS.classes
  try:
    input_shape = tuple(map(int, shape.split('x')))
  except ValueError as error:
    raise ValueError(
        '--input_shape is height x width x channels, such as 32x32x3, got '
        f'{shape!r}.'
    ) from error
  if classes < 1:
    raise ValueError(f'--classes is at least 1, got {classes}.')
  return network.seed(
      depths or network.seed_depths,
      input_shape=(1,) if network.inputs == 'tokens' else input_shape,
      classes=classes,
      options=options,
  )


if __name__ == '__main__':
  main()
