"""Tests of images with masks: data, augmentation, mean IoU, a whole run."""

import pathlib
import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
from PIL import Image

from autogrow_jax.run import config as config_lib
from autogrow_jax import data
from autogrow_jax.run import train
from autogrow_jax.run import trained
from experiments import report
from experiments import summary
from autogrow_jax.data import images as images_lib
from autogrow_jax.data import masks

COLOURS = np.array([[20, 20, 20], [220, 40, 40], [40, 60, 220]], np.uint8)


def scene(number: int, height: int = 20, width: int = 24) -> np.ndarray:
  """A mask: a frame of class 0, a box of class 1 or 2, a line of void."""
  mask = np.zeros((height, width), np.uint8)
  top, left = 2 + number % 4, 3 + number % 5
  mask[top : top + 11, left : left + 12] = 1 + number % 2
  mask[top] = masks.VOID
  return mask


def paint(mask: np.ndarray) -> np.ndarray:
  """An image whose colours are its mask; void is like class 0."""
  return COLOURS[np.where(mask == masks.VOID, 0, mask)]


def write(
    folder: pathlib.Path, name: str, mask: np.ndarray, mode: str = 'P'
) -> None:
  """Writes an image and its mask."""
  for kind in ('images', 'masks'):
    (folder / kind).mkdir(parents=True, exist_ok=True)
  Image.fromarray(paint(mask)).save(folder / 'images' / f'{name}.bmp')
  picture = Image.fromarray(mask)
  if mode == 'P':
    picture.putpalette(list(range(255, -1, -1)) * 3)
  picture.save(folder / 'masks' / f'{name}.png')


class PairsTestCase(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path) / 'set'

  def fill(self, *splits: str, count: int = 10) -> None:
    for split in splits or ('',):
      for number in range(count):
        mode = 'P' if number % 2 else 'L'
        write(self.root / split, f'{number:02d}', scene(number), mode)

  def load(self, **options) -> data.Dataset:
    config = data.DataConfig(f'pairs:{self.root}', **options)
    return data.load(config, seed=0)


class LoadTest(PairsTestCase):

  def test_masks_are_the_labels(self):
    self.fill('train', 'test')
    dataset = self.load(holdout=3)
    self.assertEqual(dataset.classes, 3)
    self.assertEqual(dataset.input_shape, (20, 24, 3))
    self.assertLen(dataset.train, 7)
    self.assertLen(dataset.read_test(), 10)
    how = dataset.preprocessing
    self.assertEqual((how.scale, how.flip), (2.0, True))
    for split, indices in (
        (dataset.train, dataset.train_indices),
        (dataset.holdout, dataset.holdout_indices),
    ):
      for image, labels, index in zip(split.images, split.labels, indices):
        mask = scene(index)
        np.testing.assert_array_equal(image, paint(mask))
        np.testing.assert_array_equal(
            labels, np.where(mask == 255, -1, mask.astype(int))
        )

  def test_a_fifth_is_for_the_test(self):
    self.fill()
    dataset = self.load(holdout=2)
    self.assertLen(dataset.train, 6)
    self.assertLen(dataset.read_test(), 2)
    again = self.load(holdout=2)
    np.testing.assert_array_equal(
        dataset.read_test().images, again.read_test().images
    )
    self.assertEqual(dataset.digest, again.digest)
    write(self.root, '99', scene(1, 21, 24))
    with self.assertRaisesRegex(ValueError, 'Give a size .*--data.image_size'):
      self.load()
    self.assertNotEqual(self.load(image_size=32).digest, dataset.digest)

  def test_frames(self):
    self.fill()
    dataset = self.load(image_size=40)
    labels = dataset.train.labels[0]
    mask = scene(int(dataset.train_indices[0]))
    self.assertEqual(labels.shape, (40, 40))
    labels, image = labels.copy(), dataset.train.images[0].copy()
    np.testing.assert_array_equal(image[10:30, 8:32], paint(mask))
    np.testing.assert_array_equal(labels[10:30, 8:32] == 0, mask == 0)
    labels[10:30, 8:32] = -1
    image[10:30, 8:32] = 0
    self.assertEqual((labels.max(), image.max()), (-1, 0))

  def test_scales_down(self):
    mask = np.zeros((40, 20), np.uint8)
    mask[:20] = 2
    pair = np.concatenate([paint(mask), mask[..., None]], -1)
    image, labels = np.split(masks.frame(pair, (10, 10)), [3], -1)
    labels = masks.labels(labels[..., 0])
    np.testing.assert_array_equal(labels[:, 0], np.full(10, -1))
    np.testing.assert_array_equal(labels[:5, 2:7], np.full((5, 5), 2))
    np.testing.assert_array_equal(labels[5:, 2:7], np.zeros((5, 5)))
    np.testing.assert_array_equal(image[0, 3], COLOURS[2])
    np.testing.assert_array_equal(image[0, 0], np.zeros(3))

  def test_damaged_ones_are_left_out(self):
    self.fill()
    path = self.root / 'masks' / '03.png'
    path.write_bytes(path.read_bytes()[:60])
    with self.assertRaisesRegex(images_lib.Damaged, '03.png cannot be read'):
      self.load()
    dataset = self.load(skip_damaged=True, holdout=2)
    self.assertEqual(len(dataset.train) + len(dataset.read_test()), 7)


class RefusalTest(PairsTestCase):

  def check(self, message: str, **options) -> None:
    with self.assertRaisesRegex(ValueError, re.escape(message)) as caught:
      self.load(**options)
    self.assertNotIn('\n', str(caught.exception))

  def test_no_folder(self):
    self.check(f'There is no folder {self.root}')

  @parameterized.parameters('images', 'masks')
  def test_no_folder_of(self, kind):
    self.fill()
    (self.root / kind).rename(self.root / 'other')
    self.check(f"has no folder '{kind}'; put images into")

  def test_a_mask_is_missing(self):
    self.fill()
    (self.root / 'masks' / '04.png').unlink()
    self.check('images/04.bmp has no mask')

  def test_two_images_of_a_name(self):
    self.fill()
    Image.fromarray(paint(scene(1))).save(self.root / 'images' / '04.jpg')
    self.check('would share the mask 04.png')

  def test_sizes_differ(self):
    self.fill()
    Image.fromarray(scene(1, 20, 23)).save(self.root / 'masks' / '04.png')
    self.check('04.png has 20x23 pixels, but its image', image_size=32)

  @parameterized.parameters('RGB', 'I;16')
  def test_no_indices(self, mode):
    self.fill()
    mask = Image.fromarray(scene(1)).convert(mode)
    mask.save(self.root / 'masks' / '04.png')
    self.check('a mask is a PNG of 8 bits, palette or grey')

  def test_no_class_of_the_training_set(self):
    self.fill('train', 'test')
    mask = scene(1)
    mask[0, 0] = 7
    Image.fromarray(mask).save(self.root / 'test' / 'masks' / '04.png')
    self.check('has the class index 7, but there are the classes 0 to 2')

  def test_one_class(self):
    for name in 'abcdef':
      write(self.root, name, np.zeros((8, 8), np.uint8))
    self.check('have no class but 0 and void')

  def test_streams(self):
    self.fill()
    self.check("leave out stream='always'", stream='always')

  def test_arrays(self):
    images = np.zeros((6, 8, 8, 1), np.uint8)
    masks = np.zeros((6, 8, 8), int)
    plain = data.Preprocessing((0.0,), (1.0,))
    build = lambda masks, how: data.from_arrays(
        images, masks, images, masks, holdout=2, seed=0, preprocessing=how,
        classes=2,
    )  # pyformat: disable
    self.assertEqual(build(masks, plain).train.labels.shape, (4, 8, 8))
    with self.assertRaisesRegex(ValueError, 'as large as their images'):
      build(masks[:, :4], plain)
    with self.assertRaisesRegex(ValueError, 'without pad and crop'):
      build(masks, data.Preprocessing((0.0,), (1.0,), pad=1))


class VocTest(PairsTestCase):

  def load(self, **options):
    config = data.DataConfig('voc/2012', data_dir=str(self.root), **options)
    return data.load(config, seed=0)

  def test_reads_what_is_published(self):
    voc = self.root / 'VOCdevkit' / 'VOC2012'
    for folder in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
      (voc / folder).mkdir(parents=True)
    for split, numbers in (('train', range(6)), ('val', range(6, 9))):
      for number in numbers:
        mask = scene(number, 30 + number)
        Image.fromarray(paint(mask)).save(voc / 'JPEGImages' / f'{number}.jpg')
        Image.fromarray(mask).save(voc / 'SegmentationClass' / f'{number}.png')
      listing = voc / 'ImageSets' / 'Segmentation' / f'{split}.txt'
      listing.write_text(''.join(f'{number}\n' for number in numbers))
    dataset = self.load(holdout=2)
    self.assertEqual(dataset.classes, 21)
    self.assertEqual(dataset.input_shape, (513, 513, 3))
    self.assertLen(dataset.train, 4)
    test = self.load(holdout=2, image_size=48).read_test()
    self.assertEqual(test.labels.shape, (3, 48, 48))
    (voc / 'SegmentationClass' / '7.png').unlink()
    with self.assertRaisesRegex(ValueError, 'lacks .*7.png: its masks of clas'):
      self.load(holdout=2)

  def test_says_what_to_unpack(self):
    with self.assertRaisesRegex(ValueError, 'not among what TFDS prepares; un'):
      self.load()

  def test_stand_in(self):
    dataset = data.stand_in(data.DataConfig('voc/2012'), seed=0)
    self.assertEqual(dataset.train.labels.shape, (1464 - 146, 513, 513))
    self.assertEqual(dataset.train.labels.strides[1:], (0, 0))


class AugmentTest(absltest.TestCase):

  def augment(self, masks, *, scale=2.0, flip=True, number=0, first=0):
    # Blue is the mask, so that the two can be compared.
    images = np.stack([np.full_like(masks, 200), masks, masks], -1)
    images = (40 * np.maximum(0, images)).astype(np.uint8)
    images[..., 0] = 200
    how = data.Preprocessing((0.0,) * 3, (1.0,) * 3, flip=flip, scale=scale)
    run = jax.jit(data.augment_examples, static_argnums=3)
    got = run(jax.random.key(number), images, masks, how, first=first)
    return images, *map(np.asarray, got)

  def setUp(self):
    super().setUp()
    self.masks = np.stack([scene(number) for number in range(8)])
    self.masks = np.where(self.masks == 255, -1, self.masks.astype(np.int16))

  def test_nothing_to_do(self):
    images, got, labels = self.augment(self.masks, scale=1.0, flip=False)
    np.testing.assert_array_equal(got, images)
    np.testing.assert_array_equal(labels, self.masks)
    self.assertEqual((got.dtype, labels.dtype), (np.uint8, np.int32))

  def test_flips(self):
    images, got, labels = self.augment(self.masks, scale=1.0)
    mirrored = 0
    for before, after, mask, label in zip(images, got, self.masks, labels):
      is_same = np.array_equal(after, before)
      mirrored += not is_same
      step = 1 if is_same else -1
      np.testing.assert_array_equal(after, before[:, ::step])
      np.testing.assert_array_equal(label, mask[:, ::step])
    self.assertBetween(mirrored, 1, 7)

  def test_images_and_masks_stay_together(self):
    for number in range(4):
      _, got, labels = self.augment(self.masks, number=number)
      red, green = got[..., 0].astype(int), got[..., 1].astype(int)
      # Outside is black in the image and void in the mask.
      np.testing.assert_array_less(labels[red < 45], 0)
      # Where both are pure they agree; on edges the image is in between.
      pure = (labels >= 0) & (red == 200) & (green % 40 == 0)
      self.assertGreater(np.mean(pure), 0.3)
      agree = green[pure] == 40 * labels[pure]
      self.assertGreater(np.mean(agree), 0.98)

  def test_sizes_vary_between_half_and_double(self):
    whole = np.ones((64, 32, 32), np.int32)
    _, _, labels = self.augment(whole, scale=2.0)
    sides = np.count_nonzero(np.any(labels == 1, 2), 1)
    self.assertBetween(sides.min(), 16, 19)
    self.assertEqual(sides.max(), 32)  # Larger ones fill the frame.
    self.assertBetween(np.mean(sides == 32), 0.3, 0.7)
    tops = np.argmax(np.any(labels == 1, 2), 1)
    self.assertGreater(len(set(tops[sides < 28])), 4)

  def test_depends_on_the_position_in_the_batch_only(self):
    _, want, labels = self.augment(self.masks)
    _, got, part = self.augment(self.masks[3:], first=3)
    np.testing.assert_array_equal(got, want[3:])
    np.testing.assert_array_equal(part, labels[3:])


class ScoreTest(absltest.TestCase):

  def test_few_large_examples_at_once(self):
    self.assertEqual(trained.examples_at_once(256, 10), 256)
    self.assertEqual(trained.examples_at_once(256, 513 * 513 * 21), 12)
    self.assertEqual(trained.examples_at_once(256, 2**30), 1)


class RunTest(PairsTestCase):

  def config(self, **changes) -> config_lib.RunConfig:
    return config_lib.RunConfig.from_json({
        'workdir': str(self.root.parent / 'run'),
        'data': {
            'dataset': f'pairs:{self.root}', 'image_size': 24, 'holdout': 4
        },
        'network': {'name': 'deeplab', 'depths': [1] * 4, 'widths': [4] * 4},
        'policy': {'name': 'fixed'},
        'schedule': {'learning_rate': 0.05, 'finetune_epochs': 2},
        'batch_size': 4,
        **changes,
    })

  def test_trains_and_scores(self):
    self.fill(count=15)
    result = train.run(self.config())
    history = (self.root.parent / 'run' / 'history.jsonl').read_text()
    self.assertEqual(history.count('"miou"'), 2)
    report.write(self.root.parent / 'run')
    self.assertIn(
        'Test mean IoU', (self.root.parent / 'run/report.html').read_text()
    )
    self.assertRegex(
        summary.of_run(result, 'w'),
        rf'hold-out mean IoU +test mean IoU\n.*{result["test_miou"]:.2f} %\n',
    )
    network = trained.load(self.root.parent / 'run')
    dataset = data.load(network.config.data, seed=0)
    score = network.score(dataset.read_test())
    self.assertEqual(score.metrics['miou'], result['test_miou'])
    self.assertEqual(score.accuracy, result['test_accuracy'])
    logits = network.predict(dataset.train.images[:2])
    self.assertEqual(logits.shape, (2, 24, 24, 3))

  @parameterized.parameters(
      ({'network': {}}, 'basic3resnet predicts one class for each example'),
      ({'data': {}}, 'but the data have one class for each example: choose'),
  )
  def test_networks_and_data_that_do_not_fit(self, changes, message):
    self.fill()
    with self.assertRaisesRegex(ValueError, message):
      train.run(self.config(**changes))


if __name__ == '__main__':
  absltest.main()
