"""Shows a network without building it: layers, parameters, multiply-adds.

    python -m experiments.describe --network=basic4resnet --depths=2-3-4-1 \\
        --input_shape=32x32x3 --classes=100

or lists all configurations that --preset of the other binaries takes:

    python -m experiments.describe --presets
"""

import dataclasses
import json

from absl import flags as absl_flags

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax.run import console
from autogrow_jax import networks
from experiments import flags
from experiments import presets

PRESETS = absl_flags.DEFINE_bool(
    'presets', False, 'List all presets in place of a network.'
)
NETWORK = absl_flags.DEFINE_string(
    'network',
    'basic3resnet',
    f'{", ".join(networks.FAMILIES)}, or package.module:attribute.',
)
DEPTHS = absl_flags.DEFINE_string(
    'depths',
    None,
    "Blocks per stage, e.g. 3-3-3; by default the network's, mostly one each.",
)
INPUT_SHAPE = absl_flags.DEFINE_string(
    'input_shape', '32x32x3', 'Height x width x channels; ignored for text.'
)
CLASSES = absl_flags.DEFINE_integer(
    'classes', 10, 'Number of classes, or of words of a language model.'
)
EMBEDDING = absl_flags.DEFINE_integer(
    'embedding', None, *flags.RUN_FLAGS['embedding'][2:]
)
STEM = absl_flags.DEFINE_string(
    'stem', None, 'small or imagenet; small up to 64 pixels by default.'
)
SHORTCUT = absl_flags.DEFINE_string(
    'shortcut', None, 'B (1x1 convolution) or A (no parameters); B by default.'
)
WIDTHS = absl_flags.DEFINE_string(
    'widths', None, "Base channels per stage; the network's by default."
)
FORMAT = absl_flags.DEFINE_enum(
    'format', 'table', ['table', 'json'], 'For people or for programs.'
)


def main() -> None:
  if PRESETS.value:
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
  if FORMAT.value == 'json':
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


def make_architecture() -> architecture_lib.Architecture:
  """Returns the architecture that the flags ask for."""
  network = networks.get(NETWORK.value)
  try:
    input_shape = tuple(map(int, INPUT_SHAPE.value.split('x')))
  except ValueError as error:
    raise ValueError(
        '--input_shape is height x width x channels, such as 32x32x3, got '
        f'{INPUT_SHAPE.value!r}.'
    ) from error
  if CLASSES.value < 1:
    raise ValueError(f'--classes is at least 1, got {CLASSES.value}.')
  depths, widths = (
      flags.parse_depths(flag.name, flag.value) if flag.value else None
      for flag in (DEPTHS, WIDTHS)
  )
  return network.seed(
      depths or network.seed_depths,
      input_shape=(1,) if network.inputs == 'tokens' else input_shape,
      classes=CLASSES.value,
      options={
          'stem': STEM.value,
          'shortcut': SHORTCUT.value,
          'widths': widths,
          'embedding': EMBEDDING.value,
      },
  )


if __name__ == '__main__':
  flags.run_main(main)
