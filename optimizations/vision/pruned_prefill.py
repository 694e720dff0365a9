"""Running the text tower of a vision-language model on fewer visual tokens, invisibly to its caller.

Outside, everything stays in the coordinates of the full prompt: `generate` keeps its input ids, masks and
position ids, and hidden states come back with the full length. Inside, the text tower and its cache hold only
the surviving columns.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch

Select = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the head of a prompt went: its `full` columns up to the last visual one, packed and padded left.

    What follows the head is left alone, so that tokens drafted behind the prompt can be taken back.
    `columns` int64 [B, kept] names the source column of each slot (0 where `valid`, bool [B, kept], is False);
    `source` int64 [B, full] names, for each column of the head, the slot of its nearest survivor before it;
    `real` int64 [B] counts the head's unpadded tokens per row, dropped ones included; `anchor` is a row whose
    image ends the head, `anchor_position` the rotary position of its first column after the head.
    """

    columns: torch.Tensor
    valid: torch.Tensor
    source: torch.Tensor
    real: torch.Tensor
    anchor: int = 0
    anchor_position: int = 0

    @property
    def full(self) -> int:
        return self.source.shape[1]

    @property
    def kept(self) -> int:
        return self.columns.shape[1]

    @property
    def dropped(self) -> int:
        """Columns by which the cache is shorter than what was given."""
        return self.full - self.kept

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Surviving columns of `values`: [B, full + n, ...] as [B, kept + n, ...]."""
        return torch.cat([values[_rows(self.columns), self.columns], values[:, self.full :]], dim=1)

    def scatter_back(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, kept + n, H] as [B, full + n, H]; a dropped column repeats its nearest survivor before it."""
        return torch.cat([hidden[_rows(self.source), self.source], hidden[:, self.kept :]], dim=1)

    def mask(self, later: torch.Tensor) -> torch.Tensor:
        """Attention mask int64 [rows, kept + n]: `later` is that of the n columns after the head; its rows
        may be a multiple of this batch (beams, samples)."""
        valid = self.valid.repeat_interleave(len(later) // len(self.valid), dim=0)
        return torch.cat([valid.long(), later.to(valid.device, torch.int64)], dim=1)


def layout(keep: torch.Tensor, real: torch.Tensor) -> Layout:
    """Pack the columns that are kept and real.

    Args:
        keep, real: bool [B, full]; `real` is False on padding.
    """
    live = keep & real
    counts = live.sum(1, keepdim=True)
    width = int(counts.max())
    hole = width - counts
    slots = torch.arange(width, device=live.device)[None]
    order = live.to(torch.uint8).sort(dim=1, stable=True, descending=True).indices
    columns = order.gather(1, (slots - hole).clamp(min=0))
    valid = slots >= hole
    source = ((live.cumsum(1) - 1).clamp(min=0) + hole).clamp(max=width - 1)
    return Layout(columns.masked_fill(~valid, 0), valid, source, real.sum(1))


def _rows(columns: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(columns), device=columns.device)[:, None]


def keep_mask(embeds: torch.Tensor, visual: torch.Tensor, select: Select) -> torch.Tensor:
    """bool [B, L]: every text column, and of each image (a run of `visual`) what `select` names.

    Args:
        embeds: [B, L, H] after the visual features went in.
        visual: bool [B, L].
        select: features [n, H] of one image → kept indices.
    """
    keep = ~visual
    for row, start, end in runs(visual):
        keep[row, start + select(embeds[row, start:end])] = True
    return keep


def runs(visual: torch.Tensor) -> list[tuple[int, int, int]]:
    """(row, start, end) of each run of True: one image or one video frame, as separators stand between."""
    padded = torch.nn.functional.pad(visual.to(torch.int8), (1, 1))
    change = padded.diff(dim=1)
    starts, ends = (change == 1).nonzero().tolist(), (change == -1).nonzero().tolist()
    return [(row, start, end) for (row, start), (_, end) in zip(starts, ends, strict=True)]


class PrunedTextTower:
    """Replacement of `language_model.forward` and of `compute_3d_position_ids` of one Qwen3-VL model."""

    def __init__(self, model: Any, select: Select) -> None:
        self.model = model
        self.select = select
        self.forward_full = model.language_model.forward
        self.positions_full = model.compute_3d_position_ids
        self.layouts: weakref.WeakKeyDictionary[Any, Layout] = weakref.WeakKeyDictionary()

    def forward(self, *ids: Any, **arguments: Any) -> Any:
        """The text tower's forward; Qwen3-VL passes keyword arguments only."""
        if ids:
            return self.forward_full(*ids, **arguments)
        cache = arguments.get("past_key_values")
        past = _length(cache)
        if cache is not None and not past:
            self.layouts.pop(cache, None)  # a cache that was reset and is used again
        visual = arguments.get("visual_pos_masks")
        if visual is None or not bool(visual.any()):
            known = self._layout_of(cache, past)
            return self.forward_full(**arguments) if known is None else self._continue(known, past, arguments)
        if past:
            raise ValueError(
                f"visual_token_pruning cannot add images to a cache that already holds {past} tokens (a second "
                "turn, or chunked prefill): pass the whole conversation without past_key_values, and "
                "prefill_chunk_size=None"
            )
        return self._prefill(visual, arguments)

    def positions(self, input_ids: Any, inputs_embeds: Any, **arguments: Any) -> torch.Tensor | None:
        """M-RoPE ids [3, B, q] in coordinates of the full prompt, also when the cache is shorter."""
        cache = arguments.get("past_key_values")
        past = _length(cache)
        known = self._layout_of(cache, past)
        if known is None or self.model.rope_deltas is None:
            return self.positions_full(input_ids=input_ids, inputs_embeds=inputs_embeds, **arguments)
        rows, length = inputs_embeds.shape[:2]
        mask = arguments.get("attention_mask")
        if mask is None or mask.ndim != 2:  # every column after the head counts as a token
            later = known.real.new_ones(rows, past - known.kept + length)
            before = known.real.repeat_interleave(rows // len(known.real))[:, None]
            text = before + later.cumsum(1) - 1
        else:
            text = mask.long().cumsum(1) - 1
        deltas = self.model.rope_deltas.to(text.device)
        text = text[:, -length:] + deltas.repeat_interleave(rows // len(deltas), 0)
        return text[None].expand(3, -1, -1)

    def _layout_of(self, cache: Any, past: int) -> Layout | None:
        return self.layouts.get(cache) if past else None

    def _prefill(self, visual: torch.Tensor, arguments: dict[str, Any]) -> Any:
        embeds = arguments["inputs_embeds"]
        visual = visual.to(embeds.device)
        keep = keep_mask(embeds, visual, self.select)
        if bool(keep.all()):
            return self.forward_full(**arguments)
        real = _real(arguments.get("attention_mask"), embeds)
        head = int(visual.any(0).nonzero().max()) + 1
        where = layout(keep[:, :head], real[:, :head])
        mask = where.mask(real[:, head:])
        stay = keep[visual]
        deepstack = arguments.get("deepstack_visual_embeds") or []
        outputs = self.forward_full(
            **{
                **arguments,
                "inputs_embeds": where.gather(embeds),
                "visual_pos_masks": where.gather(visual) & mask.bool(),
                "deepstack_visual_embeds": [layer[stay.to(layer.device)] for layer in deepstack],
                "attention_mask": mask,
                "position_ids": _positions(arguments.get("position_ids"), where, mask),
            }
        )
        cache = outputs[1] if isinstance(outputs, tuple) else outputs.past_key_values
        if cache is not None:
            self.layouts[cache] = _anchored(where, visual, arguments.get("position_ids"))
        return _with_hidden(outputs, where.scatter_back)

    def _continue(self, known: Layout, past: int, arguments: dict[str, Any]) -> Any:
        embeds = arguments["inputs_embeds"]
        rows, length = embeds.shape[:2]
        positions = arguments.get("position_ids")
        fresh = _fresh(known, past, length, positions)
        mask = arguments.get("attention_mask")
        later = embeds.new_ones(rows, past - known.kept + fresh)
        if mask is not None and mask.ndim == 2:
            later = mask[:, known.full :]
        outputs = self.forward_full(
            **{
                **arguments,
                "inputs_embeds": embeds[:, length - fresh :],
                "attention_mask": known.mask(later),
                "position_ids": None if positions is None else positions[..., length - fresh :],
            }
        )
        if fresh == length:
            return outputs
        source = (torch.arange(length, device=embeds.device) - (length - fresh)).clamp(min=0)
        return _with_hidden(outputs, lambda hidden: hidden[:, source])


def _fresh(known: Layout, past: int, length: int, positions: torch.Tensor | None) -> int:
    """How many of the last `length` tokens the cache lacks, by the rotary position of the last one: `generate`,
    continuing an earlier call, counts cached columns and so feeds as many too many as were dropped."""
    if positions is None:
        return length
    row = known.anchor * positions.shape[-2] // len(known.valid)
    lane = positions[-1] if positions.ndim == 3 else positions
    fresh = int(lane[row, -1]) + 1 - known.anchor_position - (past - known.kept)
    if fresh not in (length, length - known.dropped) or fresh < 1:
        raise ValueError(
            f"visual_token_pruning: the cache holds {past} of {past + known.dropped} tokens, but the {length} given "
            f"now end at the position of {past + known.dropped + fresh}; pass positions and a 2-D attention mask "
            f"over the full prompt ({past + known.dropped + length} columns), as generate() does"
        )
    return fresh


def _anchored(where: Layout, visual: torch.Tensor, positions: torch.Tensor | None) -> Layout:
    """`where` with the position that follows the head, in a row where an image ends it."""
    row = int(visual[:, where.full - 1].nonzero()[0])
    if positions is None:
        return dataclasses.replace(where, anchor=row, anchor_position=int(where.real[row]))
    lanes = positions[-3:, min(row, positions.shape[1] - 1)] if positions.ndim == 3 else positions[row]
    return dataclasses.replace(where, anchor=row, anchor_position=int(lanes[..., : where.full].max()) + 1)


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _real(mask: torch.Tensor | None, embeds: torch.Tensor) -> torch.Tensor:
    """bool [B, L], False on padding, from no mask, a 2-D mask or the causal 4-D mask of a static cache."""
    rows, length = embeds.shape[:2]
    if mask is None:
        return torch.ones(rows, length, dtype=torch.bool, device=embeds.device)
    if mask.ndim == 2:
        return mask.to(embeds.device, torch.bool)
    allowed = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0, :, :length].expand(rows, -1, -1)
    real = allowed[:, -1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    if not torch.equal(allowed & real[:, :, None], causal & real[:, None] & real[:, :, None]):
        raise ValueError(
            "visual_token_pruning understands padding masks [B, L] and the causal 4-D mask that generate() makes "
            "of them, not another 4-D attention mask; pass the 2-D mask"
        )
    return real


def _positions(positions: torch.Tensor | None, where: Layout, mask: torch.Tensor) -> torch.Tensor | None:
    """Rotary ids of the survivors, unchanged; the text row of four counts slots, as masks expect."""
    if positions is None:
        return None
    lanes = positions if positions.ndim == 3 else positions[None].expand(3, -1, -1)
    lanes = lanes.expand(-1, len(where.columns), -1)
    kept = torch.stack([where.gather(lane) for lane in lanes])
    if len(kept) == 4:
        kept[0] = mask.cumsum(1) - 1
    return kept.masked_fill(mask == 0, 0)


def _with_hidden(outputs: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(outputs, tuple):
        return (change(outputs[0]), *outputs[1:])
    outputs.last_hidden_state = change(outputs.last_hidden_state)
    return outputs
