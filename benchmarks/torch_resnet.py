"""Basic3ResNet in PyTorch, written for `benchmarks.step`: the same layers."""

from collections.abc import Callable, Sequence
import os

import numpy as np
import torch
from torch import nn


class Block(nn.Module):
  """Two 3x3 convolutions around a shortcut (1x1 where the shape changes)."""

  def __init__(self, inputs: int, outputs: int, stride: int):
    super().__init__()
    self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    self.norm1 = nn.BatchNorm2d(outputs)
    self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
    self.norm2 = nn.BatchNorm2d(outputs)
    self.shortcut = nn.Identity()
    if stride != 1 or inputs != outputs:
      self.shortcut = nn.Sequential(
          nn.Conv2d(inputs, outputs, 1, stride, bias=False),
          nn.BatchNorm2d(outputs),
      )

  def forward(self, x):
    y = torch.relu(self.norm1(self.conv1(x)))
    return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def network(depths: Sequence[int], channels: int) -> nn.Module:
  """The whole network, for ten classes."""
  layers = [
      nn.Conv2d(channels, 16, 3, 1, 1, bias=False),
      nn.BatchNorm2d(16),
      nn.ReLU(),
  ]
  inputs = 16
  for stage, depth in enumerate(depths):
    outputs = 16 * 2**stage
    for index in range(depth):
      layers.append(Block(inputs, outputs, 2 if stage and not index else 1))
      inputs = outputs
  return nn.Sequential(
      *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)
  )


def training(
    depths: Sequence[int],
    batch: tuple[np.ndarray, np.ndarray],
    *,
    compiled: bool = False,
) -> Callable[[], None]:
  """One training step on a batch, waited for.

  Args:
    depths: blocks per stage.
    batch: images (batch, height, width, channel) and labels.
    compiled: by torch.compile, in mixed precision.

  Returns:
    The function.
  """
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  images, labels = batch
  x = torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32) / 255
  x = x.to(device).to(memory_format=torch.channels_last)
  y = torch.tensor(labels, dtype=torch.long, device=device)
  model = network(depths, images.shape[-1]).to(device)
  model = model.to(memory_format=torch.channels_last)
  optimizer = torch.optim.SGD(
      model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4
  )
  forward = torch.compile(model) if compiled else model

  def step():
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, enabled=compiled):
      loss = nn.functional.cross_entropy(forward(x), y)
    loss.backward()
    optimizer.step()
    if device == 'cuda':
      torch.cuda.synchronize()

  return step
