"""Tests of the description of a network."""

import dataclasses
import json
import re

from absl.testing import absltest
from absl.testing import parameterized

from autogrow_jax import architecture as architecture_lib

Architecture = architecture_lib.Architecture


def small() -> Architecture:
  return Architecture(
      family='basic3resnet',
      stages=(('s0b0', 's0b1'), ('s1b0',)),
      sizes=(
          ('classes', 5),
          ('image', 3),
          ('s0', 4),
          ('s0b0.mid', 4),
          ('s0b1.mid', 7),
          ('s1', 8),
          ('s1b0.mid', 6),
      ),
      options=(('resolution', (8, 8)), ('stem', 'small')),
      minted=(2, 1),
  )


class ArchitectureTest(parameterized.TestCase):

  def test_reads(self):
    architecture = small()
    self.assertEqual(architecture.depths, (2, 1))
    self.assertEqual(str(architecture), 'basic3resnet-2-1')
    self.assertEqual(architecture.size('s0b1.mid'), 7)
    self.assertEqual(architecture.option('resolution'), (8, 8))
    self.assertEqual(architecture.stage_of('s0b1'), 0)
    self.assertEqual(architecture.stage_of('s1b0'), 1)
    with self.assertRaisesRegex(ValueError, "No block 's2b0'"):
      architecture.stage_of('s2b0')

  def test_is_hashable_by_value(self):
    self.assertEqual(hash(small()), hash(small()))
    self.assertNotEqual(small(), small().resized({'s0': 5}))

  def test_survives_json(self):
    architecture = small().with_block(0)
    data = json.loads(json.dumps(architecture.to_json()))
    restored = Architecture.from_json(data)
    self.assertEqual(restored, architecture)
    self.assertEqual(hash(restored), hash(architecture))

  def test_json_is_read_in_any_order(self):
    data = small().to_json()
    data['sizes'] = dict(reversed(data['sizes'].items()))
    data['options'] = dict(reversed(data['options'].items()))
    self.assertEqual(Architecture.from_json(data), small())

  def test_with_block_copies_private_sizes_of_the_block_before(self):
    before = small()
    after = before.with_block(0)
    self.assertEqual(after.stages, (('s0b0', 's0b1', 's0b2'), ('s1b0',)))
    self.assertEqual(after.size('s0b2.mid'), 7)
    self.assertEqual(after.minted, (3, 1))
    self.assertEqual(
        set(after.sizes) - set(before.sizes), {('s0b2.mid', 7)}
    )
    self.assertEqual(before, small())

  def test_private_axes_are_told_from_those_of_longer_names(self):
    # 's0b1' is a prefix of 's0b10'.
    architecture = small()
    for _ in range(9):
      architecture = architecture.with_block(0)
    self.assertIn('s0b10', architecture.stages[0])
    left = architecture.without_block('s0b1')
    self.assertNotIn('s0b1.mid', dict(left.sizes))
    self.assertEqual(left.size('s0b10.mid'), 7)

  def test_names_are_never_used_again(self):
    architecture = small().with_block(0).without_block('s0b2').with_block(0)
    self.assertEqual(architecture.stages[0], ('s0b0', 's0b1', 's0b3'))

  def test_without_block_takes_its_axes(self):
    architecture = small().without_block('s0b1')
    self.assertEqual(architecture.stages, (('s0b0',), ('s1b0',)))
    self.assertNotIn('s0b1.mid', dict(architecture.sizes))
    self.assertEqual(architecture.minted, (2, 1))

  def test_resized(self):
    architecture = small().resized({'s1': 9, 's0b0.mid': 1})
    self.assertEqual(architecture.size('s1'), 9)
    self.assertEqual(architecture.size('s0b0.mid'), 1)
    self.assertEqual(architecture.size('s0'), 4)

  @parameterized.parameters(
      (lambda a: a.without_block('s0b0'), "'s0b0' enters stage 0"),
      (lambda a: a.without_block('s9b0'), "No block 's9b0'"),
      (lambda a: a.with_block(2), 'Stage 2 does not exist; there are 2'),
      (lambda a: a.with_block(-1), 'Stage -1 does not exist'),
      (lambda a: a.resized({'s7': 3}), "No axes ['s7']"),
      (lambda a: a.resized({'s1': 0}), "'s1' has size 0; sizes are >= 1"),
      (lambda a: a.resized({'s1': 2.0}), "'s1' has size 2.0"),
      (
          lambda a: dataclasses.replace(a, stages=(('s0b0',), ('s0b0',))),
          'must be unique',
      ),
      (lambda a: dataclasses.replace(a, stages=(('x',), ())), 'Stage 1 has no'),
      (lambda a: dataclasses.replace(a, minted=(1,)), '1 entries for 2 stages'),
  )
  def test_refuses(self, edit, message):
    with self.assertRaisesRegex(ValueError, re.escape(message)):
      edit(small())


if __name__ == '__main__':
  absltest.main()
