"""Sampled masks, Yuan et al. 2021.

Budgets are those of their results. Lengths, weight decay and batch size of the
ImageNet networks are our own choice.
"""

from typing import Any

Settings = dict[str, Any]


def _masks(
    dataset: str, network: str, sparsity: float, epochs: int
) -> Settings:
  """Channels by sampled masks, trained as the full network is."""
  return {
      'data.dataset': dataset,
      'network.name': network,
      'policy.name': 'every',
      'policy.interval': 1,
      'policy.max_epochs': epochs,
      'method': 'sparsify',
      'method.target_sparsity': sparsity,
      'schedule.growing': 'whole',
      'schedule.finetune_epochs': 0,
      'optimizer.weight_decay': 1e-4,
  }


_MOBILENET = {
    'method.budget': 'macs',
    'optimizer.weight_decay': 4e-5,
    'batch_size': 256,
}

PRESETS = {
    # For two cores: one layer per resolution, a tenth of the images. Masks have
    # hundreds of steps where the paper gives them tens of thousands, so their
    # rate is a hundred times the paper's, and the last fifth of the run trains
    # the last sample.
    'vgg16_fashion_mnist_small': _masks('fashion_mnist', 'vgg16', 0.9, 25) | {
        'data.holdout': 2000,
        'data.data_fraction': '0.1',
        'network.depths': (1,) * 5,
        'network.widths': (16, 32, 64, 64, 64),
        'method.mask.learning_rate': 10.0,
        'method.freeze': 0.8,
        'batch_size': 64,
    },
    'vgg16_cifar10': _masks('cifar10', 'vgg16', 0.95, 160),
    'resnet20_cifar10': _masks('cifar10', 'basic3resnet', 0.642, 160) | {
        'network.depths': (3, 3, 3),
        'network.shortcut': 'A',
    },
    'wrn28_10_cifar10': _masks('cifar10', 'wrn28_10', 0.9057, 200) | {
        'optimizer.weight_decay': 5e-4,
    },
    'resnet50_imagenet': _masks(
        'imagenet2012', 'bottleneck4resnet', 0.388, 90
    ) | {'network.depths': (3, 4, 6, 3), 'batch_size': 256},
    # 73 and 83 % of the multiply-adds of the quarter and three quarters wide
    # network.
    'mobilenet_imagenet_small': _masks(
        'imagenet2012', 'mobilenet1', 0.7985, 90
    ) | _MOBILENET | {
        'network.widths': (32, 64, 128, 256, 512),
        'data.image_size': 128,
    },
    'mobilenet_imagenet_large': _masks(
        'imagenet2012', 'mobilenet1', 0.5251, 90
    ) | _MOBILENET,
    'deeplab_voc': _masks('voc/2012', 'deeplab', 0.498, 50) | {
        'data.image_size': 513,
        'batch_size': 16,
    },
    # The large network of Zaremba et al. 2014; its text is --dataset=text:PATH.
    'lstm_ptb': _masks('text:ptb', 'lstm2', 0.688, 55) | {
        'network.keep': 0.65,
        'optimizer.momentum': 0.0,
        'optimizer.weight_decay': 0.0,
        'optimizer.clip_norm': 10 / 35,
        'batch_size': 20,
    },
}
for _name, _network, _dataset, _depths, _epochs, _finetune, _batch_size in (
    ('basic3', 'basic3resnet', 'cifar10', (42, 42, 42), 160, 40, 128),
    ('plain3', 'plain3net', 'cifar10', (23, 22, 22), 160, 40, 128),
    ('bottleneck4', 'bottleneck4resnet', 'imagenet2012', (6, 7, 3, 9), 90, 20,
     256),
    ('plain4', 'plain4net', 'imagenet2012', (5, 5, 5, 4), 90, 20, 256),
):
  # Channels and layers, half of the depths that AutoGrow found.
  PRESETS[f'{_name}_layers_{_dataset.removesuffix("2012")}'] = _masks(
      _dataset, _network, 0.5, _epochs
  ) | {
      'network.depths': _depths,
      'method.grow': 'both',
      'method.lambda1': 1.0,
      'method.lambda2': 0.1,
      'schedule.finetune_epochs': _finetune,
      'batch_size': _batch_size,
  }
