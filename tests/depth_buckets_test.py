"""Tests of whole runs: how often, and how early, they compile."""

import collections
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import runs

_CHANGES = {
    'network': {'name': 'mlp', 'widths': [12, 10]},
    'policy': {'interval': 1, 'window': 20, 'max_depths': [6, 2]},
    'schedule': {'learning_rate': 0.01, 'finetune_epochs': 1},
}
_GROWTHS = (6 - 1) + (2 - 1)


class DepthBucketsTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    directory = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.workdirs, cls.results = {}, {}
    for buckets in ('exact', 'powers'):
      cls.workdirs[buckets] = pathlib.Path(directory, buckets)
      cls.results[buckets] = runs.quietly(
          runs.tiny(
              cls.workdirs[buckets],
              devices={
                  'depth_buckets': buckets,
                  'compile_ahead': buckets == 'powers',
              },
              **_CHANGES,
          )
      )

  def test_few_compilations(self):
    compiled = {
        buckets: collections.Counter(
            item['what'].removesuffix(', not needed')
            for item in runs.records(workdir, 'compile')
        )
        for buckets, workdir in self.workdirs.items()
    }
    # The seed; in the first stage, behind a block of its own, 4 and 6 blocks,
    # in the second 4; and what is found at last, exactly.
    for program in ('train step', 'evaluation'):
      self.assertEqual(compiled['exact'][program], 1 + _GROWTHS)
      self.assertEqual(compiled['powers'][program], 1 + 2 + 1 + 1)

  def test_compiles_ahead(self):
    ahead = lambda buckets: [
        item['what']
        for item in runs.records(self.workdirs[buckets], 'compile')
        if 'waited' in item
    ]
    self.assertEmpty(ahead('exact'))
    # After the first epoch nothing was compiled for its growth, nor for the
    # exact network at the end.
    for program in ('train step', 'evaluation'):
      self.assertEqual(ahead('powers').count(program), 2)

  def test_same_run(self):
    found = {
        buckets: [
            (item['epoch'], item['stage'], item['depths'])
            for item in runs.records(workdir, 'grow')
        ]
        for buckets, workdir in self.workdirs.items()
    }
    self.assertLen(found['exact'], _GROWTHS)
    self.assertEqual(found['powers'], found['exact'])
    losses = [
        [item['train_loss'] for item in runs.records(workdir, 'epoch')]
        for workdir in self.workdirs.values()
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    self.assertEqual(
        self.results['powers']['params'], self.results['exact']['params']
    )


if __name__ == '__main__':
  absltest.main()
