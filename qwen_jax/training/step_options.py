"""How a train step computes: a value that a run's configuration fills in."""

import dataclasses
from typing import get_args

from qwen_jax.errors import UserError
from qwen_jax.nn.router import Assignment, RouterOptions
from qwen_jax.training.balancing import BalanceOptions
from qwen_jax.training.checks import Bounds, check_fields
from qwen_jax.training.layers import Remat

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How a step computes; clipping, schedules and decay are the optimiser's.

    Attributes:
      dtype: of the parameters' copy and the activations.
      scan: whether layers of a kind are compiled once and scanned over their stacked weights, or
        compiled one by one, which on CPU spares time.
      remat: what is kept for the backward pass, as `training.layers.run_layers` has it.
      microbatches: parts of the batch that are computed one after another, their gradients summed
        in float32. The update is that of the whole batch; where a balancing loss counts, the parts
        run forward once more, before, to learn how the whole batch uses the experts.
      z_loss: coefficient of the softmax's squared log denominator, mean over tokens.
      balance: how experts are kept in use.
      router: how tokens and experts come together in training; evaluations take each token's
        likeliest experts, without noise and drop nothing.
      mtp_loss: coefficient of the mean cross entropy of the tokens further on, where the model has
        a head for them (arXiv 2412.19437, section 2.2). With 0 the head is not trained.
      block_size: tokens of a device whose logits it holds at once.

    Raises:
      UserError: a value that none of these can have.
    """

    dtype: str = "bfloat16"
    scan: bool = True
    remat: Remat = "full"
    microbatches: int = 1
    z_loss: float = 0.0
    balance: BalanceOptions = dataclasses.field(default_factory=BalanceOptions)
    router: RouterOptions = dataclasses.field(default_factory=RouterOptions)
    mtp_loss: float = 0.1
    block_size: int = 1024

    def __post_init__(self):
        some, coefficient = Bounds(least=1), Bounds(least=0)
        check_fields(
            self,
            dtype=DTYPES,
            remat=get_args(Remat),
            z_loss=coefficient,
            mtp_loss=coefficient,
            block_size=some,
            microbatches=some,
        )
        if self.router.assignment == Assignment.EXPERT_CHOICE and self.balance.form == "first":
            raise UserError(
                "balance.form = first: with router.assignment = expert_choice no expert of a token "
                "is its first; take form = all"
            )
