"""Tests of experiments.report and of the figures in experiments.plots."""

from html import parser
import pathlib
import re
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from autogrow_jax.run import history as history_lib
from experiments import report

_RESULT = {
    'method': 'autogrow', 'network': 'basic3', 'dataset': 'digits', 'seed': 0,
    'found': '2-1', 'params': 98042, 'macs': 13_900_000, 'growths': 1,
    'epochs': 4, 'val_accuracy': 95.4, 'test_accuracy': 94.913,
    'select_on': 'validation', 'train_macs': 1.5e12, 'wall_seconds': 3725.2,
    'params_digest': 'ab' * 32, 'versions': {'jax': '0.10.2'},
    'null_band': [94.1, 95.9], 'comparison': {'fixed': {'macs': 2e12}},
    'surprise': '<b>&"',
}
_VOID_TAGS = ('meta', 'br')


def _epoch(epoch: int, depths: list[int], **others) -> dict:
  return {
      'event': 'epoch', 'epoch': epoch, 'step': 10 * epoch + 10,
      'depths': depths, 'learning_rate': 0.1, 'phase': 'finetuning',
      'train_loss': 2.0 / (epoch + 1), 'train_correct': 50 + epoch,
      'train_total': 100, 'train_metrics': {'accuracy': 50.0 + epoch},
      'loss': 'nan' if epoch == 1 else 2.0, 'correct': 40 + epoch, 'total': 80,
      'metrics': {'accuracy': 50.0 + epoch}, 'best': 40 + epoch,
      'params': 78042, 'macs': 12_500_000, 'train_macs': 1e9 * epoch,
      'eval_macs': 1e8 * epoch, 'wall_seconds': 2.0 * epoch,
      'compile_seconds': 1.0, 'compile_count': 1, **others,
  }


def _history(*, epochs: int = 4, grows: bool = True) -> list[dict]:
  """A run that grows after its second epoch."""
  records = []
  depths = [1, 1]
  for epoch in range(epochs):
    phase = 'growing' if grows and epoch < 3 else 'finetuning'
    records.append(_epoch(epoch, list(depths), phase=phase))
    if grows and epoch == 1:
      depths[0] += 1
      records.append({
          'event': 'grow', 'epoch': 1, 'step': 20, 'depths': list(depths),
          'stage': 0, 'block': 's0b1', 'note': 'Zero<Init>',
          'params_before': 78042, 'params_after': 98042,
          'macs_before': 12.5e6, 'macs_after': 13.9e6,
          'loss_before': 0.45671, 'loss_after': 'inf',
          'logits_change_eval': 0.0, 'logits_change_train': 1.2e-7,
          'optimizer': {'kept': 24, 'new': 6, 'dropped': 0},
      })
      records.append({
          'event': 'stop', 'epoch': 1, 'step': 20, 'depths': list(depths),
          'stage': 1, 'reason': 'window',
      })
  records.append({
      'event': 'end', 'epoch': epochs, 'step': 0, 'depths': depths
  })
  return records


class _Checker(parser.HTMLParser):
  """Collects text and links, and fails on tags that do not match."""

  def __init__(self):
    super().__init__()
    self.open, self.links, self.ids, self.tags, self.text = [], [], [], [], ''

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag not in _VOID_TAGS:
      self.open.append(tag)
    for name, value in attrs:
      if name in ('src', 'href', 'xlink:href'):
        self.links.append(value)
      if name == 'id':
        self.ids.append(value)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in _VOID_TAGS:
      self.open.pop()

  def handle_endtag(self, tag):
    if self.open.pop() != tag:
      raise AssertionError(f'</{tag}> closes another tag.')

  def handle_data(self, data):
    self.text += data


def _check(page: str) -> _Checker:
  checker = _Checker()
  checker.feed(page)
  checker.close()
  if checker.open:
    raise AssertionError(f'{checker.open} are left open.')
  return checker


def _render(history=None, result=None, config=None) -> str:
  return report.render(
      config=config or {'model': {'name': 'basic3'}},
      history=_history() if history is None else history,
      result=_RESULT if result is None else result,
  )


class ReportTest(parameterized.TestCase):

  def test_is_self_contained_and_well_formed(self):
    page = _render()
    checker = _check(page)
    self.assertEqual(checker.tags.count('svg'), 3)
    self.assertNotIn('script', checker.tags)
    for link in checker.links:
      self.assertStartsWith(link, '#')
    self.assertLen(set(checker.ids), len(checker.ids))
    self.assertNotRegex(page, r'@import|url\((?!#)')
    for address in re.findall(r'https?://\S+', page):
      self.assertStartsWith(address, 'http://www.w3.org/')  # XML names.

  def test_is_deterministic(self):
    self.assertEqual(_render(), _render())

  def test_shows_the_result(self):
    text = _check(_render()).text
    for expected in (
        'autogrow basic3 on digits: 2-1', '94.91 %', '98,042 (98.0 k)',
        '1 h 02 min', '0.10.2', '2,000,000,000,000 (2.00 T)', 'surprise',
        '<b>&"', '94.1, 95.9',
    ):
      self.assertIn(expected, text)

  def test_names_the_protocol_of_the_paper(self):
    result = {
        **_RESULT, 'select_on': 'test', 'protocol': 'paper_compat',
        'best_test_accuracy': 96.875, 'best_val_accuracy': 96.875,
    }
    text = _check(_render(result=result)).text
    self.assertIn('The protocol of the paper (--paper_compat).', text)
    self.assertIn('96.88 %best test accuracy of any epoch', text)
    self.assertIn('Protocolpaper_compat', text)
    clean = _check(_render(result={**_RESULT, 'protocol': 'holdout'})).text
    self.assertNotIn('of the paper', clean)
    self.assertIn('95.40 %validation accuracy', clean)

  def test_shows_growths(self):
    text = _check(_render()).text
    for expected in (
        '78.0 k → 98.0 k', '12.5 M → 13.9 M', '0.4567 → inf', '24 / 6 / 0',
        'Zero<Init>', '0 / 1.2e-07', 'stage 1 stops growing',
    ):
      self.assertIn(expected, text)

  def test_escapes(self):
    evil = '</pre><script>alert(1)</script>'
    page = _render(
        config={evil: evil}, result={'method': evil, evil: {evil: [evil]}}
    )
    self.assertNotIn('script', _check(page).tags)

  @parameterized.parameters(('test', True), ('validation', False))
  def test_warns_of_decisions_on_the_test_set(self, select_on, warns):
    text = _check(_render(result={**_RESULT, 'select_on': select_on})).text
    warning = 'taken on the test set (--data.select_on=test)'
    self.assertEqual(warning in text, warns)

  @parameterized.named_parameters(
      ('nothing', []),
      ('no_growth', _history(grows=False)),
      ('one_epoch', _history(epochs=1)),
      ('stages_change', [_epoch(1, [1, 2]), _epoch(2, [1])]),
      ('no_stages', [_epoch(1, [])]),
      ('no_numbers', [_epoch(1, [1], loss=None, train_metrics={})]),
  )
  def test_short_histories(self, history):
    _check(_render(history=history, result={}))

  def test_metric_of_a_task_of_ones_own(self):
    history = [_epoch(1, [1], metrics={'error': 0.5})]
    result = {**_RESULT, 'val_error': 0.51234, 'test_error': 0.25}
    text = _check(_render(history=history, result=result)).text
    self.assertIn('Error and loss by epoch', text)
    self.assertIn('0.25test error0.5123validation error94.91 %test acc', text)
    self.assertIn('Validation error0.51234', text)

  def test_widths(self):
    """Of a run that grows channels: widths for depths, and its estimates."""
    history = _history()
    for record in history:
      first = 4 if record['epoch'] < 2 else 6
      record['widths'] = {'first': first, 'second': 5}
    (growth,) = [r for r in history if r['event'] == 'grow']
    growth['initializer'] = {
        'estimated_change': -0.25, 'actual_change': -0.24,
    }
    page = _check(_render(history=history))
    self.assertIn('first (6)', page.text)
    self.assertIn('second (5)', page.text)
    self.assertIn('each growth step lowered the loss', page.text)
    self.assertNotIn('Blocks of each stage', page.text)

  def test_write_leaves_one_file_and_the_style_alone(self):
    import matplotlib  # pylint: disable=g-import-not-at-top

    before = dict(matplotlib.rcParams)
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    history_lib.write_json(folder / 'config.json', {'setting': 'from config'})
    history_lib.write_json(folder / 'result.json', _RESULT)
    lines = [history_lib.dumps(record) + '\n' for record in _history()]
    (folder / 'history.jsonl').write_text(''.join(lines))
    known = {path.name for path in folder.iterdir()}
    for _ in range(2):
      report.write(folder)
    page = (folder / 'report.html').read_text(encoding='utf-8')
    self.assertEqual(page, _render(config={'setting': 'from config'}))
    self.assertEqual(
        {path.name for path in folder.iterdir()}, known | {'report.html'}
    )
    self.assertEqual(dict(matplotlib.rcParams), before)

  def test_without_matplotlib(self):
    with mock.patch.dict(sys.modules, {'matplotlib': None}):
      checker = _check(_render())
    self.assertNotIn('svg', checker.tags)
    self.assertIn(
        "Figures need matplotlib: pip install 'autogrow-jax[report]'.",
        checker.text,
    )
    self.assertIn('94.91 %', checker.text)

  def test_imports_matplotlib_late_and_never_pyplot(self):
    code = (
        'import sys; from experiments import report;'
        ' assert "matplotlib" not in sys.modules;'
        ' report.render(config={}, history=[{"event": "epoch", "epoch": 1,'
        ' "step": 1, "depths": [1], "metrics": {"error": 1}}], result={});'
        ' assert "matplotlib" in sys.modules;'
        ' assert "matplotlib.pyplot" not in sys.modules'
    )
    root = pathlib.Path(__file__).parent.parent
    subprocess.run([sys.executable, '-c', code], cwd=root, check=True)


if __name__ == '__main__':
  absltest.main()
