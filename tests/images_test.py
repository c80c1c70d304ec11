"""Tests of decoding, fitting and cropping images on the host."""

import io
import re
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
from PIL import Image
from PIL import ImageOps
import tiny_images

from autogrow_jax.data import images

COLOUR = tiny_images.pixels(0, (20, 30, 3))
GREY = tiny_images.pixels(1, (20, 30))


def saved(picture, kind, **options):
  file = io.BytesIO()
  picture.save(file, kind, **options)
  return file.getvalue()


class DecodeTest(parameterized.TestCase):

  @parameterized.parameters('PNG', 'BMP', 'TIFF', 'PPM')
  def test_lossless_kinds(self, kind):
    encoded = tiny_images.encode(COLOUR, kind)
    np.testing.assert_array_equal(images.decode(encoded, 3), COLOUR)
    encoded = tiny_images.encode(GREY, kind)
    np.testing.assert_array_equal(
        images.decode(encoded, 3), np.stack([GREY] * 3, -1)
    )
    result = images.decode(encoded, 1)
    self.assertEqual((result.shape, result.dtype), ((20, 30, 1), np.uint8))
    np.testing.assert_array_equal(result[..., 0], GREY)

  @parameterized.parameters(
      ('JPEG', None), ('JPEG', 'CMYK'), ('TIFF', 'CMYK'), ('TIFF', 'LAB'),
      ('TIFF', 'YCbCr'), ('WEBP', None), ('PNG', 'P'), ('GIF', 'P'),
  )  # pyformat: disable
  def test_lossy_kinds_are_close(self, kind, mode):
    encoded = tiny_images.encode(COLOUR, kind, mode)
    result = images.decode(encoded, 3)
    self.assertEqual((result.shape, result.dtype), ((20, 30, 3), np.uint8))
    # A palette of 216 colours is coarse, and an inverted CMYK would be far off.
    limit = 30 if mode == 'P' else 6
    self.assertLess(np.abs(result - COLOUR.astype(int)).mean(), limit)
    grey = images.decode(encoded, 1)[..., 0]
    expected = np.asarray(Image.fromarray(result).convert('L'))
    self.assertLess(np.abs(grey - expected.astype(int)).max(), 2)

  @parameterized.product(turn=[*range(1, 9)], kind=('JPEG', 'PNG', 'WEBP'))
  def test_is_turned_as_viewers_show_it(self, turn, kind):
    image = Image.fromarray(COLOUR[:3, :5])
    exif = Image.Exif()
    exif[0x0112] = turn
    file = io.BytesIO()
    image.save(file, kind, exif=exif)
    shown = ImageOps.exif_transpose(Image.open(file)).convert('RGB')
    np.testing.assert_array_equal(
        images.decode(file.getvalue(), 3, name='it'), np.asarray(shown)
    )
    self.assertEqual(
        images.probe(io.BytesIO(file.getvalue()), name='it'),
        (shown.height, shown.width, 3)
    )

  def test_white_of_a_grey_is_what_the_file_says(self):
    levels = np.array([[0, 2047, 4095]], np.uint16)
    encoded = io.BytesIO()
    Image.fromarray(levels).save(encoded, 'TIFF', tiffinfo={281: 4095})
    decoded = images.decode(encoded.getvalue(), 1, name='it')
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 127, 255])
    with self.assertLogs(level='WARNING') as said:
      images.decode(saved(Image.fromarray(levels), 'TIFF'), 1, name='dark.tif')
    self.assertIn('dark.tif has levels of grey up to 4095', said.output[0])

  def test_16_bits_become_8(self):
    levels = np.array([[0, 128, 257, 32896, 65407, 65535]], np.uint16)
    encoded = saved(Image.fromarray(levels), 'PNG')
    expected = [0, 0, 1, 128, 255, 255]
    np.testing.assert_array_equal(images.decode(encoded, 1)[0, :, 0], expected)
    np.testing.assert_array_equal(images.decode(encoded, 3)[0, :, 2], expected)

  def test_transparency_becomes_white(self):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 0] = 100
    pixels[0, :, 3] = 0, 255, 51
    encoded = saved(Image.fromarray(pixels), 'PNG')
    np.testing.assert_array_equal(
        images.decode(encoded, 3)[0],
        [[255, 255, 255], [100, 0, 0], [224, 204, 204]],
    )
    grey = Image.fromarray(np.array([[[9, 0], [9, 255]]], np.uint8), 'LA')
    np.testing.assert_array_equal(
        images.decode(saved(grey, 'PNG'), 1)[0, :, 0], [255, 9]
    )
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert('P')
    encoded = saved(palette, 'PNG', transparency=0)
    np.testing.assert_array_equal(
        images.decode(encoded, 3)[0], [[255, 255, 255], [1, 1, 1]]
    )

  def test_black_and_white(self):
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert('1')
    for channels in (1, 3):
      np.testing.assert_array_equal(
          images.decode(saved(bits, 'PNG'), channels)[0, :, 0], [0, 255]
      )

  @parameterized.parameters(
      (b'', 'it is empty'),
      (b'hello', 'no image format that Pillow knows'),
      (tiny_images.damage(tiny_images.encode(COLOUR)), 'truncated'),
      (tiny_images.damage(tiny_images.encode(COLOUR, 'JPEG')), ''),
      (saved(Image.fromarray(np.eye(4, dtype=np.float32)), 'TIFF'), 'real'),
      (saved(Image.new('I', (2, 2), 70_000), 'TIFF'), 'not from 0 to 65535'),
  )
  def test_damaged(self, encoded, reason):
    with self.assertRaisesRegex(
        images.Damaged,
        rf'^Image 7 cannot be read \(.*{reason}.*\).*--data.skip_damaged\.$',
    ):
      images.decode(encoded, 3, name='Image 7')

  def test_a_machine_without_memory_is_no_damage(self):
    encoded = tiny_images.encode(COLOUR)
    with mock.patch.object(Image, 'open', side_effect=MemoryError):
      with self.assertRaises(MemoryError):
        images.decode(encoded, 3)
      with self.assertRaises(MemoryError):
        images.probe(io.BytesIO(encoded), name='x')

  @parameterized.parameters(
      ('1', 1), ('L', 1), ('LA', 1), ('I;16', 1), ('RGB', 3), ('RGBA', 3),
      ('P', 3),
  )  # pyformat: disable
  def test_probe(self, mode, channels):
    picture = Image.fromarray(COLOUR).convert('L' if mode == 'I;16' else mode)
    if mode == 'I;16':
      picture = Image.fromarray(np.asarray(picture).astype(np.uint16))
    found = images.probe(io.BytesIO(saved(picture, 'PNG')), name='x')
    self.assertEqual(found, (20, 30, channels))

  def test_probe_of_a_grey_palette(self):
    encoded = tiny_images.encode(GREY, 'GIF')
    self.assertEqual(images.probe(io.BytesIO(encoded), name='x'), (20, 30, 1))
    with self.assertRaisesRegex(images.Damaged, 'x cannot be read'):
      images.probe(io.BytesIO(b'GIF'), name='x')


class FitTest(parameterized.TestCase):

  @parameterized.parameters(
      (300, 200, 224, 3), (200, 301, 224, 1), (40, 60, 96, 3),
      (50, 33, 32, 3), (20, 31, 32, 1), (64, 64, 48, 3),
  )  # pyformat: disable
  def test_is_a_resize_and_a_centre_crop(self, height, width, size, channels):
    image = tiny_images.pixels(2, (height, width, channels))
    result = images.fit(image, size)
    self.assertEqual(result.shape, (size, size, channels))
    # As torchvision does it: scale all of it, then cut.
    short = round(size * 256 / 224) if size > 64 else size
    scale = short / min(height, width)
    rows, columns = round(height * scale), round(width * scale)
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    whole = np.asarray(picture.resize((columns, rows), Image.BILINEAR))
    top, left = (rows - size) // 2, (columns - size) // 2
    expected = whole[top : top + size, left : left + size]
    difference = np.abs(result.reshape(expected.shape) - expected.astype(int))
    self.assertLess(difference.mean(), 1)
    self.assertLess(difference.max(), 6)

  def test_224_shows_the_middle_of_256(self):
    # A black frame of 16 pixels, at a short side of 256, is all gone but for
    # what the filter mixes in from half a pixel of it.
    image = np.zeros((512, 512, 3), np.uint8)
    image[31:481, 31:481] = 255
    np.testing.assert_array_equal(images.fit(image, 224), 255)
    image[31] = image[:, 31] = 0
    self.assertLess(images.fit(image, 224)[0].max(), 255)

  def test_nothing_to_do(self):
    image = tiny_images.pixels(3, (28, 28, 1))
    self.assertIs(images.fit(image, 28), image)
    wide = tiny_images.pixels(3, (28, 41, 1))
    np.testing.assert_array_equal(images.fit(wide, 28), wide[:, 6:34])

  @parameterized.parameters((1, 60_000), (60_000, 1), (1, 1), (3, 2))
  def test_extreme_shapes(self, height, width):
    image = np.full((height, width, 3), 7, np.uint8)
    np.testing.assert_array_equal(images.fit(image, 224), 7)
    rng = np.random.default_rng(0)
    result = images.random_resized_crop(rng, image, 224)
    self.assertEqual(result.shape, (224, 224, 3))
    np.testing.assert_array_equal(result, 7)


class RandomResizedCropTest(parameterized.TestCase):

  def test_parts(self):
    # Each pixel says where it is, so that a crop says what part it is.
    rows, columns = np.mgrid[0:200, 0:250]
    image = np.stack([rows, columns, rows], -1).astype(np.uint8)
    rng = np.random.default_rng(0)
    areas, ratios, corners = [], [], []
    for _ in range(400):
      part = images.random_resized_crop(rng, image, 32).astype(float)
      # The mean of outer rows and columns is half a target pixel from the edge.
      height = (part[-1, :, 0].mean() - part[0, :, 0].mean()) * 32 / 31
      width = (part[:, -1, 1].mean() - part[:, 0, 1].mean()) * 32 / 31
      areas.append(height * width / 50_000)
      ratios.append(width / height)
      corners.append((part[0, 0, 0], part[0, 0, 1]))
    self.assertBetween(min(areas), 0.07, 0.12)
    self.assertBetween(max(areas), 0.8, 1.02)
    # Uniform in 0.08 to 1 but that the largest do not always fit.
    self.assertBetween(np.mean(areas), 0.42, 0.56)
    self.assertBetween(min(ratios), 0.70, 0.80)
    self.assertBetween(max(ratios), 1.25, 1.42)
    self.assertBetween(np.mean(np.log(ratios)), -0.05, 0.08)
    self.assertLess(np.min(corners), 5)
    self.assertGreater(np.ptp(corners, axis=0).min(), 100)

  def test_same_draws_same_part(self):
    image = tiny_images.pixels(4, (60, 70, 1))
    one, two, other = (
        images.random_resized_crop(np.random.default_rng(seed), image, 24)
        for seed in (5, 5, 6)
    )
    self.assertEqual(one.shape, (24, 24, 1))
    np.testing.assert_array_equal(one, two)
    self.assertFalse(np.array_equal(one, other))

  def test_what_does_not_fit_is_the_centre(self):
    image = np.zeros((10, 1000, 3), np.uint8)
    image[:, 493:507] = 200  # 10 x 13 of it are the largest at 4/3.
    result = images.random_resized_crop(np.random.default_rng(0), image, 16)
    self.assertGreaterEqual(result.min(), 199)


class ReadAllTest(absltest.TestCase):

  def test_errors_keep_their_places(self):
    class Records:
      labels = np.zeros(3, np.int32)

      def __getitem__(self, index):
        if index == 1:
          raise images.Damaged('one')
        return COLOUR + index

    first, second, third = images.read_all(Records(), [2, 1, 0])
    np.testing.assert_array_equal(first, COLOUR + 2)
    self.assertRegex(str(second), re.escape('one'))
    np.testing.assert_array_equal(third, COLOUR)


if __name__ == '__main__':
  absltest.main()
