"""VGG-19 that grows its widths on CIFAR, after Lawton et al. 2024.

Seed widths, phases and rates of the paper are not known; these are ours.
`small` is for two CPU cores: one layer per resolution, 5 % of the images.
"""

_FULL = {
    'network.name': 'vgg19',
    'network.widths': (16,) * 5,
    'policy.name': 'every',
    'policy.interval': 10,
    'policy.max_epochs': 150,
    'method': 'gauss_newton',
    'schedule.learning_rate': 0.1,
    'schedule.growing': 'cosine',
    'schedule.finetune_epochs': 200,
}
_SMALL = _FULL | {
    'data.holdout': 2000,
    'data.data_fraction': '0.05',
    'network.depths': (1,) * 5,
    'policy.interval': 3,
    'policy.max_epochs': 45,
    'method.limits.growth_cap': 0.2,
    'schedule.learning_rate': 0.05,
    'schedule.finetune_epochs': 12,
    'batch_size': 64,
}

PRESETS = {
    f'vgg19_{dataset}{suffix}': settings | {'data.dataset': dataset}
    for suffix, settings in (('', _FULL), ('_small', _SMALL))
    for dataset in ('cifar10', 'cifar100')
}
