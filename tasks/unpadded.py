"""Rows of different lengths computed without their padding.

Everything in a plain transformer but attention treats each token by itself: it is given the tokens of all rows in one line. Attention is given
rows, in a grid of (rows, longest), and its result goes back into the line. So a batch may hold rows of any lengths, which learns better than
rows of one length do, and costs what its tokens cost.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

IN_LINE = "in_line."  # transformers' name of an attention of ours, before that of what it is made from
# Of transformers' model types those that were seen to compute the same in a line. Others have layers in which a token meets those before it
# (convolutions, states), or do not hand on to attention where the rows are.
PLAIN = ("llama", "qwen2", "qwen3", "gemma", "phi3", "olmo2", "granite", "smollm3")


class Line(NamedTuple):
    """Where the tokens of right-padded rows are.

    `places`, (tokens,), are those in the flattened rows; a few more repeat the first token, which nobody reads. `grid`, (rows, longest),
    says where in the line a place of the rows is; padding has the place of the row's last token.
    """

    places: Any
    grid: Any

    def arguments(self, model: Any) -> dict[str, Any]:
        """What the decoder of a model that `let_in_line` has prepared is given beside the tokens."""
        import torch

        longest = self.grid.shape[1]
        # A row's padding is behind it, where none of its tokens looks.
        future = torch.ones(longest, longest, dtype=torch.bool, device=self.grid.device).triu(1)
        mask = torch.zeros(1, 1, longest, longest, dtype=model.dtype, device=self.grid.device).masked_fill(
            future, torch.finfo(model.dtype).min
        )
        return {
            "position_ids": (self.places % longest)[None],
            "attention_mask": mask,  # of four dimensions: taken as it is
            "line_places": self.places,
            "line_grid": self.grid,
        }


def in_line(mask: Any, step: int) -> Line:
    """The line of rows whose tokens a mask of (rows, longest) shows; its length is a multiple of `step`."""
    from torch.nn.functional import pad

    places = mask.flatten().nonzero()[:, 0]
    grid = mask.flatten().cumsum(0).sub(1).clamp(min=0).view(mask.shape)
    return Line(pad(places, (0, -len(places) % step)), grid)


def let_in_line(model: Any) -> None:
    """Let the attention that a model was loaded with, `eager` or `sdpa`, take tokens in a line too, if the model is of a `PLAIN` type."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if model.config.model_type not in PLAIN:
        return
    kernel = model.config._attn_implementation
    module = type(model.get_decoder()).__module__
    of_rows = ALL_ATTENTION_FUNCTIONS.get_interface(kernel, sys.modules[module].eager_attention_forward)
    name = f"{IN_LINE}{kernel}.{module}"
    AttentionInterface.register(name, _attention(of_rows))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    model.set_attn_implementation(name)


def takes_lines(model: Any, longest: int) -> bool:
    """Whether a model takes rows of so many tokens in a line: the mask of a line knows of no window that ends before."""
    window = getattr(model.config, "sliding_window", None)
    return str(model.config._attn_implementation).startswith(IN_LINE) and (not window or longest <= window)


def _attention(of_rows: Any) -> Any:
    """Attention to tokens in a line, from a model's own attention to rows."""

    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any, line_places: Any = None, line_grid: Any = None, **more: Any
    ) -> Any:
        if line_grid is None:
            return of_rows(module, query, key, value, mask, **more)
        rows = [states[0][:, line_grid].transpose(0, 1) for states in (query, key, value)]  # (rows, heads, longest, width)
        output, weights = of_rows(module, *rows, mask, **more)
        return output.flatten(0, 1)[line_places][None], weights

    return attend
