"""`RunState`: where a run is, as one immutable value."""

import dataclasses
from typing import Any, Self

from autogrow_jax import architecture as architecture_lib
from autogrow_jax import costs
from autogrow_jax import policies
from autogrow_jax import state as state_lib
from autogrow_jax import view
from autogrow_jax.networks import base as networks_base
from autogrow_jax.run import parallel as parallel_lib

Architecture = architecture_lib.Architecture


@dataclasses.dataclass(frozen=True, eq=False)
class Progress:
  """The part of a run's state that is not an array.

  Attributes:
    architecture: current architecture, of the canonical state.
    policy: state of the policy.
    phase: 'growing', 'finetuning' (after it), or 'training' (nothing grows).
    step: number of training steps done.
    epoch: number of epochs finished.
    phase_epoch: number of epochs finished in this phase.
    best: largest number of correct selection examples after any epoch.
    ledger: costs so far.
    records: number of records in the history.
    skipped: damaged training images skipped in the current epoch.
    twin: architecture of the ungrown twin; None without one.
  """

  architecture: Architecture
  policy: policies.Policy
  phase: str
  step: int = 0
  epoch: int = 0
  phase_epoch: int = 0
  best: int = 0
  ledger: costs.Ledger = costs.Ledger()
  records: int = 0
  skipped: int = 0
  twin: Architecture | None = None

  def to_documents(self) -> dict[str, Any]:
    """JSON documents for a checkpoint."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return {
        'architecture': fields.pop('architecture').to_json(),
        'policy': fields.pop('policy').to_json(),
        'progress': {
            **fields,
            'ledger': dataclasses.asdict(self.ledger),
            'twin': self.twin and self.twin.to_json(),
        },
    }

  @classmethod
  def from_documents(
      cls, documents: dict[str, Any], policy_type: type[policies.Policy]
  ) -> Self:
    """Makes it of what `to_documents` gave."""
    progress = dict(documents['progress'])
    twin = progress.pop('twin', None)
    return cls(
        twin=twin and Architecture.from_json(twin),
        architecture=Architecture.from_json(documents['architecture']),
        policy=policy_type.from_json(documents['policy']),
        ledger=costs.Ledger(**progress.pop('ledger')),
        **progress,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class RunState:
  """Where a run is: arrays on the devices, and progress.

  A training step consumes the arrays of the state that it starts from.

  Attributes:
    progress: everything that is not an array.
    layout: layout of the packed arrays.
    packed: the packed `TrainState`, on the devices.
    depths: depths of the layout, for programs, on the devices.
    meters: sums over the current epoch, on the devices.
    active: part of the canonical state that is computed; None for all.
    canonical: the canonical state if only a part of it is computed, else None.
    twin: canonical state of the ungrown twin, on the host; None without one.
  """

  progress: Progress
  layout: view.Layout
  packed: Any
  depths: Any
  meters: Any
  active: view.Active | None
  canonical: state_lib.TrainState | None
  twin: state_lib.TrainState | None = None

  @property
  def cost(self) -> tuple[int, int]:
    """Parameters and multiply-adds of the active network."""
    chosen: tuple[Any, ...] = ()
    if self.active is not None:
      chosen = self.active.counts, self.active.blocks
    architecture = self.progress.architecture
    return tuple(
        count(architecture, *chosen) for count in (costs.params, costs.macs)
    )

  def with_progress(self, **changes: Any) -> Self:
    """The state with other progress."""
    progress = dataclasses.replace(self.progress, **changes)
    return dataclasses.replace(self, progress=progress)

  def fetch(self, parallel: parallel_lib.Parallel) -> state_lib.TrainState:
    """Copies the canonical state to the host."""
    state = view.unpack(parallel.fetch(self.packed), self.layout)
    return self._whole(state, self.canonical)

  def own(self, parallel: parallel_lib.Parallel) -> tuple[Any, Any]:
    """Copies the method's own leaves, (trainable, other), to the host."""
    part = lambda state: (state.params['aux'], state.stats['method'])
    own = parallel.fetch(part(self.packed))
    return self._whole(own, self.active and part(self.canonical))

  def rewound(self) -> Self:
    """The state at the beginning of a text."""
    stats = self.packed.stats
    network = networks_base.rewound(stats['network'])
    packed = self.packed.replace(stats={**stats, 'network': network})
    return dataclasses.replace(self, packed=packed)

  def _whole(self, computed: Any, canonical: Any) -> Any:
    """The canonical form of a tree of which a part may be computed."""
    if self.active is None:
      return computed
    return self.active.put(computed, canonical)


def running(meters: Any) -> tuple[float, float]:
  """Mean loss, and accuracy in percent, of an epoch so far."""
  total = max(1, int(meters['total']))
  return float(meters['loss_sum']) / total, 100 * int(meters['correct']) / total
