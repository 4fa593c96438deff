"""How likely a model finds given tokens, for batches of any lengths.

By whole forward passes, so that every pattern and every platform serves. Sequences are sorted by
length and filled up behind their end, where causal attention does not look, to powers of two: a
program is compiled for each of these lengths, not for each sequence.
"""

from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from gqa_scaling.config import require
from gqa_scaling.costs import LOGIT_BYTES
from gqa_scaling.model.einsum import einsum_f32, full_precision
from gqa_scaling.model.transformer import Transformer

SHORTEST = 32  # tokens that shorter sequences are filled up to


class Scorer:
    """A model that reads at most `longest` tokens, on `rows` sequences at a time."""

    def __init__(self, model: Transformer, longest: int, rows: int) -> None:
        require(longest > 0, f"max_length={longest} must be greater than 0")
        require(rows > 0, f"batch_size={rows} must be greater than 0")
        self.longest, self.rows = longest, rows
        graph, self._parameters = nnx.split(model)

        def score(
            parameters: nnx.State, tokens_BT: jax.Array, targets_BT: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            """Log-likelihood of each target in nats, and whether no token is more likely."""
            with full_precision(model.config.dtype):
                return scored(nnx.merge(graph, parameters), tokens_BT, targets_BT)

        def scored(
            model: Transformer, tokens_BT: jax.Array, targets_BT: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            hidden_BTD, table_VD = model(tokens_BT), model.output_table()
            table_VD = table_VD.astype(hidden_BTD.dtype)

            def of_one(token: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                hidden_D, target = token
                logits_V = einsum_f32("D,VD->V", hidden_D, table_VD)
                likely = logits_V[target] - jax.nn.logsumexp(logits_V)
                return likely, logits_V.argmax() == target

            tokens_N = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1)
            at_once = max(1, LOGIT_BYTES // (4 * len(table_VD)))
            likely_N, best_N = jax.lax.map(of_one, tokens_N, batch_size=at_once)
            return likely_N.reshape(targets_BT.shape), best_N.reshape(targets_BT.shape)

        self._score = jax.jit(score)

    def loglikelihoods(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation) the log-likelihood of the continuation in nats, and
        whether it is what the model would write, one likeliest token after another.

        Contexts hold at least one token; of one that is too long the beginning is left out. Raises
        UserError for a continuation of more than `longest` tokens.
        """
        whole = []
        for context, continuation in requests:
            require(len(context) > 0, "a context must hold at least one token")
            require(
                0 < len(continuation) <= self.longest,
                f"a continuation of {len(continuation)} tokens must hold 1 to {self.longest}",
            )
            whole.append([*context, *continuation][-(self.longest + 1) :])
        out: list[tuple[float, bool]] = [(0.0, False)] * len(whole)
        order = sorted(range(len(whole)), key=lambda i: -len(whole[i]))
        for start in range(0, len(order), self.rows):
            batch = order[start : start + self.rows]
            # all are filled up to a power of two
            time = min(max(SHORTEST, 1 << (len(whole[batch[0]]) - 2).bit_length()), self.longest)
            tokens_BT, targets_BT = np.zeros((2, self.rows, time), np.int32)
            for row, i in enumerate(batch):
                tokens_BT[row, : len(whole[i]) - 1] = whole[i][:-1]
                targets_BT[row, : len(whole[i]) - 1] = whole[i][1:]
            likely_BT, best_BT = jax.device_get(
                self._score(self._parameters, tokens_BT, targets_BT)
            )
            for row, i in enumerate(batch):
                end = len(whole[i]) - 1
                mine = slice(end - len(requests[i][1]), end)
                total = float(likely_BT[row, mine].sum(dtype=np.float64))
                out[i] = total, bool(best_BT[row, mine].all())
        return out
