"""`NetworkConfig`: settings whose help and unit are metadata of the fields."""

import dataclasses
from typing import Any


def _option(text: str, default: Any = None, unit: str = '') -> Any:
  metadata = {'help': text, 'unit': unit}
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
  """Network that a run starts from; None takes the family's default."""

  name: str = _option(
      "Key of `networks.FAMILIES`, or 'package.module:attribute'.",
      'basic3resnet',
  )
  depths: tuple[int, ...] | None = _option(
      "Blocks per stage, e.g. 3-3-3; the network's by default, mostly 1 each.",
      unit='blocks',
  )
  stem: str | None = _option(
      'Stem: small or imagenet; by default small up to 64 pixels.'
  )
  shortcut: str | None = _option(
      'Shortcut where a residual block changes shape: B (1x1 convolution and '
      'norm) or A (no parameters); by default B.'
  )
  bn_scale_init: str | None = _option(
      'Start of batch norm scales: ones, or uniform01, which the paper very '
      'likely had; by default ones.'
  )
  widths: tuple[int, ...] | None = _option(
      "Base width per stage, e.g. 16-32-64; by default the network's.",
      unit='channels',
  )
  embedding: int | None = _option(
      "Language models: length of a word's vector; by default the width of the "
      'first layer.',
      unit='units',
  )
  keep: float | None = _option(
      'Language models: probability with which a unit stays in training; by '
      'default 1.'
  )
  init_bound: float | None = _option(
      'Language models: largest parameter at the start; by default 0.04.'
  )

  def options(self) -> dict[str, Any]:
    """Options for `Network.seed`: all fields but name and depths."""
    _, _, *fields = dataclasses.fields(self)
    return {field.name: getattr(self, field.name) for field in fields}
