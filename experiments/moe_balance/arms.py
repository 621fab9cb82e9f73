"""The arms of the study: ways to balance, each a few settings that `tools.train` has as well."""

import dataclasses

from qwen_jax.errors import UserError
from qwen_jax.nn.router import Assignment, RouterOptions
from qwen_jax.training.balancing import BalanceOptions

# Rows of a micro-batch, all of one domain.
MICROBATCH_ROWS = 4


@dataclasses.dataclass(frozen=True)
class Experts:
    """What a layer's experts are; the same numbers at work for each token in all.

    Attributes:
      num_experts, num_experts_per_tok, intermediate_size, renormalise: as `MoeSpec` has them.
      shared_intermediate_size: of the expert that every token goes to; None for none.
    """

    num_experts: int = 16
    num_experts_per_tok: int = 2
    intermediate_size: int = 32
    renormalise: bool = True
    shared_intermediate_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of an arm's training.

    Attributes:
      until: the part of all steps at which it ends.
      balance: how experts are kept in use; None for a dense model, out of whose feed-forward blocks
        the next phase's experts are cut.
      router: how tokens and experts come together.
    """

    until: float
    balance: BalanceOptions | None
    router: RouterOptions = dataclasses.field(default_factory=RouterOptions)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
      name: in reports.
      phases: one after another, the last until the end.
      experts: of its layers.
    """

    name: str
    phases: tuple[Phase, ...]
    experts: Experts = Experts()

    @property
    def balance(self) -> BalanceOptions:
        """Of the last phase."""
        return self.phases[-1].balance

    @property
    def router(self) -> RouterOptions:
        """Of the last phase."""
        return self.phases[-1].router


def _balance(loss: float = 0.0, **options) -> BalanceOptions:
    return BalanceOptions(loss, microbatch_rows=MICROBATCH_ROWS, num_domains=8, **options)


def _arm(name: str, loss: float = 0.0, experts: Experts = Experts(), **options) -> Arm:
    router = options.pop("router", RouterOptions())
    return Arm(name, (Phase(1.0, _balance(loss, **options), router),), experts)


def _switch(name: str, at: float) -> Arm:
    # The parts of the arm that balances micro-batches, which is trained but once.
    before = tuple(Phase(until, _balance(0.1, group="micro")) for until in SWITCHES if until <= at)
    return Arm(name, (*before, Phase(1.0, _balance(0.1))))


# Where an arm goes over from micro-batches to all of the batch, as parts of the steps.
SWITCHES = (0.5, 0.8)
NONE, MICRO, GLOBAL, LOSS_FREE = "none", "micro 0.1", "global 0.1", "loss-free sign 0.001"

ARMS: tuple[Arm, ...] = (
    _arm(NONE),
    _arm("sequence 0.1", 0.1, group="sequence"),
    _arm("micro 0.001", 0.001, group="micro"),
    _arm("micro 0.01", 0.01, group="micro"),
    Arm(MICRO, tuple(Phase(until, _balance(0.1, group="micro")) for until in (*SWITCHES, 1.0))),
    _arm("micro 1", 1.0, group="micro"),
    _arm("global 0.001", 0.001),
    _arm("global 0.01", 0.01),
    # As far from the arm before as rounding: what lies within its difference is noise.
    _arm("global 0.01001", 0.01001),
    _arm(GLOBAL, 0.1),
    _arm("global 1", 1.0),
    _arm("shuffled 0.1", 0.1, group="shuffled"),
    _arm("buffer 0.1", 0.1, group="buffer"),
    _arm("global 0.1 + micro 0.001", 0.1, complement=0.001, complement_group="micro"),
    _switch("micro 0.1 then global at 50%", SWITCHES[0]),
    _switch("micro 0.1 then global at 80%", SWITCHES[1]),
    _arm(LOSS_FREE, bias_rate=0.001),
    _arm("loss-free sign 0.01", bias_rate=0.01),
    _arm("loss-free proportional 0.001", bias_rate=0.001, bias_update="proportional"),
    _arm("loss-free proportional 0.01", bias_rate=0.01, bias_update="proportional"),
    _arm("loss-free proportional 0.1", bias_rate=0.1, bias_update="proportional"),
    _arm("loss-free sign 0.001 by micro counts", bias_rate=0.001, bias_group="micro"),
    _arm("loss-free sign 0.001 + sequence 0.001", bias_rate=0.001, complement=0.001),
    _arm("z-loss 0.001", z_loss=0.001),
    _arm("similarity 0.01", similarity=0.01),
    _arm("noise 0.1", router=RouterOptions(noise=0.1)),
    _arm("capacity 1", router=RouterOptions(capacity_factor=1.0)),
    _arm("Sinkhorn", router=RouterOptions(Assignment.SINKHORN)),
    _arm("BASE", router=RouterOptions(Assignment.BASE, rows=MICROBATCH_ROWS)),
    _arm("expert choice", router=RouterOptions(Assignment.EXPERT_CHOICE, rows=1)),
    _arm("global 0.01 raw top-k", 0.01, Experts(renormalise=False)),
    _arm("global 0.01 fine-grained", 0.01, Experts(32, 4, 16)),
    _arm("global 0.01 shared expert", 0.01, Experts(16, 1, 32, False, 32)),
    Arm("global 0.01 upcycled", (Phase(0.5, None), Phase(1.0, _balance(0.01)))),
)  # fmt: skip


def find_arms(names: list[str] | None) -> tuple[Arm, ...]:
    """The arms of these names, or all; the one that others are compared with is always there.

    Raises:
      UserError: a name that no arm has.
    """
    if names is None:
        return ARMS
    known = {arm.name: arm for arm in ARMS}
    for name in names:
        if name not in known:
            raise UserError(f"--arms: {name!r} is no arm; known: {'; '.join(known)}")
    return tuple(arm for arm in ARMS if arm.name in (NONE, *names))
